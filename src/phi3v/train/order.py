"""Which samples an epoch draws, and in which order: pure functions of the seed and the epoch."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol

import numpy as np

from phi3v.data.dataset import ConversationDataset
from phi3v.data.schema import Sample
from phi3v.errors import ConfigError

Sampling = Literal["shuffle", "class_balanced", "one_per_image"]

MOST_ANSWERS_A_SAMPLE = 0.5
"""Data with more different answers than this, per sample, has no classes to balance."""


class EpochOrder(Protocol):
    """The order of every epoch. Its length is the number of samples that an epoch draws."""

    def __len__(self) -> int: ...

    def of(self, epoch: int) -> np.ndarray:
        """Returns the dataset positions of ``epoch`` in training order: (len,) int64."""
        ...


class Shuffled:
    """Every sample once.

    Args:
        num_samples: of the data set.
        seed: with the epoch, what the order is made of.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples = num_samples
        self._seed = seed

    def __len__(self) -> int:
        return self._num_samples

    def of(self, epoch: int) -> np.ndarray:
        return _generator(self._seed, epoch).permutation(self._num_samples)


class StemsTogether:
    """Every sample once, those that begin alike side by side: in random groups of at most ``most``, in random order.

    Args:
        group_of: (n,) number of the samples that begin alike, from 0 without gaps.
        most: samples of a group. More that begin alike make several groups of about the same size.
        seed: with the epoch, what the order is made of.

    >>> order = StemsTogether([0, 1, 0, 1, 1, 2], most=2, seed=0).of(0).tolist()
    >>> sorted(order), abs(order.index(0) - order.index(2))
    ([0, 1, 2, 3, 4, 5], 1)
    """

    def __init__(self, group_of: Sequence[int] | np.ndarray, *, most: int, seed: int) -> None:
        self._group_of = np.asarray(group_of, dtype=np.int64)
        self._most = most
        self._seed = seed

    def __len__(self) -> int:
        return len(self._group_of)

    def of(self, epoch: int) -> np.ndarray:
        generator = _generator(self._seed, epoch)
        shuffled = generator.permutation(len(self))
        members = shuffled[np.argsort(self._group_of[shuffled], kind="stable")]  # alike ones together, in random order
        group = self._group_of[members]
        sizes = np.bincount(group)
        place = np.arange(len(members)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        pieces = -(-sizes // self._most)
        piece = (np.cumsum(pieces) - pieces)[group] + place * pieces[group] // sizes[group]
        return members[np.argsort(generator.permutation(pieces.sum())[piece], kind="stable")]


class Grouped:
    """Equally many samples of every group, shuffled together.

    A group hands out its members in random order, all of them before any comes again, and goes on in the next epoch
    where it stopped.

    Args:
        group_of: (n,) group of each sample of the data set, numbered from 0 without gaps.
        draws: samples that an epoch draws from each group.
        seed: with the epoch, what the order is made of.

    >>> order = Grouped([0, 0, 0, 1], draws=2, seed=0)
    >>> sorted(order.of(0).tolist() + order.of(1).tolist() + order.of(2).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    """

    def __init__(self, group_of: Sequence[int] | np.ndarray, *, draws: int, seed: int) -> None:
        numbers = np.asarray(group_of, dtype=np.int64)
        by_group = np.argsort(numbers, kind="stable")
        self._members = np.split(by_group, np.cumsum(np.bincount(numbers))[:-1])
        self._draws = draws
        self._seed = seed

    def __len__(self) -> int:
        return len(self._members) * self._draws

    def of(self, epoch: int) -> np.ndarray:
        drawn = [self._drawn(group, epoch) for group in range(len(self._members))]
        return _generator(self._seed, epoch).permutation(np.concatenate(drawn))

    def _drawn(self, group: int, epoch: int) -> np.ndarray:
        members = self._members[group]
        if len(members) == 1:
            return np.repeat(members, self._draws)
        first = epoch * self._draws
        rounds = range(first // len(members), (first + self._draws - 1) // len(members) + 1)
        stream = np.concatenate([_generator(self._seed, group, number).permutation(members) for number in rounds])
        start = first - rounds[0] * len(members)
        return stream[start : start + self._draws]


def epoch_order(
    dataset: ConversationDataset,
    sampling: Sampling,
    seed: int,
    *,
    stem_group_of: np.ndarray | None = None,
    shared_questions: int = 1,
) -> EpochOrder:
    """Returns the order that a run's ``sampling`` asks for; reads every line of the data unless it is ``shuffle``.

    Args:
        dataset: checked samples.
        sampling: what an epoch draws.
        seed: of the run.
        stem_group_of: (n,) number of the samples that begin alike; ``shuffle`` keeps them together.
        shared_questions: most of them side by side; 1: they are scattered like any others.

    Raises:
        ConfigError: ``class_balanced`` on data whose answers are no classes.
    """
    if sampling == "shuffle" and stem_group_of is not None and shared_questions > 1:
        return StemsTogether(stem_group_of, most=shared_questions, seed=seed)
    if sampling == "shuffle":
        return Shuffled(len(dataset), seed)
    key_of = _last_answer if sampling == "class_balanced" else partial(_shown_images, dataset)
    numbers: dict[bytes, int] = {}
    group_of = np.empty(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        digest = hashlib.blake2b(repr(key_of(dataset[index])).encode(), digest_size=16).digest()
        group_of[index] = numbers.setdefault(digest, len(numbers))
    if sampling == "one_per_image":
        return Grouped(group_of, draws=1, seed=seed)
    if len(numbers) > MOST_ANSWERS_A_SAMPLE * len(dataset):
        raise ConfigError(
            f"sampling is class_balanced, but the {len(dataset)} training samples have {len(numbers)} different last "
            "answers: that is no closed set of classes; set sampling to shuffle"
        )
    return Grouped(group_of, draws=-(-len(dataset) // len(numbers)), seed=seed)


def _last_answer(sample: Sample) -> str:
    return sample.turns[-1].assistant


def _shown_images(dataset: ConversationDataset, sample: Sample) -> tuple[str, ...]:
    """Names the images that a sample shows, by their paths; a sample without any stands alone."""
    return tuple(sorted(str(dataset.image_path(sample, name)) for name in sample.images)) or (sample.where,)


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seeds))
