"""FSDP2: every process holds a share of each tensor, and layers are put together while they compute.

Source: torch's ``fully_shard``. transformers and accelerate would also take care of CPUs' processes by quietly running
DDP instead, and of checkpoints that another number of processes cannot resume; neither is used here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from phi3v.model.packed_layers import PackedClipLayer, PackedDecoderLayer
from phi3v.train.engines.engine import AVERAGES, CLIPPING_MARGIN, Average, Read, adamw_state, steps_of
from phi3v.train.engines.loss_scale import ScaledSteps


class FullySharded:
    """An engine as ``Engine`` describes it.

    Args:
        model: with float32 trainable weights, whole, anywhere: it is moved and shared out layer by layer.
        make_optimizer: makes AdamW over the trainable parameters of the sharded model.
        device: what this process computes on.
        dtype: what layers compute in; weights are put together in it, gradients added up in float32.
        offloads: keep the state in the machine's memory and not in the GPU's.
    """

    is_whole = False
    needs_one_path = True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        device: torch.device,
        dtype: torch.dtype,
        offloads: bool = False,
    ) -> None:
        self._mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if dtype != torch.float32 else None,
            reduce_dtype=torch.float32,
            # The residual stream keeps its own type.
            cast_forward_inputs=False,
        )
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
        }
        for module in model.modules():
            if isinstance(module, PackedDecoderLayer | PackedClipLayer):
                fully_shard(module, **options)
        fully_shard(model, **options)
        self.module = model
        # Where FSDP cannot run, others quietly run something else.
        assert isinstance(self.module, FSDPModule)
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        assert all(isinstance(one, DTensor) for one in self._parameters.values())
        self._device = device
        adamw = make_optimizer(model)
        self._scaled = ScaledSteps(adamw) if dtype == torch.float16 else None
        self.optimizer = self._scaled or adamw

    def run(self, compute_loss: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        # Every micro-batch's gradients are shared out at once: whole ones would take as much memory as the weights.
        loss = compute_loss()
        (loss * self._scaled.scale if self._scaled else loss).backward()
        return loss.detach()

    def clip(self, max_norm: float) -> torch.Tensor:
        parameters = list(self._parameters.values())
        if self._scaled is not None:
            self._scaled.unscale(parameters)
        # Of the shares, wherever they lie: torch's own function would have them exchanged where they lie, which
        # NCCL does for GPUs only.
        shares = [_share_of(one.grad) for one in parameters if one.grad is not None]
        squares = nn.utils.get_total_norm(shares).to(self._device).float().square()
        distributed.all_reduce(squares)
        norm = squares.sqrt()
        if max_norm:
            factor = (max_norm / (norm + CLIPPING_MARGIN)).clamp(max=1.0)
            for share in shares:
                share.mul_(factor.to(share.device))
        if self._scaled is not None:
            self._scaled.see(float(norm))
        return norm

    def weights(self, *, has_frozen: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad or has_frozen:
                yield name, self._whole(parameter)

    def averages(self) -> Iterator[tuple[str, Average, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            state = self.optimizer.state[parameter]
            for average in AVERAGES:
                # With fp16 every step so far may have been left out.
                yield name, average, self._whole(state[average] if state else torch.zeros_like(parameter))

    def num_steps(self) -> int:
        return steps_of(self.optimizer)

    def load(self, read: Read, num_steps: int) -> None:
        for name, parameter in self._parameters.items():
            assert isinstance(parameter, DTensor)
            averages: dict[Average, torch.Tensor] = {}
            for average in AVERAGES:
                # Every process reads the whole tensor and keeps its share: none has to send anything. It comes out on
                # the mesh's device, also where shares lie in the machine's memory.
                whole = read(name, average)
                share = distribute_tensor(whole, self._mesh, parameter.placements, src_data_rank=None)
                averages[average] = share.to(parameter.device)
            self.optimizer.state[parameter] = adamw_state(parameter, averages, num_steps)

    def scaling(self) -> dict[str, float]:
        return {"scale": self._scaled.scale, "steps": self._scaled.steps} if self._scaled else {}

    def load_scaling(self, state: dict[str, float]) -> None:
        if self._scaled is not None and state:
            self._scaled.scale, self._scaled.steps = state["scale"], int(state["steps"])

    def close(self) -> None:
        self.optimizer.state.clear()
        self._parameters.clear()

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        # Shares that lie in the machine's memory are put together by the GPUs all the same.
        there = tensor.detach().to(self._device)
        assert isinstance(there, DTensor)
        return there.full_tensor()


def _share_of(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
