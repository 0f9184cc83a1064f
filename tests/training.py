"""What tests of training share: small data, a small configuration, and runs in a child process that may be killed."""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from phi3v.arguments import exit_code
from phi3v.config import TrainConfig
from phi3v.data.encode import Encoded
from phi3v.geometry import num_image_tokens
from phi3v.model.packed import PackedBatch
from phi3v.runlog import RunDirectory
from phi3v.train.run import run_training

TOKENS_PER_SIDE = 2
"""Image tokens along a crop's edge in the small model."""

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


def write_shared_data(folder: Path) -> Path:
    """Writes ``train.jsonl``: five questions on one image, three on two images, and of every other kind something.

    The others are: text only, one image, several turns, images in a later turn, and one of the shared images where
    nothing is shared. ``eval.jsonl`` is made of the first lines.
    """
    dice = random.Random(1)
    (folder / "images").mkdir(parents=True)
    for name in ("page", "left", "right", "other"):
        size = dice.randint(20, 90), dice.randint(20, 90)
        Image.frombytes("RGB", size, dice.randbytes(3 * size[0] * size[1])).save(folder / "images" / f"{name}.png")

    def turn(*names: str) -> dict[str, Any]:
        question, answer = "why " * dice.randint(1, 9), "yes " * dice.randint(1, 5)
        return {"images": [f"{name}.png" for name in names], "user": f"{question}?", "assistant": answer}

    conversations = [
        [turn()],
        *([turn("page")] for _ in range(4)),
        [turn("page"), turn(), turn("other")],
        *([turn("left", "right")] for _ in range(3)),
        [turn("left"), turn("right")],
        [turn(), turn("page")],
        [turn(), turn()],
        [turn("other")],
    ]
    dice.shuffle(conversations)
    lines = [
        json.dumps({"id": f"sample-{number}", "conversations": turns}) + "\n"
        for number, turns in enumerate(conversations)
    ]
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
        "shared_questions": 1,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "save_steps": 2,
        "checkpointing": "off",
        "num_workers": 0,
        "device": "cpu",
        "report_to": [],
        **changes,
    }
    return TrainConfig(**settings)


def train_in_child(config: TrainConfig, prepare: Callable[[], None] = lambda: None, timeout_s: float = 120) -> int:
    """Trains in a forked process, so that it can be killed; returns the command's exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            prepare()
            code = exit_code(lambda: run_training(config))
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


def alone(encoded: Encoded) -> dict[str, torch.Tensor]:
    """Returns what the model's padded forward takes for one sample: a batch of one row, with labels."""
    rows = {name: tensor[None] for name, tensor in encoded.items() if name in ("input_ids", "labels")}
    return {**rows, **{name: encoded[name] for name in ("pixel_values", "image_sizes") if name in encoded}}


def unpack(batch: PackedBatch) -> list[dict[str, torch.Tensor]]:
    """Returns the sequences of a packed batch apart: what the model's padded forward takes, with ``loss_weights``."""
    layout = batch.layout
    pieces = [torch.arange(start, end) for start, end in pairwise(layout.starts)]
    stems, wholes = pieces[: len(layout.stems)], pieces[len(layout.stems) : layout.num_trunk_pieces]
    branches = iter(pieces[layout.num_trunk_pieces :])
    rows = [*wholes]
    for stem, lengths in zip(stems, layout.branches, strict=True):
        rows += [torch.cat([stem, next(branches)]) for _ in lengths]
    return [_sequence(batch, row) for row in rows]


def _sequence(batch: PackedBatch, row: torch.Tensor) -> dict[str, torch.Tensor]:
    assert torch.equal(batch.position_ids[row], torch.arange(len(row)))
    ids = batch.input_ids[row]
    labels, weights = torch.full_like(ids, -100), torch.zeros(len(ids))
    for position, target, weight in zip(
        batch.target_positions.tolist(), batch.target_ids, batch.target_weights, strict=True
    ):
        for place in (row == position).nonzero()[:, 0].tolist():
            labels[place + 1], weights[place + 1] = target, weight
    sequence = {"input_ids": ids[None], "labels": labels[None], "loss_weights": weights[None]}
    shown = dict(zip(batch.image_positions.tolist(), batch.image_rows.tolist(), strict=True))
    rows_of_images = [shown[position] for position in row.tolist() if position in shown]
    pixel_values, sizes = [], []
    while rows_of_images:
        number, count = _image_at(batch, rows_of_images[0])
        assert rows_of_images[:count] == list(range(rows_of_images[0], rows_of_images[0] + count))
        rows_of_images = rows_of_images[count:]
        first = sum(height * width + 1 for height, width in batch.grids[:number])
        height, width = batch.grids[number]
        assert batch.crops is not None
        pixel_values.append(batch.crops[first : first + height * width + 1])
        sizes.append([height * batch.crops.shape[-1], width * batch.crops.shape[-1]])
    if sizes:
        sequence["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixel_values, batch_first=True)
        sequence["image_sizes"] = torch.tensor(sizes)
    return sequence


def _image_at(batch: PackedBatch, row: int) -> tuple[int, int]:
    """Returns the number of the image whose first row this is, and how many it has."""
    start = 0
    for number, grid in enumerate(batch.grids):
        count = num_image_tokens(grid, TOKENS_PER_SIDE)
        if start == row:
            return number, count
        start += count
    raise AssertionError(f"row {row} is in the middle of an image")


def forget_after(run: Path, step: int) -> None:
    """Takes away what the run did after a checkpoint, as if it had been killed then."""
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "model")
    state = json.loads((run / "checkpoints" / f"checkpoint-{step}" / "training" / "state.json").read_text())
    assert state["optimizer_steps"] == step


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
