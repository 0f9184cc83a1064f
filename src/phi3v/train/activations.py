"""How much of a step's activations is kept and how many positions a device computes at once: what its memory allows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

import torch
from torch import distributed

from phi3v.config import LORA_PARTS, TrainConfig, settings_of
from phi3v.errors import CapacityError
from phi3v.geometry import ModelDims
from phi3v.memory import CHECKPOINTING, Checkpointing, MemoryModel, MicroBatch
from phi3v.train.checkpoints.rehearsal import in_words
from phi3v.train.tuning import IMAGE_PARTS

logger = logging.getLogger(__name__)

CPU_POSITIONS = 4096
"""Positions that a CPU computes at once."""

LEAST_POSITIONS = 8192
"""Positions below which a fast GPU waits for its next kernels: launching a micro-batch's takes about 0.25 s."""

MOST_POSITIONS = 24_576
"""Positions beyond which a larger micro-batch gains nothing."""

POSITIONS_STEP = 1024
"""Budgets are multiples of this, so that a few megabytes of free memory more or less do not change a run's batches."""

MARGIN = 1.5
"""How far a micro-batch may lie above the data's mean in crops and in supervised positions, as a factor."""

DEFAULT_RANK = settings_of(TrainConfig)["lora_rank"].default
"""Rank that the adapters of a method that is proposed would have."""


