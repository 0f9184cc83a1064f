"""The questions that a data set asks: what they cost, who answers them, and which answers they allow."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Scoring
from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.images import check_image
from ..data.schema import Turn, parse_sample
from ..errors import ConfigError, DataError
from ..model.processing_phi3_v import Phi3VProcessor
from .classes import find_label

FURTHER_QUESTION_COST = 100
"""About what one more question about the same images costs, decoder positions: its text and the steps of its answer."""

_IN_TRAINING = "eval_scoring and eval_labels in a training run"


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of one sample.

    Attributes:
        index: of the sample in its data set.
        turn: zero-based.
        cost: decoder positions of the sample.
        images: keys of the images that its prompt shows, in text order; equal keys are equal pixels.
        image_sizes: their (h, w) px.
    """

    index: int
    turn: int
    cost: int
    images: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """Sorts questions into the order of the data set."""
        return self.index, self.turn


def list_questions(dataset: ConversationDataset, encoder: SampleEncoder, limit: int | None) -> list[Question]:
    """Lists every turn of the first ``limit`` samples (None: of all), in the order of the data set."""
    sizes: dict[Path, tuple[int, int]] = {}
    questions: list[Question] = []
    for index in range(num_samples_asked(dataset, limit)):
        sample = dataset[index]
        paths: list[Path] = []

        def look(path: Path, seen: list[Path] = paths) -> tuple[int, int]:
            seen.append(path)
            if path not in sizes:
                sizes[path] = check_image(path, decode=False)
            return sizes[path]

        own_sizes = tuple(dataset.image_sizes(sample, look))
        keys = tuple(encoder.image_key(sample, path) for path in paths)
        cost = encoder.measure(sample, own_sizes).tokens
        num_shown = 0
        for number, turn in enumerate(sample.turns):
            num_shown += len(turn.images)
            questions.append(Question(index, number, cost, keys[:num_shown], own_sizes[:num_shown]))
    return questions


def num_samples_asked(dataset: ConversationDataset, limit: int | None) -> int:
    """Returns how many samples an evaluation uses, from the first."""
    return len(dataset) if limit is None else min(len(dataset), limit)


def group_questions(questions: Iterable[Question], most: int) -> list[list[Question]]:
    """Puts questions with the same first image together, up to ``most`` of them; others stand alone.

    >>> a, b = ("a.png",), ("b.png",)
    >>> questions = [Question(0, 0, 9, a), Question(1, 0, 9, b), Question(2, 0, 9, a), Question(3, 0, 2)]
    >>> [[question.index for question in group] for group in group_questions(questions, most=8)]
    [[0, 2], [1], [3]]
    """
    groups: list[list[Question]] = []
    open_groups: dict[str, list[Question]] = {}
    for one in questions:
        group = open_groups.get(one.images[0]) if one.images else None
        if group is None or len(group) == most:
            group = []
            groups.append(group)
            if one.images:
                open_groups[one.images[0]] = group
        group.append(one)
    return groups


def share_of(groups: Sequence[list[Question]], rank: int, num_ranks: int) -> list[list[Question]]:
    """Returns the groups that one of several processes answers, the costliest first.

    The costliest group goes to the process with the least to do so far, and so on with the others. Every process works
    out the same shares.

    >>> groups = [[Question(index, 0, cost)] for index, cost in enumerate([5, 9, 1, 7])]
    >>> [[group[0].cost for group in share_of(groups, rank, 2)] for rank in (0, 1)]
    [[9, 1], [7, 5]]
    """
    by_cost = sorted(groups, key=_cost, reverse=True)
    shares: list[list[list[Question]]] = [[] for _ in range(num_ranks)]
    costs = [0] * num_ranks
    for group in by_cost:
        cheapest = costs.index(min(costs))
        shares[cheapest].append(group)
        costs[cheapest] += _cost(group)
    return shares[rank]


def _cost(group: Sequence[Question]) -> int:
    """Estimates what a group costs, in decoder positions: what its questions have in common counts once."""
    return max(one.cost for one in group) + FURTHER_QUESTION_COST * (len(group) - 1)


def labels_of(turn: Turn, labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the closed set of answers of a turn: its own, or else the configured one; empty for an open question."""
    return turn.labels or tuple(labels)


def check_labels(
    dataset: ConversationDataset,
    processor: Phi3VProcessor,
    *,
    scoring: Scoring,
    labels: Sequence[str],
    limit: int | None,
) -> None:
    """Checks before any model is loaded that every question has the labels that its scoring needs.

    Args:
        dataset: samples that ``check_dataset`` passed.
        processor: of the model; its tokenizer knows which labels cannot be written.
        scoring: where answers come from.
        labels: of the questions that name none themselves.
        limit: samples asked, from the first; None = all.

    Raises:
        ConfigError: ``labels`` is no set of answers that a data file could hold.
        DataError: a question has no labels and its scoring needs some, or its answer is none of ``labels``.
    """
    if labels:
        _check_configured(labels, processor)
    elif scoring == "generate":
        return
    for index in range(num_samples_asked(dataset, limit)):
        sample = dataset[index]
        for number, turn in enumerate(sample.turns, start=1):
            allowed = labels_of(turn, labels)
            if not allowed:
                raise DataError(
                    f"{sample.label}, turn {number}: scoring is {scoring}, but the question has no labels. Give the "
                    f'turn "labels": [...], set labels for all such questions, or set scoring to generate '
                    f"({_IN_TRAINING})."
                )
            if find_label(turn.assistant, allowed) is None:
                raise DataError(
                    f"{sample.label}, turn {number}: the answer {turn.assistant!r} is none of the labels "
                    f"{', '.join(map(repr, allowed))}, which were set for all questions without their own. Add it to "
                    f"them, or give the turn its own ({_IN_TRAINING})."
                )


def _check_configured(labels: Sequence[str], processor: Phi3VProcessor) -> None:
    """Refuses a configured set of labels that could not stand in a data file."""
    turn = {"user": "?", "assistant": labels[0], "labels": list(labels)}
    try:
        sample = parse_sample(json.dumps({"id": "labels", "conversations": [turn]}), "the setting labels")
        SampleEncoder(processor).measure(sample, [])
    except DataError as error:
        raise ConfigError(str(error)) from error
