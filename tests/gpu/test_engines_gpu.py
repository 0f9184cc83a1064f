"""Engines on GPUs: as many processes as there are GPUs, two at most, learn as one process with DDP does."""

import os
import subprocess
import sys
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shared_data(tmp_path_factory.mktemp("engines") / "data")


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
    parallel: str, method: str, precision: str, offloads: bool, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    if parallel.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    if offloads and (parallel == "ddp" or precision != "bf16"):
        pytest.skip("offloading is tried in bf16")
    settings = {"method": method, "precision": precision, **({"lora_rank": 4} if method == "lora" else {})}
    expected = run(tiny_dir, data, tmp_path / "one", 1, **settings)
    num_gpus = min(2, torch.cuda.device_count())
    found = run(tiny_dir, data, tmp_path / "shared", num_gpus, parallel=parallel, cpu_offload=offloads, **settings)
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
