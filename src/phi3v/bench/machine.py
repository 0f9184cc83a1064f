"""What the machine itself can do: rates to hold a training step against, the clock, and the memory in use."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
"""Edge of the square matrices whose product is timed."""

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Bytes that are copied on the device."""

REPEATS, WARMUP_REPEATS = 20, 3
"""Timed repeats, and those before them, which load kernels and raise the clock."""

SUSTAINED_S = {"cuda": 4.0, "cpu": 0.2}
"""How long products run without a pause, seconds."""


def measure_rates(device: torch.device) -> dict[str, Any]:
    """Measures the fastest matrix product and copy that a program can hope for.

    Returns:
        ``matmul_tflops``: product of two square matrices of normal numbers, bf16 on a GPU and float32 on a CPU; the
        median of a few. ``matmul_sustained_tflops``: of products without a pause, behind their first half: what is left
        when the device lowers its clocks to stay within its power. ``copy_gb_per_s``: bytes read and written, a median.
    """
    size = MATMUL_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)

    def multiply() -> object:
        return torch.matmul(left, right, out=product)

    seconds = _median_seconds(multiply, device)
    repeats = max(2, round(SUSTAINED_S[device.type] / seconds))
    for _ in range(repeats // 2):
        multiply()
    watch = Stopwatch(device, "run")
    for _ in range(repeats // 2):
        multiply()
    sustained = watch.seconds()["run"] / (repeats // 2)
    return {
        "matmul_tflops": 2 * size**3 / seconds / 1e12,
        "matmul_sustained_tflops": 2 * size**3 / sustained / 1e12,
        "copy_gb_per_s": 2 * COPY_BYTES[device.type] / _median_seconds(lambda: target.copy_(source), device) / 1e9,
        "matmul_size": size,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for repeat in range(WARMUP_REPEATS + REPEATS):
        watch = Stopwatch(device, "run")
        run()
        if repeat >= WARMUP_REPEATS:
            seconds.append(watch.seconds()["run"])
    return statistics.median(seconds)


class Stopwatch:
    """Splits time into sections, on the device's own clock: nothing waits for the device until the seconds are read.

    Args:
        device: whose work is timed.
        section: what the time from now on is booked on.
    """

    def __init__(self, device: torch.device, section: str) -> None:
        self._device = device
        self._marks = [(section, self._now())]

    def enter(self, section: str) -> None:
        """Books the time from here on on ``section``."""
        self._marks.append((section, self._now()))

    def seconds(self) -> dict[str, float]:
        """Returns the time of each section up to now, seconds, in the order in which they first came."""
        self.enter("")
        synchronize(self._device)
        total: dict[str, float] = {}
        for (section, start), (_, end) in pairwise(self._marks):
            passed = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
            total[section] = total.get(section, 0.0) + passed
        return total

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Lets :func:`peak_memory` count from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the most memory in use: a GPU's ``allocated_bytes`` and ``reserved_bytes``, else ``process_bytes``."""
    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def device_name(device: torch.device) -> str:
    """Names the device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
