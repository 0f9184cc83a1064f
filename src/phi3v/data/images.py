"""Image files on disk: opened once, from untrusted data, and never half read.

Orientation tags (EXIF) are not applied: the published processing reads the stored pixels through ``convert("RGB")``.
"""

import struct
import zlib
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_IMAGE_PIXELS = 89_478_485
"""Largest image that is read, pixels; PIL's own warning threshold, an error here. RGB of that size takes 256 MiB."""

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

_TAIL_BYTES = 64
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
        UnusableImageError: missing, not an image, over ``MAX_IMAGE_PIXELS``, or damaged.
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
        UnusableImageError: missing, not an image, or over ``MAX_IMAGE_PIXELS``.
    """
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise UnusableImageError(
            f"{found} (looked for {path})",
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
        raise _bomb(str(error)) from error
    except PermissionError as error:
        raise UnusableImageError(
            f"may not be read ({path})", "Give this user the right to read it.", "unreadable image"
        ) from error
    except DECODING_ERRORS as error:
        raise _corrupt(error) from error
    if image.height * image.width > MAX_IMAGE_PIXELS:
        image.close()
        raise _bomb(f"{image.height}x{image.width} px (h x w)")
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
        raise _bomb(str(error)) from error
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
