"""Near duplicates among perceptual hashes, without comparing every image with every other."""

from itertools import combinations

import numpy as np

MOST_PHASH_BITS = 4
"""Bits of 64 in which the frequency hashes of near duplicates may differ."""

MOST_DHASH_BITS = 6
"""Bits of 64 in which their difference hashes may differ. Both hashes must agree: pages of print share low frequencies.
Source: measured on re-encoded, resized and unrelated pictures, docs/LOG.md."""

WINDOW = 128
"""Entries of a bucket that each entry is compared with. Buckets are larger only where thousands of hashes resemble each
other; links through neighbours join most of those all the same, and the work stays in proportion to the images."""

_BLOCK_SHIFTS = (0, 11, 22, 33, 43, 53)
_BLOCK_BITS = (11, 11, 11, 10, 10, 11)


def near_groups(phashes: np.ndarray, dhashes: np.ndarray) -> np.ndarray:
    """Numbers groups of images so that near duplicates, linked directly or through others, share a number.

    Hashes are cut into six blocks. Two that differ in at most four bits agree in at least two blocks, so it is enough
    to compare, for each of the 15 pairs of blocks, hashes that agree in both: 2**20 buckets or more.

    Args:
        phashes: (n,) uint64.
        dhashes: (n,) uint64.

    Returns:
        (n,) int64, the smallest index of each image's group.
    """
    if len(phashes) == 0:
        return np.zeros(0, dtype=np.int64)
    both, first, inverse = np.unique(
        np.stack([phashes, dhashes], axis=1), axis=0, return_index=True, return_inverse=True
    )
    phash, dhash = both[:, 0], both[:, 1]
    blocks = [
        (phash >> np.uint64(shift)) & np.uint64(2**bits - 1)
        for shift, bits in zip(_BLOCK_SHIFTS, _BLOCK_BITS, strict=True)
    ]
    parents = np.arange(len(both))
    for one, other in combinations(range(len(blocks)), 2):
        keys = (blocks[one] << np.uint64(max(_BLOCK_BITS))) | blocks[other]
        order = np.lexsort((dhash, keys))
        keys = keys[order]
        active = np.arange(len(keys))
        for distance in range(1, WINDOW + 1):
            active = active[active + distance < len(keys)]
            active = active[keys[active] == keys[active + distance]]
            if not len(active):
                break
            left, right = order[active], order[active + distance]
            is_near = (num_bits(phash[left] ^ phash[right]) <= MOST_PHASH_BITS) & (
                num_bits(dhash[left] ^ dhash[right]) <= MOST_DHASH_BITS
            )
            parents = _linked(parents, left[is_near], right[is_near])
    smallest = np.full(len(both), len(phashes))
    np.minimum.at(smallest, parents, first)
    return smallest[parents][inverse.reshape(-1)]


def num_bits(values: np.ndarray) -> np.ndarray:
    """Counts the bits set in each of (n,) uint64."""
    return np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)


def _linked(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Joins the groups of each pair; ``parents`` names the root of every group directly, before and after."""
    one, other = parents[left], parents[right]
    is_new = one != other
    for a, b in np.unique(np.stack([one[is_new], other[is_new]], axis=1), axis=0):
        root_a, root_b = _root(parents, a), _root(parents, b)
        parents[max(root_a, root_b)] = min(root_a, root_b)
    while is_new.any():
        roots = parents[parents]
        if (roots == parents).all():
            break
        parents = roots
    return parents


def _root(parents: np.ndarray, entry: int) -> int:
    while parents[entry] != entry:
        entry = parents[entry]
    return entry
