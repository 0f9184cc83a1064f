"""Image files and the image processor: the pixels of a plain computation, or an error that says what is wrong.

Sizes from 1 x 1 to needles, every mode of PIL, films, truncated and damaged files, and files that ask for far more
memory or time than they have bytes.
"""

import io
import json
import math
import os
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from torch.nn import functional as F

from phi3v.data.dataset import ConversationDataset
from phi3v.data.images import (
    MAX_JPEG_SCANS,
    MAX_TILE_PIXELS,
    UnusableImageError,
    check_image,
    open_image,
    read_image,
)
from phi3v.data.schema import SampleError
from phi3v.geometry import hd_layout
from phi3v.model.image_processing_phi3_v import CLIP_MEAN, CLIP_STD, Phi3VImageProcessor

FUZZ = settings.get_profile("phi3v-fuzz")
CROP_PX = 28
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "AVIF")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's notes on damaged TIFF files

SIDE = st.integers(1, 90) | st.sampled_from([1, 2, 337, 400])
SIZE = st.tuples(SIDE, SIDE) | st.sampled_from([(1, 5000), (5000, 1), (1, 1), (2, 3000), (1, 28), (29, 28)])


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    dice = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        return Image.fromarray(dice.integers(0, 300, (height, width)).astype(kind))
    image = Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for step in {"LAB": ("LAB",), "La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("RGBA", "PA")}.get(
        mode, (mode,)
    ):
        if step == "LAB":
            from PIL import ImageCms

            profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
            assert image is not None
        else:
            image = image.convert(step)
    return image


def plain_crops(image: Image.Image, num_crops: int) -> torch.Tensor:
    """The published transform in plain steps: turn, scale, pad, turn back, normalise, cut."""
    rgb = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGB")
    is_tall = rgb.width < rgb.height
    if is_tall:
        rgb = rgb.transpose(Image.Transpose.TRANSPOSE)
    ratio = rgb.width / rgb.height
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    width = (scale - 1) * CROP_PX
    height = int(width / ratio)
    if height < 1:
        raise ValueError("too elongated")
    padded = math.ceil(height / CROP_PX) * CROP_PX
    canvas = Image.new("RGB", (width, padded), (255, 255, 255))
    canvas.paste(rgb.resize((width, height), Image.Resampling.BILINEAR), (0, (padded - height) // 2))
    if is_tall:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    view = F.interpolate(pixels[None], (CROP_PX, CROP_PX), mode="bicubic", align_corners=False)
    tiles = pixels.unfold(1, CROP_PX, CROP_PX).unfold(2, CROP_PX, CROP_PX).permute(1, 2, 0, 3, 4)
    return torch.cat([view, tiles.reshape(-1, 3, CROP_PX, CROP_PX)])


# --- the processor


@FUZZ
@given(size=SIZE, mode=st.sampled_from(MODES), num_crops=st.integers(1, 20), seed=st.integers(0, 9))
@example(size=(1, 5000), mode="RGB", num_crops=1, seed=0)
@example(size=(5000, 1), mode="L", num_crops=20, seed=0)
@example(size=(1, 1), mode="1", num_crops=1, seed=0)
@example(size=(3, 1), mode="P", num_crops=20, seed=0)
def test_any_image_is_cut_as_the_plain_transform_cuts_it(
    size: tuple[int, int], mode: str, num_crops: int, seed: int
) -> None:
    image = noise(*size, mode, seed)
    processor = Phi3VImageProcessor(num_crops=num_crops, crop_px=CROP_PX, num_img_tokens=1)
    try:
        expected = plain_crops(image, num_crops)
    except ValueError:
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} px \(h x w\) is too elongated"):
            processor.preprocess(image)
        return
    cut = processor.preprocess(image)
    assert cut["pixel_values"].shape == (1, *expected.shape)
    torch.testing.assert_close(cut["pixel_values"][0], expected, rtol=0, atol=1e-5)
    layout = hd_layout(*size, num_crops, CROP_PX)
    assert cut["num_img_tokens"] == [processor.image_token_count(*size)]
    assert cut["image_sizes"].tolist() == [list(layout.padded)]


@FUZZ
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    kind=st.sampled_from(["uint8", "int8", "uint16", "float32", "bool", "object"]),
)
@example(shape=(0, 5), kind="uint8")
@example(shape=(5, 0, 3), kind="uint8")
def test_any_array_is_an_image_or_is_refused_by_its_shape(shape: tuple[int, ...], kind: str) -> None:
    processor = Phi3VImageProcessor(num_crops=2, crop_px=CROP_PX, num_img_tokens=1)
    array = np.zeros(shape, dtype=kind)
    is_image = kind == "uint8" and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) and all(shape[:2])
    if is_image:
        expected = plain_crops(Image.fromarray(array), 2) if max(shape[:2]) < 40 * min(shape[:2]) else None
        if expected is not None:
            torch.testing.assert_close(processor.preprocess(array)["pixel_values"][0], expected, rtol=0, atol=1e-5)
        return
    with pytest.raises((TypeError, ValueError), match="an image"):
        processor.preprocess(array)


