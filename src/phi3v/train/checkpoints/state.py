"""What a checkpoint holds beside the model's files: optimizer, schedule, loss scale and random states.

It lies in a folder of its own, in safetensors and JSON. Tensors are whole and have the parameters' names, so that a
checkpoint fits every engine and any number of processes, which share the writing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3v.errors import CheckpointError
from phi3v.files import write_json
from phi3v.train.engines.engine import Average, Engine, Read

FOLDER = "training"

TRAINING_FILE = "state.json"
"""Steps, schedule, loss scale and number of processes."""

AVERAGES_PATTERN = "optimizer-*.safetensors"
"""AdamW's averages; as many files as processes and their size ask for."""

MOST_FILE_BYTES = 4 * 10**9
"""A process writes what it has gathered when it is more: no more lies in the machine's memory at once."""


def training_folder(checkpoint: str | Path) -> Path:
    """Returns where a checkpoint's training state lies; makes the folder."""
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_averages(engine: Engine, folder: Path, *, rank: int, world_size: int) -> None:
    """Writes AdamW's averages; every process those of its own parameters, all go through all of them."""
    pending: dict[str, torch.Tensor] = {}
    size = number = 0
    for index, (name, average, tensor) in enumerate(engine.averages()):
        if index % world_size != rank:
            continue
        pending[f"{name}.{average}"] = tensor.detach().to("cpu", torch.float32).contiguous()
        size += tensor.numel() * 4
        if size > MOST_FILE_BYTES:
            save_file(pending, folder / f"optimizer-{rank:05}-{number:05}.safetensors")
            pending, size, number = {}, 0, number + 1
    if pending:
        save_file(pending, folder / f"optimizer-{rank:05}-{number:05}.safetensors")


@contextmanager
def read_averages(folder: Path) -> Iterator[Read]:
    """Opens a checkpoint's averages; a tensor is read when it is asked for.

    Raises:
        CheckpointError: a parameter has none there.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(str(path), framework="pt")) for path in sorted(folder.glob(AVERAGES_PATTERN))
        ]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  safe_open is no mapping

        def read(name: str, average: Average) -> torch.Tensor:
            if f"{name}.{average}" not in places:
                raise CheckpointError(
                    f"{folder}: the optimizer's {average} of {name} is missing: it belongs to another run; use another "
                    "output_dir"
                )
            return places[f"{name}.{average}"].get_tensor(f"{name}.{average}")

        yield read


def write_training(engine: Engine, scheduler: Any, folder: Path, *, world_size: int) -> None:
    """Writes ``TRAINING_FILE``; one process does."""
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    write_json(
        folder / TRAINING_FILE,
        {
            "optimizer_steps": engine.num_steps(),
            "schedule": schedule,
            "loss_scale": engine.scaling(),
            "processes": world_size,
        },
    )


def load_training(engine: Engine, scheduler: Any, folder: Path) -> None:
    """Takes optimizer, schedule and loss scale from a checkpoint.

    Raises:
        CheckpointError: it lacks a parameter.
    """
    stored = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    with read_averages(folder) as read:
        engine.load(read, stored["optimizer_steps"])
    engine.load_scaling(stored["loss_scale"])
    scheduler.load_state_dict({**scheduler.state_dict(), **stored["schedule"]})
    rates = zip(engine.optimizer.param_groups, stored["schedule"]["_last_lr"], strict=True)
    for group, rate in rates:
        group["lr"] = rate


def write_random_states(folder: Path, device: torch.device, *, rank: int) -> None:
    """Writes torch's random states of this process: dropout draws from them. Nothing else in training is random."""
    states = {"cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    save_file(states, _random_file(folder, rank))


def load_random_states(folder: Path, device: torch.device, *, rank: int) -> bool:
    """Takes the random states from a checkpoint; says whether there are any for this process and device."""
    path = _random_file(folder, rank)
    if not path.is_file():
        return False
    states = load_file(path)
    torch.random.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    return device.type != "cuda" or "cuda" in states


def gather(weights: Iterable[tuple[str, torch.Tensor]], *, keeps: bool) -> Mapping[str, torch.Tensor]:
    """Goes through an engine's weights; returns them in float32 on the CPU where they are kept, else nothing."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if keeps:
            found[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return found


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank:05}.safetensors"
