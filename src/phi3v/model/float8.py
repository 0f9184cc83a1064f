"""Products in float8: operands are scaled by their largest number and rounded to 8 bits, sums stay in float32.

Inputs and weights become e4m3 (3 bits of fraction), gradients e5m2 (2 bits, a wider range), each tensor with one scale
of its own, taken anew every time. Gradients of weights are not formed here: they stay in 16 bit.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433; one scale a tensor measured the
fastest on Hopper.
"""

import torch

from . import kernels
from .projection import Projection, ProjectionCompute


class Float8Compute(ProjectionCompute):
    """Forms ``x W^T`` and ``grad W`` in float8; arguments as ``ProjectionCompute``."""

    fp8 = True

    def multiply(self, projection: Projection, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, scale = self._weight(projection, x.dtype, is_transposed=False)
        y = scaled_product(*quantised(x, torch.float8_e4m3fn), weight.t(), scale, x.dtype)
        self.release(projection)
        return y if bias is None else y.add_(bias)

    def multiply_back(self, projection: Projection, grad: torch.Tensor) -> torch.Tensor:
        weight, scale = self._weight(projection, grad.dtype, is_transposed=True)
        grad_x = scaled_product(*quantised(grad, torch.float8_e5m2), weight.t(), scale, grad.dtype)
        self.release(projection)
        return grad_x

    def _weight(
        self, projection: Projection, dtype: torch.dtype, *, is_transposed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weights in float8, (out, in) or (in, out) as the product reads them along its sums, and scale."""

        sources = projection.weights
        scale = projection.working_copy(
            "float8 scale", sources, dtype, lambda: scale_of(projection.exact_weight(), torch.float8_e4m3fn)
        )
        straight = projection.working_copy(
            "float8", sources, dtype, lambda: scaled_to_float8(projection.exact_weight(), scale, torch.float8_e4m3fn)
        )
        if not is_transposed:
            return straight, scale
        return projection.working_copy("float8 transposed", sources, dtype, lambda: straight.t().contiguous()), scale


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
