"""Measurements as lines for people."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class PublishedSpeed(NamedTuple):
    """A row of Microsoft's table.

    Attributes:
        samples_per_s: of eight A100-80GB together, without flash attention.
        samples_per_s_flash: with it.
        peak_gb: of one GPU, GB.
    """

    samples_per_s: float
    samples_per_s_flash: float
    peak_gb: int


PUBLISHED = {
    "full": PublishedSpeed(5.04, 8.66, 36),
    "frozen_vision": PublishedSpeed(17.58, 31.74, 27),
    "lora": PublishedSpeed(5.59, 12.13, 16),
    "qlora": PublishedSpeed(4.83, 10.55, 10),
}
"""Microsoft's figures: DocVQA, 2,443 tokens on average, num_crops 16, effective batch 64, 8 x A100-80GB."""

PUBLISHED_GPUS = 8


def machine_line(name: str, rates: Mapping[str, Any]) -> str:
    """Says what the machine can do."""
    size = f"{rates['matmul_size']:,}"
    return (
        f"{name}: {rates['matmul_tflops']:.3g} TFLOP/s in a {rates['matmul_dtype']} product of {size} x {size} "
        f"({rates['matmul_sustained_tflops']:.3g} without a pause), {rates['copy_gb_per_s']:,.0f} GB/s copying"
    )


def run_lines(run: Mapping[str, Any]) -> list[str]:
    """Says what was measured of one variant."""
    lines = ["", f"{run['name']}:"]
    if "not_measured" in run:
        return [*lines, f"  not measured: {run['not_measured']}"]
    low, high = run["samples_per_s_range"]
    sample, split = run["sample"], run["split_seconds"]
    sections = ", ".join(f"{name} {seconds:.3g}" for name, seconds in split.items() if name != "packing")
    again = run["flops"]["recomputed"][run["compute"]["checkpointing"]] / run["flops"]["needed"]
    rows = {
        "work": f"{sample['positions']:,.0f} positions a sample, {sample['computed_positions']:,.0f} of them and "
        f"{sample['crops']:.3g} crops computed; {run['precision']}, checkpointing {run['compute']['checkpointing']}, "
        f"{run['micro_batches_a_step']:.3g} micro-batches a step",
        "start-up": f"{run['startup_s']:.1f} s that the first {len(run['warmup_seconds'])} steps took longer",
        "samples/s": f"{run['samples_per_s']:.4g} ({low:.4g} to {high:.4g} in {len(run['step_seconds'])} steps)",
        "tokens/s": f"{run['positions_per_s']:,.0f}",
        "TFLOP/s": f"{run['tflops']:.4g}, {run['machine_share']:.1%} of the product's; {sample['flops'] / 1e12:.3g} "
        f"TFLOP a sample, {again:.0%} more computed again",
        "memory": memory_text(run["memory"]),
        "a step": f"{sections} s; packing, which loader workers do beside it, {split['packing']:.3g} s",
    }
    if "baseline" in run:
        baseline = run["baseline"]
        rows["baseline"] = (
            f"{baseline['samples_per_s']:.4g} samples/s, memory {memory_text(baseline['memory'])}: {run['ratio']:.3g} "
            "times as fast"
        )
    return [*lines, *(f"  {name:10} {text}" for name, text in rows.items())]


def table_lines(measured: Mapping[str, Any]) -> list[str]:
    """Puts what was measured beside the published figures, in Markdown."""
    lines = [
        "",
        f"| method | samples/s, one {measured['device']} | baseline there | TFLOP/s | peak memory "
        "| Microsoft's on eight A100-80GB, without / with flash attention | one of those, with |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in measured["runs"]:
        published = PUBLISHED[run["name"]]
        ours = [run.get("not_measured", "")] + [""] * 3
        if "samples_per_s" in run:
            baseline = f"{run['baseline']['samples_per_s']:.3g}" if "baseline" in run else ""
            ours = [f"{run['samples_per_s']:.3g}", baseline, f"{run['tflops']:.3g}", memory_text(run["memory"])]
        a_gpu = published.samples_per_s_flash / PUBLISHED_GPUS
        theirs = [
            f"{published.samples_per_s} / {published.samples_per_s_flash}, {published.peak_gb} GB",
            f"{a_gpu:.2f}",
        ]
        lines.append(f"| {' | '.join([run['name'], *ours, *theirs])} |")
    return lines


def memory_text(memory: Mapping[str, int]) -> str:
    """Says the peak of a GPU's memory or of the process's; nothing is known where several share a process's peak."""
    if not memory:
        return "not measured"
    if "allocated_bytes" in memory:
        return f"{memory['allocated_bytes'] / 1e9:.1f} GB ({memory['reserved_bytes'] / 1e9:.1f} reserved)"
    return f"{memory['process_bytes'] / 1e9:.2f} GB of the process"
