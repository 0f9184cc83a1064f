"""What a run says while it works, and on which machine."""

import logging
import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from phi3v.credentials import without_secrets


def show_messages(is_writer: bool) -> None:
    """Shows the package's messages on standard error, above a progress bar; those of the first process only."""
    disable_progress_bar()  # transformers shows one for every shard that it reads or writes
    package = logging.getLogger("phi3v")
    package.setLevel(logging.INFO if is_writer else logging.ERROR)
    if not package.handlers:
        package.addHandler(_BarHandler())


class _BarHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(without_secrets(self.format(record)), file=sys.stderr)


def describe_gpus(device: torch.device) -> list[dict[str, Any]]:
    """Describes the GPUs that this machine offers, for ``environment.json``."""
    if device.type != "cuda":
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in found
    ]