@dataclass(frozen=True, kw_only=True)
class DataLoad:
    """What the samples ask for.

    Attributes:
        longest_tokens: decoder positions of the longest sample.
        longest_crops: most crops of one sample.
        crops_a_token: crops per decoder position that is computed, over all samples; None: the most that can come.
        targets_a_token: supervised positions per decoder position that is computed, over all samples.
    """

    longest_tokens: int
    longest_crops: int
    crops_a_token: float | None = None
    targets_a_token: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ActivationPolicy:
    """What a device computes at once, and what of it the backward pass computes again.

    Attributes:
        checkpointing: off, selective or full.
        micro_batch_tokens: most decoder positions at once; a longer sample goes alone.
        micro_batch_crops: most crops at once; None: no limit of their own.
        predicted_bytes: by item, for a micro-batch that is full; empty on a CPU.
        available_bytes: what the device has for it; None on a CPU.
    """

    checkpointing: Checkpointing
    micro_batch_tokens: int
    micro_batch_crops: int | None = None
    predicted_bytes: Mapping[str, int] = field(default_factory=dict)
    available_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, for the run log."""
        return {
            "checkpointing": self.checkpointing,
            "micro_batch_tokens": self.micro_batch_tokens,
            "micro_batch_crops": self.micro_batch_crops,
            "predicted_bytes": dict(self.predicted_bytes),
            "available_bytes": self.available_bytes,
        }

    def table(self) -> str:
        """Returns the choice as text: a line, and on a GPU one more for every item."""
        crops = "" if self.micro_batch_crops is None else f" and {self.micro_batch_crops:,} crops"
        at_once = f"{self.micro_batch_tokens:,} positions{crops}"
        head = f"Activations: checkpointing {self.checkpointing}, at most {at_once} at once"
        if self.available_bytes is None:
            return f"{head}."
        total = sum(self.predicted_bytes.values())
        lines = [f"{head}; predicted {in_words(total)} of {in_words(self.available_bytes)}:"]
        lines += [f"  {name:<14} {in_words(size):>9}" for name, size in self.predicted_bytes.items()]
        return "\n".join(lines)


def choose_activation_policy(
    config: TrainConfig, dims: ModelDims, load: DataLoad, *, precision: str, device: torch.device, num_ranks: int = 1
) -> ActivationPolicy:
    """Chooses what ``config`` leaves open: ``checkpointing: auto`` and ``micro_batch_tokens: None``.

    May be called before or after the model is on the device, and by every process of a run (each then gets the same
    answer: the least memory of any decides). The choice is logged.

    Args:
        config: what is set is kept.
        dims: the model's sizes, ``model.config.dims``.
        load: what the samples ask for.
        precision: ``fp32``, ``bf16`` or ``fp16``; ``choose_precision(...).name``.
        device: where the run computes.
        num_ranks: processes of the run.

    Raises:
        CapacityError: the longest sample does not fit, whatever is computed again.
    """
    memory = memory_model(config, dims, precision=precision, num_ranks=num_ranks)
    policy = plan_activations(
        memory,
        load,
        available_bytes=None if device.type == "cpu" else _available_bytes(device),
        checkpointing=config.checkpointing,
        micro_batch_tokens=config.micro_batch_tokens,
        micro_batch_crops=config.micro_batch_crops,
    )
    logger.info("%s", policy.table())
    return policy


def memory_model(config: TrainConfig, dims: ModelDims, *, precision: str, num_ranks: int = 1) -> MemoryModel:
    """Returns the memory model of a run; arguments as in :func:`choose_activation_policy`."""
    return MemoryModel(
        dims=dims,
        trained_parts=config.trained_parts,
        precision=precision,
        adapter_rank=config.lora_rank if config.trains_adapters else None,
        has_magnitudes=config.use_dora,
        four_bit_parts=tuple(config.four_bit_parts) if config.method == "qlora" else (),
        num_ranks=num_ranks,
        parallel=config.parallel,
        offloads=config.cpu_offload,
    )


def plan_activations(
    memory: MemoryModel,
    load: DataLoad,
    *,
    available_bytes: int | None,
    checkpointing: Literal["auto"] | Checkpointing = "auto",
    micro_batch_tokens: int | None = None,
    micro_batch_crops: int | None = None,
) -> ActivationPolicy:
    """Chooses from numbers alone.

    Takes the least recomputation with which the longest sample fits, and at least ``LEAST_POSITIONS`` positions; then
    as many positions as fit, up to ``MOST_POSITIONS``. Without ``available_bytes`` (a CPU): nothing is computed again,
    and ``CPU_POSITIONS`` positions. What is set is kept; if it is predicted not to fit, a warning says so.

    Args:
        memory: predicts the bytes of a micro-batch.
        load: what the samples ask for.
        available_bytes: what the device has for the run.
        checkpointing: set by the user, or auto.
        micro_batch_tokens: set by the user, or None.
        micro_batch_crops: set by the user, or None.

    Raises:
        CapacityError: the longest sample does not fit, whatever is computed again, and something is left to choose.
    """
    if available_bytes is None:
        return ActivationPolicy(
            checkpointing="off" if checkpointing == "auto" else checkpointing,
            micro_batch_tokens=micro_batch_tokens or CPU_POSITIONS,
            micro_batch_crops=micro_batch_crops,
        )
    room = _Room(memory, load, available_bytes, micro_batch_crops)
    modes = CHECKPOINTING if checkpointing == "auto" else (checkpointing,)
    wanted = max(micro_batch_tokens or LEAST_POSITIONS, load.longest_tokens)
    mode = room.first_fitting(modes, wanted)
    if micro_batch_tokens is not None:
        tokens = micro_batch_tokens
    else:
        multiples = range(MOST_POSITIONS, load.longest_tokens, -POSITIONS_STEP)
        tokens = next((tokens for tokens in multiples if room.fits(mode, tokens)), load.longest_tokens)
    predicted = room.predict(mode, tokens)
    if sum(predicted.values()) > available_bytes:
        is_all_set = checkpointing != "auto" and micro_batch_tokens is not None
        if not is_all_set and not room.fits("full", load.longest_tokens):
            raise CapacityError(room.refusal())
        logger.warning(
            "checkpointing %s with %d positions at once is predicted to need %s, and %s are available: the run may "
            "stop for want of memory. Leave checkpointing (auto) and micro_batch_tokens (none) to be chosen.",
            mode,
            max(tokens, load.longest_tokens),
            in_words(sum(predicted.values())),
            in_words(available_bytes),
        )
    return ActivationPolicy(
        checkpointing=mode,
        micro_batch_tokens=tokens,
        micro_batch_crops=micro_batch_crops or room.micro_batch(tokens).crops or None,
        predicted_bytes=predicted,
        available_bytes=available_bytes,
    )


@dataclass(frozen=True)
class _Room:
    """A device's memory, and what wants into it."""

    memory: MemoryModel
    load: DataLoad
    available_bytes: int
    crops_limit: int | None

    def micro_batch(self, tokens: int) -> MicroBatch:
        """Returns the heaviest micro-batch of a budget; the longest sample is in none that is smaller."""
        positions = max(tokens, self.load.longest_tokens)
        crops = 0
        if self.load.longest_crops and tokens > self.load.longest_tokens:
            crops = positions // self.memory.dims.crop_tokens
            if self.load.crops_a_token is not None and self.memory.is_reached("vision"):
                crops = min(crops, ceil(positions * self.load.crops_a_token * MARGIN))
            if self.crops_limit is not None:
                crops = min(crops, self.crops_limit)
        crops = max(crops, self.load.longest_crops)
        targets = min(positions, ceil(positions * self.load.targets_a_token * MARGIN))
        return MicroBatch(positions=positions, crops=crops, targets=targets)

    def predict(self, mode: Checkpointing, tokens: int) -> dict[str, int]:
        return self.memory.predict(mode, self.micro_batch(tokens))

    def fits(self, mode: Checkpointing, tokens: int) -> bool:
        return sum(self.predict(mode, tokens).values()) <= self.available_bytes

    def first_fitting(self, modes: Sequence[Checkpointing], tokens: int) -> Checkpointing:
        """Returns the first mode with which a budget fits; without one the last."""
        for mode in modes:
            if self.fits(mode, tokens):
                return mode
        return modes[-1]

    def refusal(self) -> str:
        """Says what does not fit, and which methods would."""
        load = self.load
        state = sum(self.memory.state_bytes("full").values())
        needed = sum(self.predict("full", load.longest_tokens).values())
        remedies = []
        for change, memory in _alternatives(self.memory).items():
            other = sum(_Room(memory, load, 0, self.crops_limit).predict("full", load.longest_tokens).values())
            if other <= self.available_bytes:
                remedies.append(f"{change} (predicted {in_words(other)})")
        remedies.append("a lower num_crops or max_length" if remedies else "a device with more memory")
        *first, last = remedies
        listed = f"{', '.join(first)} or {last}" if first else last
        return (
            f"the device has {in_words(self.available_bytes)} for this run, which is predicted to need "
            f"{in_words(needed)} even with every layer computed again: {in_words(state)} for weights, gradients, "
            f"optimizer and copies, {in_words(needed - state)} for the longest sample ({load.longest_tokens} "
            f"positions, {load.longest_crops} crops). Use {listed}. "
            "Setting both checkpointing and micro_batch_tokens tries it all the same."
        )


