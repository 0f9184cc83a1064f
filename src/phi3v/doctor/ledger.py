"""All that both passes keep of the data: plain arrays, so that a million samples are some hundred megabytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ..data.dataset import ConversationDataset
from ..data.processes import Workers
from ..data.schema import Sample
from .hashing import digests_of_lists
from .pictures import Look
from .reading import PLACES_A_TASK, Place, Reader, spans

IMAGE = np.dtype(
    [
        ("first", "i8"),
        ("content", "u8"),
        ("phash", "u8"),
        ("dhash", "u8"),
        ("height", "u4"),
        ("width", "u4"),
        ("format", "u1"),
        ("mode", "u1"),
        ("orientation", "u1"),
        ("reason", "u1"),
        ("has_alpha", "?"),
        ("is_animated", "?"),
        ("is_flat", "?"),
    ]
)
"""What is kept of a distinct image file, 47 bytes. ``first`` is the first of the images shown that is this file;
``format``, ``mode`` and ``reason`` number ``Ledger.words``."""


@dataclass(slots=True)
class Words:
    """Numbers for the few different words of a column; 0 is the empty word."""

    known: list[str] = field(default_factory=lambda: [""])

    def number(self, word: str) -> int:
        """Returns the word's number, the next free one for a new word."""
        if word not in self.known:
            self.known.append(word)
        return self.known.index(word)


@dataclass(slots=True)
class Ledger:
    """The data as columns: S samples (lines) of all splits in order, T turns, R places of images, I image files.

    Memory: 8 bytes (the data set's offset) + 37 a sample, 8 a turn, 16 a place of an image, 47 an image file.

    Attributes:
        splits: the data files.
        ends: for each split, the number of samples of it and those before it.
        rows: (S,) ``LINE``; ``reason`` counts a sample's images too and is final.
        answers: (T,) uint64 digests, in the samples' order.
        images: (I,) ``IMAGE``, in the order in which they are first shown.
        image_of: (R,) which image file each place shows.
        words: what the numbers of ``reason``, ``format`` and ``mode`` mean.
    """

    splits: Sequence[ConversationDataset]
    ends: np.ndarray
    rows: np.ndarray
    answers: np.ndarray
    images: np.ndarray
    image_of: np.ndarray
    words: Words

    @property
    def sample_of_place(self) -> np.ndarray:
        """(R,) the sample that each place belongs to."""
        return np.repeat(np.arange(len(self.rows)), self.rows["num_images"])

    @property
    def sample_of_turn(self) -> np.ndarray:
        """(T,) the sample that each turn belongs to."""
        return np.repeat(np.arange(len(self.rows)), self.rows["num_turns"])

    @property
    def place_edges(self) -> np.ndarray:
        """(S + 1,) places before each sample, and all of them."""
        return np.concatenate([[0], np.cumsum(self.rows["num_images"], dtype=np.int64)])

    def samples_of(self, split: int) -> slice:
        """Returns the samples of a split."""
        return slice(int(self.ends[split - 1]) if split else 0, int(self.ends[split]))

    def images_of(self, split: int) -> np.ndarray:
        """Returns the image files that a split shows, in the order in which it does; those of bad samples too."""
        own = self.samples_of(split)
        edges = self.place_edges
        shown = self.image_of[edges[own.start] : edges[own.stop]]
        return shown[np.sort(np.unique(shown, return_index=True)[1])]

    def split_of(self, sample: int) -> int:
        """Returns the split of a sample."""
        return int(np.searchsorted(self.ends, sample, side="right"))

    def read(self, sample: int) -> Sample:
        """Reads a sample's line again.

        Raises:
            SampleError: the line is bad.
            DataError: the file was changed meanwhile.
        """
        split = self.split_of(sample)
        return self.splits[split].read_line(sample - self.samples_of(split).start)

    def dataset_of(self, sample: int) -> ConversationDataset:
        """Returns the data file of a sample."""
        return self.splits[self.split_of(sample)]

    def image_name(self, image: int, among: slice | None = None) -> str:
        """Returns ``file:line: path`` of the first place that shows an image file.

        Args:
            image: number of the file.
            among: only places of these samples.
        """
        place = int(self.images["first"][image])
        edges = self.place_edges
        if among is not None:
            start, stop = edges[among.start], edges[among.stop]
            place = int(start + np.argmax(self.image_of[start:stop] == image))
        row = int(np.searchsorted(edges, place, side="right")) - 1
        sample = self.read(row)
        return f"{sample.where}: {sample.images[place - int(edges[row])]}"

    def prompts(self, has_content: bool) -> np.ndarray:
        """Returns (S,) uint64 digests of all that each sample shows the model, its images included.

        Args:
            has_content: know an image by its bytes, so that a copy under another name is the same; else by its path.
        """
        names = self.images["content"][self.image_of] if has_content else self.image_of.astype(np.uint64)
        shown = digests_of_lists(names, self.rows["num_images"])
        return digests_of_lists(np.stack([self.rows["prompt"], shown], axis=1).reshape(-1), np.full(len(self.rows), 2))


