"""Speed, memory and exchange of the engines on 1, 2, 4 and 8 GPUs of one machine, whole optimizer steps of one batch.

    python benchmarks/scaling.py --gpus 1 2 4 8 --output scaling.json
    python benchmarks/scaling.py --gpus 1 2 --runs full:fsdp2 lora:ddp --steps 4
    python benchmarks/scaling.py --gpus 1 2 --tiny --runs full:fsdp2

The workload of docs/performance.md at an effective batch of 64; the published size with random weights, equal on all
processes. All runs of one number of GPUs come from one start of torchrun, one after the other; on one GPU each has its
own. Starts that fit on the machine's GPUs together run at the same time, each on GPUs of its own, the largest first.

Where there are several GPUs, one more step is profiled on each: seconds in which it computes, seconds of NCCL's
kernels, those of them in which nothing else runs, and those in which nothing runs. Losses must be those of one GPU but
for rounding. Efficiency: of N times the same run's speed on one GPU, and of N times that of the method's fastest engine
there.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from phi3v.bench.machine import device_name, peak_memory, reset_peak_memory, synchronize
from phi3v.bench.model import bench_config, build_model
from phi3v.bench.options import BenchOptions
from phi3v.bench.workload import Workload, costs_of, draw_samples
from phi3v.data.packing import Budget, saving_of, stem_groups
from phi3v.files import write_json
from phi3v.model.compute import Compute
from phi3v.model.packed import PackedBatch
from phi3v.model.packed_attention import row_alignment
from phi3v.train.activations import choose_activation_policy
from phi3v.train.data import Sharing
from phi3v.train.engines.choose import is_sharded, open_engine, require_engine
from phi3v.train.room import data_load
from phi3v.train.tuning import choose_precision, select_trainable, wrap_lora

DEFAULT_RUNS = ("full:ddp", "full:fsdp2", "frozen_vision:ddp", "frozen_vision:fsdp2", "lora:ddp", "full:zero2")

WARMUP_STEPS = 1
"""And one more a process: the fewer micro-batches a step has, the more steps until attention is planned for all shapes,
0.15 s each, for which all processes wait."""

MOST_SECONDS = 240
"""Of a run, on average over a start's; processes that wait for each other would wait forever."""

Result = dict[str, Any]
Job = tuple[int, tuple[str, ...]]
"""A number of GPUs, and the runs, ``METHOD:ENGINE``, that are measured there."""

Span = tuple[int, int]


def main() -> None:
    """Starts a run for every engine and number of GPUs, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--runs", nargs="+", default=DEFAULT_RUNS, metavar="METHOD:ENGINE")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="timed steps (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="a small model, on CPUs where there is no GPU")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        measure_all(options.runs, options.worker, options)
        return
    results = run_all(options)
    print("\n" + "\n".join(map(line_of, results)), flush=True)


def run_all(options: argparse.Namespace) -> list[Result]:
    """Starts every job as soon as GPUs for it are free; returns what they found, by run and number of GPUs."""
    num_devices = torch.cuda.device_count()
    if num_devices and max(options.gpus) > num_devices:
        raise SystemExit(f"--gpus {max(options.gpus)}: this machine has {num_devices}")
    runs = tuple(options.runs)
    waiting: list[Job] = []
    for num_gpus in sorted(options.gpus, reverse=True):
        waiting += [(1, (run,)) for run in runs] if num_gpus == 1 else [(num_gpus, runs)]
    free = list(range(num_devices or 1))
    results: list[Result] = []
    running: dict[Future[list[Result]], list[int]] = {}
    with ThreadPoolExecutor() as threads:
        while waiting or running:
            for job in [*waiting]:
                # Without GPUs one job at a time, whatever its number of processes.
                needed = job[0] if num_devices else 1
                if needed <= len(free):
                    devices, free = free[:needed], free[needed:]
                    waiting.remove(job)
                    running[threads.submit(start, job, devices if num_devices else None, options)] = devices
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                free = sorted(free + running.pop(future))
                results += future.result()
                results.sort(key=lambda result: (runs.index(result["run"]), result["gpus"]))
                add_efficiency(results)
                if options.output is not None:
                    write_json(options.output, results)
    return results


def add_efficiency(results: list[Result]) -> None:
    """Says how fast each run is: of the same run on one GPU, and of its method's fastest there, times its GPUs."""
    alone = {result["run"]: result["samples_per_s"] for result in results if result["gpus"] == 1 and is_done(result)}
    for result in filter(is_done, results):
        speed = result["samples_per_s"] / result["gpus"]
        method = method_of(result["run"])
        if result["run"] in alone:
            result["efficiency"] = speed / alone[result["run"]]
        if same := [other for run, other in alone.items() if method_of(run) == method]:
            result["of_fastest"] = speed / max(same)


