"""Speed, memory and exchange of the engines on 1, 2, 4 and 8 GPUs of one machine, whole optimizer steps of one batch.

    python benchmarks/scaling.py --gpus 1 2 4 8 --output scaling.json
    python benchmarks/scaling.py --gpus 1 2 --runs full:fsdp2 lora:ddp --steps 4
    python benchmarks/scaling.py --gpus 1 2 --tiny --runs full:fsdp2

The workload of docs/performance.md at an effective batch of 64; the published size with random weights, equal on all
processes. Every run is one start of torchrun; those that fit on the machine's GPUs together run at the same time, each
on GPUs of its own, the largest first. Where there are several GPUs, one more step is profiled: seconds of NCCL's
kernels, and those of them in which nothing else runs. Losses must be those of one GPU but for rounding. Efficiency: of
N times the fastest run of the same method on one GPU, whatever its engine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from phi3v.bench.machine import device_name, peak_memory, reset_peak_memory, synchronize
from phi3v.bench.model import bench_config, build_model
from phi3v.bench.options import BenchOptions
from phi3v.bench.workload import Workload, costs_of, draw_samples
from phi3v.data.packing import Budget, saving_of, stem_groups
from phi3v.files import write_json
from phi3v.model.compute import Compute
from phi3v.model.packed_attention import row_alignment
from phi3v.train.activations import choose_activation_policy
from phi3v.train.data import Sharing
from phi3v.train.engines.choose import is_sharded, open_engine, require_engine
from phi3v.train.room import data_load
from phi3v.train.tuning import choose_precision, select_trainable, wrap_lora

DEFAULT_RUNS = ("full:ddp", "full:fsdp2", "full:zero2", "frozen_vision:ddp", "frozen_vision:fsdp2", "lora:ddp")

MOST_SECONDS = 300
"""Of a run; processes that wait for each other would wait forever."""

Job = tuple[str, int]
"""A run, ``METHOD:ENGINE``, and its number of GPUs."""

Span = tuple[float, float]


def main() -> None:
    """Starts a run for every engine and number of GPUs, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--runs", nargs="+", default=DEFAULT_RUNS, metavar="METHOD:ENGINE")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed steps, after one (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="a small model, on CPUs where there is no GPU")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "ENGINE", "JSON"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        method, parallel, file = options.worker
        measure(method, parallel, Path(file), options)
        return
    results = run_all([(run, num_gpus) for num_gpus in options.gpus for run in options.runs], options)
    print("\n" + "\n".join(map(line_of, results)), flush=True)


