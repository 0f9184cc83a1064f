"""Operations are counted as torch dispatches them, and add up to the figures that the documents give."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phi3v.config import PARTS, TrainConfig
from phi3v.flops import Work, count_flops
from phi3v.geometry import ModelDims, num_image_tokens
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.train.tuning import select_trainable, wrap_lora

PAGE = Work(wholes=[2443], crops=17, image_rows=num_image_tokens((4, 4)), targets=10)
CACHED_PAGE = Work(wholes=[2443], targets=10)
# 10,194 pages with 39,463 questions: 87 pages of 100 with four, the others with three.
PAGES_WITH_QUESTIONS = Work(
    stems=[2411] * 100,
    branches=[[32] * 4] * 87 + [[32] * 3] * 13,
    crops=17 * 100,
    image_rows=num_image_tokens((4, 4)) * 100,
    targets=10 * 387,
)
DECODER_PARTS = ("decoder", "embeddings", "head")
LORA_PARTS = ("vision", "projector", "decoder", "head")


@pytest.mark.parametrize(
    ("work", "samples", "parts", "rank", "expected"),
    [
        (PAGE, 1, PARTS, None, 75.6),
        (PAGE, 1, DECODER_PARTS, None, 63.0),
        (CACHED_PAGE, 1, DECODER_PARTS, None, 56.6),
        (PAGE, 1, LORA_PARTS, 32, 53.7),
        (PAGES_WITH_QUESTIONS, 387, PARTS, None, 20.1),
    ],
    ids=["full", "frozen vision", "cached features", "LoRA", "shared pages"],
)
def test_the_published_size_takes_the_documented_operations(
    work: Work, samples: int, parts: tuple[str, ...], rank: int | None, expected: float
) -> None:
    count = count_flops(ModelDims.published(), work, parts, lora_rank=rank)
    assert count.total / samples / 1e12 == pytest.approx(expected, rel=0.003)


def test_recomputing_costs_a_second_forward_pass_of_the_layers_that_learn() -> None:
    dims = ModelDims.published()
    full = count_flops(dims, PAGE, PARTS)
    assert full.recomputed("full") / 1e12 == pytest.approx(25, rel=0.02)
    assert full.recomputed("off") == full.recomputed("selective") == 0
    frozen = count_flops(dims, PAGE, DECODER_PARTS)
    last_layer = 2 * (2443 - 10) * (dims.hidden**2 + 3 * dims.hidden * dims.mlp)
    assert frozen.recomputed("full") == frozen.decoder.forward + frozen.decoder_attention.forward - last_layer
    assert frozen.spared == 3 * last_layer == frozen.total - frozen.needed


def test_counts_add_up() -> None:
    one, other = count_flops(ModelDims.published(), PAGE, PARTS), count_flops(ModelDims.published(), CACHED_PAGE, PARTS)
    both = one + other
    assert both.total == one.total + other.total and both.needed == one.needed + other.needed
    assert both.recomputed("full") == one.recomputed("full") + other.recomputed("full")
    assert both.decoder.weight_gradient == one.decoder.weight_gradient + other.decoder.weight_gradient


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"method": "full", "freeze": ["vision"]},
        {"method": "full", "freeze": ["projector"]},
        {"method": "full", "freeze": ["vision", "projector", "embeddings"]},
        {"method": "full", "freeze": ["vision", "projector", "embeddings", "decoder"]},
        {"method": "frozen_vision"},
        {"method": "lora", "lora_rank": 5},
        {"method": "lora", "lora_rank": 5, "lora_parts": ["decoder"]},
        {"method": "lora", "lora_rank": 5, "lora_parts": ["projector"]},
        {"method": "lora", "lora_rank": 5, "lora_parts": ["head"]},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_count_equals_what_torch_dispatches(
    tiny_config: Phi3VConfig, changes: dict[str, Any], kv_heads: int
) -> None:
    config = TrainConfig(model="m", output_dir="o", train_data=["t"], **changes)  # pyright: ignore[reportArgumentType]
    published = {**tiny_config.to_dict(), "num_key_value_heads": kv_heads}
    model = Phi3VForCausalLM(Phi3VConfig.from_dict(published))
    model.set_attn_implementation("eager")  # whose products the counter sees, causal ones in full
    model.train()
    select_trainable(model, config)
    learner = wrap_lora(model, config) if config.trains_adapters else model
    grid = (2, 1)
    image_rows = num_image_tokens(grid, model.config.tokens_per_side)
    length, targets = image_rows + 9, 4
    ids = torch.full((1, length), 5)
    ids[0, 2 : 2 + image_rows] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[0, -targets:] = 7
    crop_px = model.config.crop_px
    with FlopCounterMode(display=False) as counter:
        learner(
            input_ids=ids,
            pixel_values=torch.randn(1, 3, 3, crop_px, crop_px),
            image_sizes=torch.tensor([[grid[0] * crop_px, grid[1] * crop_px]]),
            labels=labels,
            loss_weights=(labels != -100).float(),
            supervised_only=True,
        ).loss.backward()
    work = Work(wholes=[length], crops=3, image_rows=image_rows, targets=targets)
    rank = config.lora_rank if config.trains_adapters else None
    count = count_flops(model.config.dims, work, config.trained_parts, lora_rank=rank)
    assert count.total + count.decoder_attention.total == counter.get_total_flops()


def test_branches_see_their_stem_and_themselves() -> None:
    stems, wholes, branches = [7, 3], [4], [[2, 5], [1]]
    owners = [("stem", 0)] * 7 + [("stem", 1)] * 3 + [("whole", 0)] * 4
    owners += [(0, 0)] * 2 + [(0, 1)] * 5 + [(1, 0)]
    pairs = sum(
        owner == seen or (seen[0] == "stem" and owner[0] == seen[1])
        for query, owner in enumerate(owners)
        for seen in owners[: query + 1]
    )
    # A position's sight of itself is on the diagonal, of which the half is counted.
    work = Work(stems=stems, wholes=wholes, branches=branches)
    assert work.seen_twice == 2 * pairs - len(owners)
    assert work.positions == len(owners)
    dims = ModelDims.published()
    attention = count_flops(dims, work, PARTS).decoder_attention
    assert attention.forward == 2 * work.seen_twice * dims.hidden * dims.layers
    assert attention.data_gradient == 2 * attention.forward
