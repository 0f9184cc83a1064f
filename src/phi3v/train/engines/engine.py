"""What every engine can do, and the words for it.

A run's *state* is what a step changes: the trained weights in float32 (*masters*) and AdamW's two averages of each. An
engine keeps it whole on every process or in parts on all of them; it takes steps, and gives the state out and takes it
in by the parameters' names, whole tensor by whole tensor. So a checkpoint belongs to no engine and to no number of
processes.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import nn

AVERAGES = ("exp_avg", "exp_avg_sq")
"""AdamW's averages of a gradient and of its square, as torch names them."""

CLIPPING_MARGIN = 1e-6
"""Added to a gradient's norm before it divides, as torch's ``clip_grad_norm_`` does."""

Average = Literal["exp_avg", "exp_avg_sq"]
Read = Callable[[str, Average], torch.Tensor]
"""Gives a parameter's average, whole, float32, on the CPU."""


class Engine(Protocol):
    """Takes optimizer steps with a model.

    Attributes:
        module: what is called with ``packed=``.
        optimizer: holds the learning rates; ``step`` updates the weights of all processes.
        is_whole: whether the model that was given to the engine still holds all weights on every process.
        needs_one_path: whether processes must run the same modules in every micro-batch: they put weights together when
            they meet them, or send gradients in the order in which they come.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def needs_one_path(self) -> bool: ...

    def run(self, compute_loss: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """Runs a micro-batch forward and backward; returns its loss, without a gradient.

        Args:
            compute_loss: calls ``module``.
            is_last: whether it is the last one of its step.
        """
        ...

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scales the step's gradient down to ``max_norm``, if that is not 0; returns its norm before."""
        ...

    def weights(self, *, has_frozen: bool) -> Iterator[tuple[str, torch.Tensor]] | None:
        """Returns every trained parameter's name and float32 weights, whole; all processes must go through them all.

        Args:
            has_frozen: whether the other parameters come too, in the type that they compute in.

        Returns:
            None where the model that was given to the engine holds them as they are.
        """
        ...

    def averages(self) -> Iterator[tuple[str, Average, torch.Tensor]]:
        """Yields AdamW's averages, float32, whole, likewise. Only after a step."""
        ...

    def num_steps(self) -> int:
        """Returns the steps that AdamW has taken: its averages are corrected by them."""
        ...

    def load(self, read: Read, num_steps: int) -> None:
        """Takes in averages; the weights were in the model already when the engine got it."""
        ...

    def scaling(self) -> dict[str, float]:
        """Returns fp16's loss ``scale`` and the ``steps`` since it was last lowered; empty without one."""
        ...

    def load_scaling(self, state: dict[str, float]) -> None:
        """Takes in what ``scaling`` gave."""
        ...

    def close(self) -> None:
        """Lets go of the memory."""
        ...


class SkippingOptimizer(torch.optim.Optimizer):
    """AdamW as Trainer sees it, for engines that leave out steps: groups, state and defaults are AdamW's own.

    Args:
        adamw: what holds them.

    Attributes:
        step_was_skipped: whether the last step was left out; the schedule waits for those that are taken.
    """

    def __init__(self, adamw: torch.optim.Optimizer) -> None:
        # Not torch's own constructor, which would make groups anew; step hooks run in AdamW's step.
        self.param_groups = adamw.param_groups
        self.state = adamw.state
        self.defaults: dict[str, Any] = adamw.defaults
        self.step_was_skipped = False


def adamw_state(parameter: torch.Tensor, averages: dict[Average, torch.Tensor], num_steps: int) -> dict[str, object]:
    """Returns what AdamW keeps of a parameter.

    Args:
        parameter: decides where the state lies.
        averages: in the parameter's own form.
        num_steps: steps taken.
    """
    # Where torch's fused kernels want it; others take it from anywhere.
    step = torch.tensor(float(num_steps), dtype=torch.float32, device=parameter.device)
    return {"step": step, **averages}


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Returns the steps that a torch AdamW has taken: the most of any parameter."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def gradient_norm(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clips as ``Engine.clip`` says, by torch's own function."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
