"""benchmarks/scaling.py: what its table says of runs, and which GPUs a run gets."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="scaling")


def test_efficiency_is_of_the_same_run_and_of_the_methods_fastest(script: dict[str, Any]) -> None:
    speeds = {("full:ddp", 1): 8.0, ("full:fsdp2", 1): 5.0, ("full:fsdp2", 2): 9.0, ("full:zero2", 2): 8.0}
    results: list[dict[str, Any]] = [
        {"run": run, "gpus": num_gpus, "samples_per_s": speed} for (run, num_gpus), speed in speeds.items()
    ]
    results += [{"run": "full:ddp", "gpus": 2, "failed": "x"}, {"run": "lora:ddp", "gpus": 2, "samples_per_s": 3.0}]
    script["add_efficiency"](results)
    assert [(one.get("efficiency"), one.get("of_fastest")) for one in results] == [
        (1.0, 1.0),
        (1.0, 0.625),
        (0.9, 0.5625),
        (None, 0.5),  # its own run on one GPU is not there
        (None, None),
        (None, None),
    ]


def test_a_failed_run_is_told_by_its_own_error(script: dict[str, Any]) -> None:
    errors = "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nChildFailedError: \n"
    line = script["line_of"]({"run": "full:ddp", "gpus": 2, "failed": errors})
    assert line == "| full:ddp | 2 | failed: [rank1]: torch.OutOfMemoryError: CUDA out of memory. |"


def test_a_run_stays_on_the_gpus_that_are_visible(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert script["names_of"]([0, 2]) == "4,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert script["names_of"]([1, 7]) == "1,7"