def is_done(result: Result) -> bool:
    """Whether there are figures."""
    return "failed" not in result


def method_of(run: str) -> str:
    """Returns the method of METHOD:ENGINE."""
    return run.partition(":")[0]


def start(job: Job, devices: list[int] | None, options: argparse.Namespace) -> list[Result]:
    """Measures runs in processes of their own; after one that fails, the others are started again."""
    num_gpus, runs = job
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": names_of(devices)}
    with TemporaryDirectory() as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
        command += [__file__, "--worker", name, "--runs", *runs]
        command += ["--batch_size", str(options.batch_size), "--steps", str(options.steps)]
        command += ["--tiny"] * options.tiny
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **visible})
        try:
            _, errors = process.communicate(timeout=MOST_SECONDS * len(runs))
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            _, errors = process.communicate()
            errors += f"\nTimeoutError: not done after {MOST_SECONDS * len(runs)} s"
        files = [Path(name) / f"{run}.json" for run in runs]
        found = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    results = [{"run": run, "gpus": num_gpus, **one} for run, one in zip(runs, found, strict=False)]
    if len(found) < len(runs):
        results.append({"run": runs[len(found)], "gpus": num_gpus, "failed": errors[-20_000:]})
    for result in results:
        print(line_of(result), flush=True)
    left = runs[len(results) :]
    return results + (start((num_gpus, left), devices, options) if left else [])


def names_of(devices: list[int]) -> str:
    """Returns GPUs as CUDA_VISIBLE_DEVICES names them, of those that are visible here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return ",".join(names[device] for device in devices)


def measure_all(runs: Sequence[str], folder: Path, options: argparse.Namespace) -> None:
    """Measures runs one after the other, as one of the processes; the first one writes ``RUN.json``."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    precision = choose_precision(BenchOptions(tiny=options.tiny).train_config(), device.type).name
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision), cpu=not is_cuda)
    for run in runs:
        found = measure(run, device, accelerator, options)
        if accelerator.is_main_process:
            write_json(folder / f"{run}.json", found)
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()
    distributed.barrier()
    distributed.destroy_process_group()


def measure(name: str, device: torch.device, accelerator: Accelerator, options: argparse.Namespace) -> Result:
    """Takes a run's steps."""
    method, parallel = name.split(":")
    is_cuda = device.type == "cuda"
    held_before = torch.cuda.memory_allocated(device) if is_cuda else 0
    bench = BenchOptions(method=method, batch_size=options.batch_size, tiny=options.tiny)  # pyright: ignore[reportArgumentType]
    run = replace(bench.train_config(), parallel=parallel)
    precision = choose_precision(run, device.type)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    num_warmup = WARMUP_STEPS + num_ranks
    require_engine(run, device)
    config = bench_config(options.tiny)
    samples = draw_samples(bench, config, options.batch_size * (num_warmup + options.steps + 1))
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

    def prepared(number: int) -> list[PackedBatch]:
        batches = [workload.pack(planned) for planned in workload.plan(number)]
        batches = [batch.pin_memory() for batch in batches] if is_cuda else batches
        distributed.barrier()
        synchronize(device)
        return batches

    def step(batches: list[PackedBatch]) -> torch.Tensor:
        loss = torch.zeros((), device=device)
        for place, batch in enumerate(batches, start=1):
            on_device = batch.to(device, non_blocking=True)
            share = lambda batch=on_device: engine.module(packed=batch).loss * (num_ranks / options.batch_size)
            loss += engine.run(share, is_last=place == len(batches))
        engine.clip(run.max_grad_norm)
        engine.optimizer.step()
        engine.module.zero_grad()
        synchronize(device)
        return loss

    def timed(number: int) -> tuple[float, float]:
        batches = prepared(number)
        began = time.perf_counter()
        loss = step(batches)
        seconds = time.perf_counter() - began
        distributed.all_reduce(loss)
        return most_of_all(seconds, device), float(loss) / num_ranks

    steps = [timed(number) for number in range(num_warmup)]
    reset_peak_memory(device)
    steps += [timed(num_warmup + number) for number in range(options.steps)]
    memory = {name: int(most_of_all(size, device)) for name, size in peak_memory(device).items()}
    seconds = [one for one, _ in steps]
    found: Result = {
        "device": device_name(device),
        "precision": precision.name,
        "samples_per_s": options.batch_size / statistics.median(seconds[num_warmup:]),
        "step_seconds": seconds,
        "losses": [loss for _, loss in steps],
        "memory": memory,
        "held_before": held_before,
        "policy": policy.to_dict(),
        "micro_batches": len(workload.plan(0)),
    }
    if is_cuda and num_ranks > 1:
        batches = prepared(num_warmup + options.steps)
        found["exchange"] = exchange_of(lambda: step(batches))
    engine.close()
    return found


