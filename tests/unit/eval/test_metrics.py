"""Scores against hand-computed values and against the plainest code that computes them."""

import math
import random
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.errors import ConfigError
from phi3v.eval.metrics import METRICS, Score, accuracy, anls, bootstrap, exact_match, levenshtein, score_predictions


def plain_levenshtein(left: str, right: str) -> int:
    """The definition."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        substituted = distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, substituted)

    return distance(len(left), len(right))


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_levenshtein_equals_its_definition(left: str, right: str) -> None:
    assert levenshtein(left, right) == plain_levenshtein(left, right)


def test_levenshtein_equals_its_definition_beyond_a_machine_word_and_ascii() -> None:
    generator = random.Random(0)
    for _ in range(20):
        left, right = ("".join(generator.choices("aébß😀 ", k=generator.randrange(60, 140))) for _ in range(2))
        assert levenshtein(left, right) == plain_levenshtein(left, right)


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_levenshtein_by_hand(left: str, right: str, distance: int) -> None:
    assert levenshtein(left, right) == distance


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("BandMarching", ["BandMarching"], 1),
        (" bandmarching.\n", ["BandMarching"], 1),
        ("Yes !", ["yes"], 1),
        ("two  words", ["Two words"], 1),
        ("STRASSE", ["straße"], 1),
        ("b", ["a", "b"], 1),
        ("True", ["False"], 0),
        ("C", ["C++"], 0),
        ("5", ["5%"], 0),
        ("3.5", ["35"], 0),
        ("", ["?"], 0),
        ("!", ["?"], 0),
        ("?", ["?"], 1),
        ("", [""], 1),
    ],
)
def test_accuracy_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert accuracy(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [(" Yes\n", ["Yes"], 1), ("yes", ["Yes"], 0), ("Yes.", ["Yes"], 0), ("b", ["a", "b"], 1), ("a  b", ["a b"], 0)],
)
def test_exact_match_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("ITC Limited", ["ITC Limited"], 1),
        ("  itc LIMITED ", ["ITC Limited"], 1),
        ("abcd", ["abcx"], 0.75),
        ("abcd", ["abxx"], 0),  # NL is exactly the threshold
        ("abcde", ["abcxx"], 0.6),  # NL 0.4
        ("abc", ["abcdef"], 0),  # half of the longer one is missing
        ("abcd", ["abcdef"], 1 - 2 / 6),
        ("abcd", ["zzzz", "abcx", "abxx"], 0.75),  # the best answer counts
        ("", ["abc"], 0),
        ("", [""], 1),
    ],
)
def test_anls_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score, abs=1e-12)


@given(st.text("ab ", max_size=10), st.lists(st.text("abAB ", max_size=10), min_size=1, max_size=3))
def test_anls_equals_its_definition(prediction: str, answers: list[str]) -> None:
    def similarity(left: str, right: str) -> float:
        nl = plain_levenshtein(left, right) / max(len(left), len(right), 1)
        return 1 - nl if nl < 0.5 else 0.0

    expected = max(similarity(prediction.strip().lower(), answer.strip().lower()) for answer in answers)
    assert anls(prediction, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_question_without_answers_is_refused(metric: str) -> None:
    with pytest.raises(ValueError, match="without an accepted answer"):
        METRICS[metric]("a", [])


def test_bootstrap_equals_three_plain_lines() -> None:
    values = [1.0, 0.0, 0.5, 0.8, 0.0, 1.0, 0.9]
    picks = np.random.default_rng(3).integers(0, len(values), size=(500, len(values)))
    means = [sum(values[pick] for pick in row) / len(values) for row in picks]
    expected = (np.quantile(means, 0.05), np.quantile(means, 0.95))
    assert bootstrap(values, seed=3, resamples=500, confidence=0.9) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_agrees_with_the_normal_interval_on_many_values() -> None:
    n, share = 4000, 0.8
    values = [1.0] * int(n * share) + [0.0] * int(n * (1 - share))
    low, high = bootstrap(values, seed=0)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(share * (1 - share) / n)
    # 2,000 resamples place an interval's end within about a twentieth of its half width.
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.1 * half)


def test_bootstrap_depends_on_its_seed_alone() -> None:
    values = list(np.random.default_rng(0).random(30))
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_bootstrap_in_blocks_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0] * 20
    monkeypatch.setattr("phi3v.eval.metrics.BOOTSTRAP_BLOCK", 7 * len(values))
    low, high = bootstrap(values, seed=0)
    assert 0.3 < low < 0.42
    assert 0.58 < high < 0.7


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [0.4]])
def test_too_few_values_leave_the_whole_range_open(values: list[float]) -> None:
    assert bootstrap(values, seed=0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "arguments"),
    [([float("nan"), 0.5], {}), ([1.5, 0.5], {}), ([-0.1], {}), ([0.5] * 3, {"resamples": 0})]
    + [([0.5] * 3, {"confidence": confidence}) for confidence in (0, 1, 95)],
)
def test_bootstrap_refuses_what_is_no_score(values: list[float], arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1|at least 1|between 0 and 1"):
        bootstrap(values, seed=0, **arguments)


def test_score_predictions_gives_mean_interval_and_items() -> None:
    score, items = score_predictions("accuracy", ["a", "b", "x", "D"], [["a"], ["b"], ["c"], ["d"]], seed=5)
    assert items == [1.0, 1.0, 0.0, 1.0]
    low, high = bootstrap(items, seed=5)
    assert score == Score("accuracy", 0.75, low, high, 0.95, 4)


def test_no_predictions_have_no_score() -> None:
    score, items = score_predictions("anls", [], [], seed=0)
    assert math.isnan(score.score)
    assert (score.low, score.high, score.n, items) == (0.0, 1.0, 0, [])


def test_an_unknown_metric_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'acuracy'; did you mean accuracy"):
        score_predictions("acuracy", [], [], seed=0)


def test_predictions_and_answers_must_match_in_number() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        score_predictions("anls", ["a", "b"], [["a"]], seed=0)
