"""Scores by class against scikit-learn, and against plain loops where it has nothing to compare with."""

import math
import random
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from phi3v.eval import classes, intervals
from phi3v.eval.classes import ClosedQuestion, ClosedReport, auroc, closed_report, find_label

WORDS = ("red", "green", "blue", "black")
OTHER = "other"


def answered(num: int, labels: tuple[str, ...], seed: int = 0, num_levels: int = 1000) -> list[ClosedQuestion]:
    """Questions of random answers, a tenth outside the set; ``num_levels`` few makes ties among probabilities."""
    dice = random.Random(seed)
    questions = []
    for _ in range(num):
        weights = [dice.randint(1, num_levels) for _ in labels]
        probabilities = tuple(weight / sum(weights) for weight in weights)
        predicted = None if dice.random() < 0.1 else dice.choice(labels)
        questions.append(ClosedQuestion(labels, dice.choice(labels), predicted, probabilities))
    return questions


def report(questions: list[ClosedQuestion]) -> ClosedReport:
    found = closed_report(questions, seed=0)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", "Yes"),
        (" yes.\n", "Yes"),
        ("no!", "No"),
        ("nope", None),
        ("", None),
        ("c", "c"),
        ("C.", "C"),
        ("C", "C"),
    ],
)
def test_an_answer_names_its_label_as_accuracy_would_accept_it(text: str, label: str | None) -> None:
    """The label itself comes before one that differs from it in case."""
    assert find_label(text, ("Yes", "No", "C", "c")) == label


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("num_labels", [2, 4])
def test_by_class_and_macro_as_scikit_learn(num_labels: int) -> None:
    labels = WORDS[:num_labels]
    questions = answered(200, labels)
    (group,) = report(questions).groups
    expected = [question.expected for question in questions]
    predicted = [question.predicted or OTHER for question in questions]
    table: Any = precision_recall_fscore_support(expected, predicted, labels=labels)
    for index, scores in enumerate(group.classes):
        found = (scores.precision.value, scores.recall.value, scores.f1.value, scores.support)
        assert found == pytest.approx(tuple(column[index] for column in table))
        assert scores.predicted == predicted.count(scores.label)
        for estimate in (scores.precision, scores.recall, scores.f1):
            assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    assert group.macro_f1.value == pytest.approx(f1_score(expected, predicted, labels=labels, average="macro"))
    assert group.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(expected, predicted))
    reference = confusion_matrix(expected, predicted, labels=[*labels, OTHER])[:num_labels]
    assert group.confusion == reference.tolist()
    assert (group.n, group.other) == (200, predicted.count(OTHER))


def test_labels_that_do_not_occur_leave_the_means_alone() -> None:
    """``blue`` is never right but answered, ``black`` is neither; scikit-learn says the same of undefined values."""
    pairs = [("red", "red"), ("red", "green"), ("green", "green"), ("green", "blue"), ("green", None)]
    (group,) = report([ClosedQuestion(WORDS, expected, predicted) for expected, predicted in pairs]).groups
    expected, predicted = [pair[0] for pair in pairs], [pair[1] or OTHER for pair in pairs]
    reference = f1_score(expected, predicted, labels=WORDS, average="macro", zero_division=np.nan)
    assert group.macro_f1.value == pytest.approx(reference) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert group.balanced_accuracy.value == pytest.approx((1 / 2 + 1 / 3) / 2)
    blue, black = group.classes[2:]
    assert (blue.precision.value, blue.f1.value) == (0, 0) and math.isnan(blue.recall.value)
    assert math.isnan(black.precision.value) and math.isnan(black.f1.value) and math.isnan(black.f1.low)


@pytest.mark.parametrize("num_levels", [2, 5, 1000])
def test_auroc_as_scikit_learn_with_and_without_ties(num_levels: int) -> None:
    questions = answered(80, ("No", "Yes"), seed=num_levels, num_levels=num_levels)
    (group,) = report(questions).groups
    is_first = [question.expected == "No" for question in questions]
    scores = [question.probabilities[0] for question in questions if question.probabilities is not None]
    reference = roc_auc_score(is_first, scores)
    assert auroc(scores, is_first) == pytest.approx(reference)
    assert group.auroc is not None and group.auroc.value == pytest.approx(reference)
    assert group.auroc.low < reference < group.auroc.high


