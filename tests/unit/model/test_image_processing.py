"""The HD transform against a plain one written from docs/internals.md, bit by bit, and images that people have."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from phi3v.model.image_processing_phi3_v import CLIP_MEAN, CLIP_STD, Phi3VImageProcessor

EDGE = 28
"""Crop edge of most tests here, pixels: the transform is the same at every edge."""

TOLERANCE = 1e-5
"""Absolute, on normalised pixels of magnitude 2: a few float32 roundings."""


def small(num_crops: int = 4) -> Phi3VImageProcessor:
    return Phi3VImageProcessor(num_crops=num_crops, crop_px=EDGE, num_img_tokens=1)


def noise(h: int, w: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng((h, w, channels)).integers(0, 256, (h, w, channels), dtype=np.uint8)


def reference(image: Image.Image, num_crops: int, edge: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Returns an image's crops, global view first, and its padded (h, w); docs/internals.md line by line."""
    pixels = np.asarray(image.convert("RGB"))
    is_portrait = pixels.shape[1] < pixels.shape[0]
    if is_portrait:
        pixels = pixels.swapaxes(0, 1)
    h, w = pixels.shape[:2]
    ratio = w / h
    scale = max(s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops)
    new_w, new_h = edge * scale, int(edge * scale / ratio)
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize((new_w, new_h), Image.Resampling.BILINEAR)
    missing = -new_h % edge
    padded = np.full((new_h + missing, new_w, 3), 255, np.uint8)
    padded[int(missing / 2) : int(missing / 2) + new_h] = np.asarray(resized)
    if is_portrait:
        padded = padded.swapaxes(0, 1)
    normalised = ((torch.tensor(padded) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)
    crops = [F.interpolate(normalised[None], (edge, edge), mode="bicubic", align_corners=False, antialias=False)[0]]
    for top in range(0, normalised.shape[1], edge):
        for left in range(0, normalised.shape[2], edge):
            crops.append(normalised[:, top : top + edge, left : left + edge])
    return torch.stack(crops), (normalised.shape[1], normalised.shape[2])


def assert_as_reference(image: Image.Image, num_crops: int, edge: int = EDGE) -> None:
    processor = Phi3VImageProcessor(num_crops=num_crops, crop_px=edge, num_img_tokens=1)
    crops, padded = reference(image, num_crops, edge)
    features = processor(image)
    assert features["image_sizes"].tolist() == [list(padded)]
    torch.testing.assert_close(features["pixel_values"][0], crops, atol=0, rtol=0)


@pytest.mark.parametrize("num_crops", [*range(1, 10), 16])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (50, 50), (40, 173), (173, 40)])
def test_against_the_reference(num_crops: int, size: tuple[int, int]) -> None:
    assert_as_reference(Image.fromarray(noise(*size)), num_crops)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 16), st.sampled_from(["RGB", "L", "LA", "1"]))
def test_against_the_reference_at_any_size(h: int, w: int, num_crops: int, mode: str) -> None:
    try:
        small(num_crops).layout(h, w)
    except ValueError as error:
        assert "too elongated" in str(error)
        return
    assert_as_reference(Image.fromarray(noise(h, w)).convert(mode), num_crops)


