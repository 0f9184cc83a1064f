"""The trainability audit: does every part that should learn get a gradient, on one real batch, before step 1?"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from phi3v.config import TrainConfig
from phi3v.errors import ConfigError
from phi3v.model.checkpoint import base_of
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch
from phi3v.model.parts import PARTS, is_never_used, part_of
from phi3v.train.tuning import IMAGE_PARTS, Precision, adaptable_modules, learning_rate_of

_LOSS_SCALES = (65536.0, 1024.0, 16.0, 1.0)
"""Factors tried on an fp16 loss, highest first: small gradients vanish in fp16 without one, and large ones overflow."""

_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PartAudit:
    """What one part of the model is and does in this run.

    Attributes:
        part: one of ``PARTS``.
        should_learn: whether the configuration asks this part to change.
        learning_rate: its highest learning rate; None when it should not learn.
        parameters: all of its numbers, adapters not counted.
        unused_by_design: those of them that no computation reaches: CLIP's last layer and ``post_layernorm``.
        trainable: numbers that the optimizer changes, adapters included.
        linear_layers: layers that adapters can stand on.
        lora_layers: those of them that have one.
        dora_layers: those of these that train DoRA's magnitude too.
        adapter_scaling: what the adapters' output is multiplied by; None without adapters, or if they differ.
        gradient_norm: 2-norm of the batch's gradient over the part's trainable numbers; None without any gradient.
        without_gradient: names of trainable tensors that the backward pass did not reach.
    """

    part: str
    should_learn: bool
    learning_rate: float | None
    parameters: int
    unused_by_design: int
    trainable: int
    linear_layers: int
    lora_layers: int
    dora_layers: int
    adapter_scaling: float | None
    gradient_norm: float | None
    without_gradient: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit of one model on one batch.

    Attributes:
        parts: one entry a part, in the order of ``PARTS``.
        loss: the batch's loss, mean over its samples or tokens.
        problems: why training would not do what was asked; empty when it would.
    """

    parts: tuple[PartAudit, ...]
    loss: float
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``audit.json``."""
        totals = {
            "parameters": sum(part.parameters for part in self.parts),
            "trainable": sum(part.trainable for part in self.parts),
        }
        return {**totals, **dataclasses.asdict(self)}

    def table(self) -> str:
        """Returns the audit as aligned text, one line a part."""
        rows = [("part", "parameters", "trainable", "adapters", "learning rate", "gradient norm")]
        for part in self.parts:
            rows.append(
                (
                    part.part,
                    f"{part.parameters:,}" + (f" ({part.unused_by_design:,} unused)" if part.unused_by_design else ""),
                    f"{part.trainable:,}",
                    f"{part.lora_layers}/{part.linear_layers}" + " DoRA" * bool(part.dora_layers)
                    if part.linear_layers
                    else "-",
                    "-" if part.learning_rate is None else f"{part.learning_rate:g}",
                    "-" if part.gradient_norm is None else f"{part.gradient_norm:.3g}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def require_trainable(self) -> None:
        """Stops the run when a part would not learn.

        Raises:
            ConfigError: names the parts and the reasons.
        """
        if self.problems:
            raise ConfigError("this run would not train what it should:\n- " + "\n- ".join(self.problems))


def audit(model: Phi3VForCausalLM | PeftModel, batch: PackedBatch, config: TrainConfig, precision: Precision) -> Audit:
    """Runs one batch forward and backward and looks at the gradient of every part.

    An adapter's A has a gradient of exactly zero while its B is zero, so a part with adapters is judged by all of its
    tensors together; every one of them, DoRA's magnitudes included, must be reached. A gradient is let go of as soon as
    its norm is taken. Weights, random states and the model's mode are afterwards what they were; gradients there were
    none.

    Args:
        model: as it will be trained, on its device.
        batch: a training batch on that device; with an image if vision or projector should learn.
        config: what the run asks for.
        precision: what it computes in.
    """
    base = base_of(model)
    loss, norms = _backward(model, batch, precision)
    parts = tuple(_audit_part(part, base, config, norms) for part in PARTS)
    has_images = batch.crops is not None
    problems = [
        problem for part in parts for problem in (*_problems(part, has_images), *_adapter_problems(part, config))
    ]
    return Audit(parts=parts, loss=loss, problems=tuple(problems))


def _backward(
    model: Phi3VForCausalLM | PeftModel, batch: PackedBatch, precision: Precision
) -> tuple[float, dict[nn.Parameter, float]]:
    """Returns the batch's mean loss, and the norm of every gradient that its backward pass reached."""
    device = batch.input_ids.device
    base, was_training = base_of(model), model.training
    compute = base.compute
    # A gradient that is added up in place would never be given out.
    base.compute = replace(compute, accumulates_in_place=False)
    model.train()
    value, norms = float("nan"), {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _norms_taken(model) as taken:
        for scale in _LOSS_SCALES if precision.name == "fp16" else (1.0,):
            with precision.autocast(device):
                loss = model(packed=batch).loss / batch.target_weights.sum()
            value = float(loss.detach())
            if not loss.requires_grad:
                break
            taken.clear()
            (loss * scale).backward()
            norms = {parameter: float(norm) / scale for parameter, norm in taken.items()}
            if all(math.isfinite(norm) for norm in norms.values()):
                break
    model.train(was_training)
    base.compute = compute
    return value, norms


@contextmanager
def _norms_taken(model: nn.Module) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
    """Gives every gradient's norm, and lets go of the gradient itself: together they are as large as the weights."""
    taken: dict[nn.Parameter, torch.Tensor] = {}

    def take(parameter: Any) -> None:
        if parameter.grad is None:  # a function of its own gave none
            return
        taken[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        parameter.grad = None

    hooks = [one.register_post_accumulate_grad_hook(take) for one in model.parameters() if one.requires_grad]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _audit_part(
    part: str, base: Phi3VForCausalLM, config: TrainConfig, norms: Mapping[nn.Parameter, float]
) -> PartAudit:
    own = [(name, parameter) for name, parameter in base.named_parameters() if part_of(name) == part]
    sizes = _sizes(base)
    plain = [(name, sizes[name]) for name, _ in own if ".lora_" not in name]
    trainable = [(name, parameter) for name, parameter in own if parameter.requires_grad]
    num_vision_layers = base.config.vision_config.num_hidden_layers
    reached = [norms[parameter] for _, parameter in trainable if parameter in norms]
    should_learn = part in config.trained_parts
    adaptable = adaptable_modules(base, part)
    adapters = [
        (module, name) for module in adaptable if isinstance(module, LoraLayer) for name in module.active_adapters
    ]
    scalings = {float(module.scaling[name]) for module, name in adapters}
    return PartAudit(
        part=part,
        should_learn=should_learn,
        learning_rate=learning_rate_of(part, config) if should_learn else None,
        parameters=sum(size for _, size in plain),
        unused_by_design=sum(size for name, size in plain if is_never_used(name, num_vision_layers)),
        trainable=sum(parameter.numel() for _, parameter in trainable),
        linear_layers=len(adaptable),
        lora_layers=len({module for module, _ in adapters}),
        dora_layers=len({module for module, name in adapters if name in module.lora_magnitude_vector}),
        adapter_scaling=scalings.pop() if len(scalings) == 1 else None,
        gradient_norm=math.hypot(*reached) if reached else None,
        without_gradient=tuple(name for name, parameter in trainable if parameter not in norms),
    )


def _sizes(base: nn.Module) -> dict[str, int]:
    """Counts every parameter's numbers; a weight in 4 bit is stored as bytes of two, and its layer knows how many."""
    sizes = {name: parameter.numel() for name, parameter in base.named_parameters()}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            sizes[f"{name}.weight"] = module.in_features * module.out_features
    return sizes


def _adapter_problems(part: PartAudit, config: TrainConfig) -> Iterator[str]:
    if not part.lora_layers:
        return
    wanted = config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)
    if part.adapter_scaling is None or not math.isclose(part.adapter_scaling, wanted, rel_tol=1e-6):
        found = "by different factors" if part.adapter_scaling is None else f"by {part.adapter_scaling:g}"
        yield (
            f"{part.part}'s adapters are scaled {found}, but lora_alpha, lora_rank and use_rslora ask for {wanted:g}. "
            "Another version of PEFT may do as it is told."
        )
    if part.dora_layers != part.lora_layers * config.use_dora:
        yield (
            f"{part.dora_layers} of {part.part}'s {part.lora_layers} adapters have DoRA's magnitude, but use_dora is "
            f"{str(config.use_dora).lower()}. Another version of PEFT may do as it is told."
        )


def _problems(part: PartAudit, has_images: bool) -> Iterator[str]:
    if not part.should_learn:
        return
    if not part.trainable:
        yield (
            f"{part.part} should learn at {part.learning_rate:g}, but none of its parameters is trainable: it is "
            "frozen and has no adapter. Take it out of part_learning_rates, or out of freeze."
        )
        return
    if not has_images and part.part in IMAGE_PARTS:
        yield (
            f"{part.part} should learn, but no training sample has an image, so it never gets a gradient. "
            f"Add {part.part} to freeze, or images to the data."
        )
        return
    stuck = part.without_gradient
    if stuck or not part.gradient_norm:
        shown = ", ".join(stuck[:_NAMES_SHOWN]) + (
            f" and {len(stuck) - _NAMES_SHOWN} more" * (len(stuck) > _NAMES_SHOWN)
        )
        found = f"the backward pass does not reach {shown}" if stuck else "its gradient is exactly zero"
        yield (
            f"{part.part} should learn, but {found}. Something between it and the loss is detached or runs under "
            "no_grad; freeze the part if that is meant."
        )
    elif part.gradient_norm != part.gradient_norm or part.gradient_norm == float("inf"):
        yield (
            f"{part.part}'s gradient is not finite on the first batch. Use precision bf16 or fp32, and check that the "
            "model's weights are finite."
        )
