"""What an engine does not go together with is refused before anything is loaded, with what to do."""

from typing import Any

import pytest
import torch

from phi3v.config import TrainConfig
from phi3v.errors import ConfigError
from phi3v.train.engines.choose import is_sharded, require_engine


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", output_dir="run", train_data=["train.jsonl"], **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "fsdp2", "method": "qlora"}, "with method qlora use ddp"),
        ({"parallel": "zero2", "method": "qlora"}, "with method qlora use ddp"),
        ({"parallel": "fsdp2", "cpu_offload": True}, "leave it out"),
        ({"parallel": "fsdp2", "fp8": True}, "leave one of them out"),
        ({"parallel": "zero3", "fp8": True}, "leave one of them out"),
        ({"parallel": "zero3", "vision_cache": "cache", "method": "frozen_vision"}, "use ddp or zero2"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_engine(config(**changes), torch.device("cpu"))


def test_what_does_go_together() -> None:
    require_engine(config(parallel="fsdp2", method="lora"), torch.device("cpu"))
    require_engine(config(method="qlora"), torch.device("cpu"))
    assert [is_sharded(config(parallel=name)) for name in ("ddp", "fsdp2", "zero2", "zero3")] == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerates_own_sharding_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match="set parallel to fsdp2, zero2 or zero3"):
        require_engine(config(), torch.device("cpu"))


def test_offloading_needs_something_to_offload() -> None:
    with pytest.raises(ConfigError, match="cpu_offload"):
        config(cpu_offload=True)
