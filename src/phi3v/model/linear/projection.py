"""A projection: linear layers that read the same input, with their adapters, forward and backward as one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapters import Adapters, adapters_key
from .dora import ScaledRows
from .held_weights import HeldWeights, base_of
from .products import Gradients, ProjectionCompute
from .working_copies import WorkingCopies


class Projection:
    """Linear layers that read the same input, as one.

    Tensors are read from the modules at every use: what shards a model puts others in their place.

    Args:
        modules: ``nn.Linear``, one of PEFT's LoRA or DoRA layers on one, or one of those on a layer in 4 bit.
        has_room: whether the input comes in a buffer with room for the adapters' columns.

    Attributes:
        room: columns that the input's buffer has beyond the input, the adapters' ranks together; 0: none.
    """

    def __init__(self, modules: Sequence[nn.Module], *, has_room: bool = True) -> None:
        self._modules = tuple(modules)
        self._adapters_keys = [adapters_key(module) for module in modules]
        bases = [base_of(module) for module in modules]
        copies = WorkingCopies()
        self._adapters = Adapters(modules, [base.out_features for base in bases], copies)
        self._held = HeldWeights(bases, self._adapters, copies, has_room=has_room)
        has_magnitude = any(place.adapter.has_magnitude for place in self._adapters.places)
        self._scaled_rows = ScaledRows(self._held, self._adapters) if has_magnitude else None
        self.room = self._held.room

    def is_of(self, modules: Sequence[nn.Module]) -> bool:
        """Says whether these are still the projection's modules, and compute the same adapters."""
        return (
            len(modules) == len(self._modules)
            and all(own is other for own, other in zip(self._modules, modules, strict=True))
            and [adapters_key(module) for module in modules] == self._adapters_keys
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        found = [*self._held.parameters, *self._adapters.parameters]
        return [parameter for parameter in found if parameter.requires_grad]

    @property
    def dropout(self) -> float:
        """Share of the adapters' inputs that is dropped now: 0 outside training."""
        return self._adapters.dropout

    def buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Returns memory for an input of ``rows`` rows, (rows, in_features + room)."""
        return like.new_empty((rows, self._held.width + self.room))

    def forward(self, x: torch.Tensor, compute: ProjectionCompute, seed: int = 0) -> torch.Tensor:
        """Maps ``x`` (T, in_features + room), whose last ``room`` columns are written here, to (T, out_features).

        With adapters' dropout, ``seed`` decides what is dropped; the backward pass needs the same.
        """
        held, adapters = self._held, self._adapters
        own, bias = x[:, : held.width], held.bias(x.dtype)
        if not adapters.rank:
            return compute.multiply(held, own, bias)
        seen = adapters.dropped(own, seed)
        low = self._low(x, seen)
        if self._scaled_rows is not None:
            return self._scaled_rows.forward(x, seen, low, bias, compute)
        if compute.is_joint(held):
            joint = held.joint(x.dtype)
            return torch.mm(x, joint.t()) if bias is None else torch.addmm(bias, x, joint.t())
        return compute.multiply(held, own, bias).addmm_(low, adapters.scaled_b(x.dtype).t())

    def backward(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        compute: ProjectionCompute,
        gradients: Gradients,
        *,
        needs_input: bool = True,
        seed: int = 0,
        is_filled: bool = False,
        output: torch.Tensor | None = None,
    ) -> Any:
        """Adds the parameters' gradients to ``gradients`` (or in place) and returns the input's.

        Args:
            x: (T, in_features + room) as ``forward`` took it.
            grad: (T, out_features).
            compute: as in the forward.
            gradients: where gradients are collected.
            needs_input: whether the input's gradient is wanted.
            seed: as in the forward.
            is_filled: whether ``x`` still has what the forward wrote into its room.
            output: (T, out_features) that the forward returned, if it is still at hand: spares the gradient of DoRA's
                magnitudes a product.

        Returns:
            (T, in_features); its rows are further apart only if the input has room, for attention reads contiguous
            ones. None if it is not wanted.
        """
        held, adapters = self._held, self._adapters
        own = x[:, : held.width]
        self._add_base_gradients(own, grad, compute, gradients)
        if not adapters.rank:
            return compute.multiply_back(held, grad) if needs_input else None
        seen = adapters.dropped(own, seed)
        low = x[:, -self.room :] if is_filled and self.room else self._low(x, seen)
        if self._scaled_rows is not None:
            return self._scaled_rows.backward(
                x, seen, low, grad, compute, gradients, needs_input=needs_input, seed=seed, output=output
            )
        if needs_input and compute.is_joint(held):
            wide = torch.mm(grad, held.joint(grad.dtype))
            grad_x, grad_low = wide[:, : held.width], wide[:, -self.room :]
        else:
            grad_low = torch.mm(grad, adapters.scaled_b(grad.dtype))
            grad_x = compute.multiply_back(held, grad) if needs_input else None
        for rows, columns, adapter, _ in adapters.places:
            if adapter.a.requires_grad:
                compute.add_product(adapter.a, grad_low[:, columns].t(), seen, gradients)
            if adapter.b.requires_grad:
                compute.add_product(adapter.b, grad[:, rows].t(), low[:, columns], gradients, scale=adapter.scaling)
        if grad_x is not None and self.dropout:
            grad_x += adapters.dropped(torch.mm(grad_low, adapters.stacked_a(grad.dtype)), seed)
        elif grad_x is not None:
            grad_x.addmm_(grad_low, adapters.stacked_a(grad.dtype))
        return grad_x

    def _low(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Returns ``seen A^T`` (T, ranks), in the room of ``x`` where there is one."""
        a = self._adapters.stacked_a(x.dtype)
        return torch.mm(seen, a.t(), out=x[:, -self.room :]) if self.room else torch.mm(seen, a.t())

    def _add_base_gradients(
        self, x: torch.Tensor, grad: torch.Tensor, compute: ProjectionCompute, gradients: Gradients
    ) -> None:
        """Adds the gradients of the layers' own weights and biases."""
        row = 0
        for base, rows in zip(self._held.bases, self._held.rows, strict=True):
            own = grad[:, row : row + rows]
            row += rows
            if base.weight.requires_grad:
                compute.add_product(base.weight, own.t(), x, gradients)
            if base.bias is not None and base.bias.requires_grad:
                gradients[base.bias] = own.sum(dim=0, dtype=torch.float32).to(base.bias.dtype)
