"""Image files on disk: opened once, from untrusted data, and never half read.

Orientation tags (EXIF) are not applied: the published processing reads the stored pixels through ``convert("RGB")``.
"""

import re
import struct
import zlib
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

MAX_IMAGE_PIXELS = 89_478_485
"""Largest image that is read, pixels; PIL's own warning threshold, an error here. RGB of that size takes 256 MiB."""

MAX_TILE_PIXELS = 4096 * 4096
"""Largest tile of a TIFF file, pixels, unless the image is half as large: a tile is decoded whole, also for an image of
one pixel."""

MAX_JPEG_SCANS = 100
"""Most scans of a JPEG. Progressive encoders write about ten; every one goes over all pixels again, so that a file of a
megabyte could keep a decoder busy for minutes."""

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read, in PIL's names. PIL knows more, and some of them (EPS) start other programs."""

_GRAY_MODES = ("1", "L", "LA")

DECODING_ERRORS = (
    OSError,
    SyntaxError,  # PIL: a broken PNG chunk
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What PIL's decoders raise on damaged files; they promise no narrower set."""

_MAX_SHOWN_CHARS = 300
_TAIL_BYTES = 64
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # none of those that stand within a scan's data
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_END_OF_IMAGE = 0xDA, 0xD9
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"


class UnusableImageError(Exception):
    """An image file cannot be used. The data set adds which sample wanted it.

    Attributes:
        found: what is wrong with the file, a phrase that follows its name.
        remedy: what to do about it, a sentence.
        reason: a few words that files with the same fault share.
    """

    def __init__(self, found: str, remedy: str, reason: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy
        self.reason = reason


def read_image(path: Path) -> Image.Image:
    """Decodes an image file to RGB, or to ``L`` where it holds no colour; a file with several frames gives its first.

    The RGB of a file without colour would repeat one channel three times, and every later step would work on it thrice.

    Raises:
        UnusableImageError: missing, not an image, over a limit of this module, or damaged.
    """
    with open_image(path) as image:
        return decode_image(image)


def check_image(path: Path, decode: bool) -> tuple[int, int]:
    """Returns an image's (h, w) in pixels, after making sure that it can be read.

    Args:
        path: the file.
        decode: decode all pixels, as training will. Otherwise only the header and the end of the file are read, which
            finds missing files, other file types, decompression bombs and files cut short, but not damage inside; a
            file whose end cannot be judged by a look is decoded all the same.

    Raises:
        UnusableImageError: as ``read_image``.
    """
    with open_image(path) as image:
        if decode or not _ends_whole(path, image.format):
            decode_image(image)
        return image.height, image.width


def open_image(path: Path) -> Image.Image:
    """Opens an image file without decoding it.

    Raises:
        UnusableImageError: missing, not an image, or over a limit of this module.
    """
    try:
        found = "" if path.is_file() else "is not a file" if path.exists() else "does not exist"
    except OSError as error:  # a name that is too long, a folder that may not be searched
        found = f"cannot be looked for ({error.strerror or error})"
    if found:
        place = str(path)
        raise UnusableImageError(
            f"{found} (looked for {place if len(place) <= _MAX_SHOWN_CHARS else '...' + place[-_MAX_SHOWN_CHARS:]})",
            "Correct the path, which is relative to the image folder, or set image_dir to the right folder.",
            "missing image",
        )
    try:
        image = Image.open(path, formats=_readable_formats())
    except UnidentifiedImageError as error:
        raise UnusableImageError(
            f"is not an image that can be read ({path}, {path.stat().st_size} bytes)",
            f"Replace it by a file of one of these formats: {', '.join(IMAGE_FORMATS)}.",
            "not an image",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(_size_in(error)) from error
    except PermissionError as error:
        raise UnusableImageError(
            f"may not be read ({path})", "Give this user the right to read it.", "unreadable image"
        ) from error
    except DECODING_ERRORS as error:
        raise _corrupt(error) from error
    try:
        _refuse_costly(image, path)
    except DECODING_ERRORS as error:
        image.close()
        raise _corrupt(error) from error
    except UnusableImageError:
        image.close()
        raise
    return image


def decode_image(image: Image.Image) -> Image.Image:
    """Decodes an opened file's pixels: mode ``L`` where it has no colour, else RGB.

    Raises:
        UnusableImageError: damaged, or a decompression bomb.
    """
    try:
        image.load()  # while the file is open, and where damage is caught
        mode = "L" if image.mode in _GRAY_MODES else "RGB"
        return image if image.mode == mode else image.convert(mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(_size_in(error)) from error
    except DECODING_ERRORS as error:
        raise _corrupt(error) from error


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _ends_whole(path: Path, image_format: str | None) -> bool:
    """Whether the file's last bytes show that nothing was cut off; False also where they cannot show it."""
    if image_format == "WEBP":
        return True  # opening it compares the file's length with its header's
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        tail = file.read()
    if image_format == "PNG":
        return tail.endswith(_PNG_END)
    return image_format in ("JPEG", "MPO") and tail.rstrip(b"\x00\r\n ").endswith(_JPEG_END)


def _refuse_costly(image: Image.Image, path: Path) -> None:
    """Refuses, before anything is decoded, what would take far more memory or time than its pixels are worth."""
    pixels = image.height * image.width
    if pixels > MAX_IMAGE_PIXELS:
        raise _bomb(f"{image.height}x{image.width} px (h x w)")
    if isinstance(image, TiffImageFile):
        tile = [int(image.tag_v2.get(tag, 0)) for tag in (_TILE_LENGTH_TAG, _TILE_WIDTH_TAG)]
        if tile[0] * tile[1] > max(MAX_TILE_PIXELS, 2 * pixels):
            raise UnusableImageError(
                f"of {image.height}x{image.width} px (h x w) has tiles of {tile[0]}x{tile[1]} px, over the limit of "
                f"{MAX_TILE_PIXELS} pixels (a decompression bomb?)",
                "Save it with smaller tiles or without tiles.",
                "decompression bomb",
            )
    if image.format in ("JPEG", "MPO") and (num_scans := _count_jpeg_scans(path)) > MAX_JPEG_SCANS:
        raise UnusableImageError(
            f"has more than {num_scans - 1} scans, the limit (a decompression bomb?)",
            "Save it again, without progressive mode.",
            "decompression bomb",
        )


def _count_jpeg_scans(path: Path) -> int:
    """Counts a JPEG file's scans, ``MAX_JPEG_SCANS + 1`` at most; of a file with one scan only the header is read."""
    num_scans, num_components, is_progressive = 0, 0, False
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        position = 2
        while num_scans <= MAX_JPEG_SCANS and (marker := _JPEG_MARKER.search(content, position)):
            kind, start = marker[1][0], marker.end()
            if kind == _JPEG_END_OF_IMAGE:
                break
            if kind in _JPEG_FRAMES:
                num_components, is_progressive = int.from_bytes(content[start + 7 : start + 8]), kind & 3 == 2
            if kind == _JPEG_SCAN:
                num_scans += 1
                if not is_progressive and content[start + 2 : start + 3] == bytes([num_components]):
                    break  # it holds all components, so there is no other
            position = start + max(2, int.from_bytes(content[start : start + 2]))
    return num_scans


def _size_in(error: BaseException) -> str:
    """Returns the size that PIL's refusal names; not its limit, which is another."""
    named = re.search(r"\((\d+) pixels\)", str(error))
    return f"{named[1]} pixels" if named else "it would decode to more than its header says"


def _bomb(found: str) -> UnusableImageError:
    return UnusableImageError(
        f"is too large: {found}, over the limit of {MAX_IMAGE_PIXELS} pixels (a decompression bomb?)",
        "Scale it down; the model sees at most a few thousand pixels a side.",
        "decompression bomb",
    )


def _corrupt(error: BaseException) -> UnusableImageError:
    return UnusableImageError(
        f"is damaged or cut short ({type(error).__name__}: {error})",
        "Fetch or write the file again, or take the sample out.",
        "corrupt image",
    )
