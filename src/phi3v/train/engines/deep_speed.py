"""DeepSpeed's ZeRO: stage 2 shares out optimizer and gradients, stage 3 the weights too."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed, nn

from phi3v.errors import ConfigError
from phi3v.memory import ZERO_BUCKET_NUMBERS
from phi3v.model.packed_layers import PackedClipLayer, PackedDecoderLayer
from phi3v.train.engines.engine import AVERAGES, Average, Read, SkippingOptimizer, adamw_state, steps_of


class DeepSpeed:
    """An engine as ``Engine`` describes it.

    Weights are 16 bit with 16-bit precisions; each process holds its share of float32 masters. DeepSpeed clips
    gradients itself, and leaves out a step whose gradient is not finite.

    Args:
        model: with float32 trainable weights, whole, anywhere: DeepSpeed moves it, in 16 bit where it computes so.
        make_optimizer: makes AdamW over the model's trainable parameters.
        device: what this process computes on.
        stage: 2 or 3.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        max_norm: gradients are scaled down to it; 0: never.
        offloads: keep the shares of the optimizer's state, and in stage 3 the weights', in the machine's memory.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """

    needs_one_path = True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        device: torch.device,
        stage: int,
        precision: str,
        max_norm: float,
        offloads: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(device)
        self.is_whole = stage < 3
        self._stage = stage
        self._device = device
        self._max_norm = max_norm
        self._is_scaled = precision == "fp16"
        self._world_size = distributed.get_world_size()
        self._adamw = make_optimizer(model)
        if stage == 3:
            # A layer's matrices are read by the layer and not by calls of their own.
            deepspeed.utils.set_z3_leaf_modules(model, [PackedDecoderLayer, PackedClipLayer])
        masters = _rounded_away(model, precision)
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.module, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._adamw,
            config=zero_config(stage, precision=precision, max_norm=max_norm, offloads=offloads),
            dist_init_required=False,
        )
        for name, weights in masters.items():
            self._set(self._parameters[name], weights, None)
        self.optimizer = _EngineOptimizer(self.module, self._adamw)

    def run(self, compute_loss: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        # How many micro-batches make a step differs from step to step: DeepSpeed is told which one is the last.
        self.module.set_gradient_accumulation_boundary(is_last)
        loss = compute_loss()
        self.module.backward(loss)
        return loss.detach()

    def clip(self, max_norm: float) -> torch.Tensor:
        assert max_norm == self._max_norm, "DeepSpeed clips within its step, to the norm it was made with"
        zero = self.module.optimizer
        if self._stage == 3:
            from deepspeed.runtime.utils import get_global_norm

            norms = [float(norm) for norm in zero._get_norm_groups()]
            norm = -1.0 if min(norms, default=0.0) < 0 else float(get_global_norm(norm_list=norms))
        else:
            norm = float(zero.scaled_global_norm())
        # A norm that is not finite comes as -1.
        finite = norm / float(zero.loss_scale) if norm >= 0 else float("inf")
        return torch.tensor(finite, device=self._device)

    def weights(self, *, has_frozen: bool) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.module.named_parameters():
            if parameter.requires_grad:
                yield name, self._shaped(parameter, safe_get_full_fp32_param(parameter))
            elif has_frozen:
                with zero.GatheredParameters([parameter], enabled=self._stage == 3):
                    yield name, parameter.detach().clone()

    def averages(self) -> Iterator[tuple[str, Average, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        for name, parameter in self._parameters.items():
            for average in AVERAGES:
                yield name, average, self._shaped(parameter, safe_get_full_optimizer_state(parameter, average))

    def num_steps(self) -> int:
        return steps_of(self._adamw)

    def load(self, read: Read, num_steps: int) -> None:
        zero = self.module.optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for share in flat:
            averages: dict[Average, torch.Tensor] = {average: torch.zeros_like(share) for average in AVERAGES}
            self._adamw.state[share] = adamw_state(share, averages, num_steps)
        self._link()
        for name, parameter in self._parameters.items():
            for average in AVERAGES:
                self._set(parameter, read(name, average), average)

    def scaling(self) -> dict[str, float]:
        if not self._is_scaled:
            return {}
        scaler = self.module.optimizer.loss_scaler
        return {"scale": float(scaler.cur_scale), "steps": scaler.cur_iter - max(0, scaler.last_overflow_iter)}

    def load_scaling(self, state: dict[str, float]) -> None:
        if self._is_scaled and state:
            scaler = self.module.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = state["scale"], int(state["steps"]), 0

    def close(self) -> None:
        self._parameters.clear()
        self._adamw.state.clear()
        self.module.destroy()

    def _link(self) -> None:
        """Says which part of AdamW's state is whose, which DeepSpeed's stage 2 does for the first group only."""
        if self._stage == 2:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            zero = self.module.optimizer
            for parameters, share in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, share, self._adamw.state)

    def _set(self, parameter: nn.Parameter, value: torch.Tensor, average: Average | None) -> None:
        """Puts this process's share of a whole tensor into the masters or an average."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 2:
            value = value.to(self._device)
            if average is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, average)
            return
        # Shares have one size; the last one's end may be filling, which DeepSpeed's own way in would look for in vain.
        size = vars(parameter)["ds_tensor"].numel()
        padded = value.new_zeros(size * self._world_size)
        padded[: value.numel()] = value.flatten()
        own = padded[size * distributed.get_rank() :][:size]
        if average is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, average)

    def _shaped(self, parameter: nn.Parameter, whole: torch.Tensor | None) -> torch.Tensor:
        assert whole is not None
        shape = vars(parameter)["ds_shape"] if self._stage == 3 else parameter.shape
        return whole.flatten()[: shape.numel()].view(shape)


class _EngineOptimizer(SkippingOptimizer):
    """AdamW whose step is DeepSpeed's, on the shares of all processes."""

    def __init__(self, engine: Any, adamw: torch.optim.Optimizer) -> None:
        super().__init__(adamw)
        self._engine = engine

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._engine.step()
        self.step_was_skipped = bool(self._engine.optimizer.overflow)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: DeepSpeed's step leaves no gradients behind."""


def zero_config(stage: int, *, precision: str, max_norm: float, offloads: bool) -> dict[str, Any]:
    """Returns DeepSpeed's configuration. Stage 2's is the published recipe's, but for float32 gradient sums.

    Args:
        stage: 2 or 3.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        max_norm: gradients are scaled down to it; 0: never.
        offloads: keep shares in the machine's memory.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": ZERO_BUCKET_NUMBERS,
        "allgather_bucket_size": ZERO_BUCKET_NUMBERS,
    }
    if offloads:
        where = {"device": "cpu", "pin_memory": True}
        zero["offload_optimizer"] = where
        if stage == 3:
            zero["offload_param"] = where
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on CPUs as well; DeepSpeed's own would be compiled at the start of the first run.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for ``device``.

    Raises:
        ConfigError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"parallel zero2 and zero3 need DeepSpeed ({error}); pip install phi3v[deepspeed], or use parallel fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Recent versions of torch say it of names that DeepSpeed calls, in every process at every step.
    warnings.filterwarnings(
        "ignore", r".*\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning
    )
    return deepspeed


def _rounded_away(model: nn.Module, precision: str) -> dict[str, torch.Tensor]:
    """Returns the float32 weights that DeepSpeed would round to 16 bit before it makes masters of them, on the CPU."""
    if precision == "fp32":
        return {}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return {
        name: one.detach().cpu()  # DeepSpeed gives the parameter other memory
        for name, one in model.named_parameters()
        if one.requires_grad and one.dtype == torch.float32 and not torch.equal(one.to(dtype).float(), one)
    }
