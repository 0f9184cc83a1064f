"""64-bit names of texts, files and whole lists, small enough to keep one for every sample.

Two different things share a name with a chance of n**2 / 2**65 among n of them: 3e-8 for a million.
"""

import hashlib
from pathlib import Path

import numpy as np

_DIGEST_BYTES = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)


def digest_of_text(text: str) -> int:
    """Returns the name of a text."""
    # A path that is not UTF-8 comes from the system with lone surrogates.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest())


def digest_of_file(path: Path) -> int:
    """Returns the name of a file's content, which is read piece by piece."""
    with path.open("rb") as file:
        return int.from_bytes(
            hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).digest()  # pyright: ignore
        )


def digests_of_lists(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Names consecutive lists of named things; equal names mean the same things in the same order.

    Args:
        items: (m,) uint64, the items of all lists, one list after the other.
        counts: (n,) items of each list; they add up to m.

    Returns:
        (n,) uint64; 0 for an empty list.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    rows = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(items), dtype=np.int64) - (ends - counts)[rows]
    digests = np.zeros(len(counts), dtype=np.uint64)
    np.add.at(digests, rows, scrambled(items + scrambled(place.astype(np.uint64) + np.uint64(1))))
    return digests


def scrambled(values: np.ndarray) -> np.ndarray:
    """Maps (n,) uint64 one to one so that every bit of the result depends on every bit of the value.

    Source: the finalizer of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    values = values * _ODD
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
