"""From crops to decoder rows, against transformers' CLIP and loops written from docs/internals.md."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionModel

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.vision_phi3_v import Phi3VImageEmbedding, merge_neighbours

TOLERANCE = 1e-5
"""Absolute, on rows of magnitude 1, float32."""

GRIDS = [(1, 1), (2, 3), (3, 1), (1, 4)]
"""(rows, columns) of tiles of four images; the last and the second differ in their number of crops."""


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(len(GRIDS), 7, 3, 56, 56, generator=torch.Generator().manual_seed(1))


IMAGE_SIZES = torch.tensor([(rows * 56, columns * 56) for rows, columns in GRIDS])


def reference(model: Phi3VForCausalLM, crops: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns one image's decoder rows. crops: (1 + rows * columns, 3, 56, 56)."""
    image_embedding = model.model.vision_embed_tokens
    clip = CLIPVisionModel(model.config.vision_config)
    weights = image_embedding.img_processor.vision_model.state_dict()
    inner = clip.vision_model if hasattr(clip, "vision_model") else clip
    inner.load_state_dict(weights)
    # After all but the last layer, the class token dropped: patches (crops, 4, 4, width).
    patches = clip.eval()(crops, output_hidden_states=True).hidden_states[-2][:, 1:].reshape(-1, 4, 4, 32)

    def token(crop: int, row: int, column: int) -> torch.Tensor:
        block = [patches[crop, 2 * row + i, 2 * column + j] for i in (0, 1) for j in (0, 1)]
        return torch.cat(block)

    lines: list[torch.Tensor] = []
    for row in range(2 * rows):
        for column in range(2 * columns):
            lines.append(token(1 + (row // 2) * columns + column // 2, row % 2, column % 2))
        lines.append(image_embedding.sub_GN[0, 0, 0])
    lines.append(image_embedding.glb_GN[0, 0])
    for row in range(2):
        lines += [token(0, row, 0), token(0, row, 1), image_embedding.sub_GN[0, 0, 0]]
    first, second = image_embedding.img_projection[0], image_embedding.img_projection[2]
    return second(F.gelu(first(torch.stack(lines))))


def rows_of(embed: Phi3VImageEmbedding, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    return embed(*embed.own_crops(pixel_values, image_sizes))


def test_rows_are_the_references(tiny_model: Phi3VForCausalLM, pixel_values: torch.Tensor) -> None:
    expected = torch.cat(
        [
            reference(tiny_model, crops[: 1 + rows * columns], rows, columns)
            for crops, (rows, columns) in zip(pixel_values, GRIDS, strict=True)
        ]
    )
    ours = rows_of(tiny_model.model.vision_embed_tokens, pixel_values, IMAGE_SIZES)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


def test_crops_beyond_an_images_own_do_not_matter(tiny_model: Phi3VForCausalLM, pixel_values: torch.Tensor) -> None:
    """The published processor fills every image up to num_crops + 1 crops."""
    embed = tiny_model.model.vision_embed_tokens
    expected = rows_of(embed, pixel_values, IMAGE_SIZES)
    filled = torch.cat([pixel_values, torch.zeros(len(GRIDS), 10, 3, 56, 56)], dim=1)
    for index, (rows, columns) in enumerate(GRIDS):
        filled[index, 1 + rows * columns :] = float("nan")
    torch.testing.assert_close(rows_of(embed, filled, IMAGE_SIZES), expected, atol=0, rtol=0)


def test_no_crop_is_computed_twice_or_in_vain(tiny_model: Phi3VForCausalLM, pixel_values: torch.Tensor) -> None:
    seen: list[int] = []
    embed = tiny_model.model.vision_embed_tokens
    embed.img_processor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    rows_of(embed, pixel_values, IMAGE_SIZES)
    assert seen == [sum(rows * columns + 1 for rows, columns in GRIDS)]


def test_merge_order() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)  # a 4 x 4 grid, row by row
    assert merge_neighbours(patches)[0].tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7]],
        [[8, 9, 12, 13], [10, 11, 14, 15]],
    ]


@pytest.mark.parametrize(
    ("crops", "sizes", "message"),
    [
        (slice(0, 6), IMAGE_SIZES, "4 images of 6 crops, but image_sizes are of 4 images that need up to 7 crops"),
        (slice(0, 7), IMAGE_SIZES[:3], "4 images of 7 crops, but image_sizes are of 3 images"),
    ],
)
def test_refuses_crops_that_do_not_fit(
    tiny_model: Phi3VForCausalLM, pixel_values: torch.Tensor, crops: slice, sizes: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.model.vision_embed_tokens.own_crops(pixel_values[:, crops], sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_separators_of_another_dtype(
    tiny_model: Phi3VForCausalLM, pixel_values: torch.Tensor, dtype: torch.dtype
) -> None:
    """Float32 separators over a 16-bit tower: what is trained and what is frozen may differ."""
    embed = tiny_model.model.vision_embed_tokens
    expected = rows_of(embed.to(dtype), pixel_values, IMAGE_SIZES)
    embed.sub_GN.data, embed.glb_GN.data = embed.sub_GN.data.float(), embed.glb_GN.data.float()
    torch.testing.assert_close(rows_of(embed, pixel_values, IMAGE_SIZES), expected, atol=0, rtol=0)