@pytest.mark.parametrize(
    ("size", "num_crops"), [((1, 1), 4), ((1, 400), 16), ((400, 1), 16), ((2, 3), 1), ((1100, 850), 16)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_against_the_reference_at_the_published_edge(size: tuple[int, int], num_crops: int, mode: str) -> None:
    assert_as_reference(Image.fromarray(noise(*size)).convert(mode), num_crops, edge=336)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "RGBa", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_through_pils_rgb(mode: str) -> None:
    image = (
        Image.new("LAB", (30, 20), (120, 20, 250)) if mode == "LAB" else Image.fromarray(noise(20, 30)).convert(mode)
    )
    expected = small()(image.convert("RGB"))
    torch.testing.assert_close(small()(image)["pixel_values"], expected["pixel_values"], atol=0, rtol=0)


def solid(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (EDGE, EDGE), colour)


def palette_with_transparency() -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (solid("RGB", (10, 200, 30)), (10, 200, 30)),
        (solid("RGBA", (10, 200, 30, 0)), (10, 200, 30)),  # alpha is dropped, not painted over white
        (palette_with_transparency(), (10, 200, 30)),
        (solid("L", 77), (77, 77, 77)),
        (solid("LA", (77, 3)), (77, 77, 77)),
        (solid("1", 1), (255, 255, 255)),
        (solid("CMYK", (0, 0, 0, 0)), (255, 255, 255)),
        (np.full((EDGE, EDGE), 77, np.uint8), (77, 77, 77)),
        (np.full((EDGE, EDGE, 3), (10, 200, 30), np.uint8), (10, 200, 30)),
        (np.full((EDGE, EDGE, 4), (10, 200, 30, 0), np.uint8), (10, 200, 30)),
    ],
    ids=["RGB", "RGBA", "palette", "L", "LA", "1", "CMYK", "array-2d", "array-3", "array-4"],
)
def test_colours(image: Image.Image | np.ndarray, rgb: tuple[int, int, int]) -> None:
    expected = (torch.tensor(rgb) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    crops = small()(image)["pixel_values"]
    torch.testing.assert_close(crops, expected[:, None, None].expand_as(crops), atol=TOLERANCE, rtol=0)


def test_padding_is_white_above_and_below() -> None:
    tiles = small(1)(Image.new("RGB", (EDGE, EDGE // 2), (0, 0, 0)))["pixel_values"][0, 1]
    white, black = [(torch.tensor(v) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD) for v in (1.0, 0.0)]
    for row in range(EDGE):
        is_image = EDGE // 4 <= row < EDGE // 4 + EDGE // 2
        expected = (black if is_image else white)[:, None].expand(3, EDGE)
        torch.testing.assert_close(tiles[:, row], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("PNG", "L", {"transparency": 7}),
        ("PNG", "1", {"transparency": 0}),
        ("PNG", "RGB", {"transparency": (7, 7, 7)}),
        ("GIF", "L", {"transparency": 7}),
        ("GIF", "P", {}),
        ("JPEG", "L", {}),
        ("TIFF", "1", {"compression": "group4"}),
    ],
)
def test_files_that_are_not_read_yet(image_format: str, mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page"
    Image.fromarray(noise(70, 50)).convert(mode).save(path, image_format, **options)
    with Image.open(path) as lazy, Image.open(path) as image:
        expected, _ = reference(image, 9, EDGE)
        torch.testing.assert_close(small(9)(lazy)["pixel_values"][0], expected, atol=0, rtol=0)


def test_arrays_are_taken_as_images() -> None:
    pixels = noise(40, 70)
    assert_same = torch.testing.assert_close
    assert_same(small()(pixels)["pixel_values"], small()(Image.fromarray(pixels))["pixel_values"], atol=0, rtol=0)


def test_eight_images_are_as_eight_calls() -> None:
    images = [Image.fromarray(noise(20 + 9 * index, 100 - 8 * index)) for index in range(8)]
    processor = small(9)
    together = processor(images)
    assert together["pixel_values"].shape[:2] == (8, max(len(processor(i)["pixel_values"][0]) for i in images))
    for index, image in enumerate(images):
        alone = processor(image)
        crops = alone["pixel_values"].shape[1]
        torch.testing.assert_close(together["pixel_values"][index, :crops], alone["pixel_values"][0], atol=0, rtol=0)
        assert not together["pixel_values"][index, crops:].any()
        assert together["image_sizes"][index].tolist() == alone["image_sizes"][0].tolist()
        assert together["num_img_tokens"][index] == alone["num_img_tokens"][0]
        assert alone["num_img_tokens"] == [processor.image_token_count(image.height, image.width)]


def test_num_crops_of_a_call_wins() -> None:
    image = Image.fromarray(noise(50, 50))
    one, other = small(4)(image, num_crops=9), small(9)(image)
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], atol=0, rtol=0)
    assert small(4).image_token_count(50, 50, num_crops=9) == other["num_img_tokens"][0]


def test_orientation_tags_are_not_applied() -> None:
    image = Image.fromarray(noise(20, 60))
    image.getexif()[0x0112] = 6  # turn by 90 degrees
    torch.testing.assert_close(
        small()(image)["pixel_values"], small()(Image.fromarray(noise(20, 60)))["pixel_values"], atol=0, rtol=0
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5, 3), np.float32), "float32"),
        (np.zeros((5, 5), np.uint16), "uint16"),
        (np.zeros((3, 5, 5), np.uint8), r"\(3, 5, 5\)"),
        (np.zeros((2, 5, 5, 3), np.uint8), r"\(2, 5, 5, 3\)"),
        ("picture.png", "got str"),
        (torch.zeros(3, 5, 5), "got Tensor"),
    ],
    ids=["float", "16-bit", "channels-first", "video", "path", "tensor"],
)
def test_refuses_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        small()([image])


def test_refuses_wrong_settings() -> None:
    with pytest.raises(ValueError, match="num_crops is 0"):
        Phi3VImageProcessor(num_crops=0)
    with pytest.raises(ValueError, match="num_crops is 0"):
        small()(Image.new("RGB", (5, 5)), num_crops=0)
    with pytest.raises(ValueError, match="num_img_tokens is 145, must be a square"):
        Phi3VImageProcessor(num_img_tokens=145)
    with pytest.raises(TypeError, match=r"does not know num_crop$"):
        Phi3VImageProcessor(num_crop=4)


def test_settings_come_from_the_files(golden_dir: Path, tiny_dir: Path, tmp_path: Path) -> None:
    published = Phi3VImageProcessor.from_pretrained(golden_dir)
    assert (published.num_crops, published.crop_px, published.num_img_tokens) == (4, 336, 144)
    assert Phi3VImageProcessor.from_pretrained(golden_dir, num_crops=16).num_crops == 16

    # Without a crop edge of its own the file follows config.json's vision_config.
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(tiny_dir / name, tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"num_crops": 3, "num_img_tokens": 144}))
    followed = Phi3VImageProcessor.from_pretrained(tmp_path)
    assert (followed.num_crops, followed.crop_px, followed.num_img_tokens) == (3, 56, 4)


def test_saves_the_published_file(golden_dir: Path, tiny_dir: Path, tmp_path: Path) -> None:
    published = json.loads((golden_dir / "preprocessor_config.json").read_text())
    del published["auto_map"]
    Phi3VImageProcessor.from_pretrained(golden_dir).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == published

    Phi3VImageProcessor.from_pretrained(tiny_dir).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["crop_px"] == 56
