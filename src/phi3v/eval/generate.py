"""Answers by greedy generation."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..data.collate import Collator
from ..data.encode import Encoded, SampleEncoder
from ..data.schema import Sample, Turn
from ..model.processing_phi3_v import Phi3VProcessor


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
