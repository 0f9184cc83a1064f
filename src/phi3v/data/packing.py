"""How samples are put together into micro-batches: a pure function of what they cost.

A *window* is what one optimizer step trains on. It is cut into micro-batches under budgets of positions, crops and
samples. Samples of a window that begin with the same images form a *group*, whose common beginning (the *stem*) is
computed once. Nothing here looks at a rank, a worker or a random state, so that every process plans the same.
"""

import hashlib
import io
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

CROP_COST = 50
"""Decoder positions whose arithmetic a crop's equals in the published model: 0.37 TFLOP forward, a position's linear
layers 7 GFLOP. It only balances micro-batches; nothing depends on its being exact."""

MOST_UNBALANCE = 1.02
"""How much the costliest micro-batch may grow for rows of pieces of nearly one length."""

_KEY_BYTES = 8


class Stem(NamedTuple):
    """How a sample begins, as far as other samples may begin alike: through the last of its leading images.

    Leading are the first images of the first question that only white space parts. A sample without an image in its
    first question has no stem.

    Attributes:
        tokens: decoder positions, from ``<s>`` through the last position of the leading images; 0: no stem.
        images: leading images.
        crops: their crops.
        digest: equal for equal ids and the same setting of ``num_crops``; it does not know which images they are.
    """

    tokens: int = 0
    images: int = 0
    crops: int = 0
    digest: bytes = b""


class Lengths(NamedTuple):
    """What a sample costs, known without its pixels.

    Attributes:
        tokens: decoder positions, image tokens included, after a cut where there is one.
        supervised: positions that the loss counts.
        crops: crops that CLIP computes, global views included.
        is_overlong: whether the sample exceeds ``max_length`` as the file has it.
        stem: how it begins.
    """

    tokens: int
    supervised: int
    crops: int
    is_overlong: bool
    stem: Stem


@dataclass(frozen=True, slots=True)
class SampleCosts:
    """What planning needs to know of every sample of a data set: 28 bytes each.

    Attributes:
        tokens: (n,) int32, decoder positions.
        supervised: (n,) int32, positions that the loss counts.
        crops: (n,) int32, crops that CLIP computes.
        stem_tokens: (n,) int32, positions of the stem; 0: the sample has none.
        stem_crops: (n,) int32, crops of the stem's images.
        stem_keys: (n,) uint64, equal for equal stems with the same images.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    crops: np.ndarray
    stem_tokens: np.ndarray
    stem_crops: np.ndarray
    stem_keys: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def to_bytes(self) -> bytes:
        """Returns the content of an ``.npz`` file."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what ``to_bytes`` returned."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


class CostRecorder:
    """Gathers the costs of one sample after the other."""

    def __init__(self) -> None:
        self._numbers = array("i")
        self._keys = array("Q")

    def add(self, lengths: Lengths, image_paths: Sequence[Path]) -> None:
        """Adds a sample.

        Args:
            lengths: as the encoder measured it.
            image_paths: its images, in text order; links followed, so that one image has one name.
        """
        stem = lengths.stem
        self._numbers.extend((lengths.tokens, lengths.supervised, lengths.crops, stem.tokens, stem.crops))
        digest = hashlib.blake2b(stem.digest, digest_size=_KEY_BYTES)
        for path in image_paths[: stem.images]:
            digest.update(f"{path}\0".encode(errors="surrogateescape"))
        self._keys.append(int.from_bytes(digest.digest(), "little"))

    def costs(self) -> SampleCosts:
        """Returns what was added so far."""
        numbers = np.array(self._numbers, dtype=np.int32).reshape(-1, 5).T
        return SampleCosts(*(column.copy() for column in numbers), stem_keys=np.array(self._keys, dtype=np.uint64))


class Budget(NamedTuple):
    """What a micro-batch may hold; None: any number. A sample that exceeds it makes a micro-batch alone."""

    tokens: int | None = None
    crops: int | None = None
    samples: int | None = None


