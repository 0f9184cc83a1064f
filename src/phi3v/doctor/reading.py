"""The two passes over the data: every line is read and tokenized once, then every image file is looked at once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.images import UnusableImageError
from ..data.schema import Sample, SampleError
from ..model.checkpoint import load_processor
from .hashing import digest_of_text
from .pictures import Look, look_at

LINES_A_TASK = 512
PLACES_A_TASK = 64
"""Images a task; at some ten milliseconds each, an interruption waits less than a second."""


class Span(NamedTuple):
    """Consecutive lines of one split: its number, and positions from ``start`` up to ``stop``."""

    split: int
    start: int
    stop: int


class Place(NamedTuple):
    """Where an image is shown: split, position of the sample, and which of the sample's images, from 0."""

    split: int
    position: int
    image: int


LINE = np.dtype(
    [
        ("id", "u8"),
        ("prompt", "u8"),
        ("text_tokens", "u4"),
        ("supervised", "u4"),
        ("num_turns", "u4"),
        ("num_images", "u4"),
        ("num_crops", "u4"),
        ("reason", "u1"),
    ]
)
"""What is kept of a line, 37 bytes.

``id`` and ``prompt`` are digests; the prompt's is of all that is shown but the images. ``text_tokens`` are the decoder
positions that no image takes. ``num_crops`` is the sample's own, 0 for none. ``reason`` numbers why the line cannot be
used, 0 for no reason.
"""


class Lines(NamedTuple):
    """What is kept of consecutive lines.

    Attributes:
        rows: (n,) ``LINE``, except that ``reason`` numbers this object's own ``reasons``.
        answers: digests of the turns' answers, all of the first line, then all of the second, and so on.
        paths: digests of the places of the images that are shown, in the same order; equal for the same file.
        reasons: what 1, 2, .. in ``rows["reason"]`` mean.
    """

    rows: np.ndarray
    answers: np.ndarray
    paths: np.ndarray
    reasons: list[str]


class Reader:
    """What one process works with: the data, the tokenizer and what to look for.

    Args:
        splits: the data files.
        model: model folder or hub id, for the processor.
        decode: decode every image in full.
        hashes: hash every image.
    """

    def __init__(self, splits: Sequence[ConversationDataset], model: str | Path, decode: bool, hashes: bool) -> None:
        self.splits = splits
        self.decode = decode
        self.hashes = hashes
        # A sample is tokenized with its images at the least size; what they really take is arithmetic.
        processor = load_processor(model, num_crops=1)
        self._encoder = SampleEncoder(processor)
        edge = processor.image_processor.crop_px
        self._least_size = (edge, edge)
        self._least_tokens = processor.image_processor.image_token_count(edge, edge)

    def read(self, span: Span) -> Lines:
        """Reads lines. Broken ones are counted, never raised."""
        dataset = self.splits[span.split]
        rows = np.zeros(span.stop - span.start, dtype=LINE)
        answers: list[int] = []
        paths: list[int] = []
        reasons: list[str] = []
        for row, position in zip(rows, range(span.start, span.stop), strict=True):
            try:
                sample = dataset.read_line(position)
                row["id"] = digest_of_text(sample.id)
                row["num_turns"] = len(sample.turns)
                row["num_images"] = len(sample.images)
                row["num_crops"] = sample.num_crops or 0
                shown = [sample.system, *((turn.user, len(turn.images)) for turn in sample.turns)]
                row["prompt"] = digest_of_text(repr(shown))
                answers += [digest_of_text(turn.assistant) for turn in sample.turns]
                paths += [_digest_of_place(dataset, sample, name) for name in sample.images]
                sizes = [self._least_size] * len(sample.images)
                lengths = self._encoder.measure(replace(sample, num_crops=None), sizes)
                row["text_tokens"] = lengths.tokens - self._least_tokens * len(sizes)
                row["supervised"] = lengths.supervised
            except SampleError as error:
                if error.reason not in reasons:
                    reasons.append(error.reason)
                row["reason"] = 1 + reasons.index(error.reason)
        return Lines(rows, np.array(answers, dtype=np.uint64), np.array(paths, dtype=np.uint64), reasons)

    def look(self, places: Sequence[Place]) -> list[Look]:
        """Looks at image files. Unusable ones are told by ``Look.problem``, never raised."""
        return [self._look(place) for place in places]

    def _look(self, place: Place) -> Look:
        dataset = self.splits[place.split]
        sample = dataset.read_line(place.position)
        try:
            path = dataset.image_path(sample, sample.images[place.image])
            return look_at(path, decode=self.decode, hashes=self.hashes)
        except (SampleError, UnusableImageError) as error:
            return Look(error.reason)


def spans(splits: Sequence[ConversationDataset]) -> Iterator[Span]:
    """Cuts the data into tasks of the first pass, whatever the number of processes."""
    for split, dataset in enumerate(splits):
        for start in range(0, dataset.num_lines, LINES_A_TASK):
            yield Span(split, start, min(start + LINES_A_TASK, dataset.num_lines))


def _digest_of_place(dataset: ConversationDataset, sample: Sample, name: str) -> int:
    try:
        return digest_of_text(str(dataset.image_path(sample, name)))
    except SampleError:  # counted when the image is looked at, as training does after reading the line
        return digest_of_text(f"{sample.where.rpartition(':')[0]}\0{name}")
