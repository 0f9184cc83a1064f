"""Padding, percentiles and histograms against the plain way of computing them."""

import itertools

import numpy as np
import pytest

from phi3v.doctor.lengths import histogram, padding, spread


def samples(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, images, crops of all images, and most crops of one, of samples with 0 to 3 images."""
    generator = np.random.default_rng(count)
    images = [generator.integers(2, 18, generator.integers(0, 4)).tolist() for _ in range(count)]
    return (
        generator.integers(5, 4000, count),
        np.array([len(own) for own in images]),
        np.array([sum(own) for own in images]),
        np.array([max(own, default=0) for own in images]),
    )


def waste_of(
    batches: list[list[int]], lengths: np.ndarray, images: np.ndarray, most: np.ndarray
) -> tuple[float, float]:
    """Pads every batch: rows to the longest, each image to the most crops of any; returns the padded sizes."""
    positions = sum(len(batch) * max(lengths[k] for k in batch) for batch in batches)
    crops = sum(sum(images[k] for k in batch) * max(most[k] for k in batch) for batch in batches)
    return float(positions), float(crops)


@pytest.mark.parametrize("count", [3, 7, 11])
@pytest.mark.parametrize("batch", [2, 4])
def test_random_batches_are_padded_as_all_batches_are_on_the_mean(count: int, batch: int) -> None:
    tokens, images, crops, most = samples(count)
    found = padding(tokens, images, crops, most, batch)
    size = min(batch, count)
    batches = [list(chosen) for chosen in itertools.combinations(range(count), size)]
    positions, padded_crops = waste_of(batches, tokens, images, most)
    used = sum(tokens[k] for chosen in batches for k in chosen)
    used_crops = sum(crops[k] for chosen in batches for k in chosen)
    assert found.tokens == pytest.approx(1 - used / positions)
    assert found.crops == pytest.approx(1 - used_crops / padded_crops)


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_sorted_batches_are_padded_as_a_loop_pads_them(batch: int) -> None:
    tokens, images, crops, most = samples(21)
    found = padding(tokens, images, crops, most, batch)
    order = sorted(range(21), key=lambda k: tokens[k])
    batches = [order[start : start + batch] for start in range(0, 21, batch)]
    positions, padded_crops = waste_of(batches, tokens, images, most)
    assert found.sorted_tokens == pytest.approx(1 - tokens.sum() / positions)
    assert found.sorted_crops == pytest.approx(1 - crops.sum() / padded_crops)


def test_a_shuffled_epoch_of_many_samples_wastes_what_is_foretold() -> None:
    tokens, images, crops, most = samples(4000)
    found = padding(tokens, images, crops, most, 8)
    order = np.random.default_rng(0).permutation(4000).tolist()
    positions, padded_crops = waste_of([order[k : k + 8] for k in range(0, 4000, 8)], tokens, images, most)
    assert found.tokens == pytest.approx(1 - tokens.sum() / positions, abs=0.01)
    assert found.crops == pytest.approx(1 - crops.sum() / padded_crops, abs=0.01)


def test_text_alone_and_nothing_at_all_have_no_padded_crops() -> None:
    none = np.zeros(3, dtype=np.int64)
    assert padding(np.array([5, 5, 5]), none, none, none, 2).crops == 0
    empty = np.zeros(0, dtype=np.int64)
    assert padding(empty, empty, empty, empty, 2).tokens == 0


@pytest.mark.parametrize("count", [1, 2, 10, 99, 100, 101])
def test_percentiles_are_numbers_of_the_data(count: int) -> None:
    numbers = np.random.default_rng(count).integers(0, 1000, count)
    found = spread(numbers)
    ordered = sorted(numbers.tolist())
    for share, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert value == ordered[-(-count * share // 100) - 1]
    assert (found.most, found.mean) == (ordered[-1], pytest.approx(sum(ordered) / count))


@pytest.mark.parametrize("high", [1, 3, 40, 4100, 10**6])
def test_a_histogram_counts_every_number_once_in_few_ranges(high: int) -> None:
    numbers = np.random.default_rng(high).integers(0, high, 500)
    found = histogram(numbers)
    assert len(found.counts) <= 40
    for start, stop, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        assert count == sum(start <= number < stop for number in numbers)
    assert sum(found.counts) == 500
