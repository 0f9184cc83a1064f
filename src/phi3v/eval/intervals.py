"""How sure a score is: bootstrap intervals of means and of whole sets of statistics. No torch."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
"""Draws of as many questions with replacement; a 95 % interval's ends then lie 50 draws from the extremes."""

CONFIDENCE = 0.95
"""Coverage of the intervals, 0 to 1."""

BOOTSTRAP_BLOCK = 1_000_000
"""Values drawn at a time: bounds the memory of a bootstrap over many questions (8 bytes each)."""


def bootstrap(
    values: Sequence[float], *, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, each from 0 to 1.

    Fewer than two values say nothing about their spread: the interval is then the whole range, (0, 1). When all
    values are equal the interval has no width, however few there are: resampling cannot invent a value never seen.
    Questions count as independent; several about one image are less so, and the true interval is wider.

    Args:
        values: one score a question.
        seed: the same seed gives the same interval.
        resamples: draws of ``len(values)`` values with replacement.
        confidence: coverage of the interval, between 0 and 1.

    Raises:
        ValueError: a value outside 0..1 or not finite, ``resamples`` below 1, ``confidence`` not within 0..1.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not np.all((scores >= 0) & (scores <= 1)):
        raise ValueError("a score lies outside 0..1 or is not a number")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, must lie between 0 and 1")
    if scores.size < 2:
        return 0.0, 1.0
    generator = np.random.default_rng(seed)
    rows_at_a_time = max(1, BOOTSTRAP_BLOCK // scores.size)
    means = np.empty(resamples)
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        picks = generator.integers(0, scores.size, size=(rows, scores.size))
        means[start : start + rows] = scores[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_statistics(
    statistics: Callable[[np.ndarray], np.ndarray], num_questions: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of several statistics, each from 0 to 1, over the same resamples.

    A statistic that a resample leaves undefined (NaN: the recall of a class that was not drawn) is left out of that
    resample. As in ``bootstrap``, fewer than two questions leave the whole range open.

    Args:
        statistics: the indices of the questions drawn, (num_questions,) int64, to the statistics' values,
            (num_statistics,) float64.
        num_questions: questions to draw from.
        seed: the same seed gives the same intervals.

    Returns:
        Lower and upper ends, (num_statistics,) float64 each; NaN where no resample defines the statistic.
    """
    if num_questions < 2:
        whole = np.ones_like(statistics(np.arange(num_questions)))
        return 0 * whole, whole
    generator = np.random.default_rng(seed)
    drawn = np.stack(
        [statistics(generator.integers(0, num_questions, size=num_questions)) for _ in range(RESAMPLES)], axis=1
    )
    tail = (1 - CONFIDENCE) / 2
    ends = np.full((len(drawn), 2), np.nan)
    for row, values in enumerate(drawn):
        defined = values[~np.isnan(values)]
        if defined.size:
            ends[row] = np.quantile(defined, [tail, 1 - tail])
    return ends[:, 0], ends[:, 1]
