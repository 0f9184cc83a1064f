"""Scores against hand-computed values and against the plainest code that computes them."""

import math
import random
import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.errors import ConfigError
from phi3v.eval.intervals import bootstrap
from phi3v.eval.metrics import (
    METRICS,
    Score,
    accuracy,
    anls,
    exact_match,
    f1,
    levenshtein,
    relaxed_accuracy,
    score_predictions,
    vqa_accuracy,
)
from phi3v.eval.normalisation import vqa_form


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
        ("Total\n 12", ["total 12"], 1),  # any space counts as one
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


@given(st.text("ab \n", max_size=10), st.lists(st.text("abAB \t", max_size=10), min_size=1, max_size=3))
def test_anls_equals_its_definition(prediction: str, answers: list[str]) -> None:
    def similarity(left: str, right: str) -> float:
        nl = plain_levenshtein(left, right) / max(len(left), len(right), 1)
        return 1 - nl if nl < 0.5 else 0.0

    def one_spaced(text: str) -> str:
        return re.sub(r"\s+", " ", text.strip().lower())

    expected = max(similarity(one_spaced(prediction), one_spaced(answer)) for answer in answers)
    assert anls(prediction, answers) == pytest.approx(expected, abs=1e-12)


@given(st.text("ab .\n", max_size=8), st.text("AB .", max_size=8))
def test_accuracy_accepts_what_the_published_recipes_accept(prediction: str, answer: str) -> None:
    """But for full stops at the start, which theirs takes off too."""

    def published(text: str) -> str:
        return text.strip().strip(".").lower()

    starts_with_a_stop = prediction.strip().startswith(".") or answer.strip().startswith(".")
    if not starts_with_a_stop and published(prediction) == published(answer):
        assert accuracy(prediction, [answer]) == 1
    assert (published(".5"), accuracy(".5", ["5"])) == ("5", 0)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Dog.", "dog"),
        ("a man, an apple and the sea", "man apple and sea"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("twenty", "twenty"),
        ("dont know", "don't know"),
        ("shouldnt've", "shouldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("red-ish 1,000", "redish 1000"),  # a comma between digits: every mark goes without a space
        ("3.5", "3.5"),
        ("3. base", "3 base"),
        ("u.s.a.", "usa"),
        ("what's\nthat\t?", "what's that"),
        ("50%", "50%"),
    ],
)
def test_the_form_that_vqa_compares(text: str, form: str) -> None:
    assert vqa_form(text) == form


@given(st.lists(st.sampled_from(["a b", "b", "c"]), min_size=4, max_size=12), st.sampled_from(["A B.", "b", "d"]))
def test_vqa_accuracy_equals_its_definition(answers: list[str], prediction: str) -> None:
    """Leave out one annotator after the other; ``a b`` is ``b`` without its article."""
    scores = []
    for left_out in range(len(answers)):
        others = [vqa_form(answer) for index, answer in enumerate(answers) if index != left_out]
        scores.append(min(others.count(vqa_form(prediction)) / 3, 1))
    assert vqa_accuracy(prediction, answers) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["yes"] * 10, 1),
        (["yes"] * 4 + ["no"] * 6, 1),
        (["yes"] * 3 + ["no"] * 7, 0.9),
        (["yes"] * 2 + ["no"] * 8, 0.6),
        (["yes"] * 1 + ["no"] * 9, 0.3),
        (["no"] * 10, 0),
        (["yes"], 1),
        (["no"], 0),
        (["yes", "yes"], 1),
        (["yes", "no"], 0.5),
        (["yes", "yes", "no"], 2 / 3),
        (["yes", "yes", "yes"], 1),
    ],
)
def test_vqa_accuracy_by_hand(answers: list[str], score: float) -> None:
    assert vqa_accuracy("Yes.", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("105", ["100"], 1),
        ("95", ["100"], 1),
        ("105.1", ["100"], 0),
        ("-105", ["-100"], 1),
        ("-100", ["100"], 0),
        ("1,040", ["1000"], 1),
        ("1040", ["1,000"], 1),
        ("1,04", ["104"], 0),  # no thousands: a text, and another one
        ("12%", ["12.4 %"], 1),
        ("0.12", ["12%"], 1),
        ("12", ["12%"], 0),
        (".5", ["0.5"], 1),
        ("0.00", ["0"], 1),
        ("0.01", ["0"], 0),
        ("2010", ["2100"], 1),  # the published metric does not know a year from a quantity
        (" Blue\n", ["blue"], 1),
        ("Blues", ["blue"], 0),
        ("nan", ["NaN"], 1),
        ("inf", ["1"], 0),
        ("7", ["yes", "7.2"], 1),
    ],
)
def test_relaxed_accuracy_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert relaxed_accuracy(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the red car", ["a red bus"], 0.5),
        ("Denver Broncos", ["The Denver Broncos!"], 1),
        ("in the city of Paris", ["Paris"], 2 * 1 / (4 + 1)),
        ("Paris Paris", ["Paris"], 2 * 1 / (2 + 1)),  # a word counts as often as both have it
        ("Paris", ["London", "Paris, France"], 2 / 3),  # the best answer counts
        ("", ["Paris"], 0),
        ("the", ["a"], 1),  # nothing but articles on both sides
    ],
)
def test_f1_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert f1(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS)
def test_a_question_without_answers_is_refused(metric: str) -> None:
    with pytest.raises(ValueError, match="without an accepted answer"):
        METRICS[metric]("a", [])


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
