"""A data set's questions answered by a model, in batches of prompts of different lengths and image counts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..config import Metric, Scoring
from ..data.collate import Collator
from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.schema import IMAGE_TAG, Sample
from ..model.processing_phi3_v import Phi3VProcessor
from .classes import find_label
from .generate import answer_batch
from .likelihood import label_log_likelihoods, label_token_ids
from .questions import Question, labels_of, list_questions, share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How questions are asked and answers scored.

    Attributes:
        metric: how an answer is scored.
        scoring: ``generate``: answers are generated; ``likelihood``: the likeliest of a question's labels is its
            answer; ``both``: answers are generated, and the labels' probabilities taken besides.
        labels: closed set of answers of the questions that name none; empty: such questions are open.
        batch_size: prompts a batch.
        max_new_tokens: longest generated answer, tokens.
        limit: samples used, from the first; None = all.
        seed: of the intervals' resampling.
        progress: show a bar.
    """

    metric: Metric
    scoring: Scoring = "generate"
    labels: Sequence[str] = ()
    batch_size: int
    max_new_tokens: int
    limit: int | None = None
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True, slots=True)
class Share:
    """Which of several processes this is, 0-based; the questions are shared out among them."""

    rank: int
    num_ranks: int


ALONE = Share(rank=0, num_ranks=1)
"""The share of a process that answers everything."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question, answered.

    Attributes:
        id: the sample's id.
        turn: zero-based turn that the question is.
        question: the user's text of that turn, without image tags.
        images: absolute paths of the images that the model saw.
        answers: accepted answers.
        prediction: the model's answer; of a generated one, special tokens and surrounding space are removed.
        labels: the closed set of answers that the question allows; empty for an open question.
        expected: the right one of ``labels``; None for an open question.
        probabilities: of ``labels``, in their order, summing to 1; None when they were not taken.
    """

    id: str
    turn: int
    question: str
    images: tuple[str, ...]
    answers: tuple[str, ...]
    prediction: str
    labels: tuple[str, ...]
    expected: str | None
    probabilities: tuple[float, ...] | None


def answer_questions(
    model: Any,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    settings: EvalSettings,
    share: Share = ALONE,
) -> list[Prediction]:
    """Answers every turn of every sample; earlier turns stand in the prompt with their gold answers.

    Prompts are batched by length, the longest first, so that little is padded and a batch that does not fit the memory
    fails at once and not after an hour. Several processes each answer their share, without waiting for each other, and
    then exchange the answers.

    Args:
        model: ``Phi3VForCausalLM``, or a ``PeftModel`` on one; its training flag is restored.
        processor: its ``num_crops`` applies where a sample names none.
        dataset: samples that ``check_dataset`` and ``check_labels`` passed.
        settings: how to ask.
        share: of this process.

    Returns:
        Predictions of all processes, in the order of the data set.
    """
    encoder = SampleEncoder(processor)
    questions = share_of(list_questions(dataset, encoder, settings.limit), share.rank, share.num_ranks)
    batches = [
        questions[start : start + settings.batch_size] for start in range(0, len(questions), settings.batch_size)
    ]
    collator = Collator(processor.tokenizer.pad_token_id, padding_side="left")
    ids_of = cache(partial(label_token_ids, processor))

    def load(batch: list[Question]) -> tuple[list[Sample], dict[str, torch.Tensor]]:
        samples = [dataset[question.index] for question in batch]
        encoded = [
            encoder.encode_prompt(sample, dataset.load_images(sample, question.turn), question.turn)
            for sample, question in zip(samples, batch, strict=True)
        ]
        return samples, collator(encoded)

    answered: list[tuple[tuple[int, int], Prediction]] = []
    with tqdm(total=len(questions), desc="answering", unit="question", disable=not settings.progress) as bar:
        for batch, (samples, inputs) in zip(batches, _one_ahead(load, batches), strict=True):
            label_sets = [
                labels_of(sample.turns[question.turn], settings.labels)
                for question, sample in zip(batch, samples, strict=True)
            ]
            texts: list[str | None] = [None] * len(batch)
            probabilities: list[tuple[float, ...] | None] = [None] * len(batch)
            if settings.scoring != "likelihood":
                texts = [*answer_batch(model, processor, inputs, settings.max_new_tokens)]
            if settings.scoring != "generate":
                scores = label_log_likelihoods(model, inputs, [[ids_of(one) for one in row] for row in label_sets])
                probabilities = [tuple(row.double().softmax(dim=0).tolist()) for row in scores]
            for question, sample, labels, text, row in zip(
                batch, samples, label_sets, texts, probabilities, strict=True
            ):
                answered.append((question.key, _prediction(dataset, sample, question.turn, labels, text, row)))
            bar.update(len(batch))
    if share.num_ranks > 1:
        answered = gather_object(answered)
    return [prediction for _, prediction in sorted(answered, key=lambda pair: pair[0])]


def _prediction(
    dataset: ConversationDataset,
    sample: Sample,
    turn_index: int,
    labels: tuple[str, ...],
    text: str | None,
    probabilities: tuple[float, ...] | None,
) -> Prediction:
    """Puts together what is known of an answered question; without a generated text the likeliest label is it."""
    turn = sample.turns[turn_index]
    if text is None:
        assert probabilities is not None
        text = labels[probabilities.index(max(probabilities))]
    seen = [name for earlier in sample.turns[: turn_index + 1] for name in earlier.images]
    return Prediction(
        id=sample.id,
        turn=turn_index,
        question=IMAGE_TAG.sub("", turn.user).strip(),
        images=tuple(str(dataset.image_path(sample, name)) for name in seen),
        answers=turn.answers,
        prediction=text,
        labels=labels,
        expected=find_label(turn.assistant, labels),
        probabilities=probabilities,
    )


def _one_ahead(load: Any, batches: list[list[Question]]) -> Iterator[Any]:
    """Yields ``load(batch)`` for every batch, the next one loading while the caller works on the last."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(load, batches[0]) if batches else None
        for following in [*batches[1:], None]:
            if waiting is None:
                return
            loaded = waiting.result()
            waiting = None if following is None else pool.submit(load, following)
            yield loaded
