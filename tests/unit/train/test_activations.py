"""What is computed at once and what again, against the memory model and a plain search."""

import logging
from dataclasses import replace

import pytest
import torch

from phi3v.config import LORA_PARTS, PARTS, TrainConfig
from phi3v.errors import CapacityError
from phi3v.geometry import ModelDims
from phi3v.memory import CHECKPOINTING, MemoryModel, MicroBatch
from phi3v.train import activations
from phi3v.train.activations import (
    LEAST_POSITIONS,
    MARGIN,
    MOST_POSITIONS,
    POSITIONS_STEP,
    ActivationPolicy,
    DataLoad,
    choose_activation_policy,
    memory_model,
    plan_activations,
)

GB = 10**9
FULL = MemoryModel(dims=ModelDims.published(), trained_parts=PARTS)
LORA = replace(FULL, trained_parts=LORA_PARTS, adapter_rank=64)
PAGE = DataLoad(longest_tokens=2554, longest_crops=17, targets_a_token=0.004)


def make_config(**changes: object) -> TrainConfig:
    return TrainConfig(model="any", output_dir="any", train_data=["any"], **changes)  # pyright: ignore


def heaviest(load: DataLoad, tokens: int) -> MicroBatch:
    """A micro-batch of ``tokens`` positions with as many crops as fit into it; the longest sample stands alone."""
    positions = max(tokens, load.longest_tokens)
    crops = load.longest_crops if tokens <= load.longest_tokens else max(positions // 144, load.longest_crops)
    return MicroBatch(
        positions=positions, crops=crops, targets=min(positions, 1 + int(positions * load.targets_a_token * MARGIN))
    )


def needed(memory: MemoryModel, mode: str, load: DataLoad, tokens: int) -> int:
    return sum(memory.predict(mode, heaviest(load, tokens)).values())  # pyright: ignore


@pytest.mark.parametrize("memory", [FULL, LORA])
@pytest.mark.parametrize("gigabytes", [20, 24, 40, 48, 78, 90, 110, 140, 190])
def test_auto_takes_the_least_recomputation_that_fits_and_then_the_most_positions(
    memory: MemoryModel, gigabytes: int
) -> None:
    room = gigabytes * GB
    if needed(memory, "full", PAGE, PAGE.longest_tokens) > room:
        with pytest.raises(CapacityError):
            plan_activations(memory, PAGE, available_bytes=room)
        return
    expected_mode = next(
        (mode for mode in CHECKPOINTING if needed(memory, mode, PAGE, LEAST_POSITIONS) <= room), "full"
    )
    budgets = [PAGE.longest_tokens, *range(3072, MOST_POSITIONS + 1, POSITIONS_STEP)]
    expected_tokens = max(tokens for tokens in budgets if needed(memory, expected_mode, PAGE, tokens) <= room)
    policy = plan_activations(memory, PAGE, available_bytes=room)
    assert (policy.checkpointing, policy.micro_batch_tokens) == (expected_mode, expected_tokens)
    assert sum(policy.predicted_bytes.values()) <= room == policy.available_bytes


def test_published_size_on_common_gpus() -> None:
    """The table of docs/tuning.md."""
    chosen = {
        (name, gigabytes): plan_activations(memory, PAGE, available_bytes=int(0.985 * gigabytes * GB))
        for name, memory, gigabytes in [("full", FULL, 80), ("full", FULL, 141), ("lora", LORA, 24), ("lora", LORA, 80)]
    }
    assert {key: policy.checkpointing for key, policy in chosen.items()} == {
        ("full", 80): "full",
        ("full", 141): "off",
        ("lora", 24): "full",
        ("lora", 80): "off",
    }


def test_a_sample_longer_than_any_budget_stands_alone() -> None:
    long = replace(PAGE, longest_tokens=40_000, longest_crops=30)
    room = needed(LORA, "selective", long, 40_000)
    assert needed(LORA, "off", long, 40_000) > room
    policy = plan_activations(LORA, long, available_bytes=room)
    assert (policy.checkpointing, policy.micro_batch_tokens, policy.micro_batch_crops) == ("selective", 40_000, 30)


def test_less_than_the_wanted_positions_fit() -> None:
    """The longest sample fits with every layer computed again, 4,096 positions do not."""
    room = needed(FULL, "full", PAGE, PAGE.longest_tokens) + 1
    assert room < needed(FULL, "full", PAGE, LEAST_POSITIONS)
    policy = plan_activations(FULL, PAGE, available_bytes=room)
    assert (policy.checkpointing, policy.micro_batch_tokens) == ("full", PAGE.longest_tokens)
    with pytest.raises(CapacityError):
        plan_activations(FULL, PAGE, available_bytes=room - 2)


def test_refusal_gives_numbers_and_what_would_fit() -> None:
    with pytest.raises(CapacityError) as refused:
        plan_activations(FULL, PAGE, available_bytes=40 * GB)
    message = str(refused.value)
    assert "40.0 GB" in message and "2554 positions, 17 crops" in message and "66.6 GB" in message
    assert "method: lora (predicted" in message and "method: qlora (predicted" in message
    assert "frozen_vision" not in message  # it would not fit either
    frozen = replace(FULL, trained_parts=PARTS[2:])
    with pytest.raises(CapacityError, match="method: frozen_vision"):
        plan_activations(FULL, PAGE, available_bytes=needed(frozen, "full", PAGE, 1))
    with pytest.raises(CapacityError, match=r"Use a device with more memory\."):
        plan_activations(FULL, PAGE, available_bytes=4 * GB)
    with pytest.raises(CapacityError, match=r"Use method: qlora \(predicted [0-9.]+ GB\) or a lower num_crops"):
        plan_activations(LORA, PAGE, available_bytes=10 * GB)


def test_what_is_set_is_kept() -> None:
    off = plan_activations(FULL, PAGE, available_bytes=140 * GB, checkpointing="full")
    assert (off.checkpointing, off.micro_batch_tokens) == ("full", MOST_POSITIONS)
    small = plan_activations(FULL, PAGE, available_bytes=140 * GB, micro_batch_tokens=1000)
    assert (small.checkpointing, small.micro_batch_tokens) == ("off", 1000)
    room = needed(FULL, "selective", PAGE, 16_000)
    large = plan_activations(FULL, PAGE, available_bytes=room, micro_batch_tokens=16_000)
    assert (large.checkpointing, large.micro_batch_tokens) == ("selective", 16_000)
    few = plan_activations(FULL, PAGE, available_bytes=140 * GB, micro_batch_crops=20)
    assert few.micro_batch_crops == 20
    assert few.micro_batch_tokens > plan_activations(FULL, PAGE, available_bytes=140 * GB).micro_batch_tokens


def test_what_is_set_and_does_not_fit_is_tried_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        both = plan_activations(FULL, PAGE, available_bytes=40 * GB, checkpointing="off", micro_batch_tokens=9000)
    assert (both.checkpointing, both.micro_batch_tokens) == ("off", 9000)
    assert "9000 positions" in caplog.text and "40.0 GB" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        mode = plan_activations(FULL, PAGE, available_bytes=78 * GB, checkpointing="off")
    assert (mode.checkpointing, mode.micro_batch_tokens) == ("off", PAGE.longest_tokens)
    assert "predicted to need" in caplog.text
    with pytest.raises(CapacityError):  # the mode is set, but not even full recomputation would fit
        plan_activations(FULL, PAGE, available_bytes=40 * GB, checkpointing="off")


def test_samples_without_images_leave_room_and_set_no_limit_of_crops() -> None:
    text = plan_activations(FULL, replace(PAGE, longest_crops=0), available_bytes=140 * GB)
    pages = plan_activations(FULL, PAGE, available_bytes=140 * GB)
    assert text.micro_batch_crops is None and text.micro_batch_tokens > pages.micro_batch_tokens
    assert pages.micro_batch_crops == pages.micro_batch_tokens // 144


def test_data_with_few_crops_computes_more_at_once_and_limits_crops() -> None:
    mixed = replace(PAGE, crops_a_token=1 / 1000)
    policy = plan_activations(FULL, mixed, available_bytes=140 * GB)
    assert policy.micro_batch_tokens > plan_activations(FULL, PAGE, available_bytes=140 * GB).micro_batch_tokens
    assert policy.micro_batch_crops == max(17, -(-policy.micro_batch_tokens * 3 // 2000))


def test_a_cpu_keeps_everything_and_computes_what_is_set(caplog: pytest.LogCaptureFixture) -> None:
    dims = ModelDims.published()

    def choose(**changes: object) -> ActivationPolicy:
        return choose_activation_policy(
            make_config(**changes), dims, PAGE, precision="fp32", device=torch.device("cpu")
        )

    with caplog.at_level(logging.INFO):
        assert choose() == ActivationPolicy(checkpointing="off", micro_batch_tokens=4096)
    assert "checkpointing off, at most 4,096 positions at once" in caplog.text
    assert choose(checkpointing="full", micro_batch_tokens=77, micro_batch_crops=5) == ActivationPolicy(
        checkpointing="full", micro_batch_tokens=77, micro_batch_crops=5
    )


def test_a_gpu_offers_what_is_free_and_what_this_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 150 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GB)
    assert activations._available_bytes(torch.device("cpu")) == 79 * GB


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, FULL),
        ({"method": "frozen_vision"}, replace(FULL, trained_parts=PARTS[2:])),
        ({"method": "lora", "lora_rank": 64}, LORA),
        ({"method": "lora", "lora_rank": 64, "use_dora": True}, replace(LORA, has_magnitudes=True)),
        (
            {"method": "qlora", "lora_rank": 8, "four_bit_parts": ["vision", "decoder"]},
            replace(LORA, adapter_rank=8, four_bit_parts=("vision", "decoder")),
        ),
        ({"method": "qlora", "lora_rank": 8}, replace(LORA, adapter_rank=8, four_bit_parts=("decoder",))),
        ({"freeze": ["decoder"]}, replace(FULL, trained_parts=("vision", "projector", "embeddings", "head"))),
    ],
)
def test_memory_model_of_a_configuration(changes: dict[str, object], expected: MemoryModel) -> None:
    assert memory_model(make_config(**changes), FULL.dims, precision="bf16") == expected


def test_table_and_record_hold_every_item() -> None:
    policy = plan_activations(LORA, PAGE, available_bytes=80 * GB)
    lines = policy.table().splitlines()
    assert lines[0].startswith("Activations: checkpointing off, at most ") and "of 80.0 GB" in lines[0]
    assert [line.split("  ")[1] for line in lines[1:]] == list(policy.predicted_bytes)
    assert ActivationPolicy(**policy.to_dict()) == policy
