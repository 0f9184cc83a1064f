"""What follows from configuration and machine alone."""

import logging
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from phi3v.config import TrainConfig
from phi3v.geometry import ModelDims
from phi3v.train.room import warn_of_little_memory
from phi3v.train.tuning import choose_precision

GB = 10**9


@pytest.mark.parametrize(
    ("changes", "available", "told"),
    [
        ({"parallel": "fsdp2"}, 132 * GB, "132.7 GB for 8 of them, and 132.0 GB are available"),
        ({"parallel": "fsdp2"}, 133 * GB, None),
        ({"parallel": "zero3", "method": "lora"}, 66 * GB, "66.3 GB for 8 of them"),
        ({"parallel": "ddp"}, 1 * GB, None),
        ({"parallel": "fsdp2", "device": "cpu"}, 1 * GB, None),
    ],
)
def test_a_machine_with_little_memory_is_told_of_before_the_system_ends_a_process(
    changes: dict[str, Any],
    available: int,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    settings = {"method": "full", "device": "cuda", "precision": "fp16", **changes}
    config = TrainConfig(model="any", output_dir="any", train_data=["any"], **settings)  # pyright: ignore
    with caplog.at_level(logging.WARNING, "phi3v"):
        precision = choose_precision(config, "cuda")
        warn_of_little_memory(config, precision, ModelDims.published(), torch.device(config.device))
    assert [told in message for message in caplog.messages] == ([True] if told else [])