def run_all(jobs: list[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs every job as soon as GPUs for it are free; returns what they found, by run and number of GPUs."""
    num_devices = torch.cuda.device_count()
    free = list(range(num_devices)) if num_devices else [0]
    waiting = sorted(jobs, key=lambda job: -job[1])
    if num_devices and waiting[0][1] > num_devices:
        raise SystemExit(f"--gpus {waiting[0][1]}: this machine has {num_devices}")
    found: dict[Job, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], tuple[Job, list[int]]] = {}
    with ThreadPoolExecutor() as threads:
        while waiting or running:
            # Without GPUs one job at a time, whatever its number of processes.
            for job in [*waiting]:
                needed = job[1] if num_devices else 1
                if needed <= len(free):
                    devices, free = free[:needed], free[needed:]
                    waiting.remove(job)
                    running[threads.submit(start, *job, devices if num_devices else None, options)] = job, devices
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, devices = running.pop(future)
                free = sorted(free + devices)
                found[job] = future.result()
                print(line_of(found[job]), flush=True)
                if options.output is not None:
                    write_json(options.output, with_efficiency(found.values()))
    places = {job: (options.runs.index(job[0]), job[1]) for job in jobs}
    return with_efficiency(found[job] for job in sorted(jobs, key=places.__getitem__))


def with_efficiency(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds ``efficiency`` where the same method was measured on one GPU: of its fastest run there, times the GPUs."""
    listed = list(results)
    alone: dict[str, float] = {}
    for result in listed:
        if result["gpus"] == 1 and "samples_per_s" in result:
            method = result["run"].partition(":")[0]
            alone[method] = max(alone.get(method, 0.0), result["samples_per_s"])
    for result in listed:
        best = alone.get(result["run"].partition(":")[0])
        if best and "samples_per_s" in result:
            result["efficiency"] = result["samples_per_s"] / result["gpus"] / best
    return listed


def start(run: str, num_gpus: int, devices: list[int] | None, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one measurement in processes of its own; returns what the first of them wrote, or why there is nothing."""
    method, parallel = run.split(":")
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
        command += [__file__, "--worker", method, parallel, str(file)]
        command += ["--batch_size", str(options.batch_size), "--steps", str(options.steps)]
        command += ["--tiny"] * options.tiny
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **visible})
        try:
            _, errors = process.communicate(timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            _, errors = process.communicate()
            errors += f"\nTimeoutError: not done after {MOST_SECONDS} s"
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {"failed": errors[-20_000:]}
    return {"run": run, "gpus": num_gpus, **found}


def measure(method: str, parallel: str, file: Path, options: argparse.Namespace) -> None:
    """Takes the steps, as one of the processes."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    bench = BenchOptions(method=method, batch_size=options.batch_size, tiny=options.tiny)  # pyright: ignore[reportArgumentType]
    run = replace(bench.train_config(), parallel=parallel)
    precision = choose_precision(run, device.type)
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision.name, precision.name), cpu=not is_cuda)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    require_engine(run, device)
    config = bench_config(options.tiny)
    samples = draw_samples(bench, config, options.batch_size * (options.steps + 2))
    costs = costs_of(samples)
    group_of = stem_groups(costs, config.original_max_position_embeddings)
    load = data_load(costs, Sharing(1, group_of, saving_of(costs, group_of, 1)))
    policy = choose_activation_policy(
        run, config.dims, load, precision=precision.name, device=device, num_ranks=num_ranks
    )
    workload = Workload(
        samples,
        config,
        batch_size=options.batch_size,
        budget=Budget(tokens=policy.micro_batch_tokens, crops=policy.micro_batch_crops),
        shared_questions=1,
        seed=0,
        alignment=row_alignment(device),
        rank=rank,
        num_ranks=num_ranks,
    )
    model = build_model(config, getattr(torch, precision.weights), device, seed=0)
    select_trainable(model, run)
    model.compute = Compute(
        checkpointing=policy.checkpointing,
        accumulates_in_place=num_ranks == 1 and parallel == "ddp",
        is_sharded=is_sharded(run),
    )
    torch.manual_seed(0)  # adapters start alike on all processes
    learner = wrap_lora(model, run) if run.trains_adapters else model
    engine = open_engine(run, precision, learner, accelerator)

    def step(number: int) -> tuple[float, float]:
        batches = [workload.pack(planned) for planned in workload.plan(number)]
        batches = [batch.pin_memory() for batch in batches] if is_cuda else batches
        distributed.barrier()
        synchronize(device)
        began = time.perf_counter()
        loss = torch.zeros((), device=device)
        for place, batch in enumerate(batches, start=1):
            on_device = batch.to(device, non_blocking=True)
            share = lambda batch=on_device: engine.module(packed=batch).loss * (num_ranks / options.batch_size)
            loss += engine.run(share, is_last=place == len(batches))
        engine.clip(run.max_grad_norm)
        engine.optimizer.step()
        engine.module.zero_grad()
        synchronize(device)
        seconds = torch.tensor(time.perf_counter() - began, device=device)
        distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
        distributed.all_reduce(loss)
        return float(seconds), float(loss) / num_ranks

    losses = [step(0)[1]]
    reset_peak_memory(device)
    timed = [step(number + 1) for number in range(options.steps)]
    memory = peak_memory(device)
    found: dict[str, Any] = {
        "device": device_name(device),
        "precision": precision.name,
        "samples_per_s": options.batch_size / sorted(seconds for seconds, _ in timed)[len(timed) // 2],
        "step_seconds": [seconds for seconds, _ in timed],
        "losses": losses + [loss for _, loss in timed],
        "memory": memory,
        "policy": policy.to_dict(),
        "micro_batches": len(workload.plan(0)),
    }
    if is_cuda and num_ranks > 1:
        found |= exchange_of(lambda: step(options.steps + 1))
    if rank == 0:
        write_json(file, found)
    distributed.barrier()
    engine.close()
    distributed.destroy_process_group()


def exchange_of(step: Any) -> dict[str, float]:
    """Profiles a step: seconds of NCCL's kernels, and those of them in which no other kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = {
        is_nccl: merged(
            (event.time_range.start, event.time_range.end) for event in kernels if ("nccl" in event.name) == is_nccl
        )
        for is_nccl in (True, False)
    }
    exchange = length(spans[True])
    hidden = exchange + length(spans[False]) - length(merged([*spans[True], *spans[False]]))
    return {"exchange_s": exchange / 1e6, "exposed_s": (exchange - hidden) / 1e6}


def merged(spans: Iterable[Span]) -> list[Span]:
    """Joins spans that touch.

    >>> merged([(5, 6), (0, 2), (1, 3)])
    [(0, 3), (5, 6)]
    """
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def length(spans: Iterable[Span]) -> float:
    """Returns the length of spans that do not touch."""
    return sum(end - begin for begin, end in spans)


def line_of(result: dict[str, Any]) -> str:
    """Returns a result as a row of a table."""
    start = f"| {result['run']} | {result['gpus']} | "
    if "failed" in result:
        errors = [line for line in result["failed"].splitlines() if "Error: " in line]
        return start + f"failed: {(errors or ['the JSON has its output'])[-1]} |"
    efficiency = f"{result['efficiency']:.1%}" if "efficiency" in result else ""
    cells = [
        f"{result['samples_per_s']:.2f} samples/s",
        efficiency,
        f"{max(result['memory'].values()) / 1e9:.1f} GB",
        f"checkpointing {result['policy']['checkpointing']}, {result['micro_batches']} micro-batches",
        f"exchange {result['exchange_s']:.3f} s, exposed {result['exposed_s']:.3f} s" if "exchange_s" in result else "",
        "losses " + " ".join(f"{loss:.6f}" for loss in result["losses"]),
    ]
    return start + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