def most_of_all(value: float, device: torch.device) -> float:
    """Returns the largest of all processes' values."""
    most = torch.tensor(float(value), device=device, dtype=torch.float64)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return float(most)


def exchange_of(step: Callable[[], object]) -> dict[str, list[float]]:
    """Profiles a step that all processes begin together; returns seconds of every process.

    Returns:
        ``computes``, in which kernels and copies run that are not NCCL's; ``exchange``, of NCCL's kernels; ``exposed``,
        of those while nothing else runs; ``idle``, in which nothing runs at all.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        distributed.barrier()  # starting to profile takes processes differently long
        torch.cuda.synchronize()
        began = time.time_ns()
        step()
        seconds = (time.time_ns() - began) / 1e9
    # Not ``events()``, which makes a tree of them all, for a minute.
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    kernels = [
        event
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and event.start_ns() >= began
    ]
    spans = {
        is_nccl: merged(
            (event.start_ns(), event.start_ns() + event.duration_ns())
            for event in kernels
            if ("nccl" in event.name()) == is_nccl
        )
        for is_nccl in (True, False)
    }
    exchange, computes = length(spans[True]), length(spans[False])
    busy = length(merged([*spans[True], *spans[False]]))
    found = {
        "computes": computes / 1e9,
        "exchange": exchange / 1e9,
        "exposed": (busy - computes) / 1e9,
        "idle": seconds - busy / 1e9,
    }
    own = torch.tensor(list(found.values()), device="cuda", dtype=torch.float64)
    of_all = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(of_all, own)
    columns = torch.stack(of_all, dim=1).tolist()
    return dict(zip(found, columns, strict=True))


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


def length(spans: Iterable[Span]) -> int:
    """Returns the length of spans that do not touch."""
    return sum(end - begin for begin, end in spans)


def line_of(result: dict[str, Any]) -> str:
    """Returns a result as a row of a table."""
    start = f"| {result['run']} | {result['gpus']} | "
    if "failed" in result:
        errors = [line for line in result["failed"].splitlines() if "Error: " in line and "ChildFailed" not in line]
        return start + f"failed: {(errors or ['the JSON has its output'])[-1][:300]} |"
    cells = [
        f"{result['samples_per_s']:.2f} samples/s",
        ", ".join(f"{result[name]:.1%}" for name in ("efficiency", "of_fastest") if name in result),
        f"{max(result['memory'].values()) / 1e9:.1f} GB",
        f"checkpointing {result['policy']['checkpointing']}, {result['micro_batches']} micro-batches",
        in_words(result["exchange"]) if "exchange" in result else "",
        "losses " + " ".join(f"{loss:.6f}" for loss in result["losses"]),
    ]
    return start + " | ".join(cells) + " |"


def in_words(exchange: dict[str, list[float]]) -> str:
    """Says what a profiled step's seconds went into: the least and the most of any GPU."""
    return ", ".join(f"{name} {min(values):.3f} to {max(values):.3f} s" for name, values in exchange.items())


if __name__ == "__main__":
    main()
