"""Questions whose answer is one of a closed set of labels: scores by class, ranking and calibration. No torch.

Classes are the labels; what the model says outside of them is *other*. Questions are taken together where they have the
same labels, in whatever order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from phi3v.eval.intervals import bootstrap_statistics
from phi3v.eval.normalisation import folded

NUM_BINS = 15
"""Bins of equal width that calibration sorts probabilities into. Source: Guo et al. 2017, section 2."""

MOST_GROUPS = 8
"""Label sets that are reported on, the most frequent first. Questions with options of their own have one each."""

MOST_CONFUSION_LABELS = 128
"""Labels up to which a confusion matrix is kept: 130 KB as JSON, in every line of ``eval.jsonl``."""


@dataclass(frozen=True, slots=True)
class ClosedQuestion:
    """One question with a closed set of labels, answered.

    Attributes:
        labels: the set; the first label of a set of two is the positive one.
        expected: the right label.
        predicted: the answer's label, or None for an answer outside the set.
        probabilities: of the labels, in their order, 0 to 1; None when they were not taken.
    """

    labels: tuple[str, ...]
    expected: str
    predicted: str | None
    probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its bootstrap interval, each 0 to 1; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ClassScores:
    """How one label fared.

    Attributes:
        label: the label.
        support: questions whose right answer it is.
        predicted: questions answered with it.
        precision: share of ``predicted`` that is right; undefined when it was never answered.
        recall: share of ``support`` that is answered right; undefined without support.
        f1: 2 x right / (support + predicted); undefined when both are 0.
    """

    label: str
    support: int
    predicted: int
    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True, slots=True)
class LabelSetReport:
    """How the questions with one set of labels fared.

    Attributes:
        labels: the set, in the order of the first question that has it.
        n: questions.
        other: questions answered outside the set.
        macro_f1: mean F1 over the labels that occur, as right answer or as prediction.
        balanced_accuracy: mean recall over the labels that occur as right answer.
        auroc: of a set of two with probabilities, the chance that a question whose answer is the first label gets a
            higher probability of it than another question does, ties counted half; else None.
        classes: one a label.
        confusion: (labels, labels + 1) counts: a row a right answer, a column a prediction, *other* last; None for
            more than ``MOST_CONFUSION_LABELS`` labels.
    """

    labels: tuple[str, ...]
    n: int
    other: int
    macro_f1: Estimate
    balanced_accuracy: Estimate
    auroc: Estimate | None
    classes: tuple[ClassScores, ...]
    confusion: list[list[int]] | None


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Questions whose highest probability lies above ``low`` and up to ``high``.

    Attributes:
        low: lower edge, 0 to 1.
        high: upper edge, 0 to 1.
        n: questions.
        confidence: their mean highest probability.
        accuracy: share of them whose likeliest label is right.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether probabilities mean what they say, over all questions that have them.

    Attributes:
        n: questions.
        accuracy: share whose likeliest label is right; the first of equally likely ones counts.
        confidence: mean highest probability.
        error: expected calibration error: mean over ``NUM_BINS`` bins of |accuracy - confidence|, weighted by size.
        brier: mean over the questions of half the squared distance between probabilities and truth: 0 at best, 1 at
            worst; with two labels the mean of (probability of the positive - truth) squared.
        bins: those that hold a question.
    """

    n: int
    accuracy: float
    confidence: float
    error: Estimate
    brier: Estimate
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True)
class ClosedReport:
    """How the questions with labels fared.

    Attributes:
        label_sets: different sets of labels there are.
        groups: the most frequent of them, at most ``MOST_GROUPS``.
        calibration: over the questions of all sets; None when no probabilities were taken.
    """

    label_sets: int
    groups: tuple[LabelSetReport, ...]
    calibration: Calibration | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values, as ``eval.json`` holds it."""
        return asdict(self)


def find_label(text: str, labels: tuple[str, ...]) -> str | None:
    """Returns the label that an answer names, or None.

    It is the label that equals the answer, or else the first that ``accuracy`` accepts the answer for.

    >>> find_label("yes.", ("Yes", "No"))
    'Yes'
    """
    exact, by_form = _lookups(labels)
    return exact.get(text.strip()) or by_form.get(folded(text))


@lru_cache(maxsize=1024)
def _lookups(labels: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Maps stripped and folded labels to labels, the first of equals winning."""
    backwards = labels[::-1]
    return {label.strip(): label for label in backwards}, {folded(label): label for label in backwards}


def closed_report(questions: Sequence[ClosedQuestion], *, seed: int) -> ClosedReport | None:
    """Scores answered questions by class, with bootstrap intervals; None when there are no questions.

    Args:
        questions: those with labels.
        seed: of the bootstrap.
    """
    if not questions:
        return None
    groups: dict[frozenset[str], list[ClosedQuestion]] = {}
    for question in questions:
        groups.setdefault(frozenset(question.labels), []).append(question)
    by_size = sorted(groups.values(), key=len, reverse=True)
    return ClosedReport(
        label_sets=len(groups),
        groups=tuple(_label_set_report(group, seed) for group in by_size[:MOST_GROUPS]),
        calibration=_calibration(questions, seed),
    )