def read_all(splits: Sequence[ConversationDataset], workers: Workers[Reader], progress: bool) -> Ledger:
    """Makes both passes.

    Raises:
        DataError: a data file was changed meanwhile.
        CapacityError: a worker process was killed.
    """
    words = Words()
    lengths = [dataset.num_lines for dataset in splits]
    rows, answers, paths = [], [], []
    with tqdm(total=sum(lengths), desc="reading lines", unit=" samples", disable=not progress) as bar:
        for lines in workers.map(Reader.read, spans(splits)):
            numbers = np.array([0, *map(words.number, lines.reasons)], dtype=np.uint8)
            lines.rows["reason"] = numbers[lines.rows["reason"]]
            rows.append(lines.rows)
            answers.append(lines.answers)
            paths.append(lines.paths)
            bar.update(len(lines.rows))
    _, first, inverse = np.unique(np.concatenate(paths), return_index=True, return_inverse=True)
    del paths
    in_order = np.argsort(first)  # numbers do not depend on digests, and follow the files
    rank = np.empty_like(in_order)
    rank[in_order] = np.arange(len(in_order))
    images = np.zeros(len(first), dtype=IMAGE)
    images["first"] = first[in_order]
    ledger = Ledger(
        splits, np.cumsum(lengths), np.concatenate(rows), np.concatenate(answers), images, rank[inverse], words
    )
    _look_at_images(ledger, workers, progress)
    _pass_problems_on(ledger)
    return ledger


def _look_at_images(ledger: Ledger, workers: Workers[Reader], progress: bool) -> None:
    number = 0
    with tqdm(total=len(ledger.images), desc="looking at images", unit=" images", disable=not progress) as bar:
        for looks in workers.map(Reader.look, _place_tasks(ledger)):
            for look in looks:
                _note(ledger.images[number], look, ledger.words)
                number += 1
            bar.update(len(looks))


def _place_tasks(ledger: Ledger) -> Iterable[list[Place]]:
    first = ledger.images["first"]
    edges = ledger.place_edges
    for start in range(0, len(first), PLACES_A_TASK):
        places = first[start : start + PLACES_A_TASK]
        samples = np.searchsorted(edges, places, side="right") - 1
        indices = places - edges[samples]
        splits = np.searchsorted(ledger.ends, samples, side="right")
        starts = np.concatenate([[0], ledger.ends])[splits]
        yield [Place(*map(int, place)) for place in zip(splits, samples - starts, indices, strict=True)]


def _note(image: np.void, look: Look, words: Words) -> None:
    image["reason"] = words.number(look.problem)
    image["format"], image["mode"] = words.number(look.format), words.number(look.mode)
    for name in ("height", "width", "orientation", "has_alpha", "is_animated", "is_flat", "content", "phash", "dhash"):
        image[name] = getattr(look, name)


def _pass_problems_on(ledger: Ledger) -> None:
    """Gives a sample the problem of its first bad image: training looks at images before it tokenizes."""
    place_reasons = ledger.images["reason"][ledger.image_of]
    bad = np.flatnonzero(place_reasons)
    samples = ledger.sample_of_place[bad]
    first_of_sample = np.unique(samples, return_index=True)
    ledger.rows["reason"][first_of_sample[0]] = place_reasons[bad[first_of_sample[1]]]
