"""A data set's questions answered by a model, those about the same images together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..config import Metric, Scoring
from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.schema import IMAGE_TAG, Sample
from ..errors import StoppedError
from ..model.processing_phi3_v import Phi3VProcessor
from .classes import find_label
from .engine import Answer, Engine
from .generate import text_of
from .likelihood import label_probabilities, label_token_ids
from .loading import LoadedGroup, QuestionLoader
from .prompts import Group, Picture, Prompt
from .questions import group_questions, labels_of, list_questions, share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How questions are asked and answers scored.

    Attributes:
        metric: how an answer is scored.
        scoring: ``generate``: answers are generated; ``likelihood``: the likeliest of a question's labels is its
            answer; ``both``: answers are generated, and the labels' probabilities taken besides.
        labels: closed set of answers of the questions that name none; empty: such questions are open.
        batch_size: questions answered at once; None: as many as the memory holds.
        max_new_tokens: longest generated answer, tokens.
        limit: samples used, from the first; None = all.
        seed: of the intervals' resampling.
        progress: show a bar.
    """

    metric: Metric
    scoring: Scoring = "generate"
    labels: Sequence[str] = ()
    batch_size: int | None = None
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
    should_stop: Callable[[], bool] = lambda: False,
    keep: Callable[[Prediction], object] = lambda prediction: None,
) -> list[Prediction]:
    """Answers every turn of every sample; earlier turns stand in the prompt with their gold answers.

    Questions about the same images go together, the longest prompts first, so that little is padded and a batch that
    does not fit the memory fails at once and not after an hour. Several processes each answer their share, without
    waiting for each other, and then exchange the answers.

    Args:
        model: ``Phi3VForCausalLM``, or a ``PeftModel`` on one; its training flag is restored.
        processor: its ``num_crops`` applies where a sample names none.
        dataset: samples that ``check_dataset`` and ``check_labels`` passed.
        settings: how to ask.
        share: of this process.
        should_stop: asked before every batch: whether this process is to leave the rest unanswered.
        keep: gets each prediction of this process as soon as it is there; the costliest questions come first.

    Returns:
        Predictions of all processes, in the order of the data set.

    Raises:
        StoppedError: in all processes, when one of them left questions unanswered.
    """
    encoder = SampleEncoder(processor)
    engine = Engine(
        model,
        stop_token_ids=processor.stop_token_ids,
        max_new_tokens=settings.max_new_tokens,
        most_questions=settings.batch_size,
    )
    ids_of = cache(partial(label_token_ids, processor))

    def ask(sample: Sample, turn: int, ids: list[int], pictures: tuple[Picture, ...]) -> Prompt:
        labels = labels_of(sample.turns[turn], settings.labels) if settings.scoring != "generate" else ()
        return Prompt(ids, pictures, tuple(map(ids_of, labels)), is_generated=settings.scoring != "likelihood")

    loader = QuestionLoader(
        dataset,
        encoder,
        ask=ask,
        group=engine.group,
        num_ahead=engine.most_questions,
        use_pinned_memory=engine.device.type == "cuda",
    )
    groups = group_questions(list_questions(dataset, encoder, settings.limit), engine.most_questions)
    groups = share_of(groups, share.rank, share.num_ranks)
    answered: list[tuple[tuple[int, int], Prediction]] = []
    is_stopped = False
    with tqdm(total=sum(map(len, groups)), desc="answering", unit="question", disable=not settings.progress) as bar:
        for batch in _that_have_room(engine, loader.load(groups)):
            if should_stop():
                is_stopped = True
                break
            answers = engine.answer([group for loaded in batch for group in loaded.groups])
            for loaded in batch:
                for question, sample, prompt in zip(loaded.questions, loaded.samples, loaded.prompts, strict=True):
                    labels = labels_of(sample.turns[question.turn], settings.labels)
                    text, probabilities = _outcome(processor, prompt, answers[prompt])
                    prediction = _prediction(dataset, sample, question.turn, labels, text, probabilities)
                    keep(prediction)
                    answered.append((question.key, prediction))
                bar.update(len(loaded.questions))
    shares = [(answered, is_stopped)]
    if share.num_ranks > 1:
        shares = gather_object(shares)
    if any(stopped for _, stopped in shares):
        raise StoppedError("the evaluation was stopped before all questions were answered")
    together = [pair for own, _ in shares for pair in own]
    return [prediction for _, prediction in sorted(together, key=lambda pair: pair[0])]


def _that_have_room(engine: Engine, loaded: Iterator[LoadedGroup]) -> Iterator[list[LoadedGroup]]:
    """Yields as many groups of questions at once as can be answered together, in order."""
    batch: list[LoadedGroup] = []
    groups: list[Group] = []
    for one in loaded:
        if batch and not engine.has_room([*groups, *one.groups]):
            yield batch
            batch, groups = [], []
        batch.append(one)
        groups += one.groups
    if batch:
        yield batch


def _outcome(processor: Phi3VProcessor, prompt: Prompt, answer: Answer) -> tuple[str | None, tuple[float, ...] | None]:
    """Returns the generated text and the labels' probabilities, each as far as it was asked for."""
    text = text_of(processor, answer) if prompt.is_generated else None
    return text, label_probabilities(answer.log_likelihoods) if prompt.labels else None


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
