"""One process, or several that each hold everything and average their gradients (DDP)."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from phi3v.train.engines.engine import AVERAGES, Average, Read, adamw_state, gradient_norm, steps_of


class Replicated:
    """An engine as ``Engine`` describes it, on accelerate.

    Args:
        model: with float32 trainable weights, on its device.
        optimizer: AdamW over them.
        accelerator: wraps both.
    """

    is_whole = True
    needs_one_path = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._adamw = optimizer
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        # A step's last micro-batch leaves gradients in the buffers that are sent; those before it add theirs up beside
        # them, in tensors of their own. Every micro-batch reaches every parameter.
        handler = DistributedDataParallelKwargs(find_unused_parameters=False, gradient_as_bucket_view=True)
        accelerator.ddp_handler = handler  # pyright: ignore[reportAttributeAccessIssue]
        self.module, self.optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(self.optimizer, AcceleratedOptimizer)

    def run(self, compute_loss: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        # Gradients of processes are averaged at the last micro-batch.
        with nullcontext() if is_last else self._accelerator.no_sync(self.module):
            loss = compute_loss()
            self._accelerator.backward(loss)
        return loss.detach()

    def clip(self, max_norm: float) -> torch.Tensor:
        self._accelerator.unscale_gradients(self.optimizer)
        return gradient_norm(list(self._parameters.values()), max_norm)

    def weights(self, *, has_frozen: bool) -> None:
        return None

    def averages(self) -> Iterator[tuple[str, Average, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            state = self._adamw.state[parameter]
            for average in AVERAGES:
                # With fp16 every step so far may have been left out.
                yield name, average, state[average] if state else torch.zeros_like(parameter)

    def num_steps(self) -> int:
        return steps_of(self._adamw)

    def load(self, read: Read, num_steps: int) -> None:
        for name, parameter in self._parameters.items():
            averages: dict[Average, torch.Tensor] = {
                average: read(name, average).to(parameter.device) for average in AVERAGES
            }
            self._adamw.state[parameter] = adamw_state(parameter, averages, num_steps)

    def scaling(self) -> dict[str, float]:
        scaler = self._accelerator.scaler
        if scaler is None:
            return {}
        state = scaler.state_dict()
        return {"scale": state["scale"], "steps": state["_growth_tracker"]}

    def load_scaling(self, state: dict[str, float]) -> None:
        scaler = self._accelerator.scaler
        if scaler is not None and state:
            scaler.load_state_dict(
                {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": int(state["steps"])}
            )

    def close(self) -> None:
        self._accelerator.free_memory()
