"""Products in float8: operands are scaled by their largest number and rounded to 8 bits, sums stay in float32.

Inputs and weights become e4m3 (3 bits of fraction), gradients e5m2 (2 bits, a wider range), each tensor with one scale
of its own, taken anew every time. Gradients of weights are not formed here: they stay in 16 bit.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433; one scale a tensor measured the
fastest on Hopper.
"""

import torch

from ...errors import ConfigError
from .. import kernels
from .held_weights import HeldWeights
from .products import ProjectionCompute
from .working_copies import state_of


class Float8Compute(ProjectionCompute):
    """Forms ``x W^T`` and ``grad W`` in float8; arguments as ``ProjectionCompute``."""

    fp8 = True

    def multiply(self, held: HeldWeights, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, scale = _float8_weight(held, x.dtype, is_transposed=False)
        y = scaled_product(*quantised(x, torch.float8_e4m3fn), weight.t(), scale, x.dtype)
        self.release(held)
        return y if bias is None else y.add_(bias)

    def multiply_back(self, held: HeldWeights, grad: torch.Tensor) -> torch.Tensor:
        weight, scale = _float8_weight(held, grad.dtype, is_transposed=True)
        grad_x = scaled_product(*quantised(grad, torch.float8_e5m2), weight.t(), scale, grad.dtype)
        self.release(held)
        return grad_x


def _float8_weight(held: HeldWeights, dtype: torch.dtype, *, is_transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights in float8, (out, in) or (in, out) as the product reads them along its sums, and scale.

    Raises:
        ConfigError: the weights are held in 4 bit.
    """
    if held.is_four_bit:
        raise ConfigError("fp8 multiplies weights of 16 or 32 bit, and the decoder is held in 4 bit; leave fp8 out")
    state = state_of(held.weights, dtype)
    scale = held.copies.get("float8 scale", state, lambda: scale_of(held.exact_weight(), torch.float8_e4m3fn))
    straight = held.copies.get(
        "float8", state, lambda: scaled_to_float8(held.exact_weight(), scale, torch.float8_e4m3fn)
    )
    if not is_transposed:
        return straight, scale
    return held.copies.get("float8 transposed", state, lambda: straight.t().contiguous()), scale


def scale_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns what the largest number is divided by to become ``dtype``'s largest: () float32, 1 for a zero tensor."""
    largest = kernels.for_device(x.device).absolute_maximum(x)
    return torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)


def quantised(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``x / scale`` (T, K) in ``dtype``, contiguous, and the scale."""
    scale = scale_of(x, dtype)
    return scaled_to_float8(x, scale, dtype), scale


def scaled_to_float8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``x / scale`` (T, K) in ``dtype``, contiguous."""
    return kernels.for_device(x.device).to_float8(x, scale, dtype)


def scaled_product(
    left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns ``left @ right`` of float8 (T, K) and (K, N), scales undone, in ``dtype``."""
    if not left.is_cuda:
        return ((left.float() * left_scale) @ (right.float() * right_scale)).to(dtype)
    return torch.ops.aten._scaled_mm(left, right, left_scale, right_scale, out_dtype=dtype, use_fast_accum=True)