def test_the_interval_of_auroc_is_the_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain way: draw questions, ask scikit-learn."""
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    questions = answered(40, ("No", "Yes"), num_levels=4)
    is_first = np.array([question.expected == "No" for question in questions])
    scores = np.array([question.probabilities[0] for question in questions if question.probabilities is not None])
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, 40, size=40) for _ in range(200)]
    values = [roc_auc_score(is_first[picks], scores[picks]) for picks in drawn]
    (group,) = report(questions).groups
    assert group.auroc is not None
    assert [group.auroc.low, group.auroc.high] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist())


def test_the_first_label_is_the_positive_one_and_one_class_alone_has_no_auroc() -> None:
    sure = ClosedQuestion(("Yes", "No"), "Yes", "Yes", (0.9, 0.1))
    unsure = ClosedQuestion(("Yes", "No"), "No", "Yes", (0.6, 0.4))
    (group,) = report([sure, unsure]).groups
    assert group.auroc is not None and group.auroc.value == 1
    (group,) = report([sure, sure]).groups
    assert group.auroc is not None and math.isnan(group.auroc.value) and math.isnan(group.auroc.low)
    (group,) = report([sure, ClosedQuestion(("Yes", "No"), "No", "No")]).groups
    assert group.auroc is None, "a question without probabilities"


@pytest.mark.parametrize("labels", [("No", "Yes"), tuple(sorted(WORDS))])
def test_calibration_as_a_plain_loop_and_scikit_learn(labels: tuple[str, ...]) -> None:
    questions = answered(300, labels, num_levels=6)
    found = report(questions).calibration
    assert found is not None
    tops = [max(question.probabilities or ()) for question in questions]
    hits = [
        question.labels[(question.probabilities or ()).index(top)] == question.expected
        for question, top in zip(questions, tops, strict=True)
    ]
    error = 0.0
    for index in range(15):
        members = [k for k, top in enumerate(tops) if index / 15 < top <= (index + 1) / 15]
        error += abs(sum(hits[k] - tops[k] for k in members)) / len(tops)
        of_bin = [one for one in found.bins if one.low == index / 15]
        assert len(members) == sum(one.n for one in of_bin)
    assert found.error.value == pytest.approx(error)
    assert (found.accuracy, found.confidence) == pytest.approx((sum(hits) / 300, sum(tops) / 300))
    expected = [question.expected for question in questions]
    probabilities: Any = [question.probabilities for question in questions]
    reference = brier_score_loss(expected, probabilities, labels=labels, scale_by_half=True)
    assert found.brier.value == pytest.approx(reference)
    assert found.brier.low < found.brier.value < found.brier.high


def test_certainty_has_a_bin() -> None:
    found = report([ClosedQuestion(("a", "b"), "a", "a", (1.0, 0.0))] * 3).calibration
    assert found is not None and found.error.value == 0 and found.brier.value == 0
    assert [(one.n, one.confidence, one.accuracy) for one in found.bins] == [(3, 1.0, 1.0)]


def test_sets_are_told_apart_by_what_they_hold() -> None:
    """The order of the labels does not matter: the first question's counts, for the probabilities too."""
    turned = ClosedQuestion(("No", "Yes"), "No", "No", (0.8, 0.2))
    straight = ClosedQuestion(("Yes", "No"), "Yes", "Yes", (0.7, 0.3))
    found = report([straight, turned, *answered(3, WORDS)])
    assert (found.label_sets, [group.n for group in found.groups]) == (2, [3, 2])
    yes_no = found.groups[1]
    assert yes_no.labels == ("Yes", "No")
    assert yes_no.confusion == [[1, 0, 0], [0, 1, 0]]
    assert yes_no.auroc is not None and yes_no.auroc.value == 1
    assert found.calibration is not None and found.calibration.n == 5


def test_many_sets_and_many_labels_are_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    own_options = [ClosedQuestion((f"a{k}", f"b{k}"), f"a{k}", None) for k in range(20)]
    found = report(own_options + answered(5, WORDS))
    assert (found.label_sets, len(found.groups), found.groups[0].n) == (21, classes.MOST_GROUPS, 5)
    monkeypatch.setattr(classes, "MOST_CONFUSION_LABELS", 3)
    assert report(answered(5, WORDS)).groups[0].confusion is None


def test_no_closed_question_has_no_report() -> None:
    assert closed_report([], seed=0) is None