class Load(NamedTuple):
    """What is computed for some samples."""

    tokens: int = 0
    crops: int = 0
    samples: int = 0

    def __add__(self, other: "Load") -> "Load":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Load(self.tokens + other.tokens, self.crops + other.crops, self.samples + other.samples)

    @property
    def cost(self) -> int:
        """Arithmetic, in units of a decoder position's."""
        return self.tokens + CROP_COST * self.crops

    def fits(self, budget: Budget) -> bool:
        """Whether it is within the budget."""
        return all(most is None or load <= most for load, most in zip(self, budget, strict=True))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank computes at once.

    Attributes:
        groups: positions in the data set; the samples of a group have one stem, and a group of one shares nothing.
        load: what is computed for it.
        counts: False for a filler: it keeps a rank in step with the others, and weighs nothing.
    """

    groups: tuple[tuple[int, ...], ...]
    load: Load
    counts: bool = True


class Packing(NamedTuple):
    """How windows are packed.

    Attributes:
        budget: what a micro-batch may hold.
        shared_questions: most samples of a group; 1: nothing is shared.
        short_positions: longest sequence that the short LongRoPE factors reach; a stem is not shared across it, for
            its keys and values depend on the factors.
        num_ranks: processes that share each window.
    """

    budget: Budget
    shared_questions: int = 1
    short_positions: int = 4096
    num_ranks: int = 1


def plan_window(costs: SampleCosts, window: Sequence[int], packing: Packing) -> list[list[MicroBatch]]:
    """Cuts a window into micro-batches.

    As few as the budget allows, but equally many for every rank; each about as costly as the others, and so is what
    every rank has to do. A rank that is left without samples gets a filler.

    Args:
        costs: of the whole data set.
        window: positions in the data set; one may come twice.
        packing: budgets and ranks.

    Returns:
        For every rank its micro-batches, the costliest first.
    """
    units = _split_for_ranks(costs, _groups(costs, window, packing), packing.num_ranks)
    units.sort(key=lambda unit: -unit[0].cost)
    bins = _pack(units, packing)
    bins.sort(key=lambda batch: -batch.load.cost)
    num_rounds = -(-len(bins) // packing.num_ranks)
    ranks: list[list[MicroBatch]] = [[] for _ in range(packing.num_ranks)]
    cheapest_ranks = [(0, rank) for rank in range(packing.num_ranks)]  # a heap of (cost so far, rank)
    for batch in bins:
        cost, rank = heappop(cheapest_ranks)
        ranks[rank].append(batch)
        if len(ranks[rank]) < num_rounds:
            heappush(cheapest_ranks, (cost + batch.load.cost, rank))
    if all(len(rank) == num_rounds for rank in ranks):
        return ranks
    cheapest = min(window, key=lambda index: load_of(costs, (index,)).cost)
    filler = MicroBatch(((cheapest,),), load_of(costs, (cheapest,)), counts=False)
    return [rank + [filler] * (num_rounds - len(rank)) for rank in ranks]


def load_of(costs: SampleCosts, group: Sequence[int]) -> Load:
    """Returns what is computed for a group: its stem once, everything else for each of its samples."""
    repeats = len(group) - 1
    first = group[0]
    return Load(
        tokens=sum(int(costs.tokens[index]) for index in group) - repeats * int(costs.stem_tokens[first]),
        crops=sum(int(costs.crops[index]) for index in group) - repeats * int(costs.stem_crops[first]),
        samples=len(group),
    )


def stem_groups(costs: SampleCosts, short_positions: int) -> np.ndarray:
    """Numbers the samples that may share a stem alike: (n,) int64, from 0 without gaps, in the order of the data.

    A sample without a stem has a number of its own. The numbers do not depend on where the images lie.
    """
    # Equal stems of equal keys; whether the long factors apply is a bit more, and without a stem the place itself.
    has_stem = costs.stem_tokens > 0
    key = np.empty(len(costs), dtype=[("kind", np.int8), ("key", np.uint64)])
    key["kind"] = np.where(has_stem, 1 + (costs.tokens > short_positions), 0)
    key["key"] = np.where(has_stem, costs.stem_keys, np.arange(len(costs), dtype=np.uint64))
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number.reshape(-1)]


class Saving(NamedTuple):
    """What sharing saves in an epoch that draws every sample once.

    Attributes:
        tokens, crops: computed without sharing.
        shared_tokens, shared_crops: computed with it.
        is_exact: whether the latter two are counted rather than estimated.
    """

    tokens: int
    crops: int
    shared_tokens: int
    shared_crops: int
    is_exact: bool = True

    @property
    def token_share(self) -> float:
        """Share of the positions that need not be computed."""
        return 1 - self.shared_tokens / self.tokens


def saving_of(costs: SampleCosts, group_of: np.ndarray, most: int) -> Saving:
    """Returns what groups of at most ``most`` samples save, if windows and budgets leave every group whole.

    Args:
        costs: of the data set.
        group_of: as ``stem_groups`` returns it.
        most: samples of a group.
    """
    sizes = np.bincount(group_of)
    repeats = sizes - -(-sizes // most)
    _, first = np.unique(group_of, return_index=True)
    tokens, crops = int(costs.tokens.sum(dtype=np.int64)), int(costs.crops.sum(dtype=np.int64))
    return Saving(
        tokens,
        crops,
        tokens - int((repeats * costs.stem_tokens[first]).sum()),
        crops - int((repeats * costs.stem_crops[first]).sum()),
    )


Unit = tuple[Load, tuple[int, ...]]
"""A group of samples, and what is computed for it."""


def _groups(costs: SampleCosts, window: Sequence[int], packing: Packing) -> list[Unit]:
    """Puts samples with one stem together, as many as limits and budget allow, in the window's order."""
    places = np.asarray(window, dtype=np.int64)
    columns = (costs.tokens, costs.crops, costs.stem_tokens, costs.stem_crops, costs.stem_keys)
    samples = zip(window, *(column[places].tolist() for column in columns), strict=True)
    groups: list[list[int]] = []
    loads: list[Load] = []
    open_group: dict[tuple[int, bool], int] = {}
    for index, tokens, crops, stem_tokens, stem_crops, stem_key in samples:
        key = (stem_key, tokens > packing.short_positions)
        number = open_group.get(key) if stem_tokens > 0 else None
        if number is not None and len(groups[number]) < packing.shared_questions:
            load = loads[number] + Load(tokens - stem_tokens, crops - stem_crops, 1)
            if load.fits(packing.budget):
                groups[number].append(index)
                loads[number] = load
                continue
        open_group[key] = len(groups)
        groups.append([index])
        loads.append(Load(tokens, crops, 1))
    return [(load, tuple(group)) for load, group in zip(loads, groups, strict=True)]


