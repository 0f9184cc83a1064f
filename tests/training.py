"""What tests of training share: small data, a small configuration, and runs in a child process that may be killed."""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from phi3v.config import TrainConfig
from phi3v.runlog import RunDirectory
from phi3v.train.run import run_training

TIMING = ("samples_per_s", "tokens_per_s", "memory_bytes", "elapsed_s", "seconds")
"""Keys of log lines that two equal runs may differ in."""


def write_training_data(folder: Path, num_samples: int = 11) -> Path:
    """Writes ``train.jsonl`` and ``eval.jsonl``: text only, one image and two images, answers of different lengths."""
    dice = random.Random(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(num_samples):
        names = [f"{number}-{image}.png" for image in range((0, 1, 2, 1)[number % 4])]
        for name in names:
            size = dice.randint(20, 90), dice.randint(20, 90)
            Image.frombytes("RGB", size, dice.randbytes(3 * size[0] * size[1])).save(folder / "images" / name)
        question, answer = "why " * dice.randint(1, 9), "yes " * dice.randint(1, 5)
        turn = {"images": names, "user": f"{number} {question}?", "assistant": f"{answer}{number}"}
        lines.append(json.dumps({"id": f"sample-{number}", "conversations": [turn]}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "eval.jsonl").write_text("".join(lines[:3]))
    return folder


def make_config(model: Path, data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """Returns a configuration of 6 steps in 2 epochs: windows of 4, 4 and 3 samples."""
    settings: dict[str, Any] = {
        "model": str(model),
        "output_dir": output_dir,
        "train_data": [data / "train.jsonl"],
        "batch_size": 4,
        "micro_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "save_steps": 2,
        "gradient_checkpointing": False,
        "num_workers": 0,
        "device": "cpu",
        "report_to": [],
        **changes,
    }
    return TrainConfig(**settings)


def train_in_child(config: TrainConfig, prepare: Callable[[], None] = lambda: None, timeout_s: float = 120) -> int:
    """Trains in a forked process, so that it can be killed; returns its exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            prepare()
            run_training(config)
            code = 0
        except BaseException:  # noqa: BLE001  a child must never return into pytest
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        waited, status = os.waitpid(pid, os.WNOHANG)
        if waited:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"training did not end within {timeout_s} s")


def die() -> None:
    """Kills this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def logged(run: Path) -> list[dict[str, Any]]:
    """Returns a run's step and evaluation lines without what depends on the clock."""
    lines = [*RunDirectory(run).steps(), *RunDirectory(run).evals()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of ``RUN/model``."""
    (path,) = (run / "model").glob("*.safetensors")
    return load_file(path)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Returns the largest absolute difference between two sets of the same tensors."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
