"""DoRA: every row of the adapted weights is scaled to a length of its own, the magnitude m.

``y = g (x W^T + s (x A^T) B^T) + b`` with ``g = m / ||W + s B A||``. As in PEFT, the length ``||W + s B A||`` is a
constant to the gradients; and while the adapter's input is dropped to x', the base sees x and x' both:
``y = x W^T + b + (g - 1) x' W^T + g s (x' A^T) B^T``. Scaled are the weights, ``g [W | s B]``, which are fewer than the
outputs, unless the input has few rows. In 16 bit they are rounded once, as the copies of trained weights are. The
magnitudes' gradient takes one product more, that of a weight gradient, from which B's is cut.
"""

from collections.abc import Hashable
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ...errors import ConfigError
from .adapters import Adapter, Adapters, active_adapters
from .held_weights import HeldWeights, base_of, held_weight
from .products import Gradients, ProjectionCompute, column_dots, product_in_float32
from .working_copies import WorkingCopies, state_of

ROWS_A_NORM = 1024
"""Rows of a weight whose lengths are taken at once: 33 MB in float32 at 8,192 columns."""


class ScaledRows:
    """A projection's products where some of its layers have magnitudes.

    Args:
        held: the layers' weights.
        adapters: their adapters.
    """

    def __init__(self, held: HeldWeights, adapters: Adapters) -> None:
        self._held = held
        self._adapters = adapters
        # A few kilobytes that take a pass over the weights: kept where other working copies are not.
        self._scales = WorkingCopies()

    def forward(
        self,
        x: torch.Tensor,
        seen: torch.Tensor,
        low: torch.Tensor,
        bias: torch.Tensor | None,
        compute: ProjectionCompute,
    ) -> torch.Tensor:
        """Returns the output (T, out_features).

        Args:
            x: (T, in_features + room), the room filled.
            seen: (T, in_features), the input as the adapters see it.
            low: (T, ranks), ``seen A^T``.
            bias: (out_features,).
            compute: how products are formed.
        """
        held, adapters, scale = self._held, self._adapters, self._scale()
        width = held.width
        own = x[:, :width]
        if adapters.dropout:
            y = compute.multiply(held, own, bias)
            if compute.fp8:
                y += compute.multiply(held, seen, None).mul_(scale - 1)
                return y.add_(torch.mm(low, adapters.scaled_b(x.dtype).t()).mul_(scale))
            weights = self._scaled_weights(self._weights_and_b(x.dtype, compute))
            return y.addmm_(seen, weights[:, :width].t()).addmm_(low, weights[:, width:].t())
        if compute.fp8 or len(x) < width:
            if compute.is_joint(held):
                y = torch.mm(x, held.joint(x.dtype).t())
            else:
                y = compute.multiply(held, own, None).addmm_(low, adapters.scaled_b(x.dtype).t())
            return y.mul_(scale) if bias is None else y.mul_(scale).add_(bias)
        weights = self._scaled_weights(self._weights_and_b(x.dtype, compute))
        read, read_weights = (x, weights) if held.room else (own, weights[:, :width])
        y = torch.mm(read, read_weights.t()) if bias is None else torch.addmm(bias, read, read_weights.t())
        return y if held.room else y.addmm_(low, weights[:, width:].t())

    def backward(
        self,
        x: torch.Tensor,
        seen: torch.Tensor,
        low: torch.Tensor,
        grad: torch.Tensor,
        compute: ProjectionCompute,
        gradients: Gradients,
        *,
        needs_input: bool,
        seed: int,
        output: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Adds the gradients of A, B and the magnitudes to ``gradients`` (or in place) and returns the input's.

        Arguments as in ``forward`` and in ``Projection.backward``.
        """
        held, adapters = self._held, self._adapters
        width = held.width
        weights = self._weights_and_b(grad.dtype, compute)
        self._add_gradients(x, seen, low, grad, weights, compute, gradients, output)
        weights = self._scaled_weights(weights)
        if not needs_input:
            grad_seen, grad_low = None, torch.mm(grad, weights[:, width:])
        elif compute.fp8:
            scale = self._scale() - 1 if adapters.dropout else self._scale()
            scaled = torch.mul(grad, scale, out=torch.empty_like(grad))
            grad_seen, grad_low = compute.multiply_back(held, scaled), torch.mm(grad, weights[:, width:])
        elif held.room:
            wide = torch.mm(grad, weights)
            grad_seen, grad_low = wide[:, :width], wide[:, width:]
        else:
            grad_seen, grad_low = torch.mm(grad, weights[:, :width]), torch.mm(grad, weights[:, width:])
        for place in adapters.places:
            if place.adapter.a.requires_grad:
                compute.add_product(place.adapter.a, grad_low[:, place.columns].t(), seen, gradients)
        if grad_seen is None:
            return None
        grad_seen.addmm_(grad_low, adapters.stacked_a(grad.dtype))
        if not adapters.dropout:
            return grad_seen
        return compute.multiply_back(held, grad).add_(adapters.dropped(grad_seen, seed))

    def _add_gradients(
        self,
        x: torch.Tensor,
        seen: torch.Tensor,
        low: torch.Tensor,
        grad: torch.Tensor,
        weights: torch.Tensor,
        compute: ProjectionCompute,
        gradients: Gradients,
        output: torch.Tensor | None,
    ) -> None:
        """Adds the gradients of B and of the magnitudes.

        Of B it is ``g s grad^T (x A^T)``. Of row o's magnitude it is the sum over t of ``grad (x W^T + s (x A^T) B^T)``
        divided by ``||W + s B A||``: the row's sum of ``(grad^T [x | x A^T]) [W | s B]``. Where the output, which is
        ``m / ||..||`` times what stands in brackets, is at hand, that needs no product.

        Args:
            x, seen, low, grad, compute, gradients, output: as in ``backward``.
            weights: ``[W | s B]`` (out_features, in_features + ranks).
        """
        width = seen.shape[1]
        learning = [
            (place.rows, place.adapter.magnitude)
            for place in self._adapters.places
            if place.adapter.has_magnitude and place.adapter.magnitude.requires_grad
        ]
        if learning and output is not None and not self._adapters.dropout and self._held.bias(x.dtype) is None:
            sums_low = product_in_float32(grad.t(), low)
            dots = column_dots(output, grad) / self._magnitudes()
        elif learning and self._held.room and not self._adapters.dropout:
            sums = product_in_float32(grad.t(), x)
            sums_low = sums[:, width:].clone()
            dots = sums.mul_(weights).sum(dim=1) / self._norms()
        else:
            sums_low = product_in_float32(grad.t(), low)
            dots = (sums_low * weights[:, width:]).sum(dim=1)
            if learning:
                dots += product_in_float32(grad.t(), seen).mul_(weights[:, :width]).sum(dim=1)
            dots /= self._norms()
        for rows, magnitude in learning:
            gradients[magnitude] = dots[rows].to(magnitude.dtype)
        scale = self._scale()[:, None]
        for rows, columns, adapter, _ in self._adapters.places:
            if adapter.b.requires_grad:
                own = sums_low[rows, columns] * (scale[rows] * adapter.scaling)
                compute.add_gradient(adapter.b, own.to(adapter.b.dtype), gradients)

    def _weights_and_b(self, dtype: torch.dtype, compute: ProjectionCompute) -> torch.Tensor:
        """Returns ``[W | s B]`` (out_features, in_features + ranks): the joint weights where there are some."""
        if compute.is_joint(self._held):
            return self._held.joint(dtype)
        beside = torch.cat([self._held.weight(dtype), self._adapters.scaled_b(dtype)], dim=1)
        compute.release(self._held)
        return beside

    def _scaled_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns ``g [W | s B]`` of ``[W | s B]``, and with dropout ``[(g - 1) W | g s B]``."""
        scale = self._scale()[:, None]
        scaled = torch.mul(weights, scale, out=torch.empty_like(weights))
        if self._adapters.dropout:
            width = self._held.width
            torch.mul(weights[:, :width], scale - 1, out=scaled[:, :width])
        return scaled

    def _scale(self) -> torch.Tensor:
        """Returns every row's ``m / ||W + s B A||`` (out_features,) float32; 1 for layers without a magnitude."""
        adapters = [place.adapter for place in self._adapters.places]
        magnitudes = [adapter.magnitude for adapter in adapters if adapter.has_magnitude]
        return self._scales.get("scale", self._state(*magnitudes), lambda: self._magnitudes() / self._norms())

    def _norms(self) -> torch.Tensor:
        """Returns the lengths of the adapted weights' rows (out_features,) float32; 1 for layers without a magnitude.

        Raises:
            ConfigError: the weights under a magnitude are trained themselves.
        """

        def make() -> torch.Tensor:
            found = self._ones()
            for rows, _, adapter, layer in self._adapters.places:
                if adapter.has_magnitude:
                    base = self._held.bases[layer]
                    if base.weight.requires_grad:
                        raise ConfigError("the weights under a DoRA adapter are trained too; freeze them")
                    found[rows] = row_norms(held_weight(base), adapter.a, adapter.b, adapter.scaling)
            return found

        return self._scales.get("norms", self._state(), make)

    def _state(self, *magnitudes: torch.Tensor) -> Hashable:
        """Returns what changes when a row's length, or one of the magnitudes, may have changed."""
        matrices = [matrix for place in self._adapters.places for matrix in (place.adapter.a, place.adapter.b)]
        sources = [*self._held.weights, *matrices, *magnitudes]
        return state_of(sources, torch.float32, self._adapters.scalings)

    def _magnitudes(self) -> torch.Tensor:
        """Returns every row's magnitude (out_features,) float32; 1 for layers without one."""
        found = self._ones()
        for place in self._adapters.places:
            if place.adapter.has_magnitude:
                found[place.rows] = place.adapter.magnitude.detach()
        return found

    def _ones(self) -> torch.Tensor:
        return torch.ones(sum(self._held.rows), dtype=torch.float32, device=self._held.weights[0].device)


@torch.no_grad()
def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns the lengths of the rows of ``W + s B A``: (out_features,) float32.

    The sum itself is formed, in float32 and some rows at a time. ``||W||^2 + 2 s (W A^T . B) + s^2 (B A A^T . B)``
    would need as large a product and W in float32 too, loses digits where B A undoes W, and is not exactly ``||W||``
    while B is zero.

    Args:
        weight: W (out_features, in_features), of any number format.
        a: A (rank, in_features).
        b: B (out_features, rank).
        scaling: s.
    """
    wide = a.float()
    blocks = zip(weight.split(ROWS_A_NORM), b.split(ROWS_A_NORM), strict=True)
    sums = (torch.addmm(rows.float(), own.float(), wide, alpha=scaling) for rows, own in blocks)
    return torch.cat([torch.linalg.vector_norm(one, dim=1) for one in sums])


@torch.no_grad()
def set_magnitudes_to_norms(model: nn.Module) -> None:
    """Gives every DoRA adapter of a model the magnitudes with which it computes what it would without them, exactly.

    PEFT takes them in the weights' own number format: of 16-bit weights every row would start up to 2^-9 too long or
    too short.
    """
    for module in model.modules():
        adapter = Adapter(cast(LoraLayer, module)) if active_adapters(module) else None
        if adapter is not None and adapter.has_magnitude:
            held = held_weight(base_of(module))
            adapter.magnitude.data = row_norms(held, adapter.a, adapter.b, adapter.scaling)
