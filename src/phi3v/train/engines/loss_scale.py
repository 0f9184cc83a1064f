"""fp16's loss scale for an engine whose gradients lie shared out: small gradients would vanish in fp16 without one."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from phi3v.train.engines.engine import SkippingOptimizer

FIRST_SCALE = 2.0**16
STEPS_TO_GROW = 2000
"""torch's ``GradScaler`` starts and grows so."""


class ScaledSteps(SkippingOptimizer):
    """AdamW with a loss scale.

    Losses are multiplied by ``scale`` before their backward pass. A step whose gradient is not finite on any process is
    left out and halves the scale; ``STEPS_TO_GROW`` taken ones in a row double it. Whether a step is left out follows
    from the gradient's norm, which all processes know: none of them has to ask the others. torch's ``GradScaler`` asks
    tensor by tensor, and leaves it to AdamW's fused kernel to do nothing, to which it would pass its answer beside
    shared-out tensors.

    Args:
        adamw: takes the steps.

    Attributes:
        scale: what losses are multiplied by.
        steps: steps taken since the scale last changed.
    """

    def __init__(self, adamw: torch.optim.Optimizer) -> None:
        super().__init__(adamw)
        self._adamw = adamw
        self.scale = FIRST_SCALE
        self.steps = 0
        self._is_finite = True

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients by the scale."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.scale)

    def see(self, norm: float) -> None:
        """Notes the norm of the unscaled gradients of all processes; ``step`` goes by it."""
        self._is_finite = math.isfinite(norm)

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.step_was_skipped = not self._is_finite
        if self._is_finite:
            self._adamw.step()
        self.steps = self.steps + 1 if self._is_finite else 0
        if not self._is_finite:
            self.scale /= 2
        elif self.steps == STEPS_TO_GROW:
            self.scale, self.steps = self.scale * 2, 0
