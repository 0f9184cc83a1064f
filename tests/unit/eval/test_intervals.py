"""Bootstrap intervals against the plainest code that computes them, and against the normal distribution."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from phi3v.eval.intervals import RESAMPLES, bootstrap, bootstrap_statistics


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
    monkeypatch.setattr("phi3v.eval.intervals.BOOTSTRAP_BLOCK", 7 * len(values))
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


def test_statistics_share_their_resamples() -> None:
    values = np.random.default_rng(1).random((2, 30))
    lows, highs = bootstrap_statistics(lambda picks: values[:, picks].mean(axis=1), 30, seed=3)
    generator = np.random.default_rng(3)
    means = [values[:, generator.integers(0, 30, size=30)].mean(axis=1) for _ in range(RESAMPLES)]
    expected = np.quantile(np.stack(means), [0.025, 0.975], axis=0)
    np.testing.assert_allclose([lows, highs], expected)


def test_undefined_values_are_left_out_of_the_resample() -> None:
    """The first statistic is defined where question 0 was drawn, the second never."""
    lows, highs = bootstrap_statistics(lambda picks: np.array([0.25 if 0 in picks else np.nan, np.nan]), 5, seed=0)
    assert (lows[0], highs[0]) == (0.25, 0.25)
    assert np.isnan([lows[1], highs[1]]).all()


def test_one_question_leaves_the_whole_range_open() -> None:
    lows, highs = bootstrap_statistics(lambda picks: np.array([0.5, 1.0]), 1, seed=0)
    assert (lows.tolist(), highs.tolist()) == ([0, 0], [1, 1])
