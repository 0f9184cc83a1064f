"""One image file: what its header says, and the hashes by which its copies are known."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..data.images import DECODING_ERRORS, check_image, decode_image, open_image
from .hashing import digest_of_file

HASHED_PX = 32
"""Edge of the grey image that is hashed, pixels."""

FLAT_DEVIATION = 3.0
"""Grey levels (of 255): an image whose 32 x 32 grey version deviates less from its mean is blank. What is left of it is
noise, so its perceptual hashes say nothing."""

_DHASH_MARGIN = 2.0
"""Grey levels by which a cell must outshine its neighbour; white paper is then equal everywhere, also after JPEG."""

_DRAFT_PX = 2 * HASHED_PX
_SECTION = 8
_ORIENTATION_TAG = 0x0112

WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of more than 8 bits a channel; their conversion to RGB clips at 255."""


class Look(NamedTuple):
    """What one image file is like.

    Attributes:
        problem: why it cannot be used, in a few words, or empty; then nothing else is known.
        height: px.
        width: px.
        format: Pillow's name.
        mode: Pillow's name.
        orientation: EXIF orientation that Pillow's ``convert`` does not apply, 1 (upright) to 8.
        has_alpha: whether transparency is dropped.
        is_animated: whether further frames are dropped.
        is_flat: whether it is blank. False where not hashed.
        content: digest of the file's bytes; 0 where not hashed.
        phash: 64 bits, signs of low frequencies; 0 where not hashed.
        dhash: 64 bits, signs of differences from cell to cell; 0 where not hashed.
    """

    problem: str
    height: int = 0
    width: int = 0
    format: str = ""
    mode: str = ""
    orientation: int = 1
    has_alpha: bool = False
    is_animated: bool = False
    is_flat: bool = False
    content: int = 0
    phash: int = 0
    dhash: int = 0


def look_at(path: Path, *, decode: bool, hashes: bool) -> Look:
    """Looks at one image file.

    Args:
        path: the file.
        decode: decode it in full resolution, as training will.
        hashes: hash its bytes and its pixels. A JPEG is decoded for that in reduced resolution, everything else whole,
            so damage inside is found as well.

    Raises:
        UnusableImageError: as ``phi3v.data.images.read_image``.
    """
    if not hashes:
        check_image(path, decode)  # judges the end of the file, which hashing finds by reading it
    with open_image(path) as image:
        look = Look(
            problem="",
            height=image.height,
            width=image.width,
            format=image.format or "",
            mode=image.mode,
            orientation=_orientation(image),
            has_alpha=image.has_transparency_data,
            is_animated=_is_animated(image),
        )
        if not hashes:
            return look
        if image.format in ("JPEG", "MPO") and not decode:
            image.draft("L" if image.mode == "RGB" else image.mode, (_DRAFT_PX, _DRAFT_PX))
        grey = decode_image(image).convert("L").resize((HASHED_PX, HASHED_PX), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.float64)
    return look._replace(
        content=digest_of_file(path),
        is_flat=bool(pixels.std() < FLAT_DEVIATION),
        phash=frequency_hash(pixels),
        dhash=difference_hash(pixels),
    )


def frequency_hash(pixels: np.ndarray) -> int:
    """Returns the 64 bits by which the 8 x 8 lowest frequencies exceed their median.

    Args:
        pixels: (32, 32) float, grey levels.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions".
    """
    basis = _cosines()
    frequencies = basis @ pixels @ basis.T
    return _bits(frequencies > np.median(frequencies.ravel()[1:]))


def difference_hash(pixels: np.ndarray) -> int:
    """Returns 64 bits, one for each cell of an 8 x 8 grid: whether it is clearly brighter than the one to its right.

    The last column is compared with the first, so that a slope over the whole image shows too.

    Args:
        pixels: (32, 32) float, grey levels.
    """
    edge = HASHED_PX // _SECTION
    cells = pixels.reshape(_SECTION, edge, _SECTION, edge).mean(axis=(1, 3))
    return _bits(cells - np.roll(cells, -1, axis=1) > _DHASH_MARGIN)


@cache
def _cosines() -> np.ndarray:
    """The rows of the 32-point cosine transform that belong to the 8 lowest frequencies, (8, 32)."""
    places = (np.arange(HASHED_PX) + 0.5) / HASHED_PX
    return np.cos(np.pi * np.arange(_SECTION)[:, None] * places)


def _bits(is_set: np.ndarray) -> int:
    return int.from_bytes(np.packbits(is_set.ravel()).tobytes())


def _orientation(image: Image.Image) -> int:
    if image.format in ("TIFF", "AVIF"):
        return 1  # Pillow turns these itself
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking further would decode all pixels
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DECODING_ERRORS:  # a broken EXIF block does not stop training
        return 1
    return value if value in range(1, 9) else 1


def _is_animated(image: Image.Image) -> bool:
    """Whether the file holds a film or several pages; a phone's second picture (MPO) is neither."""
    if image.format in ("JPEG", "MPO"):
        return False
    try:
        return getattr(image, "is_animated", False)  # which formats have the attribute is Pillow's affair
    except DECODING_ERRORS:  # a frame behind the first is broken; training does not read it
        return True