def _alternatives(memory: MemoryModel) -> dict[str, MemoryModel]:
    """Returns settings that hold less, with their memory models."""
    adapters = replace(memory, adapter_rank=memory.adapter_rank or DEFAULT_RANK, trained_parts=LORA_PARTS)
    quantised = replace(adapters, four_bit_parts=("decoder",), parallel="ddp", offloads=False)
    frozen = replace(memory, trained_parts=tuple(part for part in memory.trained_parts if part not in IMAGE_PARTS))
    found: dict[str, MemoryModel] = {}
    if memory.num_ranks > 1 and memory.parallel == "ddp" and not memory.four_bit_parts:
        found["parallel: fsdp2"] = replace(memory, parallel="fsdp2")
    if memory.adapter_rank is None:
        if memory.is_reached("projector") and frozen.trained_parts:
            found["method: frozen_vision"] = frozen
        found["method: lora"] = adapters
    if not memory.four_bit_parts:
        found["method: qlora"] = quantised
    return found


def _available_bytes(device: torch.device) -> int:
    """Returns what this process can have of a GPU, what it holds already included; the least of all processes."""
    free, _ = torch.cuda.mem_get_info(device)
    available = torch.tensor(free + torch.cuda.memory_reserved(device), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(available, op=distributed.ReduceOp.MIN)
    return int(available.item())
