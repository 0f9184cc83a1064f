"""Answers by greedy generation, in batches of prompts of different lengths and image counts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.collate import Collator
from ..data.dataset import ConversationDataset
from ..data.encode import Encoded, SampleEncoder
from ..data.schema import IMAGE_TAG, Sample, Turn
from ..model.processing_phi3_v import Phi3VProcessor


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question, answered.

    Attributes:
        id: the sample's id.
        turn: zero-based turn that the question is.
        question: the user's text of that turn, without image tags.
        images: absolute paths of the images that the model saw.
        answers: accepted answers.
        prediction: what the model generated, special tokens and surrounding space removed.
    """

    id: str
    turn: int
    question: str
    images: tuple[str, ...]
    answers: tuple[str, ...]
    prediction: str


@dataclass(frozen=True, slots=True)
class _Question:
    index: int
    turn: int
    cost: int


def generate_predictions(
    model: Any,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    *,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
    progress: bool = True,
) -> list[Prediction]:
    """Answers every turn of every sample; earlier turns stand in the prompt with their gold answers.

    Prompts are batched by length, the longest first, so that little is padded and a batch that does not fit the memory
    fails at once and not after an hour.

    Args:
        model: ``Phi3VForCausalLM``, or a ``PeftModel`` on one; its training flag is restored.
        processor: its ``num_crops`` applies where a sample names none.
        dataset: samples that ``check_dataset`` passed.
        batch_size: prompts a batch.
        max_new_tokens: longest answer, tokens.
        limit: samples used, from the first; None = all.
        progress: show a bar.

    Returns:
        Predictions in the order of the data set.
    """
    encoder = SampleEncoder(processor)
    questions: list[_Question] = []
    for index in range(min(len(dataset), limit or len(dataset))):
        sample = dataset[index]
        cost = encoder.measure(sample, dataset.image_sizes(sample)).tokens
        questions += [_Question(index, turn, cost) for turn in range(len(sample.turns))]
    by_cost = sorted(questions, key=lambda question: -question.cost)
    batches = [by_cost[start : start + batch_size] for start in range(0, len(by_cost), batch_size)]

    collator = Collator(processor.tokenizer.pad_token_id, padding_side="left")

    def load(batch: list[_Question]) -> tuple[list[Sample], dict[str, torch.Tensor]]:
        samples = [dataset[question.index] for question in batch]
        encoded = [
            encoder.encode_prompt(sample, dataset.load_images(sample, question.turn), question.turn)
            for sample, question in zip(samples, batch, strict=True)
        ]
        return samples, collator(encoded)

    answered: dict[tuple[int, int], Prediction] = {}
    with tqdm(total=len(questions), desc="answering", unit="question", disable=not progress) as bar:
        for batch, (samples, inputs) in zip(batches, _one_ahead(load, batches), strict=True):
            texts = answer_batch(model, processor, inputs, max_new_tokens)
            for question, sample, text in zip(batch, samples, texts, strict=True):
                turn = sample.turns[question.turn]
                seen = [name for earlier in sample.turns[: question.turn + 1] for name in earlier.images]
                answered[question.index, question.turn] = Prediction(
                    id=sample.id,
                    turn=question.turn,
                    question=IMAGE_TAG.sub("", turn.user).strip(),
                    images=tuple(str(dataset.image_path(sample, name)) for name in seen),
                    answers=turn.answers,
                    prediction=text,
                )
            bar.update(len(batch))
    return [answered[key] for key in sorted(answered)]


def generate_once(
    model: Any,
    processor: Phi3VProcessor,
    prompt: str,
    images: Sequence[Image.Image] = (),
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    num_crops: int | None = None,
) -> str:
    """Answers one prompt about some images.

    Args:
        prompt: the user's text; image tags are put before it unless it holds them itself.
        images: in the order of their numbers.
        system: system message.
        max_new_tokens: longest answer, tokens.
        num_crops: overrides the processor's own.

    Raises:
        DataError: tags that do not fit the images, or special tokens in the text.
    """
    names = tuple(f"image {number}" for number in range(1, len(images) + 1))
    turn = Turn(user=prompt, assistant="", images=names, answers=("",))
    sample = Sample(id="prompt", turns=(turn,), system=system, num_crops=num_crops, source=None, where="command line")
    encoded: Encoded = SampleEncoder(processor).encode_prompt(sample, images, turn=0)
    inputs = Collator(processor.tokenizer.pad_token_id, padding_side="left")([encoded])
    return answer_batch(model, processor, inputs, max_new_tokens)[0]


@torch.inference_mode()
def answer_batch(
    model: Any, processor: Phi3VProcessor, inputs: dict[str, torch.Tensor], max_new_tokens: int
) -> list[str]:
    """Generates greedily from left-padded prompts and returns B answers as text."""
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        generated = model.generate(
            **{key: value.to(device) for key, value in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=processor.stop_token_ids,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    finally:
        model.train(was_training)
    new_tokens = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def _one_ahead(load: Any, batches: list[list[_Question]]) -> Iterator[Any]:
    """Yields ``load(batch)`` for every batch, the next one loading while the caller works on the last."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(load, batches[0]) if batches else None
        for following in [*batches[1:], None]:
            if waiting is None:
                return
            loaded = waiting.result()
            waiting = None if following is None else pool.submit(load, following)
            yield loaded