def _split_for_ranks(costs: SampleCosts, units: list[Unit], num_ranks: int) -> list[Unit]:
    """Halves the costliest groups while there are fewer groups than ranks: an idle rank would save nothing."""
    units = list(units)
    while len(units) < num_ranks:
        largest = max(range(len(units)), key=lambda number: (len(units[number][1]) > 1, units[number][0].cost))
        group = units[largest][1]
        if len(group) == 1:
            break
        halves = group[: len(group) // 2], group[len(group) // 2 :]
        units[largest : largest + 1] = [(load_of(costs, half), half) for half in halves]
    return units


def _pack(units: Sequence[Unit], packing: Packing) -> list[MicroBatch]:
    """Puts units, costliest first, into as few micro-batches as first fit finds; then balances them, if they fit."""
    least = _least_loads(units)
    first_fit = _first_fit(units, least, packing.budget)
    number = min(len(units), -(-len(first_fit) // packing.num_ranks) * packing.num_ranks)
    bins = _balance(units, least, number, packing.budget) or first_fit
    return [_micro_batch(units_of_bin) for units_of_bin in _alike_together(units, bins, packing.budget)]


def _least_loads(units: Sequence[Unit]) -> list[Load]:
    """Returns for every unit the least that any unit after it adds, of each kind: what that exceeds, all of them do."""
    least: list[Load] = []
    tokens = crops = samples = sys.maxsize
    for load, _ in reversed(units):
        least.append(Load(tokens, crops, samples))
        tokens, crops, samples = min(tokens, load.tokens), min(crops, load.crops), min(samples, load.samples)
    return least[::-1]


def _first_fit(units: Sequence[Unit], least: Sequence[Load], budget: Budget) -> list[list[Unit]]:
    """Puts each unit into the first bin that takes it, or into a new one."""
    bins: list[list[Unit]] = []
    loads: list[Load] = []
    open_places: list[int] = []  # of the bins that may take a unit yet, in order
    for unit, least_after in zip(units, least, strict=True):
        place = next((place for place in open_places if (loads[place] + unit[0]).fits(budget)), None)
        if place is None:
            place = len(bins)
            bins.append([])
            loads.append(Load())
            open_places.append(place)
        bins[place].append(unit)
        loads[place] += unit[0]
        if not (loads[place] + least_after).fits(budget):
            open_places.remove(place)
    return bins


def _balance(units: Sequence[Unit], least: Sequence[Load], number: int, budget: Budget) -> list[list[Unit]] | None:
    """Puts each unit, costliest first, into the cheapest of ``number`` bins that takes it; None: one fits nowhere."""
    bins: list[list[Unit]] = [[] for _ in range(number)]
    loads = [Load()] * number
    cheapest = [(0, place) for place in range(number)]  # a heap of the bins that may take a unit yet
    for unit, least_after in zip(units, least, strict=True):
        refused: list[tuple[int, int]] = []
        while cheapest:
            cost, place = heappop(cheapest)
            if not bins[place] or (loads[place] + unit[0]).fits(budget):
                break
            refused.append((cost, place))
        else:
            return None
        bins[place].append(unit)
        loads[place] += unit[0]
        if (loads[place] + least_after).fits(budget):
            refused.append((loads[place].cost, place))
        for one in refused:
            heappush(cheapest, one)
    return bins


def _alike_together(units: Sequence[Unit], bins: list[list[Unit]], budget: Budget) -> list[list[Unit]]:
    """Deals units that cost nearly the same anew, neighbours in cost to one bin, as many to each as it has.

    Then the pieces of a row are of nearly one length, which attention can make use of. Bins whose balance would suffer,
    or that would exceed the budget, stay as they are.
    """
    rest = iter(units)
    sorted_bins = [[next(rest) for _ in one] for one in bins]
    before, after = ([_load(one) for one in some] for some in (bins, sorted_bins))
    is_balanced = max(load.cost for load in after) <= MOST_UNBALANCE * max(load.cost for load in before)
    return sorted_bins if is_balanced and all(load.fits(budget) for load in after) else bins


def _load(units: Sequence[Unit]) -> Load:
    load = Load()
    for own, _ in units:
        load += own
    return load


def _micro_batch(units: Sequence[Unit]) -> MicroBatch:
    return MicroBatch(tuple(group for _, group in units), _load(units))
