"""Linear maps of the fast path: forward and backward by hand, with adapters folded into the products.

A projection is one linear layer, or several that read the same input (CLIP's queries, keys and values). Each may carry
a LoRA adapter: ``y = x W^T + b + s (x A^T) B^T``. Where W is held as it is, the adapter costs hardly more than its own
gradients: the columns of ``s B`` stand beside W's, and ``x A^T`` beside x in the same buffer, so that one product gives
``[x | x A^T] [W | s B]^T``, and its backward product gives the gradients of x and of ``x A^T`` together.

Measured on one H200, gate_up_proj of the published size, 15,072 rows, rank 64: 2.13 ms for the joint product, 2.09 ms
for W alone, 2.56 ms for W and then ``addmm``.

A DoRA adapter also scales every row of the adapted weights to a length of its own, the magnitude m:
``y = g (x W^T + s (x A^T) B^T) + b`` with ``g = m / ||W + s B A||``. As in PEFT, the length ``||W + s B A||`` is a
constant to the gradients; and while the adapter's input is dropped to x', the base sees x and x' both:
``y = x W^T + b + (g - 1) x' W^T + g s (x' A^T) B^T``. Scaled are the weights, ``g [W | s B]``, which are fewer than the
outputs, unless the input has few rows. In 16 bit they are rounded once, as the copies of trained weights are. The
magnitudes' gradient takes one product more, that of a weight gradient, from which B's is cut.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import ConfigError

Gradients = dict[torch.Tensor, torch.Tensor]
"""Gradients of one layer's parameters, by parameter; those accumulated in place are not in it."""

ROWS_A_NORM = 1024
"""Rows of a weight whose lengths are taken at once: 33 MB in float32 at 8,192 columns."""

