"""The assembly of a measurement: one thing after the other in one process, shown and recorded."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch

from phi3v.bench import page
from phi3v.bench.baseline import measure_baseline
from phi3v.bench.machine import device_name, measure_rates
from phi3v.bench.model import bench_config
from phi3v.bench.options import BenchOptions, Method
from phi3v.bench.training import Trainee, build_trainee, choose_policy, measure_steps
from phi3v.bench.workload import PAGE_PX, Workload, draw_samples, read_samples
from phi3v.data.collate import PackSample
from phi3v.data.packing import Budget
from phi3v.errors import CapacityError, ConfigError
from phi3v.files import write_json
from phi3v.geometry import hd_layout, num_image_tokens
from phi3v.model.compute import Compute
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.packed_attention import row_alignment
from phi3v.model.placement import resolve_device
from phi3v.runlog import environment
from phi3v.train.messages import describe_gpus

SWEPT_CROPS = (1, 4, 9, 16)
SWEPT_TEXT_TOKENS = (33, 512, 1024, 2048, 4096)
SWEPT_SAMPLES_AT_ONCE = (1, 2, 4, 6, 8)
SWEPT_RANKS = (8, 16, 32, 64, 128, 256)


def run_bench(options: BenchOptions, show: Callable[[str], object] = print) -> dict[str, Any]:
    """Measures what ``options`` ask for, and writes it to ``options.output`` as it grows.

    Args:
        options: what.
        show: gets the lines for people, each thing's as soon as it is measured.

    Returns:
        What the file holds: ``environment``, ``device``, ``machine`` (rates), ``options``, ``model`` (sizes), and
        ``runs``: one for each thing that was measured.

    Raises:
        ConfigError: options that this machine cannot follow, or a file that cannot be written.
        CapacityError: the one thing to measure does not fit the device's memory.
    """
    if options.output is not None:
        _require_writable(options.output)
    device = torch.device(resolve_device(options.device))
    config = bench_config(options.tiny)
    rates = measure_rates(device)
    show(page.machine_line(device_name(device), rates))
    measured: dict[str, Any] = {
        "environment": environment(gpus=describe_gpus(device)),
        "device": device_name(device),
        "machine": rates,
        "options": options.to_dict(),
        "model": asdict(config.dims),
        "runs": [],
    }
    bench = Bench(config, device)
    variants = list(_variants(options, config))
    for name, variant in variants:
        run: dict[str, Any] = {"name": name, "options": variant.to_dict()}
        try:
            run |= bench.measure(variant)
        except (CapacityError, ConfigError, torch.OutOfMemoryError) as error:
            reason = f"{name} does not fit: {error}" if isinstance(error, torch.OutOfMemoryError) else str(error)
            if len(variants) == 1:
                raise (error if isinstance(error, ConfigError) else CapacityError(reason)) from error
            run["not_measured"] = reason
        if "tflops" in run:
            run["machine_share"] = run["tflops"] / rates["matmul_tflops"]
        measured["runs"].append(run)
        for line in page.run_lines(run):
            show(line)
        if options.output is not None:
            write_json(options.output, measured)
    if options.table:
        for line in page.table_lines(measured):
            show(line)
    return measured


def _require_writable(file: Path) -> None:
    """Makes sure, before minutes of measuring, that a file can be written; its content stays as it is.

    Raises:
        ConfigError: it cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("ab").close()
        if is_new:  # what fails later leaves no empty file that looks like a measurement's
            file.unlink()
    except OSError as error:
        raise ConfigError(f"--output {file}: cannot be written ({error.strerror or error})") from error


class Bench:
    """Measures variants one after the other; a model is built again only where a variant needs another one."""

    def __init__(self, config: Phi3VConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._trainee: Trainee | None = None
        self._built_for: object = None

    def measure(self, options: BenchOptions, **compute_changes: Any) -> dict[str, Any]:
        """Measures one variant.

        Args:
            options: what.
            compute_changes: fields of ``Compute`` that differ from what training takes.
        """
        samples = self._samples(options)
        found: dict[str, Any] = {}
        if options.baseline:
            self._release()
            found["baseline"] = measure_baseline(options, self._config, samples, self._device)
            self._release()
        trainee = self._trainee_for(options)
        policy = choose_policy(options, self._config, samples, self._device)
        workload = Workload(
            samples,
            self._config,
            batch_size=options.batch_size,
            budget=Budget(tokens=policy.micro_batch_tokens, crops=policy.micro_batch_crops),
            shared_questions=options.shared_questions,
            seed=options.seed,
            feature_dtype=(trainee.precision.autocast_dtype or torch.float32) if options.cached_features else None,
            alignment=row_alignment(self._device),
        )
        compute = Compute(checkpointing=policy.checkpointing, fp8=options.fp8, accumulates_in_place=True)
        compute = replace(compute, **compute_changes)
        found |= measure_steps(trainee, workload, compute, options)
        found |= {"precision": trainee.precision.name, "policy": policy.to_dict()}
        if "baseline" in found:
            found["ratio"] = found["samples_per_s"] / found["baseline"]["samples_per_s"]
            if self._device.type != "cuda":  # a process's peak never falls: both would show the larger of the two
                found["memory"] = found["baseline"]["memory"] = {}
        return found

    def _samples(self, options: BenchOptions) -> list[PackSample]:
        count = options.batch_size * (options.warmup_steps + options.steps + 1)
        read = draw_samples if options.data is None else read_samples
        return read(options, self._config, count)

    def _trainee_for(self, options: BenchOptions) -> Trainee:
        needed = (options.method, options.lora_rank, options.precision, options.seed)
        if self._trainee is None or needed != self._built_for:
            self._release()
            self._trainee, self._built_for = build_trainee(options, self._config, self._device), needed
        return self._trainee

    def _release(self) -> None:
        """Gives the memory of models back, so that what comes next starts from the same."""
        self._trainee = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _variants(options: BenchOptions, config: Phi3VConfig) -> Iterator[tuple[str, BenchOptions]]:
    """Yields what is measured, by name."""
    if options.table:
        for method in get_args(Method):
            cached = options.cached_features and method == "frozen_vision"
            yield method, replace(options, method=method, cached_features=cached, table=False)
    elif options.sweep == "num_crops":
        for crops in SWEPT_CROPS:
            yield f"num_crops {crops}", replace(options, num_crops=crops)
    elif options.sweep == "length":
        for tokens in SWEPT_TEXT_TOKENS:
            yield f"text_tokens {tokens}", replace(options, text_tokens=tokens)
    elif options.sweep == "micro_batch":
        longest = _longest(options, config)
        for samples in SWEPT_SAMPLES_AT_ONCE:
            yield f"samples at once {samples}", replace(options, micro_batch_tokens=samples * longest)
    elif options.sweep == "rank":
        for rank in SWEPT_RANKS:
            yield f"lora_rank {rank}", replace(options, lora_rank=rank)
    else:
        yield options.method, options


def _longest(options: BenchOptions, config: Phi3VConfig) -> int:
    """Returns the positions of the longest sample that can be drawn."""
    grid = hd_layout(*PAGE_PX, num_crops=options.num_crops, crop_px=config.crop_px).grid
    return num_image_tokens(grid, config.tokens_per_side) + options.text_tokens * 11 // 8
