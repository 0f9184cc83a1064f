"""The measuring scripts run: tiny, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3v.demo import write_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("order", [[], ["--leave_one_out"]], ids=["one by one", "leave one out"])
def test_the_ablation_measures_every_row(tmp_path: Path, order: list[str]) -> None:
    output = tmp_path / "ablation.json"
    small = ["--tiny", "--device", "cpu", "--batch_size", "4", "--steps", "1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "ablation.py", *small, *order], capture_output=True, text=True, check=True
    )
    rows = json.loads(output.read_text())["rows"]
    printed = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert printed[1:] == [row["name"] for row in rows]
    assert len(rows) >= 6 and all(row["samples_per_s"] > 0 for row in rows)
    modes = [row["compute"]["checkpointing"] for row in rows]
    assert {"off", "full"} == set(modes)


def test_sweeps_are_drawn(tmp_path: Path) -> None:
    output = tmp_path / "crops.json"
    small = ["--tiny", "--device", "cpu", "--batch_size", "2", "--steps", "1", "--warmup_steps", "0"]
    bench = [sys.executable, "-m", "phi3v", "bench", "--sweep", "num_crops", *small, "--output", str(output)]
    subprocess.run(bench, check=True, capture_output=True)
    picture = tmp_path / "growth.svg"
    plot = [sys.executable, BENCHMARKS / "plot_performance.py", output, "--output", picture]
    subprocess.run(plot, check=True, capture_output=True)
    assert picture.read_text().startswith("<svg ")


def test_a_checkpoint_of_two_processes_goes_on_alone(tmp_path: Path) -> None:
    """With float32's losses, on the demo's images."""
    write_data(tmp_path / "data")
    small = [tmp_path / "out", "--tiny", "--data", tmp_path / "data", "--gpus", "2", "1", "--parallel", "fsdp2", "ddp"]
    command = [sys.executable, BENCHMARKS / "regroup.py", *small]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    *_, last = done.stdout.splitlines()
    assert float(last.removeprefix("largest relative difference ")) < 1e-5
    assert "Going on from" in done.stdout


def test_scaling_gives_one_process_losses(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    small = ["--tiny", "--batch_size", "4", "--steps", "1", "--gpus", "1", "2", "--output", str(output)]
    command = [sys.executable, BENCHMARKS / "scaling.py", *small, "--runs", "full:fsdp2", "lora:ddp"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    found = json.loads(output.read_text())
    assert [(one["run"], one["gpus"]) for one in found] == [
        (run, gpus) for run in ("full:fsdp2", "lora:ddp") for gpus in (1, 2)
    ]
    for alone, shared in (found[:2], found[2:]):
        num_steps = len(alone["losses"])  # two processes take one more to warm up
        assert num_steps == len(shared["losses"]) - 1 == 3
        assert shared["losses"][:num_steps] == pytest.approx(alone["losses"], rel=1e-5)
        assert shared["efficiency"] > 0
