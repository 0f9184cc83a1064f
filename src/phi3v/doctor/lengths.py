"""What samples cost at a number of crops: decoder positions, crops, and how much of a padded batch is padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..geometry import hd_layout, num_image_tokens
from .ledger import Ledger

NUM_CROPS = (1, 4, 9, 16)
"""Numbers of crops that every diagnosis shows."""

BATCHES = (2, 4, 8)
"""Micro-batch sizes whose padding is shown."""

NUM_BINS = 40
"""Bars of a histogram of lengths, at most."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How numbers are spread. A percentile is the smallest number that so many of them do not exceed.

    Attributes:
        mean: 0 without numbers, as all others.
        p50: median.
        p90: 90th percentile.
        p99: 99th percentile.
        most: the largest.
    """

    mean: float
    p50: int
    p90: int
    p99: int
    most: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of numbers by range.

    Attributes:
        edges: one more than counts; range k is ``edges[k] .. edges[k + 1] - 1``.
        counts: numbers in each range.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Padding:
    """Shares of padded batches that are padding, 0 to 1.

    Attributes:
        batch: samples in a batch.
        tokens: of decoder positions, mean over all batches of so many different samples.
        sorted_tokens: the same where samples are sorted by length and cut into batches.
        crops: of CLIP's crops, likewise.
        sorted_crops: likewise, samples sorted by decoder positions.
    """

    batch: int
    tokens: float
    sorted_tokens: float
    crops: float
    sorted_crops: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What samples take at one number of crops; one entry a sample, 0 where it cannot be used.

    Attributes:
        num_crops: most crops of an image; a sample's own number wins.
        tokens: (S,) int64 decoder positions.
        crops: (S,) int64 crops of all images, global views included.
        most_crops: (S,) int64 crops of the image that has most.
        image_crops: (R,) int64 crops of each place of an image, 0 where it cannot be laid out.
        is_usable: (S,) bool.
    """

    num_crops: int
    tokens: np.ndarray
    crops: np.ndarray
    most_crops: np.ndarray
    image_crops: np.ndarray
    is_usable: np.ndarray


@dataclass(frozen=True, slots=True)
class Lengths:
    """A split's costs at one number of crops.

    Attributes:
        num_crops: most crops of an image.
        tokens: decoder positions of a sample.
        histogram: the same.
        image_crops: number of images by their crops, global view included.
        crops: crops of a sample.
        num_over: samples of more decoder positions than the limit.
        supervised_share: of all decoder positions, 0 to 1.
        num_elongated: samples that cannot be used for an image too elongated at this number of crops.
        padding: by batch size.
    """

    num_crops: int
    tokens: Spread
    histogram: Histogram
    image_crops: dict[int, int]
    crops: Spread
    num_over: int
    supervised_share: float
    num_elongated: int
    padding: tuple[Padding, ...]


def costs_of(ledger: Ledger, num_crops: int, crop_px: int, tokens_per_side: int) -> Costs:
    """Computes what every sample takes, from the sizes of its images and the tokens of its text."""
    own = np.repeat(ledger.rows["num_crops"], ledger.rows["num_images"]).astype(np.int64)
    sizes = ledger.images[ledger.image_of]
    keys = np.stack([sizes["height"], sizes["width"], np.where(own > 0, own, num_crops)], axis=1)
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    measured = np.array(
        [_tokens_and_crops(height, width, most, crop_px, tokens_per_side) for height, width, most in distinct.tolist()],
        dtype=np.int64,
    ).reshape(-1, 2)[which.reshape(-1)]
    samples, total = ledger.sample_of_place, len(ledger.rows)
    is_usable = ledger.rows["reason"] == 0
    is_usable[samples[measured[:, 1] == 0]] = False
    most = np.zeros(total, dtype=np.int64)
    np.maximum.at(most, samples, measured[:, 1])
    tokens = ledger.rows["text_tokens"] + np.bincount(samples, measured[:, 0], total).astype(np.int64)
    crops = np.bincount(samples, measured[:, 1], total).astype(np.int64)
    return Costs(num_crops, tokens * is_usable, crops * is_usable, most * is_usable, measured[:, 1], is_usable)


def lengths_of(ledger: Ledger, costs: Costs, split: int, limit: int) -> Lengths:
    """Sums one split up.

    Args:
        ledger: the data.
        costs: of all samples.
        split: number of the split.
        limit: decoder positions that ``Lengths.num_over`` is about.
    """
    own = ledger.samples_of(split)
    chosen = own.start + np.flatnonzero(costs.is_usable[own])
    tokens, crops, most = costs.tokens[chosen], costs.crops[chosen], costs.most_crops[chosen]
    edges = ledger.place_edges
    image_crops = costs.image_crops[edges[own.start] : edges[own.stop]]
    values, counts = np.unique(
        image_crops[np.repeat(costs.is_usable[own], ledger.rows["num_images"][own])], return_counts=True
    )
    num_positions = int(tokens.sum())
    return Lengths(
        num_crops=costs.num_crops,
        tokens=spread(tokens),
        histogram=histogram(tokens),
        image_crops=dict(zip(values.tolist(), counts.tolist(), strict=True)),
        crops=spread(crops),
        num_over=int((tokens > limit).sum()),
        supervised_share=float(ledger.rows["supervised"][chosen].sum()) / num_positions if num_positions else 0.0,
        num_elongated=int((ledger.rows["reason"][own] == 0).sum()) - len(chosen),
        padding=tuple(padding(tokens, ledger.rows["num_images"][chosen], crops, most, batch) for batch in BATCHES),
    )


