"""Engines on GPUs: two processes, or one where there is one GPU, learn as one process with DDP does, and go on."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.runlog import RunDirectory
from training import forget_after, make_config, write_shared_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference of the losses; with fp16 of the first one, for its scale skips steps to find its place."""

RUNS = [
    ("fsdp2", "full", "bf16"),
    ("fsdp2", "full", "fp32"),
    ("fsdp2", "full", "fp16"),
    ("fsdp2", "lora", "bf16"),
    ("zero2", "full", "bf16"),
    ("zero2", "full", "fp16"),
    ("zero3", "full", "bf16"),
    ("ddp", "lora", "bf16"),
]


OF_METHOD: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shared_data(tmp_path_factory.mktemp("engines") / "data")


@pytest.fixture(scope="module")
def alone(tiny_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Gives the losses of one process with DDP; each setting's run once."""

    @cache
    def losses(method: str, precision: str) -> list[float]:
        output_dir = tmp_path_factory.mktemp("alone") / "run"
        return run(tiny_dir, data, output_dir, 1, method=method, precision=precision, **OF_METHOD[method])

    return losses


def run(model: Path, data: Path, output_dir: Path, num_gpus: int, **changes: Any) -> list[float]:
    settings = {"batch_size": 5, "shared_questions": 4, "num_train_epochs": 3, "save_steps": 3, **changes}
    config = make_config(model, data, output_dir, device="cuda", **settings)
    output_dir.with_suffix(".yaml").write_text(config.to_yaml())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_gpus}",
        "-m",
        "phi3v",
    ]
    done = subprocess.run(
        [*command, "train", str(output_dir.with_suffix(".yaml"))],
        env={**os.environ}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [line["loss"] for line in RunDirectory(output_dir).steps()]


@pytest.mark.parametrize(("parallel", "method", "precision"), RUNS)
@pytest.mark.parametrize("offloads", [False, True])
def test_learns_as_one_process_does(
    parallel: str,
    method: str,
    precision: str,
    offloads: bool,
    tiny_dir: Path,
    data: Path,
    alone: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    if parallel.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    if offloads and (parallel == "ddp" or precision != "bf16"):
        pytest.skip("offloading is tried in bf16")
    expected = alone(method, precision)
    settings = {"method": method, "precision": precision, "parallel": parallel, "cpu_offload": offloads}
    num_gpus = min(2, torch.cuda.device_count())
    found = run(tiny_dir, data, tmp_path / "shared", num_gpus, **settings, **OF_METHOD[method])
    num_comparable = 1 if precision == "fp16" else len(expected)
    assert found[:num_comparable] == pytest.approx(expected[:num_comparable], rel=TOLERANCE[precision])
    assert found[-1] < found[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: one alone exchanges nothing")
@pytest.mark.parametrize(
    ("parallel", "offloads"), [("fsdp2", False), ("fsdp2", True), ("zero2", True), ("zero3", True)]
)
def test_goes_on_from_its_checkpoint(parallel: str, offloads: bool, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """Losses are those of the first time; exchanges on GPUs may sum in another order."""
    if parallel.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    settings = {"method": "full", "precision": "bf16", "parallel": parallel, "cpu_offload": offloads}
    expected = run(tiny_dir, data, tmp_path / "run", 2, keep_checkpoints=9, **settings)
    forget_after(tmp_path / "run", 3)
    found = run(tiny_dir, data, tmp_path / "run", 2, keep_checkpoints=9, **settings)
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("first", "then"), [("fsdp2", "fsdp2"), ("zero2", "zero2"), ("zero3", "ddp")])
def test_goes_on_on_half_the_gpus(first: str, then: str, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """Of four, where there are as many; the losses stay those of the undisturbed run."""
    if "zero" in first and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    num_gpus = 4 if torch.cuda.device_count() >= 4 else 2
    settings = {"method": "full", "precision": "bf16", "keep_checkpoints": 9}
    expected = run(tiny_dir, data, tmp_path / "run", num_gpus, parallel=first, **settings)
    forget_after(tmp_path / "run", 3)
    found = run(tiny_dir, data, tmp_path / "run", num_gpus // 2, parallel=then, **settings)
    assert found == pytest.approx(expected, rel=TOLERANCE["bf16"])
