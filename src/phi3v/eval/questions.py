"""The questions that a data set asks: what they cost, who answers them, and which answers they allow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Scoring
from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.schema import Turn, parse_sample
from ..errors import ConfigError, DataError
from ..model.processing_phi3_v import Phi3VProcessor
from .classes import find_label

_IN_TRAINING = "eval_scoring and eval_labels in a training run"


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of one sample.

    Attributes:
        index: of the sample in its data set.
        turn: zero-based.
        cost: decoder positions of the sample.
    """

    index: int
    turn: int
    cost: int

    @property
    def key(self) -> tuple[int, int]:
        """Sorts questions into the order of the data set."""
        return self.index, self.turn


def list_questions(dataset: ConversationDataset, encoder: SampleEncoder, limit: int | None) -> list[Question]:
    """Lists every turn of the first ``limit`` samples (None: of all), in the order of the data set."""
    questions: list[Question] = []
    for index in range(num_samples_asked(dataset, limit)):
        sample = dataset[index]
        cost = encoder.measure(sample, dataset.image_sizes(sample)).tokens
        questions += [Question(index, turn, cost) for turn in range(len(sample.turns))]
    return questions


def num_samples_asked(dataset: ConversationDataset, limit: int | None) -> int:
    """Returns how many samples an evaluation uses, from the first."""
    return len(dataset) if limit is None else min(len(dataset), limit)


def share_of(questions: Sequence[Question], rank: int, num_ranks: int) -> list[Question]:
    """Returns the questions that one of several processes answers, the costliest first.

    Sorted by cost they are dealt out to and fro (0 1 2, 2 1 0, 0 1 2, ..), so that all get as many questions, within
    one, of about the same cost in all. Every process works out the same shares.

    >>> questions = [Question(index, 0, cost) for index, cost in enumerate([5, 9, 1, 7])]
    >>> [[question.cost for question in share_of(questions, rank, 2)] for rank in (0, 1)]
    [[9, 1], [7, 5]]
    """
    by_cost = sorted(questions, key=lambda question: -question.cost)
    period = 2 * num_ranks
    return [one for place, one in enumerate(by_cost) if place % period in (rank, period - 1 - rank)]


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
