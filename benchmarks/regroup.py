"""A checkpoint of the published width, saved on some GPUs, resumed on others: losses, seconds and bytes.

    python benchmarks/regroup.py OUTPUT_DIR --data FOLDER --gpus 4 2 --parallel fsdp2
    python benchmarks/regroup.py OUTPUT_DIR --data FOLDER --gpus 2 1 --parallel zero3 --tiny     # on CPUs too

Full training in bf16 with random weights, by default of the published depth too; four steps with a checkpoint after the
second on the first number of GPUs. What came after it is taken away, and the second number of GPUs goes on. Losses must
be those of the first time but for rounding. ``--data``: a folder that ``phi3v demo`` wrote (its ``data``).
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from phi3v.config import TrainConfig
from phi3v.demo import build_model
from phi3v.runlog import RunDirectory
from training import forget_after

SAVED_STEP, LAST_STEP = 2, 4


def published_sizes(num_layers: int) -> dict[str, Any]:
    """Returns the published sizes, with another number of decoder layers."""
    ones = [1.0] * 48
    return {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "rope_scaling": {"type": "su", "short_factor": ones, "long_factor": ones},
        "vision_config": {},
    }


def train(config: TrainConfig, num_gpus: int) -> None:
    """Trains as ``phi3v train`` under torchrun; prints its messages, each with the seconds since the start."""
    file = config.output_dir.with_suffix(".yaml")
    file.write_text(config.to_yaml(), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
    command += ["-m", "phi3v", "train", str(file)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})
    assert process.stdout is not None
    for line in process.stdout:
        print(f"  {time.perf_counter() - started:6.1f} s  {line.rstrip()[:200]}", flush=True)
    if process.wait() != 0:
        raise SystemExit(f"phi3v train on {num_gpus} GPUs ended with {process.returncode}")


def main() -> None:
    """Trains, takes away the second half, goes on, and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs=2, default=[4, 2], metavar="N")
    parser.add_argument("--parallel", nargs="+", default=["fsdp2"], metavar="ENGINE", help="one, or one for each part")
    parser.add_argument("--layers", type=int, default=32, help="of the decoder (default: 32)")
    parser.add_argument("--tiny", action="store_true", help="the demo's small model, in float32")
    options = parser.parse_args()
    folder: Path = options.output_dir
    has_gpu = torch.cuda.is_available()
    if options.tiny:
        build_model(folder / "base")
    else:
        torch.set_default_dtype(torch.bfloat16)  # as the published weights are
        with torch.device("cuda" if has_gpu else "cpu"):  # four billion random numbers take a CPU a minute
            build_model(folder / "base", **published_sizes(options.layers))
        gc.collect()
        torch.cuda.empty_cache()  # the runs get all of it
    losses: list[list[float]] = []
    for num_gpus, parallel in zip(options.gpus, [options.parallel[0], options.parallel[-1]], strict=True):
        print(f"\n{parallel} on {num_gpus}", flush=True)
        config = TrainConfig(
            model=str(folder / "base"),
            output_dir=folder / "run",
            train_data=[options.data / "train.jsonl"],
            method="full",
            parallel=parallel,
            precision="fp32" if options.tiny else "bf16",
            device="cuda" if has_gpu else "cpu",
            batch_size=32,
            max_steps=LAST_STEP,
            save_steps=SAVED_STEP,
            warmup_steps=1,
            logging_steps=1,
            report_to=[],
            progress=False,
        )
        train(config, num_gpus)
        losses.append([line["loss"] for line in RunDirectory(folder / "run").steps()])
        checkpoint = folder / "run" / "checkpoints" / f"checkpoint-{SAVED_STEP}"
        if not losses[1:]:
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
            print(f"checkpoint: {size / 1e9:.1f} GB", flush=True)
            forget_after(folder / "run", SAVED_STEP)
    for name, values in zip(("undisturbed", "resumed"), losses, strict=True):
        print(f"{name:12}" + " ".join(f"{value:.6f}" for value in values))
    worst = max(abs(one - other) / one for one, other in zip(*losses, strict=True))
    print(f"largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
