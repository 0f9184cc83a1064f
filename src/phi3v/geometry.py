"""Pure integers: from an image's size to its crops and its decoder positions. The one home of these formulas.

Words: a *crop* is one square tile that CLIP sees (336 px in the published model), a *patch* is one CLIP cell
(14 px), an *image token* is one decoder position. Sizes are ``(h, w)`` in pixels.
"""

from dataclasses import dataclass
from math import ceil

CROP_PX = 336
"""Crop edge of the published model, pixels: CLIP ViT-L/14-336's image size."""

TOKENS_PER_SIDE = 12
"""Image tokens along a crop's edge in the published model: 24 patches a side, merged two by two."""


@dataclass(frozen=True, slots=True)
class HDLayout:
    """Where an image's pixels go in the HD transform.

    Attributes:
        resized: ``(h, w)`` px of the image after its bilinear resize, in the orientation it is resized in
            (landscape: a portrait image is transposed first and back at the end).
        pad_top: white rows above the resized image, px, in that same orientation.
        pad_bottom: white rows below it, px.
        is_transposed: whether the image is portrait (w < h) and so goes through the transform transposed.
        grid: ``(rows, columns)`` of crops in the image's own orientation, the global view not counted.
        padded: ``(h, w)`` px of the padded image in its own orientation; what ``image_sizes`` holds.
    """

    resized: tuple[int, int]
    pad_top: int
    pad_bottom: int
    is_transposed: bool
    grid: tuple[int, int]
    padded: tuple[int, int]

    @property
    def num_crops(self) -> int:
        """Crops that CLIP computes for the image: its tiles and the global view."""
        return self.grid[0] * self.grid[1] + 1


def hd_layout(height: int, width: int, num_crops: int, crop_px: int = CROP_PX) -> HDLayout:
    """Lays an image of ``height`` x ``width`` px out on at most ``num_crops`` tiles.

    The image is scaled, up or down, to the widest whole number of tiles whose rows still fit, then padded with
    white to whole tiles.

    Raises:
        ValueError: a size or ``num_crops`` below 1, or an aspect ratio whose short side would vanish.

    Source: published processor's HD transform.

    >>> hd_layout(1100, 850, num_crops=16).grid  # a portrait page
    (4, 4)
    >>> hd_layout(480, 640, num_crops=4).padded
    (672, 672)
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} px (h x w) has no pixels")
    if num_crops < 1:
        raise ValueError(f"num_crops is {num_crops}, must be at least 1")
    is_transposed = width < height
    short, long = (width, height) if is_transposed else (height, width)
    ratio = long / short
    scale = 1
    while scale * ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    resized_w = scale * crop_px
    resized_h = int(resized_w / ratio)
    if resized_h < 1:
        raise ValueError(f"an image of {height}x{width} px (h x w) is too elongated: its short side vanishes")
    rows = ceil(resized_h / crop_px)
    missing = rows * crop_px - resized_h
    pad_top = missing // 2
    grid = (scale, rows) if is_transposed else (rows, scale)
    return HDLayout(
        resized=(resized_h, resized_w),
        pad_top=pad_top,
        pad_bottom=missing - pad_top,
        is_transposed=is_transposed,
        grid=grid,
        padded=(grid[0] * crop_px, grid[1] * crop_px),
    )


def num_image_tokens(grid: tuple[int, int], tokens_per_side: int = TOKENS_PER_SIDE) -> int:
    """Counts the decoder positions of one image whose tiles form ``grid`` = (rows, columns).

    Tiles and global view give ``tokens_per_side**2`` each; every token row of both ends with a separator, and one
    separator stands between them.

    >>> num_image_tokens((1, 1)), num_image_tokens((2, 2)), num_image_tokens((4, 4))
    (313, 757, 2509)
    """
    rows, columns = grid
    return (rows * columns + 1) * tokens_per_side**2 + 1 + (rows + 1) * tokens_per_side
