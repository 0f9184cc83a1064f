"""A machine that may not hold its processes' models is told of."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from phi3v.config import TrainConfig
from phi3v.geometry import ModelDims
from phi3v.train import host_memory
from phi3v.train.host_memory import limit_of_group, local_processes, warn_of_little_memory
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
    monkeypatch.setattr(host_memory, "limit_of_group", lambda: math.inf)
    settings = {"method": "full", "device": "cuda", "precision": "fp16", **changes}
    config = TrainConfig(model="any", output_dir="any", train_data=["any"], **settings)  # pyright: ignore
    with caplog.at_level(logging.WARNING, "phi3v"):
        precision = choose_precision(config, "cuda")
        warn_of_little_memory(config, precision, ModelDims.published(), torch.device(config.device))
    assert [told in message for message in caplog.messages] == ([True] if told else [])


def test_a_jobs_limit_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert limit_of_group(tmp_path, own) == math.inf
    own.write_text("0::/job/step\n")
    step = tmp_path / "job" / "step"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    assert limit_of_group(tmp_path, own) == math.inf
    for folder, limit, current in ((step.parent, 90, 30), (tmp_path, 900, 30)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
    assert limit_of_group(tmp_path, own) == 60


def test_processes_of_a_machine_are_counted_where_the_launcher_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert local_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert local_processes() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert local_processes() == 2
