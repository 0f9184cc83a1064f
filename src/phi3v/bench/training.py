"""Training steps as ``phi3v train`` takes them, timed."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from phi3v.bench.machine import Stopwatch, peak_memory, reset_peak_memory, synchronize
from phi3v.bench.model import build_model
from phi3v.bench.options import BenchOptions
from phi3v.bench.workload import Workload, costs_of, work_of
from phi3v.config import TrainConfig
from phi3v.data.collate import PackSample
from phi3v.data.packing import saving_of, stem_groups
from phi3v.flops import FlopCount, count_flops
from phi3v.model.compute import Compute
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch
from phi3v.train.activations import ActivationPolicy, choose_activation_policy
from phi3v.train.data import Sharing
from phi3v.train.room import data_load
from phi3v.train.tuning import Precision, choose_precision, parameter_groups, select_trainable, wrap_lora


@dataclass
class Trainee:
    """A model that is trained.

    Attributes:
        model: the model itself.
        learner: the same, or its adapters' wrapper: what is called.
        optimizer: over what learns.
        config: the run that is imitated.
        precision: number formats.
        device: where everything is.
        scaler: scales the loss of fp16; lets everything else through.
    """

    model: Phi3VForCausalLM
    learner: Phi3VForCausalLM | PeftModel
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    precision: Precision
    device: torch.device
    scaler: torch.amp.GradScaler

    def step(self, batches: Iterable[PackedBatch], num_samples: int, watch: Stopwatch | None = None) -> torch.Tensor:
        """Takes one optimizer step; returns its loss, on the device.

        Args:
            batches: on the host.
            num_samples: of all of them.
            watch: books the copy to the device on ``data``, the rest on ``vision``, ``decoder`` and ``optimizer``.
        """
        enter = watch.enter if watch is not None else lambda _: None
        scaler = self.scaler
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            enter("data")
            on_device = batch.to(self.device, non_blocking=True)
            enter("decoder")
            with self.precision.autocast(self.device):
                share = self.learner(packed=on_device).loss / num_samples
            scaler.scale(share).backward()
            loss += share.detach()
        enter("optimizer")
        learning = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


@dataclass
class Tally:
    """What timed steps did.

    Attributes:
        seconds: of each step.
        losses: of each step.
        samples: in each step.
        positions: of the decoder, as the samples have them separately; in all steps together, as are the following.
        computed_positions: those that were computed, common beginnings once.
        crops: that CLIP computed.
        micro_batches: that the steps were cut into.
        flops: of all micro-batches.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    positions: int = 0
    computed_positions: int = 0
    crops: int = 0
    micro_batches: int = 0
    flops: list[FlopCount] = field(default_factory=list)

    def add(self, batches: Sequence[PackedBatch], trainee: Trainee, seconds: float, loss: float) -> None:
        """Adds a step."""
        dims = trainee.model.config.dims
        rank = trainee.config.lora_rank if trainee.config.trains_adapters else None
        self.seconds.append(seconds)
        self.losses.append(loss)
        self.samples.append(sum(batch.num_samples for batch in batches))
        for batch in batches:
            work = work_of(batch, dims.tokens_per_side)
            self.positions += batch.num_positions
            self.computed_positions += work.positions
            self.crops += work.crops
            self.micro_batches += 1
            self.flops.append(count_flops(dims, work, trainee.config.trained_parts, lora_rank=rank))

    def to_dict(self) -> dict[str, Any]:
        """Returns rates (of the step of median speed, the slowest and the fastest) and what they are rates of."""
        samples = sum(self.samples)
        rates = [number / seconds for number, seconds in zip(self.samples, self.seconds, strict=True)]
        flops = reduce(add, self.flops)
        flops_a_sample = flops.needed / samples
        return {
            "samples_per_s": median(rates),
            "samples_per_s_range": [min(rates), max(rates)],
            "positions_per_s": median(rates) * self.positions / samples,
            "tflops": median(rates) * flops_a_sample / 1e12,
            "step_seconds": self.seconds,
            "losses": self.losses,
            "sample": {
                "positions": self.positions / samples,
                "computed_positions": self.computed_positions / samples,
                "crops": self.crops / samples,
                "flops": flops_a_sample,
            },
            "samples_a_step": self.samples,
            "micro_batches_a_step": self.micro_batches / len(self.seconds),
            "flops": flops.to_dict(),
        }


