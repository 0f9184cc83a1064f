"""Answers by greedy generation."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..data.encode import Encoded, SampleEncoder
from ..data.schema import Sample, Turn
from ..model.processing_phi3_v import Phi3VProcessor
from .engine import Answer, Engine
from .prompts import Picture, Prompt


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
    encoded = SampleEncoder(processor).encode_prompt(sample, images, turn=0)
    engine = Engine(model, stop_token_ids=processor.stop_token_ids, max_new_tokens=max_new_tokens)
    asked = prompt_of(encoded, processor.image_processor.crop_px)
    return text_of(processor, engine.answer(engine.group([asked]))[asked])


def prompt_of(encoded: Encoded, crop_px: int, name: str = "prompt") -> Prompt:
    """Makes a prompt out of an encoded question; an answer is generated to it.

    Args:
        encoded: what ``SampleEncoder.encode_prompt`` returns.
        crop_px: crop edge, pixels.
        name: tells its images from those of other prompts.
    """
    return Prompt(encoded["input_ids"].tolist(), _pictures(encoded, crop_px, name))


def _pictures(encoded: Encoded, crop_px: int, name: str) -> tuple[Picture, ...]:
    """Returns a prompt's images, each without the crops that only fill up."""
    if "pixel_values" not in encoded or "image_sizes" not in encoded:
        return ()
    grids = [(height // crop_px, width // crop_px) for height, width in encoded["image_sizes"].tolist()]
    return tuple(
        Picture(f"{name} {number}", crops[: rows * columns + 1], (rows, columns))
        for number, (crops, (rows, columns)) in enumerate(zip(encoded["pixel_values"], grids, strict=True))
    )


def text_of(processor: Phi3VProcessor, answer: Answer) -> str:
    """Returns a generated answer as text, without special tokens and surrounding space."""
    return str(processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip()
