"""Scores of short answers, one a question, and their mean. No torch: reports and tests use it without a model."""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phi3v.errors import ConfigError
from phi3v.eval.intervals import CONFIDENCE, bootstrap
from phi3v.eval.normalisation import folded, number_in, squad_tokens, vqa_form

ANLS_THRESHOLD = 0.5
"""A normalised edit distance of this or more scores 0: such an answer is another one, not a misread one."""

VQA_MATCHES = 3
"""Annotators that must have given an answer for it to count fully."""

RELAXED_TOLERANCE = 0.05
"""Largest relative error of a number that ``relaxed_accuracy`` still counts as right."""


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

    Whatever the published recipes' own comparison (``strip``, then ``strip('.')``, then ``lower``, of both sides)
    accepts, this accepts too, but for answers that differ in full stops at their start (``.5`` is not ``5``).

    >>> accuracy(" Band  Marching.", ["BandMarching", "band marching"])
    1.0
    """
    _check_answers(answers)
    return float(folded(prediction) in {folded(answer) for answer in answers})


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers, character by character within the surrounding space, else 0."""
    _check_answers(answers)
    return float(prediction.strip() in {answer.strip() for answer in answers})


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question: the best over its answers.

    ``1 - NL`` with ``NL = edit distance / longer length`` of the lower-cased texts, any space between words counting as
    one; 0 when NL is ``ANLS_THRESHOLD`` or more.

    Source: Biten et al. 2019, Scene Text Visual Question Answering, section 4; DocVQA scores with it. Spaces as in the
    scoring code that is mostly used, which however divides by lengths taken before, and lets NL = 1/2 score 1/2.

    >>> anls("ITC Limted", ["ITC Limited", "ITC"])  # one letter of eleven is missing
    0.9090909090909091
    """
    _check_answers(answers)
    return max(_similarity(prediction, answer) for answer in answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's accuracy over several annotators' answers, which are given as often as they were written.

    Leaving out each annotator in turn, the prediction scores min(matches among the others / 3, 1); the result is the
    mean over the annotators. Where fewer than three others are left, all of them must match for a full score; a single
    answer is matched or not. Compared are the forms that ``vqa_form`` gives.

    Source: Antol et al. 2015, VQA; Goyal et al. 2017, VQA v2, and their published evaluation code for ten annotators.

    >>> vqa_accuracy("Two.", ["2"] * 3 + ["3"] * 7)  # for the three, two others match; for the seven, three do
    0.9
    """
    _check_answers(answers)
    form = vqa_form(prediction)
    matches = [vqa_form(answer) == form for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(VQA_MATCHES, len(matches) - 1)
    total = sum(matches)
    return math.fsum(min((total - own) / needed, 1.0) for own in matches) / len(matches)


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers, a number within five percent of it; else 0.

    Numbers may hold thousands separators; a percentage is its hundredth, so ``12%`` is 0.12 and not 12. Texts must be
    equal but for case and surrounding space. Where the answer is 0 any way of writing 0 is right (``0.0`` for ``0``),
    and nothing else.

    Source: Methani et al. 2020, PlotQA; Masry et al. 2022, ChartQA, section 5; percentages as in the evaluation code
    published with Pix2Struct.

    >>> relaxed_accuracy("1,040", ["1000"]), relaxed_accuracy("1060", ["1000"])
    (1.0, 0.0)
    """
    _check_answers(answers)
    return float(any(_is_close(prediction, answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 of the words that prediction and answer share: the best over the answers.

    Source: Rajpurkar et al. 2016, SQuAD, section 6.1; two answers without words are equal, as in SQuAD 2.

    >>> f1("the red car", ["a red bus"])
    0.5
    """
    _check_answers(answers)
    return max(_word_overlap(squad_tokens(prediction), squad_tokens(answer)) for answer in answers)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "anls": anls,
    "vqa_accuracy": vqa_accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "f1": f1,
}
"""Metric by name: a prediction and its accepted answers (at least one) to a score from 0 to 1."""


def metric_named(name: str) -> Callable[[str, Sequence[str]], float]:
    """Returns one of ``METRICS``.

    Raises:
        ConfigError: no metric of that name.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METRICS)}"
        raise ConfigError(f"there is no metric {name!r}; {hint}")
    return METRICS[name]


def score_predictions(
    metric: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    seed: int,
    confidence: float = CONFIDENCE,
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
    score_one = metric_named(metric)
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
    left, right = (" ".join(text.lower().split()) for text in (prediction, answer))
    longer = max(len(left), len(right))
    if longer == 0:
        return 1.0
    # The distance is at least the difference in length, which alone settles rambling predictions.
    if abs(len(left) - len(right)) / longer >= ANLS_THRESHOLD:
        return 0.0
    distance = levenshtein(left, right) / longer
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _is_close(prediction: str, answer: str) -> bool:
    """Compares two answers as ``relaxed_accuracy`` does."""
    predicted, expected = number_in(prediction), number_in(answer)
    if predicted is None or expected is None:
        return prediction.strip().lower() == answer.strip().lower()
    return abs(predicted - expected) <= RELAXED_TOLERANCE * abs(expected)


def _word_overlap(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Returns F1 of two bags of words, 0 to 1."""
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def _check_answers(answers: Sequence[str]) -> None:
    if not answers:
        raise ValueError("a question without an accepted answer cannot be scored")
