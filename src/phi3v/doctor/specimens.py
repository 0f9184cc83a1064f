"""Samples as the model sees them: the crops out of the real pixel values, and every token of the text."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..data.dataset import ConversationDataset
from ..data.encode import IGNORED_LABEL, Encoded, SampleEncoder
from ..data.schema import Sample, SampleError
from ..model.image_processing_phi3_v import Phi3VImageProcessor
from .findings import EXTREME_RATIO, shortened
from .ledger import Ledger
from .lengths import Costs
from .pictures import WIDE_MODES

NUM_SPECIMENS = 12
"""Samples shown."""

MOST_IMAGES = 4
"""Images shown of one sample; the count of the rest is."""

MOST_TOKENS = 700
"""Tokens shown of one sample: the first and, where the answer usually stands, the last."""

IMAGE_BYTES = 1_800_000
"""Encoded crops that a page may hold; base64 makes a third more of them."""

_TILE_PX = 168
_PIXELATED_PX = 112
_MOST_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text, a run of image positions, or what was left out.

    Attributes:
        text: what it reads.
        note: id, or empty.
        kind: ``text``, ``special``, ``image`` or ``gap``.
        is_supervised: whether the loss counts it.
        ends_line: whether it holds a line feed.
    """

    text: str
    note: str
    kind: str
    is_supervised: bool = False
    ends_line: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of a sample.

    Attributes:
        name: its path in the data, with its size.
        crops: data URLs, the global view first, then the tiles row by row; empty where the page is full.
        columns: tiles in a row.
        edge_px: edge at which crops are shown.
        is_pixelated: whether they are shown enlarged.
    """

    name: str
    crops: tuple[str, ...]
    columns: int
    edge_px: int
    is_pixelated: bool


@dataclass(frozen=True, slots=True)
class Specimen:
    """One sample.

    Attributes:
        name: its place and id.
        reason: why it is shown.
        facts: what it costs.
        pictures: its first images.
        num_hidden: images beyond.
        tokens: its text.
        problem: why it cannot be shown, or empty.
    """

    name: str
    reason: str
    facts: str = ""
    pictures: tuple[Picture, ...] = ()
    num_hidden: int = 0
    tokens: tuple[Token, ...] = ()
    problem: str = ""


def specimens(ledger: Ledger, costs: Costs, encoder: SampleEncoder, limit: int) -> list[Specimen]:
    """Returns up to ``NUM_SPECIMENS`` samples: the unusual first, then others evenly from the shortest to the longest.

    Args:
        ledger: the data.
        costs: at the number of crops of ``encoder``.
        encoder: as training will use it.
        limit: decoder positions that over-long samples exceed.
    """
    bytes_left = IMAGE_BYTES
    shown = []
    for row, reason in _chosen(ledger, costs, limit).items():
        specimen, num_bytes = _specimen(ledger, encoder, row, reason, bytes_left)
        bytes_left -= num_bytes
        shown.append(specimen)
    return shown


def _chosen(ledger: Ledger, costs: Costs, limit: int) -> dict[int, str]:
    """Returns samples and why each is shown."""
    usable = np.flatnonzero(costs.is_usable)
    if not len(usable):
        return {}
    images = ledger.images
    modes = np.array(ledger.words.known)[images["mode"]]
    long, short = np.maximum(images["height"], images["width"]), np.minimum(images["height"], images["width"])
    kinds = {
        "turned by EXIF orientation": images["orientation"] != 1,
        "CMYK": modes == "CMYK",
        "more than 8 bits a channel": np.isin(modes, WIDE_MODES),
        "transparent": images["has_alpha"],
        "elongated": (long > EXTREME_RATIO * short) & (short > 0),
    }
    chosen: dict[int, str] = {}
    for reason, is_such in kinds.items():
        rows = ledger.sample_of_place[is_such[ledger.image_of]]
        rows = rows[costs.is_usable[rows]]
        if len(rows):
            chosen.setdefault(int(rows[0]), reason)
    overlong = usable[costs.tokens[usable] > limit]
    if len(overlong):
        chosen.setdefault(int(overlong[0]), f"over {limit:,} tokens")
    by_length = usable[np.argsort(costs.tokens[usable], kind="stable")]
    free = np.flatnonzero(~np.isin(by_length, list(chosen)))
    num_picked = min(len(free), NUM_SPECIMENS - len(chosen))
    for place in free[np.linspace(0, len(free) - 1, num_picked).round().astype(int)].tolist():
        share = place / max(1, len(by_length) - 1)
        reason = "shortest" if place == 0 else "longest" if share == 1 else f"longer than {share:.0%} of all"
        chosen[int(by_length[place])] = reason
    return chosen


def _specimen(ledger: Ledger, encoder: SampleEncoder, row: int, reason: str, bytes_left: int) -> tuple[Specimen, int]:
    """Returns a sample and the bytes that its pictures take."""
    sample, dataset = ledger.read(row), ledger.dataset_of(row)
    name = shortened(sample.label, _MOST_NAME_CHARS)
    try:
        encoded = encoder.encode(sample, dataset.load_images(sample))
        pictures, num_bytes = _pictures(sample, dataset, encoded, encoder.processor.image_processor, bytes_left)
    except SampleError as error:  # damage that headers do not show
        return Specimen(name, reason, problem=str(error)), 0
    num_supervised = int((_labels(encoded) != IGNORED_LABEL).sum())
    facts = [f"{len(encoded['input_ids']):,} tokens", f"{num_supervised:,} supervised"]
    if sample.num_crops is not None:
        facts.append(f"num_crops {sample.num_crops}, its own")
    return Specimen(
        name=name,
        reason=reason,
        facts=", ".join(facts),
        pictures=pictures,
        num_hidden=len(sample.images) - len(pictures),
        tokens=_shown(list(_tokens(encoder, encoded))),
    ), num_bytes


def _pictures(
    sample: Sample,
    dataset: ConversationDataset,
    encoded: Encoded,
    image_processor: Phi3VImageProcessor,
    bytes_left: int,
) -> tuple[tuple[Picture, ...], int]:
    """Returns a sample's first images, and the bytes that they take. A sample lists its images in text order."""
    pictures = []
    total = 0
    sizes = dataset.image_sizes(sample)[:MOST_IMAGES]
    for name, size, pixels in zip(sample.images, sizes, encoded.get("pixel_values", ()), strict=False):
        layout = image_processor.layout(*size, num_crops=sample.num_crops)
        files = [_encoded_crop(crop, image_processor) for crop in pixels[: layout.num_crops]]
        num_bytes = sum(map(len, files))
        fits = total + num_bytes <= bytes_left
        total += num_bytes * fits
        is_pixelated = image_processor.crop_px <= _PIXELATED_PX
        kind = "png" if is_pixelated else "jpeg"
        crops = [f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}" for file in files]
        pictures.append(
            Picture(
                name=f"{shortened(name, _MOST_NAME_CHARS)}, {size[0]:,} x {size[1]:,} px (h x w), "
                f"{layout.num_crops} crops",
                crops=tuple(crops) if fits else (),
                columns=layout.grid[1],
                edge_px=min(_TILE_PX, image_processor.crop_px),
                is_pixelated=is_pixelated,
            )
        )
    return tuple(pictures), total


