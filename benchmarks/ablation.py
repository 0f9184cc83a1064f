"""What each lever of the training step is worth: all of them off, then one after the other on, in one process.

    python benchmarks/ablation.py --output ablation.json
    python benchmarks/ablation.py --method lora --leave_one_out
    python benchmarks/ablation.py --tiny --device cpu

At the published size with random weights; four minutes on one GPU. What cannot be switched off is in every row: logits
and last MLP at supervised positions only, real crops only, CLIP without its last layer, no padding.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from phi3v.bench.machine import device_name
from phi3v.bench.model import bench_config
from phi3v.bench.options import BenchOptions
from phi3v.bench.page import memory_text
from phi3v.bench.run import Bench
from phi3v.files import write_json
from phi3v.model import kernels
from phi3v.model.kernels import plain
from phi3v.model.packed_attention import PackedAttention
from phi3v.model.placement import resolve_device
from phi3v.runlog import environment


class Lever(NamedTuple):
    """Something that makes training faster.

    Attributes:
        name: what it is.
        options_off: options while it is off.
        compute_off: fields of ``Compute`` while it is off.
        patch_off: takes it out of the code while it is off.
        options_on: options from where it is on, if the bench's own do not have it on.
        compute_on: fields of ``Compute`` likewise.
    """

    name: str
    options_off: Mapping[str, Any] = {}
    compute_off: Mapping[str, Any] = {}
    patch_off: Callable[[], AbstractContextManager[Any]] | None = None
    options_on: Mapping[str, Any] = {}
    compute_on: Mapping[str, Any] = {}


LEVERS = (
    Lever("fused kernels", patch_off=lambda: patch.object(kernels, "for_device", lambda _: plain)),
    Lever(
        "cuDNN attention where pieces are of one length",
        patch_off=lambda: patch.object(PackedAttention, "_dense_runs", property(lambda _: [])),
    ),
    Lever("nothing computed again that fits", options_off={"checkpointing": "full"}),
    Lever("several samples at once", options_off={"micro_batch_tokens": 1}),
    Lever("weight gradients added in place", compute_off={"accumulates_in_place": False}),
    Lever(
        "3.87 questions on a page, the page computed once",
        options_on={"questions_per_image": 3.87, "batch_size": 32},  # as many pages at once as there were samples
    ),
    Lever("float8 products (not exact)", compute_on={"fp8": True}),
)
"""In the order in which they are switched on. A sample longer than ``micro_batch_tokens`` is computed alone."""

NOTHING = "all off"


class Row(NamedTuple):
    """A measurement: its name, and which levers are on."""

    name: str
    levers_on: Sequence[Lever]


def rows(leave_one_out: bool) -> list[Row]:
    """Returns what is measured: levers added one by one, or each one missing from all."""
    if leave_one_out:
        exact = [lever for lever in LEVERS if not (lever.options_on or lever.compute_on)]
        missing = [Row(f"without: {one.name}", [lever for lever in exact if lever is not one]) for one in exact]
        return [Row("all that are exact and on one workload", exact), *missing]
    added = [Row(f"+ {lever.name}", LEVERS[: number + 1]) for number, lever in enumerate(LEVERS)]
    return [Row(NOTHING, ()), *added]


def measure(bench: Bench, row: Row, options: BenchOptions) -> dict[str, Any]:
    """Measures one row."""
    changes: dict[str, Any] = {}
    compute: dict[str, Any] = {}
    with ExitStack() as patches:
        for lever in LEVERS:
            is_on = lever in row.levers_on
            changes |= lever.options_on if is_on else lever.options_off
            compute |= lever.compute_on if is_on else lever.compute_off
            if not is_on and lever.patch_off is not None:
                patches.enter_context(lever.patch_off())
        return {"name": row.name, **bench.measure(replace(options, **changes), **compute)}


def main() -> None:
    """Measures every row, and prints it beside the one before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("full", "frozen_vision", "lora", "qlora"), default="full")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="samples a step (default: 8)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed steps a row, after one (default: 2)")
    parser.add_argument("--leave_one_out", action="store_true", help="each lever missing, instead of one by one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a small model, for tests")
    parser.add_argument("--output", type=Path, metavar="JSON")
    given = parser.parse_args()
    options = BenchOptions(
        method=given.method,
        batch_size=given.batch_size,
        steps=given.steps,
        warmup_steps=1,
        device=given.device,
        tiny=given.tiny,
    )
    device = torch.device(resolve_device(options.device))
    bench = Bench(bench_config(options.tiny), device)
    print(
        f"{options.method}, {device_name(device)}\n\n| | samples/s | against the row before | TFLOP/s | peak memory |"
    )
    print("|---|---|---|---|---|")
    measured: list[dict[str, Any]] = []
    for row in rows(given.leave_one_out):
        try:
            measured.append(measure(bench, row, options))
        except torch.OutOfMemoryError as error:
            print(f"| {row.name} | does not fit: {str(error).partition('.')[0]} | | | |", flush=True)
            continue
        now = measured[-1]
        compared = measured[0] if given.leave_one_out else measured[max(0, len(measured) - 2)]
        ratio = now["samples_per_s"] / compared["samples_per_s"]
        print(
            f"| {row.name} | {now['samples_per_s']:.3g} | x {ratio:.3f} | {now['tflops']:.3g} | "
            f"{memory_text(now['memory'])} |",
            flush=True,
        )
    if given.output is not None:
        write_json(given.output, {"environment": environment(), "device": device_name(device), "rows": measured})


if __name__ == "__main__":
    main()
