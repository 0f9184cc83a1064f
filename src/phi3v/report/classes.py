"""Scores by class of questions with closed sets of labels, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.report.values import Json, shortened, to_percent, to_text, to_whole

MOST_CLASSES = 40
"""Labels listed of a set, those with the most questions; the count of the rest is."""

MOST_CONFUSION_LABELS = 12
"""Labels up to which a confusion matrix is drawn: as many columns as stand side by side."""

UNDEFINED = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Measure:
    """A named value with its interval, as words; the interval may be empty."""

    name: str
    value: str
    interval: str


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One label: its counts, and precision, recall and F1."""

    label: str
    support: str
    predicted: str
    measures: tuple[Measure, ...]


@dataclass(frozen=True, slots=True)
class ConfusionCell:
    """How often a right answer got a prediction; ``share`` of the row's questions, 0 to 1, decides its shade."""

    count: str
    share: float
    is_right: bool


@dataclass(frozen=True, slots=True)
class ConfusionRow:
    """One right answer and what it was taken for."""

    label: str
    cells: tuple[ConfusionCell, ...]


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The questions with one set of labels."""

    title: str
    measures: tuple[Measure, ...]
    rows: tuple[ClassRow, ...]
    rows_left_out: int
    confusion_columns: tuple[str, ...]
    confusion: tuple[ConfusionRow, ...]


@dataclass(frozen=True, slots=True)
class ClassSection:
    """What the report says by class.

    Attributes:
        source: which evaluation it is of.
        label_sets: one table each.
        sets_left_out: further sets of labels that the evaluation did not report on.
        calibration: whether probabilities mean what they say; empty when none were taken.
    """

    source: str
    label_sets: tuple[LabelSet, ...]
    sets_left_out: int
    calibration: tuple[Measure, ...]


def class_section(evaluation: Json | None) -> ClassSection | None:
    """Lays out an evaluation's ``classes``; None when it holds none."""
    classes = _mapping(evaluation, "classes")
    groups = [_label_set(group) for group in _mappings(classes.get("groups"))]
    calibration = _calibration(_mapping(classes, "calibration"))
    if evaluation is None or not (groups or calibration):
        return None
    step = to_whole(evaluation.get("step"))
    return ClassSection(
        source="The result's answers" if step is None else f"The answers at step {step:,}",
        label_sets=tuple(groups),
        sets_left_out=max(0, (to_whole(classes.get("label_sets")) or 0) - len(groups)),
        calibration=calibration,
    )


def _label_set(group: Json) -> LabelSet:
    labels = _texts(group.get("labels"))
    questions, other = to_whole(group.get("n")), to_whole(group.get("other"))
    title = f"{len(labels):,} labels" + ("" if questions is None else f", {questions:,} questions")
    if other:
        title += f", {other:,} answered outside the labels"
    measures = [
        _measure("macro F1", group.get("macro_f1")),
        _measure("balanced accuracy", group.get("balanced_accuracy")),
    ]
    if isinstance(group.get("auroc"), Mapping):
        positive = shortened(labels[0]) if labels else ""
        measures.append(
            _measure(
                f"AUROC of \N{LEFT DOUBLE QUOTATION MARK}{positive}\N{RIGHT DOUBLE QUOTATION MARK}", group["auroc"]
            )
        )
    by_support = sorted(_mappings(group.get("classes")), key=lambda row: -(to_whole(row.get("support")) or 0))
    columns, confusion = _confusion(labels, group.get("confusion"))
    return LabelSet(
        title=title,
        measures=tuple(measures),
        rows=tuple(_class_row(row) for row in by_support[:MOST_CLASSES]),
        rows_left_out=max(0, len(by_support) - MOST_CLASSES),
        confusion_columns=columns,
        confusion=confusion,
    )


def _class_row(row: Json) -> ClassRow:
    return ClassRow(
        label=shortened(row.get("label")),
        support=_count(row.get("support")),
        predicted=_count(row.get("predicted")),
        measures=tuple(
            _measure(name, row.get(key))
            for key, name in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
        ),
    )


def _confusion(labels: Sequence[str], matrix: Any) -> tuple[tuple[str, ...], tuple[ConfusionRow, ...]]:
    """Lays out a matrix that is as large as its labels say, *other* last; else there is none."""
    rows = (
        [[to_whole(cell) for cell in row] for row in matrix if isinstance(row, list)]
        if isinstance(matrix, list)
        else []
    )
    is_whole = len(rows) == len(labels) and all(len(row) == len(labels) + 1 for row in rows)
    if not labels or not is_whole or len(labels) > MOST_CONFUSION_LABELS:
        return (), ()
    drawn = []
    for index, (label, row) in enumerate(zip(labels, rows, strict=True)):
        counts = [max(0, count or 0) for count in row]
        total = max(1, sum(counts))
        cells = (ConfusionCell(f"{count:,}", count / total, place == index) for place, count in enumerate(counts))
        drawn.append(ConfusionRow(shortened(label), tuple(cells)))
    return (*map(shortened, labels), "other"), tuple(drawn)


def _calibration(calibration: Json) -> tuple[Measure, ...]:
    if not calibration:
        return ()
    plain = (("accuracy", "accuracy of the likeliest label"), ("confidence", "mean probability of the likeliest label"))
    return (
        _measure("expected calibration error", calibration.get("error")),
        _measure("Brier score", calibration.get("brier")),
        *(_measure(name, {"value": calibration.get(key)}) for key, name in plain),
    )


def _measure(name: str, estimate: Any) -> Measure:
    """Writes a value from 0 to 1 in percent, with its interval where it has one."""
    estimate = estimate if isinstance(estimate, Mapping) else {}
    value, low, high = (to_percent(estimate.get(key)) for key in ("value", "low", "high"))
    interval = "" if value is None or low is None or high is None else f"{low:.1f} to {high:.1f}"
    return Measure(name, UNDEFINED if value is None else f"{value:.1f} %", interval)


def _count(value: Any) -> str:
    count = to_whole(value)
    return "?" if count is None else f"{count:,}"


def _mapping(owner: Json | None, key: str) -> Json:
    value = {} if owner is None else owner.get(key)
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [to_text(item) for item in value] if isinstance(value, list) else []
