"""Scores of short answers, and how sure a mean score is. No torch: reports and tests use it without a model."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from phi3v.errors import ConfigError

ANLS_THRESHOLD = 0.5
"""A normalised edit distance of this or more scores 0: such an answer is another one, not a misread one."""

SENTENCE_PUNCTUATION = ".,;:!?\u2026\u3002\uff0c\uff1b\uff1a\uff01\uff1f"
"""Marks that ``accuracy`` ignores at an answer's end. Others stay: ``C`` is not ``C++`` and ``5`` is not ``5%``."""

BOOTSTRAP_BLOCK = 1_000_000
"""Values drawn at a time: bounds the memory of a bootstrap over many questions (8 bytes each)."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over questions, with its bootstrap interval.

    Attributes:
        metric: a key of ``METRICS``.
        score: mean over the questions, 0 to 1; NaN when there are none.
        low: lower end of the interval, 0 to 1.
        high: upper end of the interval, 0 to 1.
        confidence: the interval's coverage, 0 to 1.
        n: number of questions.
    """

    metric: str
    score: float
    low: float
    high: float
    confidence: float
    n: int


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers but for case, spacing and punctuation at its end, else 0.

    >>> accuracy(" Band  Marching.", ["BandMarching", "band marching"])
    1.0
    """
    _check_answers(answers)
    return float(_normalised(prediction) in {_normalised(answer) for answer in answers})


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers, character by character within the surrounding space, else 0."""
    _check_answers(answers)
    return float(prediction.strip() in {answer.strip() for answer in answers})


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question: the best over its answers.

    ``1 - NL`` with ``NL = edit distance / longer length`` of the lower-cased, stripped texts; 0 when NL is
    ``ANLS_THRESHOLD`` or more.

    Source: Biten et al. 2019, Scene Text Visual Question Answering, section 4; DocVQA scores with it.

    >>> anls("ITC Limted", ["ITC Limited", "ITC"])  # one letter of eleven is missing
    0.9090909090909091
    """
    _check_answers(answers)
    return max(_similarity(prediction, answer) for answer in answers)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "anls": anls,
}
"""Metric by name: a prediction and its accepted answers (at least one) to a score from 0 to 1."""


def bootstrap(
    values: Sequence[float], *, seed: int, resamples: int = 2000, confidence: float = 0.95
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


def score_predictions(
    metric: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    seed: int,
    confidence: float = 0.95,
) -> tuple[Score, list[float]]:
    """Scores every prediction against its accepted answers.

    Args:
        metric: a key of ``METRICS``.
        predictions: one text a question.
        answers: the accepted answers of each question, at least one each.
        seed: of the bootstrap.
        confidence: coverage of the interval, between 0 and 1.

    Returns:
        The mean with its interval, and the score of each question in order.

    Raises:
        ConfigError: no metric of that name.
        ValueError: not as many predictions as lists of answers, or a question without an answer.
    """
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METRICS)}"
        raise ConfigError(f"there is no metric {metric!r}; {hint}")
    score_one = METRICS[metric]
    values = [score_one(text, accepted) for text, accepted in zip(predictions, answers, strict=True)]
    low, high = bootstrap(values, seed=seed, confidence=confidence)
    mean = math.fsum(values) / len(values) if values else math.nan
    return Score(metric, mean, low, high, confidence, len(values)), values


def levenshtein(left: str, right: str) -> int:
    """Counts the insertions, deletions and substitutions of one character that turn ``left`` into ``right``.

    Bit ``i`` of each whole number below stands for the first ``i + 1`` characters of ``left``, so one column of the
    usual table costs a few operations, whatever its height.

    Source: Hyyro 2003, A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances, figure 2.

    >>> levenshtein("kitten", "sitting")
    3
    """
    if not left:
        return len(right)
    positions: dict[str, int] = {}
    for index, character in enumerate(left):
        positions[character] = positions.get(character, 0) | 1 << index
    every_bit = (1 << len(left)) - 1
    last_bit = 1 << len(left) - 1
    # Where the table grows (rises) or shrinks (falls) by one from a cell to the one below it.
    rises, falls = every_bit, 0
    distance = len(left)
    for character in right:
        matches = positions.get(character, 0)
        diagonal = (((matches & rises) + rises) ^ rises) | matches | falls
        rises_right = falls | ~(diagonal | rises)
        falls_right = diagonal & rises
        if rises_right & last_bit:
            distance += 1
        elif falls_right & last_bit:
            distance -= 1
        rises_right = rises_right << 1 | 1
        rises = (falls_right << 1 | ~(diagonal | rises_right)) & every_bit
        falls = diagonal & rises_right & every_bit
    return distance


def _similarity(prediction: str, answer: str) -> float:
    left, right = prediction.strip().lower(), answer.strip().lower()
    longer = max(len(left), len(right))
    if longer == 0:
        return 1.0
    # The distance is at least the difference in length, which alone settles rambling predictions.
    if abs(len(left) - len(right)) / longer >= ANLS_THRESHOLD:
        return 0.0
    distance = levenshtein(left, right) / longer
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _normalised(text: str) -> str:
    """Folds case, spacing and final punctuation; a text of punctuation alone keeps it, or any two would be equal."""
    folded = " ".join(text.split()).casefold()
    return folded.rstrip(SENTENCE_PUNCTUATION + " ") or folded


def _check_answers(answers: Sequence[str]) -> None:
    if not answers:
        raise ValueError("a question without an accepted answer cannot be scored")
