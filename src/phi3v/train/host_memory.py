"""The machine's memory: whether it holds the models that wait for their engine."""

import logging
import math
import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from phi3v.config import TrainConfig
from phi3v.geometry import ModelDims
from phi3v.train.checkpoints.rehearsal import in_words
from phi3v.train.room import home_of
from phi3v.train.tuning import Precision

logger = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def warn_of_little_memory(config: TrainConfig, precision: Precision, dims: ModelDims, device: torch.device) -> None:
    """Warns where whole models wait for their engine in a machine's memory, one a process, that may not hold them.

    The system would end a process without a word. It stays a warning: some machines get more memory when they use it.
    Of several machines the first is looked at; what ``cpu_offload`` keeps there comes on top.

    Args:
        config: of the run.
        precision: of the weights.
        dims: of the model.
        device: what the run computes on.
    """
    if home_of(config, device) == device:
        return
    num_processes = local_processes()
    needed = num_processes * dims.num_parameters * getattr(torch, precision.weights).itemsize
    available = min(psutil.virtual_memory().available, limit_of_group())
    if needed > available:
        logger.warning(
            "Before and after training each of this machine's processes holds the whole model in the machine's memory, "
            "%s for %d of them, and %s are available. If the system ends one of them (exit code -9), use fewer "
            "processes or more memory, or parallel ddp where the GPU holds everything.",
            in_words(needed),
            num_processes,
            in_words(available),
        )


def local_processes() -> int:
    """Returns the run's processes on this machine: as torchrun says, else one a GPU."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return min(int(os.environ.get("WORLD_SIZE", "1")), max(1, torch.cuda.device_count()))


def limit_of_group(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> float:
    """Returns the bytes that this process's control group, a container's or a job's, may still take; infinite without.

    Args:
        root: where the system shows control groups (version 2).
        own: names the process's.
    """
    try:
        place = root / own.read_text("utf-8").rpartition("::/")[2].strip()
    except OSError:
        return math.inf
    left = math.inf
    for folder in (place, *place.parents):
        if not folder.is_relative_to(root):
            break
        with suppress(OSError, ValueError):  # no limit here, or the word max
            limit = int((folder / "memory.max").read_text("utf-8"))
            left = min(left, limit - int((folder / "memory.current").read_text("utf-8")))
    return left