# --- files


def encoded(image: Image.Image, image_format: str) -> bytes:
    """Some formats hold few modes; what they hold is what must come out."""
    file = io.BytesIO()
    try:
        image.save(file, image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    except (OSError, ValueError, KeyError, TypeError):
        assume(False)
    return file.getvalue()


def outcome(path: Path) -> np.ndarray | UnusableImageError:
    try:
        return np.asarray(read_image(path).convert("RGB"))
    except UnusableImageError as error:
        assert error.reason and error.remedy.endswith(".") and len(error.found) < 2000
        return error


@FUZZ
@given(size=SIZE, mode=st.sampled_from(MODES), image_format=st.sampled_from(FORMATS))
def test_whole_files_of_any_mode_give_pils_own_pixels(
    tmp_path_factory: pytest.TempPathFactory, size: tuple[int, int], mode: str, image_format: str
) -> None:
    assume(image_format != "AVIF" or features.check("avif"))
    path = tmp_path_factory.getbasetemp() / "whole"
    path.write_bytes(encoded(noise(*size, mode), image_format))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    pixels = outcome(path)
    assert isinstance(pixels, np.ndarray), pixels.found
    assert np.array_equal(pixels, expected)
    assert check_image(path, decode=False) == check_image(path, decode=True) == expected.shape[:2]


@FUZZ
@given(
    image_format=st.sampled_from(FORMATS),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 7)), max_size=6),
    header=st.booleans(),
)
def test_damaged_files_give_pixels_of_their_size_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory,
    image_format: str,
    keep: float,
    flips: list[tuple[float, int]],
    header: bool,
) -> None:
    assume(image_format != "AVIF" or features.check("avif"))
    content = bytearray(encoded(noise(40, 52), image_format))
    reach = min(len(content), 200) if header else len(content)
    for place, bit in flips:
        content[int(place * reach)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: math.ceil(len(content) * keep)])
    result = outcome(path)
    for decode in (False, True):
        try:
            size = check_image(path, decode)
        except UnusableImageError as error:
            assert error.reason
        else:
            # What the header promised is what decoding gives: lengths are computed from the one, pixels from the other.
            assert isinstance(result, UnusableImageError) or result.shape[:2] == size