def _encoded_crop(crop: torch.Tensor, image_processor: Phi3VImageProcessor) -> bytes:
    """Turns (3, crop_px, crop_px) normalised pixels back into an image file."""
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(image_processor.image_std)[:, None, None]
    levels = ((crop * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    if image_processor.crop_px <= _PIXELATED_PX:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _tokens(encoder: SampleEncoder, encoded: Encoded) -> Iterator[Token]:
    """Yields a sample's tokens; all positions of an image are one."""
    processor = encoder.processor
    tokenizer = processor.tokenizer
    ids, labels = encoded["input_ids"].tolist(), _labels(encoded).tolist()
    special = set(tokenizer.added_tokens_decoder)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    num_images = place = 0
    while place < len(ids):
        start = place
        place += 1
        is_supervised = labels[start] != IGNORED_LABEL
        if ids[start] == processor.image_token_id:
            while place < len(ids) and ids[place] == processor.image_token_id:
                place += 1
            num_images += 1
            yield Token(f"[image {num_images}: {place - start:,} tokens]", f"id {ids[start]}", "image", is_supervised)
            continue
        text = pieces[start].replace("\u2581", " ")
        ends_line = text == "<0x0A>" or "\n" in text
        if ends_line:
            text = "\u23ce"
        kind = "special" if ids[start] in special else "text"
        yield Token(text, f"id {ids[start]}", kind, is_supervised, ends_line)


def _labels(encoded: Encoded) -> torch.Tensor:
    assert "labels" in encoded, "a prompt has no labels"
    return encoded["labels"]


def _shown(tokens: list[Token]) -> tuple[Token, ...]:
    if len(tokens) <= MOST_TOKENS:
        return tuple(tokens)
    half = MOST_TOKENS // 2
    gap = Token(f"[{len(tokens) - 2 * half:,} more]", "", "gap", ends_line=True)
    return (*tokens[:half], gap, *tokens[-half:])
