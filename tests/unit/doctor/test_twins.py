"""Near duplicates: what comparing every pair would find, in time that does not grow with the square."""

import itertools

import numpy as np

from phi3v.doctor.twins import MOST_DHASH_BITS, MOST_PHASH_BITS, near_groups


def plain_groups(phashes: np.ndarray, dhashes: np.ndarray) -> list[int]:
    groups = list(range(len(phashes)))
    for i, j in itertools.combinations(range(len(phashes)), 2):
        is_near = int(phashes[i] ^ phashes[j]).bit_count() <= MOST_PHASH_BITS
        if is_near and int(dhashes[i] ^ dhashes[j]).bit_count() <= MOST_DHASH_BITS:
            low, high = sorted((groups[i], groups[j]))
            groups = [low if group == high else group for group in groups]
    return groups


def flipped(generator: np.random.Generator, value: int, most: int) -> int:
    for bit in generator.choice(64, size=generator.integers(0, most + 1), replace=False):
        value ^= 1 << int(bit)
    return value


def test_the_groups_are_those_of_comparing_every_pair() -> None:
    generator = np.random.default_rng(0)
    phashes: list[int] = []
    dhashes: list[int] = []
    for _ in range(60):
        phash, dhash = (int(value) for value in generator.integers(0, 2**64, 2, dtype=np.uint64))
        for _ in range(generator.integers(1, 8)):
            phash = flipped(generator, phash, MOST_PHASH_BITS + 1)  # chains, and some just too far
            dhash = flipped(generator, dhash, MOST_DHASH_BITS + 1)
            phashes.append(phash)
            dhashes.append(dhash)
    shuffled = generator.permutation(len(phashes))
    first = np.array(phashes, dtype=np.uint64)[shuffled]
    second = np.array(dhashes, dtype=np.uint64)[shuffled]
    groups = near_groups(first, second)
    assert groups.tolist() == plain_groups(first, second)
    assert 60 < len(set(groups.tolist())) < len(groups)


def test_every_place_of_four_flipped_bits_is_found() -> None:
    generator = np.random.default_rng(1)
    base = int(generator.integers(0, 2**64, dtype=np.uint64))
    for _ in range(300):
        other = base
        for bit in generator.choice(64, size=MOST_PHASH_BITS, replace=False):
            other ^= 1 << int(bit)
        pair = np.array([base, other], dtype=np.uint64)
        assert near_groups(pair, np.zeros(2, dtype=np.uint64)).tolist() == [0, 0]


def test_no_images_and_many_equal_ones_are_no_trouble() -> None:
    assert near_groups(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64)).tolist() == []
    same = np.full(200_000, 5, dtype=np.uint64)
    assert not near_groups(same, same).any()