@FUZZ
@given(
    content=st.binary(max_size=200),
    start=st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"GIF89a",
            b"BM",
            b"II*\0",
            b"MM\0*",
            b"RIFF\0\0\0\0WEBPVP8 ",
            b"P6 9 9 255\n",
            b"\0\0\0\x0cjP  \r\n\x87\n",
            b"\xff\x4f\xff\x51",
            b"\0\0\0\x1cftypavif",
        ]
    ),
)
def test_any_bytes_are_pixels_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(start + content)
    result = outcome(path)
    assert isinstance(result, UnusableImageError) or result.ndim == 3


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, image_format: str) -> None:
    frames = [noise(20, 30, seed=k) for k in range(4)]
    path = tmp_path / "film"
    options = {"lossless": True} if image_format == "WEBP" else {}
    frames[0].save(path, image_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as film:
        assert film.n_frames == 4  # pyright: ignore[reportAttributeAccessIssue]
        expected = np.asarray(film.convert("RGB"))
    assert np.array_equal(outcome(path), expected)
    if image_format != "GIF":
        assert np.array_equal(expected, np.asarray(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_turn_nothing(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.png"
    noise(20, 30).save(path, exif=exif)
    assert np.array_equal(outcome(path), np.asarray(noise(20, 30)))


# --- bombs: far more work than bytes


def png(height: int, width: int, data: bytes, before: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    if before:
        header += chunk(before[:4], before[4:])
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(**tags: int) -> bytes:
    numbers = {"width": 256, "height": 257, "compression": 259, "strip": 273, "rows": 278, "strip_bytes": 279}
    numbers |= {"tile_width": 322, "tile_length": 323, "tile": 324, "tile_bytes": 325}
    entries = {258: 8, 262: 1, 277: 1, **{numbers[name]: value for name, value in tags.items()}}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(600)


def jpeg_of_many_scans(copies: int, **options: bool) -> bytes:
    content = encoded(noise(64, 64), "JPEG") if not options else None
    if content is None:
        file = io.BytesIO()
        noise(64, 64).save(file, "JPEG", **options)
        content = file.getvalue()
    first = content.index(b"\xff\xda")
    large = bytearray(content[:first])
    frame = large.index(b"\xff\xc2" if options else b"\xff\xc0")
    large[frame + 5 : frame + 9] = struct.pack(">HH", 9000, 9000)
    return bytes(large) + content[first:-2] * copies + b"\xff\xd9"


ZEROS = zlib.compress(bytes(200_000_000), 9)
BOMBS = {
    "text chunk": png(4, 4, zlib.compress(bytes(52)), b"zTXtk\0\0" + ZEROS),
    "translated text chunk": png(4, 4, zlib.compress(bytes(52)), b"iTXtk\0\1\0\0\0" + ZEROS),
    "colour profile": png(4, 4, zlib.compress(bytes(52)), b"iCCPk\0\0" + ZEROS),
    "more pixels than declared": png(4, 4, ZEROS),
    "large and empty PNG": png(9400, 9400, zlib.compress(bytes(100))),
    "large and empty PPM": b"P6 9400 9400 255\n",
    "large and empty GIF": b"GIF89a"
    + struct.pack("<HHBBB", 9400, 9400, 0x80, 0, 0)
    + bytes(6)
    + b","
    + bytes(9)
    + b"\x02\x02\x4c\x01\0;",
    "huge GIF": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(9) + b"\x02\x02\x4c\x01\0;",
    "PPM of many digits": b"P6 " + b"9" * 1_000_000 + b" 1 255\n",
    "tile of an LZW TIFF": tiff(
        width=16, height=16, compression=5, tile_width=46_320, tile_length=46_320, tile=300, tile_bytes=50
    ),
    "tile of a deflated TIFF": tiff(
        width=16, height=16, compression=8, tile_width=30_000, tile_length=30_000, tile=300, tile_bytes=50
    ),
    "rows of a strip": tiff(width=16, height=16, compression=5, strip=300, rows=2**32 - 1, strip_bytes=50),
    "scans of a progressive JPEG": jpeg_of_many_scans(400, progressive=True),
    "zip": b"PK\x03\x04" + bytes(100),
}
REFUSED_BY_LIMIT = ("huge GIF", "tile of an LZW TIFF", "tile of a deflated TIFF", "scans of a progressive JPEG")


def look_at_all(folder: Path) -> tuple[dict[str, tuple[list[str], float]], float]:
    """Returns, by name, what each way of reading says and the seconds it takes, and the memory taken in all, MiB."""
    found = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sorted(folder.iterdir()):
        started = time.process_time()
        reasons = []
        for look in (lambda path: check_image(path, False), lambda path: check_image(path, True), read_image):
            try:
                look(path)
                reasons.append("")
            except UnusableImageError as error:
                reasons.append(error.reason)
        found[path.name] = reasons, time.process_time() - started
    return found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_bombs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    (tmp_path / "bombs").mkdir()
    for name, content in BOMBS.items():
        assert len(content) < 2_000_000
        (tmp_path / "bombs" / name).write_bytes(content)
    child = os.fork()
    if child == 0:  # so that what earlier tests took does not hide it, and a hang ends
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
            (tmp_path / "found.json").write_text(json.dumps(look_at_all(tmp_path / "bombs")))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found, grown_mib = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(BOMBS)
    assert grown_mib < 600  # a picture of the limit's size takes 256 MiB, and PIL's own copy
    for name, (reasons, seconds) in found.items():
        assert seconds < 10, name
        if name in REFUSED_BY_LIMIT:
            assert reasons == ["decompression bomb"] * 3, name


def refusal(path: Path) -> UnusableImageError:
    with pytest.raises(UnusableImageError) as caught:
        open_image(path)
    return caught.value


def test_limits_are_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(BOMBS["tile of a deflated TIFF"])
    error = refusal(path)
    assert "tiles of 30000x30000 px" in error.found and str(MAX_TILE_PIXELS) in error.found and "tiles" in error.remedy
    path.write_bytes(BOMBS["scans of a progressive JPEG"])
    error = refusal(path)
    assert f"more than {MAX_JPEG_SCANS} scans" in error.found and "progressive" in error.remedy
    path.write_bytes(BOMBS["huge GIF"])
    assert "4294836225 pixels, over the limit of 89478485 pixels" in refusal(path).found


def test_scans_of_a_baseline_jpeg_count_too(tmp_path: Path) -> None:
    """Each component in a scan of its own, again and again: no progressive mode is needed to keep a decoder busy."""
    content = encoded(noise(64, 64), "JPEG")
    start = content.index(b"\xff\xda")
    data = content[start + 14 : -2]
    scan = b"".join(b"\xff\xda\0\x08\x01" + bytes([part, 0]) + b"\0\x3f\0" + data for part in (1, 2, 3))
    path = tmp_path / "image"
    path.write_bytes(content[:start] + scan * 40 + b"\xff\xd9")
    assert refusal(path).reason == "decompression bomb"
    path.write_bytes(content[:start] + scan + b"\xff\xd9")
    assert isinstance(outcome(path), np.ndarray)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_ordinary_jpegs_pass_whatever_follows_them(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "motion.jpg"
    for options in ({}, {"progressive": True}, {"progressive": True, "exif": b"Exif\0\0" + b"\xff\xda" * 200}):
        file = io.BytesIO()
        noise(64, 64, mode).save(file, "JPEG", **options)
        # A film that a phone appends holds these two bytes again and again.
        path.write_bytes(file.getvalue() + b"\xff\xda" * 500)
        with Image.open(file) as image:
            assert np.array_equal(outcome(path), np.asarray(image.convert("RGB")))


def test_large_tiles_of_large_images_pass(tmp_path: Path) -> None:
    path = tmp_path / "slide.tiff"
    noise(300, 500).save(path, tile=True)
    content = tiff(width=16, height=16, compression=1, tile_width=4096, tile_length=4096, tile=300, tile_bytes=50)
    path.write_bytes(content)
    assert open_image(path).size == (16, 16)


# --- paths


NAMES = st.lists(
    st.sampled_from(
        ["..", ".", "a", "inner", "outside.png", "in.png", "link", "loop", "", "~", "\0", "\\..\\", "%2e%2e"]
    )
    | st.text(max_size=3),
    max_size=5,
).map("/".join)


@FUZZ
@given(name=NAMES)
@example(name="../outside.png")
@example(name="link/../../outside.png")
@example(name="/etc/passwd")
@example(name="//etc/passwd")
@example(name="a" * 300)
@example(name="\udcff")
def test_no_path_leaves_the_image_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "confined"
    folder = root / "images"
    if not root.exists():
        (folder / "inner").mkdir(parents=True)
        (folder / "a").mkdir()
        for place in (root / "outside.png", folder / "in.png"):
            noise(3, 3).save(place)
        (folder / "link").symlink_to(root)
        (folder / "loop").symlink_to(folder / "loop")
        turn = {"user": "u", "assistant": "a"}
        (root / "data.jsonl").write_text(json.dumps({"id": "1", "conversations": [turn]}))
    dataset = ConversationDataset(root / "data.jsonl")
    sample = dataset[0]
    try:
        image = dataset.load_image(sample, name)
    except SampleError as error:
        assert str(error).startswith(f"{root / 'data.jsonl'}:1: ") and len(str(error)) < 2000
        return
    # The one image that may be read.
    assert dataset.image_path(sample, name) == (folder / "in.png").resolve()
    assert image.size == (3, 3)