def auroc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Area under the receiver operating characteristic: how often a positive scores above a negative, ties half.

    Returns NaN without a positive or without a negative.

    Source: Mann and Whitney 1947; Hanley and McNeil 1982.

    >>> auroc([0.9, 0.4, 0.4], [True, True, False])
    0.75
    """
    levels, positive = _levels(scores), np.asarray(is_positive, dtype=bool)
    return _auroc_of_counts(np.bincount(levels[positive], minlength=1), np.bincount(levels[~positive], minlength=1))


def _levels(scores: Sequence[float]) -> np.ndarray:
    """Numbers the different scores from the lowest up: (n,) int64, equal for equal scores."""
    return np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)[1]


def _auroc_of_counts(positives: np.ndarray, negatives: np.ndarray) -> float:
    """AUROC from how many positives and negatives have each score, lowest first."""
    size = max(len(positives), len(negatives))
    positives, negatives = (np.pad(counts, (0, size - len(counts))) for counts in (positives, negatives))
    num_pairs = positives.sum() * negatives.sum()
    below = negatives.cumsum() - negatives
    return float((positives * (below + negatives / 2)).sum() / num_pairs) if num_pairs else math.nan


def _label_set_report(questions: Sequence[ClosedQuestion], seed: int) -> LabelSetReport:
    """Reports on questions with the same labels."""
    labels = questions[0].labels
    place = {label: index for index, label in enumerate(labels)}
    num_labels = len(labels)
    expected = np.array([place[question.expected] for question in questions])
    predicted = np.array(
        [num_labels if question.predicted is None else place[question.predicted] for question in questions]
    )
    ranks = _positive_levels(questions) if num_labels == 2 else None

    def statistics(picks: np.ndarray) -> np.ndarray:
        by_class = _class_statistics(expected[picks], predicted[picks], num_labels)
        _, recalls, f1s = by_class
        overall = [_mean_of_defined(f1s), _mean_of_defined(recalls)]
        if ranks is not None:
            is_positive = expected[picks] == 0
            overall.append(
                _auroc_of_counts(np.bincount(ranks[picks][is_positive]), np.bincount(ranks[picks][~is_positive]))
            )
        return np.concatenate([overall, by_class.ravel()])

    estimates = _estimates(statistics, len(questions), seed)
    num_overall = 2 if ranks is None else 3
    precisions, recalls, f1s = (
        estimates[num_overall + kind * num_labels : num_overall + (kind + 1) * num_labels] for kind in range(3)
    )
    confusion = np.zeros((num_labels, num_labels + 1), dtype=np.int64)
    np.add.at(confusion, (expected, predicted), 1)
    support, answered = confusion.sum(axis=1), confusion.sum(axis=0)
    return LabelSetReport(
        labels=labels,
        n=len(questions),
        other=int(answered[-1]),
        macro_f1=estimates[0],
        balanced_accuracy=estimates[1],
        auroc=None if ranks is None else estimates[2],
        classes=tuple(
            ClassScores(label, int(support[k]), int(answered[k]), precisions[k], recalls[k], f1s[k])
            for k, label in enumerate(labels)
        ),
        confusion=confusion.tolist() if num_labels <= MOST_CONFUSION_LABELS else None,
    )


def _positive_levels(questions: Sequence[ClosedQuestion]) -> np.ndarray | None:
    """Ranks questions by the probability of their set's first label; None unless all have probabilities."""
    positive = questions[0].labels[0]
    scores = []
    for question in questions:
        if question.probabilities is None:
            return None
        scores.append(question.probabilities[question.labels.index(positive)])
    return _levels(scores)


def _class_statistics(expected: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Returns precision, recall and F1 of every label, (3, num_labels) float64; NaN where undefined."""
    right = np.bincount(expected[expected == predicted], minlength=num_labels)
    support = np.bincount(expected, minlength=num_labels)
    answered = np.bincount(predicted, minlength=num_labels)[:num_labels]
    with np.errstate(invalid="ignore"):
        return np.stack([right / answered, right / support, 2 * right / (support + answered)])


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _calibration(questions: Sequence[ClosedQuestion], seed: int) -> Calibration | None:
    """Measures the calibration of the questions that have probabilities; None when none has."""
    confidences, hits, distances = [], [], []
    for question in questions:
        if question.probabilities is None:
            continue
        probabilities = np.asarray(question.probabilities, dtype=np.float64)
        truth = np.asarray([label == question.expected for label in question.labels])
        confidences.append(probabilities.max())
        hits.append(truth[probabilities.argmax()])
        distances.append(((probabilities - truth) ** 2).sum() / 2)
    if not confidences:
        return None
    confidence, hit, distance = (np.asarray(values, dtype=np.float64) for values in (confidences, hits, distances))
    # Bins hold their upper edge, so that a probability of 1 has one.
    bins = np.clip(np.ceil(confidence * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(np.int64)

    def statistics(picks: np.ndarray) -> np.ndarray:
        gaps = np.bincount(bins[picks], weights=hit[picks] - confidence[picks], minlength=NUM_BINS)
        return np.array([np.abs(gaps).sum() / len(picks), distance[picks].mean()])

    error, brier = _estimates(statistics, len(confidence), seed)
    return Calibration(
        n=len(confidence),
        accuracy=float(hit.mean()),
        confidence=float(confidence.mean()),
        error=error,
        brier=brier,
        bins=tuple(
            CalibrationBin(
                low=index / NUM_BINS,
                high=(index + 1) / NUM_BINS,
                n=int((bins == index).sum()),
                confidence=float(confidence[bins == index].mean()),
                accuracy=float(hit[bins == index].mean()),
            )
            for index in np.unique(bins).tolist()
        ),
    )


def _estimates(statistics: Callable[[np.ndarray], np.ndarray], num_questions: int, seed: int) -> list[Estimate]:
    """Returns each statistic of all questions with its interval."""
    values = statistics(np.arange(num_questions))
    lows, highs = bootstrap_statistics(statistics, num_questions, seed=seed)
    return [Estimate(*map(float, ends)) for ends in zip(values, lows, highs, strict=True)]
