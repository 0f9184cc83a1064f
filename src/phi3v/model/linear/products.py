"""How the products of all projections are formed, and into what the gradients of weights are summed."""

import torch

from .held_weights import HeldWeights

Gradients = dict[torch.Tensor, torch.Tensor]
"""Gradients of one layer's parameters, by parameter; those accumulated in place are not in it."""

ROWS_A_SUM = 2048
"""Positions whose outputs are multiplied by their gradients at once: 67 MB in 16 bit at 16,384 outputs."""


class ProjectionCompute:
    """How the products of all projections are formed.

    Args:
        accumulates_in_place: as in ``Compute``.
        keeps_copies: keep 16-bit copies of float32 weights from one micro-batch to the next.
        is_sharded: as in ``Compute``: weights stay where they are, without adapters' columns beside them.
    """

    fp8 = False

    def __init__(self, *, accumulates_in_place: bool, keeps_copies: bool, is_sharded: bool = False) -> None:
        self.accumulates_in_place = accumulates_in_place
        self.keeps_copies = keeps_copies
        self.is_sharded = is_sharded

    def is_joint(self, held: HeldWeights) -> bool:
        """Whether the adapters' columns stand beside the weights'."""
        return held.room > 0 and not self.fp8 and not self.is_sharded

    def multiply(self, held: HeldWeights, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns ``x W^T + b``."""
        weight = held.weight(x.dtype)
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        self.release(held)
        return y

    def multiply_back(self, held: HeldWeights, grad: torch.Tensor) -> torch.Tensor:
        """Returns ``grad W``, the gradient of x."""
        grad_x = torch.mm(grad, held.weight(grad.dtype))
        self.release(held)
        return grad_x

    def release(self, held: HeldWeights) -> None:
        """Lets go of the copies that ``keeps_copies`` says not to keep."""
        if not self.keeps_copies:
            held.forget()

    def add_product(
        self,
        parameter: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        gradients: Gradients,
        scale: float = 1.0,
    ) -> None:
        """Adds ``scale * left @ right`` to a parameter's gradient.

        In 16 bit on a GPU the product itself sums in float32, and into ``parameter.grad`` where that is allowed: a
        gradient of several micro-batches is rounded nowhere.
        """
        kept = parameter.grad if self.accumulates_in_place else None
        is_mixed = left.is_cuda and left.dtype != torch.float32 and parameter.dtype == torch.float32
        if kept is not None and kept.dtype == parameter.dtype and (is_mixed or left.dtype == parameter.dtype):
            if is_mixed:
                torch.ops.aten.addmm.dtype_out(kept, left, right, torch.float32, alpha=scale, out=kept)
            else:
                kept.addmm_(left, right, alpha=scale)
            return
        product = torch.mm(left, right, out_dtype=torch.float32) if is_mixed else torch.mm(left, right)
        product = product.to(parameter.dtype)
        if scale != 1.0:
            product.mul_(scale)
        self.add_gradient(parameter, product, gradients)

    def add_gradient(self, parameter: torch.Tensor, gradient: torch.Tensor, gradients: Gradients) -> None:
        """Adds a gradient that is formed already, of the parameter's type; the tensor may become the parameter's."""
        if not self.accumulates_in_place:
            gradients[parameter] = gradient
        elif parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


def column_dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the sums over T of ``left * right`` (T, N) in float32: (N,); some rows at a time."""
    blocks = zip(left.split(ROWS_A_SUM), right.split(ROWS_A_SUM), strict=True)
    return torch.stack([(one * other).sum(dim=0, dtype=torch.float32) for one, other in blocks]).sum(dim=0)


def product_in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns ``left @ right`` in float32; in 16 bit on a GPU without rounding it in between."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()