def build_trainee(options: BenchOptions, config: Phi3VConfig, device: torch.device) -> Trainee:
    """Builds model and optimizer as a training run does."""
    train_config = options.train_config()
    precision = choose_precision(train_config, device.type)
    model = build_model(
        config,
        getattr(torch, precision.weights),
        device,
        seed=options.seed,
        is_four_bit=options.method == "qlora",
    )
    select_trainable(model, train_config)
    learner = wrap_lora(model, train_config) if train_config.trains_adapters else model
    optimizer = torch.optim.AdamW(
        parameter_groups(learner, train_config),
        lr=train_config.learning_rate,
        betas=(train_config.adam_beta1, train_config.adam_beta2),
        eps=train_config.adam_epsilon,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    return Trainee(model, learner, optimizer, train_config, precision, device, scaler)


def choose_policy(
    options: BenchOptions, config: Phi3VConfig, samples: Sequence[PackSample], device: torch.device
) -> ActivationPolicy:
    """Chooses micro-batches and what is computed again as a training run on these samples does.

    Raises:
        CapacityError: the longest sample does not fit.
    """
    train_config = options.train_config()
    costs = costs_of(samples)
    group_of = stem_groups(costs, config.original_max_position_embeddings)
    sharing = Sharing(options.shared_questions, group_of, saving_of(costs, group_of, options.shared_questions))
    precision = choose_precision(train_config, device.type).name
    load = data_load(costs, sharing)
    return choose_activation_policy(train_config, config.dims, load, precision=precision, device=device)


def measure_steps(trainee: Trainee, workload: Workload, compute: Compute, options: BenchOptions) -> dict[str, Any]:
    """Takes warm-up steps, timed steps, and one more whose time is split.

    Returns:
        What ``Tally.to_dict`` gives of the timed steps, ``warmup_seconds`` of every step before them, ``startup_s``:
        what those took longer than timed ones, ``split_seconds`` by section, and ``memory``.
    """
    trainee.model.compute = compute
    numbers = iter(range(options.warmup_steps + options.steps + 1))
    warmup = [_take_step(trainee, workload, next(numbers))[0] for _ in range(options.warmup_steps)]
    reset_peak_memory(trainee.device)
    tally = Tally()
    for _ in range(options.steps):
        seconds, batches, loss = _take_step(trainee, workload, next(numbers))
        tally.add(batches, trainee, seconds, loss)
    memory = peak_memory(trainee.device)
    return {
        **tally.to_dict(),
        "warmup_seconds": warmup,
        "startup_s": max(0.0, sum(warmup) - median(tally.seconds) * len(warmup)),
        "split_seconds": _split_step(trainee, workload, next(numbers)),
        "memory": memory,
        "compute": {"checkpointing": compute.checkpointing, "fp8": compute.fp8},
    }


def _take_step(trainee: Trainee, workload: Workload, step: int) -> tuple[float, list[PackedBatch], float]:
    """Takes a step; returns its seconds, the copy to the device included and packing not, its batches and its loss."""
    batches = _packed(trainee, workload, step)
    synchronize(trainee.device)
    started = time.perf_counter()
    loss = trainee.step(batches, sum(batch.num_samples for batch in batches))
    synchronize(trainee.device)
    return time.perf_counter() - started, batches, float(loss)


def _split_step(trainee: Trainee, workload: Workload, step: int) -> dict[str, float]:
    """Takes a step and returns the seconds of its sections; ``packing`` is what loader workers do while it computes."""
    started = time.perf_counter()
    batches = _packed(trainee, workload, step)
    packing = time.perf_counter() - started
    synchronize(trainee.device)
    watch = Stopwatch(trainee.device, "data")
    with _vision_watched(trainee.model, watch):
        trainee.step(batches, sum(batch.num_samples for batch in batches), watch)
    return {"packing": packing, **watch.seconds()}


def _packed(trainee: Trainee, workload: Workload, step: int) -> list[PackedBatch]:
    batches = [workload.pack(planned) for planned in workload.plan(step)]
    return [batch.pin_memory() for batch in batches] if trainee.device.type == "cuda" else batches


@contextmanager
def _vision_watched(model: Phi3VForCausalLM, watch: Stopwatch) -> Iterator[None]:
    """Books forward and backward pass of everything that makes image rows on ``vision``."""

    def before(*_: object) -> None:
        watch.enter("vision")

    def after(_: nn.Module, __: Any, rows: torch.Tensor) -> None:
        watch.enter("decoder")
        if rows.requires_grad:
            # The gradient arrives when the decoder's backward pass is over.
            rows.register_hook(lambda _: watch.enter("vision"))

    embedding = model.model.vision_embed_tokens
    handles = [embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
