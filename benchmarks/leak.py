"""Does a long run's memory grow? Thousands of steps on clips of 1 to 10 frames, watched from outside.

    python benchmarks/leak.py --steps 5000 --output leak.json       # about ten minutes on two CPU cores

A tiny model, so that steps are short and their shapes change all the time; checkpoints, log and TensorBoard as in any
run. Resident memory and open files of the training process and of its loader's workers are read from /proc every half
second. Growth is between the second and the last quarter of the steps, by medians: what a process holds after its
warm-up, libraries' caches and the allocator's arenas included, and what comes on top later.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from commands import Command
from conftest import tiny_model_config, write_random_model
from training import make_config

MOST_FRAMES = 10
NUM_CLIPS = 60


class Reading(NamedTuple):
    """One look at a process: optimizer steps so far, resident bytes, and open files."""

    step: int
    resident_bytes: int
    files: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="optimizer steps")
    parser.add_argument("--num_workers", type=int, default=2, metavar="N", help="processes that prepare samples")
    parser.add_argument("--save_steps", type=int, default=250, metavar="N", help="steps between checkpoints")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file for the figures and all readings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = watch(Path(folder), options.steps, options.num_workers, options.save_steps)
    for name, figures in found["processes"].items():
        print(
            f"{name}: {figures['resident_mb']:.1f} MB, grown by {figures['growth_mb']:+.2f} MB "
            f"({figures['growth_bytes_a_step']:+.0f} bytes a step); open files {figures['files']}"
        )
    if options.output is not None:
        options.output.write_text(json.dumps(found))


def watch(folder: Path, num_steps: int, num_workers: int, save_steps: int) -> dict[str, Any]:
    """Trains for so many steps and returns what the processes held meanwhile."""
    model = write_random_model(tiny_model_config(), folder / "model")
    data = write_clips(folder / "data")
    config = make_config(
        model,
        data,
        folder / "run",
        num_train_epochs=num_steps,
        max_steps=num_steps,
        batch_size=3,
        micro_batch_size=None,
        micro_batch_tokens=160,
        num_crops=1,
        num_workers=num_workers,
        save_steps=save_steps,
        freeze=["embeddings", "head"],
        report_to=["tensorboard"],
    )
    command = Command(config)
    assert command.until_step(1), command.output
    readings: dict[str, list[Reading]] = {}
    last_look = 0.0

    def is_over() -> bool:
        nonlocal last_look
        if time.monotonic() - last_look > 0.5:
            last_look = time.monotonic()
            step = last_step(command.run.steps_path)
            for name, pid in {"main": command.process.pid, **dict(zip("ab", command.workers(), strict=False))}.items():
                if reading := look(pid, step):
                    readings.setdefault(name, []).append(reading)
        return False

    started = time.monotonic()
    command.until(is_over, timeout_s=24 * 3600)
    assert command.wait() == 0, command.output[-3000:]
    return {
        "steps": num_steps,
        "seconds": time.monotonic() - started,
        "processes": {name: summary(values, num_steps) for name, values in readings.items()},
        "readings": readings,
    }


def summary(readings: list[Reading], num_steps: int) -> dict[str, Any]:
    def of_quarter(number: int) -> list[Reading]:
        return [one for one in readings if number - 1 < 4 * one.step / num_steps <= number]

    second, last = of_quarter(2), of_quarter(4)
    before, after = (statistics.median(one.resident_bytes for one in part) for part in (second, last))
    return {
        "resident_mb": after / 1e6,
        "growth_mb": (after - before) / 1e6,
        "growth_bytes_a_step": (after - before) / (num_steps / 2),
        "files": [max(one.files for one in part) for part in (second, last)],
    }


def look(pid: int, step: int) -> Reading | None:
    """Returns what a process holds; None when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Reading(step, pages * 4096, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return None


def last_step(steps: Path) -> int:
    """Returns the step of the last whole line, from the end of the file."""
    with steps.open("rb") as file:
        file.seek(max(0, steps.stat().st_size - 2000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"]


def write_clips(folder: Path) -> Path:
    """Writes ``train.jsonl``: questions on 1 to ``MOST_FRAMES`` frames of different sizes."""
    dice = random.Random(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(NUM_CLIPS):
        names = [f"{number}-{frame}.jpg" for frame in range(1 + number % MOST_FRAMES)]
        size = dice.randint(30, 120), dice.randint(30, 120)
        for name in names:
            Image.frombytes("RGB", size, dice.randbytes(3 * size[0] * size[1])).save(folder / "images" / name)
        answer = "yes " * dice.randint(1, 20)
        turn = {"images": names, "user": "what " * dice.randint(1, 30), "assistant": answer}
        lines.append(json.dumps({"id": str(number), "conversations": [turn]}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


if __name__ == "__main__":
    main()
