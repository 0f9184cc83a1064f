"""Geometry against published counts and against plain counting."""

from math import ceil

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from phi3v.geometry import HDLayout, hd_layout, num_image_tokens

EDGES = st.integers(1, 20_000)
CROPS = st.integers(1, 40)


def counted_tokens(rows: int, columns: int, side: int) -> int:
    """Lays the tokens out one by one, as docs/internals.md says."""
    tokens = 0
    for grid_rows, grid_columns in ((rows, columns), (1, 1)):  # the tiles, then the global view
        for _ in range(grid_rows * side):
            tokens += grid_columns * side
            tokens += 1  # sub_GN ends the row
    return tokens + 1  # glb_GN between the two


def largest_scale(ratio: float, num_crops: int) -> int:
    return max(scale for scale in range(1, num_crops + 1) if scale * ceil(scale / ratio) <= num_crops)


@pytest.mark.parametrize(("num_crops", "tokens"), [(1, 313), (4, 757), (9, 1489), (16, 2509)])
def test_published_counts_of_a_crop_sized_image(num_crops: int, tokens: int) -> None:
    assert num_image_tokens(hd_layout(336, 336, num_crops).grid) == tokens


@pytest.mark.parametrize(
    ("size", "num_crops", "grid", "resized", "pads"),
    [
        ((1100, 850), 16, (4, 4), (1038, 1344), (153, 153)),  # portrait: resized lying down
        ((480, 640), 4, (2, 2), (504, 672), (84, 84)),
        ((480, 640), 16, (3, 4), (1008, 1344), (0, 0)),
        ((300, 1200), 4, (1, 4), (336, 1344), (0, 0)),
        ((1, 1), 4, (2, 2), (672, 672), (0, 0)),  # small images are scaled up
        ((100, 333), 4, (1, 3), (302, 1008), (17, 17)),
        ((333, 100), 4, (3, 1), (302, 1008), (17, 17)),
        ((301, 1000), 4, (1, 3), (303, 1008), (16, 17)),  # an odd gap: the smaller half on top
        ((20, 5376), 16, (1, 16), (20, 5376), (158, 158)),
    ],
)
def test_layouts(
    size: tuple[int, int], num_crops: int, grid: tuple[int, int], resized: tuple[int, int], pads: tuple[int, int]
) -> None:
    assert hd_layout(*size, num_crops) == HDLayout(
        resized=resized,
        pad_top=pads[0],
        pad_bottom=pads[1],
        is_transposed=size[1] < size[0],
        grid=grid,
        padded=(grid[0] * 336, grid[1] * 336),
    )


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
@example(1, 1, 12)
def test_tokens_are_what_counting_gives(rows: int, columns: int, side: int) -> None:
    assert num_image_tokens((rows, columns), side) == counted_tokens(rows, columns, side)


@given(EDGES, EDGES, CROPS, st.sampled_from([28, 56, 336]))
def test_every_layout_is_whole_tiles_and_no_more_than_asked(h: int, w: int, num_crops: int, crop_px: int) -> None:
    ratio = max(h, w) / min(h, w)
    scale = largest_scale(ratio, num_crops)
    assume(int(scale * crop_px / ratio) >= 1)
    layout = hd_layout(h, w, num_crops, crop_px)
    rows, columns = layout.grid

    assert max(rows, columns) == scale
    assert rows * columns <= num_crops
    assert layout.num_crops == rows * columns + 1
    assert layout.padded == (rows * crop_px, columns * crop_px)
    resized_h, resized_w = layout.resized
    assert resized_w == scale * crop_px and resized_h == int(resized_w / ratio)
    assert (layout.pad_top + resized_h + layout.pad_bottom) * resized_w == layout.padded[0] * layout.padded[1]
    assert 0 <= layout.pad_bottom - layout.pad_top <= 1
    assert layout.pad_top + layout.pad_bottom < crop_px


@given(EDGES, EDGES, CROPS)
def test_a_portrait_image_is_its_landscape_twin_transposed(h: int, w: int, num_crops: int) -> None:
    assume(h != w and int(336 * largest_scale(max(h, w) / min(h, w), num_crops) / (max(h, w) / min(h, w))) >= 1)
    one, other = hd_layout(h, w, num_crops), hd_layout(w, h, num_crops)
    assert one.is_transposed != other.is_transposed
    assert (one.grid, one.padded) == (other.grid[::-1], other.padded[::-1])
    assert (one.resized, one.pad_top, one.pad_bottom) == (other.resized, other.pad_top, other.pad_bottom)


@pytest.mark.parametrize("size", [(1, 5376), (5376, 1)])
def test_the_longest_strip_that_still_fits(size: tuple[int, int]) -> None:
    assert hd_layout(*size, num_crops=16).resized == (1, 5376)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 4), "0x10 px .* has no pixels"),
        ((10, -1, 4), "has no pixels"),
        ((10, 10, 0), "num_crops is 0"),
        ((1, 5377, 16), "1x5377 px .* too elongated"),
        ((5377, 1, 16), "5377x1 px .* too elongated"),
    ],
)
def test_refusals(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hd_layout(*arguments)
