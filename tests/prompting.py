"""Prompts of every kind, and what plain forwards say to one after the other: the references of generation's tests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from phi3v.eval.prompts import Picture, Prompt
from phi3v.model.processing_phi3_v import Phi3VProcessor

Ask = Callable[..., Prompt]
"""``make_prompt`` with a processor."""


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image of (w, h) px that no other seed gives."""
    pixels = torch.randint(256, (3 * size[0] * size[1],), generator=torch.Generator().manual_seed(seed))
    return Image.frombytes("RGB", size, bytes(pixels.tolist()))


IMAGES = {"tall": noise(0, (30, 80)), "wide": noise(1, (90, 40)), "square": noise(2, (56, 56))}


def make_prompt(processor: Phi3VProcessor, text: str, images: Sequence[str] = (), **rest: Any) -> Prompt:
    """Makes a prompt out of a user's text with image tags, names of ``IMAGES``, and whatever else a prompt has."""
    cut = processor.image_processor
    pictures: list[Picture] = []
    for name in images:
        grid = cut.layout(IMAGES[name].height, IMAGES[name].width).grid
        pictures.append(Picture(name, cut.preprocess([IMAGES[name]], return_tensors="pt")["pixel_values"][0], grid))
    counts = [cut.image_token_count(IMAGES[name].height, IMAGES[name].width) for name in images]
    return Prompt(processor.encode(f"<|user|>\n{text}<|end|>\n<|assistant|>\n", counts), tuple(pictures), **rest)


def prompts_of_every_kind(processor: Phi3VProcessor) -> list[Prompt]:
    """Text only, one image, two, several questions about one, later turns with the earlier one's answer."""
    later = "<|image_1|>\nWhat?<|end|>\n<|assistant|>\nA long answer<|end|>\n<|user|>\n"
    asked: list[tuple[str, list[str]]] = [
        ("Hi", []),
        ("A much longer question about nothing in particular, really?", []),
        ("<|image_1|>\nWhat?", ["tall"]),
        ("<|image_1|>\nWhat is this, and why?", ["tall"]),
        ("<|image_1|>\n<|image_2|>\nAlike?", ["wide", "square"]),
        ("<|image_1|>\n<|image_2|>\nAlike?", ["wide", "tall"]),
        ("<|image_1|>\nWhy?", ["tall"]),
        (later + "And <|image_2|>?", ["tall", "wide"]),
        (later + "And then?", ["tall"]),
    ]
    return [make_prompt(processor, text, images) for text, images in asked]


def plain_inputs(prompt: Prompt, more: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """What the model's padded forward takes for a prompt alone, with some tokens behind it."""
    inputs = {"input_ids": torch.tensor([[*prompt.ids, *more]])}
    if prompt.pictures:
        edge = prompt.pictures[0].crops.shape[-1]
        most = max(len(picture.crops) for picture in prompt.pictures)
        crops = torch.zeros(len(prompt.pictures), most, 3, edge, edge)
        for own, picture in zip(crops, prompt.pictures, strict=True):
            own[: len(picture.crops)] = picture.crops
        sizes = torch.tensor([[edge * side for side in picture.grid] for picture in prompt.pictures])
        inputs |= {"pixel_values": crops, "image_sizes": sizes}
    return inputs


@torch.no_grad()
def plain_tokens(
    model: Any, prompt: Prompt, num_tokens: int, stop_token_ids: Sequence[int] = (), device: str = "cpu"
) -> list[int]:
    """Greedy tokens up to a stop token: one whole forward a token, without padding, cache or neighbours."""
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        inputs = {name: tensor.to(device) for name, tensor in plain_inputs(prompt, tokens).items()}
        token = int(model(**inputs).logits[0, -1].argmax())
        if token in stop_token_ids:
            break
        tokens.append(token)
    return tokens


@torch.no_grad()
def plain_log_likelihood(model: Any, prompt: Prompt, label: Sequence[int]) -> float:
    """Prompt and label as one sequence."""
    logits = model(**plain_inputs(prompt, label)).logits[0, -len(label) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(label)[:, None]).sum())