def spread(numbers: np.ndarray) -> Spread:
    """Sums (n,) whole numbers up.

    >>> spread(np.array([4, 1, 3, 2]))
    Spread(mean=2.5, p50=2, p90=4, p99=4, most=4)
    """
    if not len(numbers):
        return Spread(0.0, 0, 0, 0, 0)
    p50, p90, p99 = np.quantile(numbers, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    return Spread(float(numbers.mean()), int(p50), int(p90), int(p99), int(numbers.max()))


def histogram(numbers: np.ndarray) -> Histogram:
    """Counts (n,) whole numbers in at most ``NUM_BINS`` ranges of one width, a round number.

    >>> histogram(np.array([3, 5, 120])).edges[:3]
    (0, 5, 10)
    """
    if not len(numbers):
        return Histogram((), ())
    low, high = int(numbers.min()), int(numbers.max())
    width = next(
        factor * 10**power
        for power in range(12)
        for factor in (1, 2, 5)
        if high - low < (NUM_BINS - 1) * factor * 10**power
    )
    start = low // width * width
    counts = np.bincount((numbers - start) // width)
    return Histogram(tuple(start + width * k for k in range(len(counts) + 1)), tuple(counts.tolist()))


def padding(
    tokens: np.ndarray, num_images: np.ndarray, crops: np.ndarray, most_crops: np.ndarray, batch: int
) -> Padding:
    """Computes the padding of batches: rows to the longest sample, every image to the most crops of any.

    For random batches this is the exact mean over all batches of ``batch`` different samples, not a simulation: of n
    lengths in ascending order, the one at rank r (from 0) is the longest of a random batch with the probability
    C(r, batch - 1) / C(n, batch).

    Args:
        tokens: (n,) decoder positions of each sample.
        num_images: (n,) images of each.
        crops: (n,) crops of each, all images together.
        most_crops: (n,) crops of its image that has most.
        batch: samples in a batch; all, where there are fewer.

    >>> padding(np.array([20, 40]), np.array([1, 1]), np.array([2, 4]), np.array([2, 4]), batch=2).tokens
    0.25
    """
    size = min(batch, len(tokens))
    if not size:
        return Padding(batch, 0.0, 0.0, 0.0, 0.0)
    is_longest = _chance_of_most(len(tokens), size)
    padded = size * float(is_longest @ np.sort(tokens))
    by_crops = np.argsort(most_crops, kind="stable")
    images = num_images[by_crops].astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(images)[:-1]]) / np.maximum(np.arange(len(images)), 1)
    padded_crops = float(is_longest @ (most_crops[by_crops] * (images + (size - 1) * before)))
    by_tokens = np.argsort(tokens, kind="stable")
    starts = np.arange(0, len(tokens), size)
    rows = np.diff(np.append(starts, len(tokens)))
    sorted_padded = float((np.maximum.reduceat(tokens[by_tokens], starts) * rows).sum())
    sorted_images = np.add.reduceat(num_images[by_tokens].astype(np.int64), starts)
    sorted_crops = float((np.maximum.reduceat(most_crops[by_tokens], starts) * sorted_images).sum())
    return Padding(
        batch=batch,
        tokens=_waste(size * float(tokens.mean()), padded),
        sorted_tokens=_waste(float(tokens.sum()), sorted_padded),
        crops=_waste(size * float(crops.mean()), padded_crops),
        sorted_crops=_waste(float(crops.sum()), sorted_crops),
    )


def _chance_of_most(count: int, size: int) -> np.ndarray:
    """Returns (count,) the chance of each rank to be the highest of ``size`` different ones."""
    ranks = np.arange(count, dtype=np.float64)
    chance = np.full(count, size / count)
    for k in range(size - 1):
        chance *= np.maximum(ranks - k, 0) / (count - 1 - k)
    return chance


def _waste(used: float, padded: float) -> float:
    # Sums in other orders differ in their last bits, on either side of zero too.
    return max(0.0, round(1 - used / padded, 12)) if padded else 0.0


def _tokens_and_crops(height: int, width: int, num_crops: int, crop_px: int, tokens_per_side: int) -> Sequence[int]:
    try:
        layout = hd_layout(height, width, num_crops, crop_px)
    except ValueError:  # too elongated, or the file cannot be used and has no size
        return 0, 0
    return num_image_tokens(layout.grid, tokens_per_side), layout.num_crops