ROWS_A_SUM = 2048
"""Positions whose outputs are multiplied by their gradients at once: 67 MB in 16 bit at 16,384 outputs."""


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
        self.modules = tuple(modules)
        self._adapters = [_Adapter(module) if _is_adapted(module) else None for module in modules]
        self._bases = [_base_of(module) for module in modules]
        self._rows = [base.out_features for base in self._bases]
        self._is_four_bit = any(_is_four_bit(base) for base in self._bases)
        self._rank = sum(adapter.rank for adapter in self._adapters if adapter is not None)
        self._has_magnitude = any(adapter.has_magnitude for adapter in self._adapters if adapter is not None)
        self.room = self._rank if has_room and not self._is_four_bit else 0
        self._copies: dict[str, tuple[Any, torch.Tensor]] = {}
        self._row_scales: dict[str, tuple[Any, torch.Tensor]] = {}
        self._joint_state: Any = None

    def is_of(self, modules: Sequence[nn.Module]) -> bool:
        """Says whether these are still the projection's modules, adapters switched as they were."""
        return all(
            own is other and _is_adapted(other) == (adapter is not None)
            for own, other, adapter in zip(self.modules, modules, self._adapters, strict=True)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        found: list[Any] = [parameter for base in self._bases for parameter in (base.weight, base.bias)]
        found += [parameter for adapter in self._adapters if adapter for parameter in adapter.parameters]
        return [parameter for parameter in found if parameter is not None and parameter.requires_grad]

    def buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Returns memory for an input of ``rows`` rows, (rows, in_features + room)."""
        return like.new_empty((rows, self._bases[0].in_features + self.room))

    @property
    def dropout(self) -> float:
        """Share of the adapters' inputs that is dropped now: 0 outside training."""
        return max((adapter.dropout for adapter in self._adapters if adapter is not None), default=0.0)

    def forward(self, x: torch.Tensor, compute: "ProjectionCompute", seed: int = 0) -> torch.Tensor:
        """Maps ``x`` (T, in_features + room), whose last ``room`` columns are written here, to (T, out_features).

        With adapters' dropout, ``seed`` decides what is dropped; the backward pass needs the same.
        """
        own, bias = self._own(x), self._bias(x.dtype)
        if not self._rank:
            return compute.multiply(self, own, bias)
        seen = self._dropped(own, seed)
        low = self._low(x, seen)
        if self._has_magnitude:
            return self._forward_scaled(x, seen, low, bias, compute)
        if self.is_joint(compute):
            joint = self._joint(x.dtype)
            return torch.mm(x, joint.t()) if bias is None else torch.addmm(bias, x, joint.t())
        return compute.multiply(self, own, bias).addmm_(low, self._scaled_b(x.dtype).t())

    def backward(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        compute: "ProjectionCompute",
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
        own = self._own(x)
        self._base_gradients(own, grad, compute, gradients)
        if not self._rank:
            return compute.multiply_back(self, grad) if needs_input else None
        seen = self._dropped(own, seed)
        low = x[:, -self.room :] if is_filled and self.room else self._low(x, seen)
        if self._has_magnitude:
            return self._backward_scaled(x, seen, low, grad, compute, gradients, needs_input, seed, output)
        if needs_input and self.is_joint(compute):
            wide = torch.mm(grad, self._joint(grad.dtype))
            grad_x, grad_low = self._own(wide), wide[:, -self.room :]
        else:
            grad_low = torch.mm(grad, self._scaled_b(grad.dtype))
            grad_x = compute.multiply_back(self, grad) if needs_input else None
        for rows, columns, adapter in self._places():
            if adapter.a.requires_grad:
                compute.add_product(adapter.a, grad_low[:, columns].t(), seen, gradients)
            if adapter.b.requires_grad:
                compute.add_product(adapter.b, grad[:, rows].t(), low[:, columns], gradients, scale=adapter.scaling)
        if grad_x is not None and self.dropout:
            grad_x += self._dropped(torch.mm(grad_low, self._stacked_a(grad.dtype)), seed)
        elif grad_x is not None:
            grad_x.addmm_(grad_low, self._stacked_a(grad.dtype))
        return grad_x

    def is_joint(self, compute: "ProjectionCompute") -> bool:
        """Whether the adapters' columns stand beside the weights'."""
        return self.room > 0 and not compute.fp8 and not compute.is_sharded

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weights (out_features, in_features) in ``dtype``; a 4-bit layer's are unpacked anew."""
        if self._is_four_bit:
            held = [_held_weight(base).to(dtype) for base in self._bases]
            return held[0] if len(held) == 1 else torch.cat(held)
        weights = self.weights
        if len(weights) == 1 and weights[0].dtype == dtype:
            return weights[0].detach()
        return self.working_copy("weight", weights, dtype, lambda: _stack(weights, dtype))

    @property
    def weights(self) -> list[torch.Tensor]:
        """The layers' own weights."""
        return [base.weight for base in self._bases]

    def exact_weight(self) -> torch.Tensor:
        """Returns the weights (out_features, in_features) as they are held."""
        first, *others = self.weights
        return torch.cat([one.detach() for one in self.weights]) if others else first.detach()

    def working_copy(
        self, name: str, sources: Sequence[torch.Tensor], dtype: torch.dtype, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Returns what ``make`` gives, made anew only when a source may have changed."""
        return self._kept(self._copies, name, sources, dtype, make)

    def forget(self) -> None:
        """Lets go of all working copies; the rows' scales stay, a few kilobytes that take a pass over the weights."""
        self._copies.clear()

    def _kept(
        self,
        copies: dict[str, tuple[Any, torch.Tensor]],
        name: str,
        sources: Sequence[torch.Tensor],
        dtype: torch.dtype,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        state = self._state(sources, dtype)
        kept = copies.get(name)
        if kept is None or kept[0] != state:
            with torch.no_grad():
                kept = copies[name] = (state, make())
        return kept[1]

    def _state(self, sources: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[Any, ...]:
        """Returns what changes when a source may have changed.

        Writing in place counts a tensor's version up and moving gives it new memory, but torch's fused optimizers do
        neither: a trained source is taken for changed after every step of any of torch's optimizers.
        """
        is_trained = any(source.requires_grad for source in sources)
        num_steps = _optimizer_steps.count if is_trained else None
        return dtype, num_steps, *((source.data_ptr(), source._version) for source in sources)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the input's own columns of its buffer."""
        return x[:, : self._bases[0].in_features]

    def _low(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Returns ``seen A^T`` (T, ranks), in the room of ``x`` where there is one."""
        a = self._stacked_a(x.dtype)
        return torch.mm(seen, a.t(), out=x[:, -self.room :]) if self.room else torch.mm(seen, a.t())

    def _forward_scaled(
        self,
        x: torch.Tensor,
        seen: torch.Tensor,
        low: torch.Tensor,
        bias: torch.Tensor | None,
        compute: "ProjectionCompute",
    ) -> torch.Tensor:
        """Returns the output of layers with magnitudes; arguments as ``forward`` has them."""
        own, scale = self._own(x), self._scale()
        width = own.shape[1]
        if self.dropout:
            y = compute.multiply(self, own, bias)
            if compute.fp8:
                y += compute.multiply(self, seen, None).mul_(scale - 1)
                return y.add_(torch.mm(low, self._scaled_b(x.dtype).t()).mul_(scale))
            weights = self._scaled_weights(self._weights_and_b(x.dtype, compute))
            return y.addmm_(seen, weights[:, :width].t()).addmm_(low, weights[:, width:].t())
        if compute.fp8 or len(x) < width:
            if self.is_joint(compute):
                y = torch.mm(x, self._joint(x.dtype).t())
            else:
                y = compute.multiply(self, own, None).addmm_(low, self._scaled_b(x.dtype).t())
            return y.mul_(scale) if bias is None else y.mul_(scale).add_(bias)
        weights = self._scaled_weights(self._weights_and_b(x.dtype, compute))
        read, read_weights = (x, weights) if self.room else (own, weights[:, :width])
        y = torch.mm(read, read_weights.t()) if bias is None else torch.addmm(bias, read, read_weights.t())
        return y if self.room else y.addmm_(low, weights[:, width:].t())

    def _backward_scaled(
        self,
        x: torch.Tensor,
        seen: torch.Tensor,
        low: torch.Tensor,
        grad: torch.Tensor,
        compute: "ProjectionCompute",
        gradients: Gradients,
        needs_input: bool,
        seed: int,
        output: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Carries gradients back through layers with magnitudes; arguments and result as ``backward`` has them."""
        width = self._own(x).shape[1]
        weights = self._weights_and_b(grad.dtype, compute)
        self._adapter_gradients(x, seen, low, grad, weights, compute, gradients, output)
        weights = self._scaled_weights(weights)
        if not needs_input:
            grad_seen, grad_low = None, torch.mm(grad, weights[:, width:])
        elif compute.fp8:
            scale = self._scale() - 1 if self.dropout else self._scale()
            scaled = torch.mul(grad, scale, out=torch.empty_like(grad))
            grad_seen, grad_low = compute.multiply_back(self, scaled), torch.mm(grad, weights[:, width:])
        elif self.room:
            wide = torch.mm(grad, weights)
            grad_seen, grad_low = wide[:, :width], wide[:, width:]
        else:
            grad_seen, grad_low = torch.mm(grad, weights[:, :width]), torch.mm(grad, weights[:, width:])
        for _, columns, adapter in self._places():
            if adapter.a.requires_grad:
                compute.add_product(adapter.a, grad_low[:, columns].t(), seen, gradients)
        if grad_seen is None:
            return None
        grad_seen.addmm_(grad_low, self._stacked_a(grad.dtype))
        if not self.dropout:
            return grad_seen
        return compute.multiply_back(self, grad).add_(self._dropped(grad_seen, seed))

    def _adapter_gradients(
        self,
        x: torch.Tensor,
        seen: torch.Tensor,
        low: torch.Tensor,
        grad: torch.Tensor,
        weights: torch.Tensor,
        compute: "ProjectionCompute",
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
            (rows, adapter.magnitude)
            for rows, _, adapter in self._places()
            if adapter.has_magnitude and adapter.magnitude.requires_grad
        ]
        if learning and output is not None and not self.dropout and self._bias(x.dtype) is None:
            sums_low = product_in_float32(grad.t(), low)
            dots = column_dots(output, grad) / self._magnitudes()
        elif learning and self.room and not self.dropout:
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
        for rows, columns, adapter in self._places():
            if adapter.b.requires_grad:
                own = sums_low[rows, columns] * (scale[rows] * adapter.scaling)
                compute.add_gradient(adapter.b, own.to(adapter.b.dtype), gradients)

    def _weights_and_b(self, dtype: torch.dtype, compute: "ProjectionCompute") -> torch.Tensor:
        """Returns ``[W | s B]`` (out_features, in_features + ranks): the joint weights where there are some."""
        if self.is_joint(compute):
            return self._joint(dtype)
        beside = torch.cat([self.weight(dtype), self._scaled_b(dtype)], dim=1)
        compute.release(self)
        return beside

    def _scaled_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns ``g [W | s B]`` of ``[W | s B]``, and with dropout ``[(g - 1) W | g s B]``."""
        scale = self._scale()[:, None]
        scaled = torch.mul(weights, scale, out=torch.empty_like(weights))
        if self.dropout:
            width = self._bases[0].in_features
            torch.mul(weights[:, :width], scale - 1, out=scaled[:, :width])
        return scaled

    def _scale(self) -> torch.Tensor:
        """Returns every row's ``m / ||W + s B A||`` (out_features,) float32; 1 for layers without a magnitude."""
        magnitudes = [adapter.magnitude for adapter in self._adapters if adapter is not None and adapter.has_magnitude]
        sources = [*self._norm_sources(), *magnitudes]
        return self._kept(self._row_scales, "scale", sources, torch.float32, lambda: self._magnitudes() / self._norms())

    def _norms(self) -> torch.Tensor:
        """Returns the lengths of the adapted weights' rows (out_features,) float32; 1 for layers without a magnitude.

        Raises:
            ConfigError: the weights under a magnitude are trained themselves.
        """

        def make() -> torch.Tensor:
            found = torch.ones(sum(self._rows), dtype=torch.float32, device=self.weights[0].device)
            for (rows, _, adapter), base in zip(self._places(), self._adapted_bases(), strict=True):
                if adapter.has_magnitude:
                    if base.weight.requires_grad:
                        raise ConfigError("the weights under a DoRA adapter are trained too; freeze them")
                    found[rows] = row_norms(_held_weight(base), adapter.a, adapter.b, adapter.scaling)
            return found

        return self._kept(self._row_scales, "norms", self._norm_sources(), torch.float32, make)

    def _norm_sources(self) -> list[torch.Tensor]:
        adapters = [adapter for adapter in self._adapters if adapter is not None]
        return [*self.weights, *(matrix for adapter in adapters for matrix in (adapter.a, adapter.b))]

    def _magnitudes(self) -> torch.Tensor:
        """Returns every row's magnitude (out_features,) float32; 1 for layers without one."""
        found = torch.ones(sum(self._rows), dtype=torch.float32, device=self.weights[0].device)
        for rows, _, adapter in self._places():
            if adapter.has_magnitude:
                found[rows] = adapter.magnitude.detach()
        return found

    def _adapted_bases(self) -> list[nn.Linear]:
        return [base for base, adapter in zip(self._bases, self._adapters, strict=True) if adapter is not None]

    def _dropped(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Drops a share of ``x`` and scales up the rest; without dropout ``x`` itself."""
        if not self.dropout:
            return x
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = torch.rand(x.shape, device=x.device, generator=generator) >= self.dropout
        return x * kept / (1 - self.dropout)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        biases = [base.bias for base in self._bases if base.bias is not None]
        if not biases:
            return None
        return self.working_copy("bias", biases, dtype, lambda: _stack(biases, dtype))

    def _joint(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns ``[W | s B]`` (out_features, in_features + room) in ``dtype``.

        The base's own weights become views of its left part, so that they are in memory once. The right part is
        renewed when an adapter has changed.
        """
        width = self._bases[0].in_features
        weights = self.weights

        def make() -> torch.Tensor:
            joint = weights[0].new_empty((sum(self._rows), width + self._rank), dtype=dtype)
            joint[:, :width] = _stack(weights, dtype)
            if all(weight.dtype == dtype and not weight.requires_grad for weight in weights):
                for weight, rows in zip(weights, joint[:, :width].split(self._rows), strict=True):
                    weight.data = rows
            return joint

        joint = self.working_copy("joint", weights, dtype, make)
        self._copies["joint"] = (self._state(weights, dtype), joint)  # where the weights lie now
        matrices = [adapter.b for adapter in self._adapters if adapter is not None]
        state = (self._state(matrices, dtype), joint.data_ptr())
        if self._joint_state != state:
            with torch.no_grad():
                self._write_b(joint[:, width:])
            self._joint_state = state
        return joint

    def _stacked_a(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns all A below each other, (room, in_features)."""
        matrices = [adapter.a for adapter in self._adapters if adapter is not None]
        return self.working_copy("a", matrices, dtype, lambda: _stack(matrices, dtype))

    def _scaled_b(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns every ``s B`` at the place of its layer's rows and its A's columns, (out_features, room)."""
        matrices = [adapter.b for adapter in self._adapters if adapter is not None]

        def make() -> torch.Tensor:
            return self._write_b(matrices[0].new_empty((sum(self._rows), self._rank), dtype=dtype))

        return self.working_copy("b", matrices, dtype, make)

    def _write_b(self, out: torch.Tensor) -> torch.Tensor:
        out.zero_()
        for rows, columns, adapter in self._places():
            out[rows, columns] = adapter.b.detach() * adapter.scaling
        return out

    def _places(self) -> list[tuple[slice, slice, "_Adapter"]]:
        """Returns every adapter with its layer's rows of the output and its own columns of the room."""
        places = []
        row = column = 0
        for adapter, rows in zip(self._adapters, self._rows, strict=True):
            if adapter is not None:
                places.append((slice(row, row + rows), slice(column, column + adapter.rank), adapter))
                column += adapter.rank
            row += rows
        return places

    def _base_gradients(
        self, x: torch.Tensor, grad: torch.Tensor, compute: "ProjectionCompute", gradients: Gradients
    ) -> None:
        row = 0
        for base, rows in zip(self._bases, self._rows, strict=True):
            own = grad[:, row : row + rows]
            row += rows
            if base.weight.requires_grad:
                compute.add_product(base.weight, own.t(), x, gradients)
            if base.bias is not None and base.bias.requires_grad:
                gradients[base.bias] = own.sum(dim=0, dtype=torch.float32).to(base.bias.dtype)


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

    def multiply(self, projection: Projection, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns ``x W^T + b``."""
        weight = projection.weight(x.dtype)
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        self.release(projection)
        return y

    def multiply_back(self, projection: Projection, grad: torch.Tensor) -> torch.Tensor:
        """Returns ``grad W``, the gradient of x."""
        grad_x = torch.mm(grad, projection.weight(grad.dtype))
        self.release(projection)
        return grad_x

    def release(self, projection: Projection) -> None:
        """Lets go of the copies that ``keeps_copies`` says not to keep."""
        if not self.keeps_copies:
            projection.forget()

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


class _OptimizerSteps:
    """Counts the steps that torch's optimizers take in this process."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._counted)

    def _counted(self, *_: Any) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


class _Adapter:
    """The active LoRA matrices of one of PEFT's layers, and DoRA's magnitude where it has one."""

    def __init__(self, module: LoraLayer) -> None:
        names = module.active_adapters
        variants = [module.lora_variant.get(name) for name in names]
        is_known = all(variant is None or type(variant) is DoraLinearVariant for variant in variants)
        if len(names) != 1 or not is_known or module.lora_bias[names[0]]:
            raise ConfigError(
                f"the packed forward computes one LoRA or DoRA adapter a layer, without a bias of its own; found "
                f"{', '.join(names)}. Merge others first"
            )
        (self._name,) = names
        self._module = module
        self.rank = module.r[self._name]
        self.scaling = float(module.scaling[self._name])
        self.has_magnitude = variants[0] is not None

    @property
    def a(self) -> nn.Parameter:
        """(rank, in_features)."""
        return cast(nn.Parameter, self._module.lora_A[self._name].weight)

    @property
    def b(self) -> nn.Parameter:
        """(out_features, rank)."""
        return cast(nn.Parameter, self._module.lora_B[self._name].weight)

    @property
    def magnitude(self) -> nn.Parameter:
        """(out_features,); only where ``has_magnitude``."""
        return cast(nn.Parameter, self._module.lora_magnitude_vector[self._name].weight)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.a, self.b, self.magnitude] if self.has_magnitude else [self.a, self.b]

    @property
    def dropout(self) -> float:
        dropout = self._module.lora_dropout[self._name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


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
        adapter = _Adapter(module) if _is_adapted(module) else None
        if adapter is not None and adapter.has_magnitude:
            held = _held_weight(_base_of(module))
            adapter.magnitude.data = row_norms(held, adapter.a, adapter.b, adapter.scaling)


def _base_of(module: nn.Module | LoraLayer) -> nn.Linear:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear):
        raise ConfigError(f"the packed forward knows linear layers only, not {type(base).__name__}")
    return base


def _is_adapted(module: nn.Module) -> TypeGuard[LoraLayer]:
    return isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged


def _is_four_bit(base: nn.Linear) -> bool:
    return vars(base.weight).get("quant_state") is not None


def _held_weight(base: nn.Linear) -> torch.Tensor:
    """Returns a layer's weight (out_features, in_features); of one in 4 bit what it stands for, unpacked anew."""
    if not _is_four_bit(base):
        return base.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, vars(base.weight)["quant_state"])


def _stack(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([tensor.detach().to(dtype) for tensor in tensors])
