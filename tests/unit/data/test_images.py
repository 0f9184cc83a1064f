import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from phi3v.data.images import MAX_IMAGE_PIXELS, UnusableImageError, check_image, read_image

BOTH_MODES = pytest.mark.parametrize("decode", [False, True], ids=["header", "decode"])


def noise(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image_format: str, **options) -> bytes:
    file = io.BytesIO()
    noise().save(file, image_format, **options)
    return file.getvalue()


def png_header_of(height: int, width: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def refusal(path: Path, decode: bool) -> UnusableImageError:
    with pytest.raises(UnusableImageError) as caught:
        check_image(path, decode)
    assert caught.value.remedy.endswith(".")
    return caught.value


@BOTH_MODES
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_whole_files_pass_and_give_their_size(tmp_path, image_format, decode):
    path = tmp_path / "image"
    path.write_bytes(encoded(image_format))
    assert check_image(path, decode) == (48, 64)
    assert read_image(path).size == (64, 48)


@BOTH_MODES
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_cut_short_are_found(tmp_path, image_format, kept, decode):
    content = encoded(image_format)
    path = tmp_path / "image"
    path.write_bytes(content[: int(len(content) * kept)])
    assert refusal(path, decode).reason in ("corrupt image", "not an image")


def test_damage_inside_is_found_by_decoding_only(tmp_path):
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 0xFF
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert check_image(path, decode=False) == (48, 64)
    assert refusal(path, decode=True).reason == "corrupt image"
    with pytest.raises(UnusableImageError):
        read_image(path)


def test_a_broken_chunk_name_is_found(tmp_path):
    file = io.BytesIO()
    noise(200, 300).save(file, "PNG")
    content = bytearray(file.getvalue())
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    content[second : second + 4] = b"\0\0\0\0"
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert refusal(path, decode=True).reason == "corrupt image"


@BOTH_MODES
def test_bytes_behind_a_whole_image_are_no_fault(tmp_path, decode):
    path = tmp_path / "motion.jpg"
    path.write_bytes(encoded("JPEG") + b"a film that a phone appended")
    assert check_image(path, decode) == (48, 64)


@BOTH_MODES
def test_a_file_that_is_no_image_is_refused(tmp_path, decode):
    path = tmp_path / "page.png"
    path.write_text("<html>404</html>")
    assert refusal(path, decode).reason == "not an image"
    path.write_bytes(b"")
    assert refusal(path, decode).reason == "not an image"


@BOTH_MODES
def test_formats_that_start_other_programs_are_refused(tmp_path, decode):
    path = tmp_path / "drawing.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with Image.open(path) as image:  # PIL itself would go on to run Ghostscript
        assert image.format == "EPS"
    assert refusal(path, decode).reason == "not an image"


@BOTH_MODES
def test_missing_files_folders_and_pipes_are_refused_at_once(tmp_path, decode):
    assert refusal(tmp_path / "none.png", decode).reason == "missing image"
    assert refusal(tmp_path, decode).reason == "missing image"
    os.mkfifo(tmp_path / "pipe.png")
    assert refusal(tmp_path / "pipe.png", decode).reason == "missing image"


@BOTH_MODES
@pytest.mark.parametrize("pixels", [MAX_IMAGE_PIXELS + 1, 4 * MAX_IMAGE_PIXELS])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, pixels, decode):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_of(1, pixels))
    error = refusal(path, decode)
    assert error.reason == "decompression bomb"
    assert "Scale it down" in error.remedy


def test_the_pixel_limit_does_not_hang_on_global_settings(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_of(MAX_IMAGE_PIXELS // 100, 101))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(path, decode=True).reason == "decompression bomb"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert refusal(path, decode=True).reason == "decompression bomb"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_pixels_are_those_of_a_plain_conversion(tmp_path, mode):
    path = tmp_path / "image.tiff"
    if mode == "I;16":
        Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)).save(path)
    else:
        noise().convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    image = read_image(path)
    assert np.array_equal(np.asarray(image.convert("RGB")), expected)
    assert image.mode == ("L" if mode in ("1", "L", "LA") else "RGB")


def test_orientation_tags_are_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to look at it"
    path = tmp_path / "phone.jpg"
    noise().save(path, exif=exif)
    assert check_image(path, decode=False) == (48, 64)
    assert read_image(path).size == (64, 48)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's notes on damaged TIFF files
def test_random_damage_gives_pixels_or_our_error(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "image"
    outcomes = set()
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"):
        content = encoded(image_format)
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 3, 30))):
                damaged[rng.randrange(min(len(damaged), rng.choice((40, 400, 10_000))))] = rng.randrange(256)
            path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
            for check in (lambda: check_image(path, False), lambda: check_image(path, True), lambda: read_image(path)):
                try:
                    check()
                    outcomes.add("pixels")
                except UnusableImageError as error:
                    outcomes.add(error.reason)
    assert outcomes >= {"pixels", "corrupt image", "not an image"}
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
