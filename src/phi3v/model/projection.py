"""Linear maps of the fast path: forward and backward by hand, with adapters folded into the products.

A projection is one linear layer, or several that read the same input (CLIP's queries, keys and values). Each may carry
a LoRA adapter: ``y = x W^T + b + s (x A^T) B^T``. Where W is held as it is, the adapter costs hardly more than its own
gradients: the columns of ``s B`` stand beside W's, and ``x A^T`` beside x in the same buffer, so that one product gives
``[x | x A^T] [W | s B]^T``, and its backward product gives the gradients of x and of ``x A^T`` together.

Measured on one H200, gate_up_proj of the published size, 15,072 rows, rank 64: 2.13 ms for the joint product, 2.09 ms
for W alone, 2.56 ms for W and then ``addmm``.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import ConfigError

Gradients = dict[torch.Tensor, torch.Tensor]
"""Gradients of one layer's parameters, by parameter; those accumulated in place are not in it."""


class Projection:
    """Linear layers that read the same input, as one.

    Args:
        modules: ``nn.Linear``, one of PEFT's LoRA layers on one, or one of those on a layer in 4 bit.
        has_room: whether the input comes in a buffer with room for the adapters' columns.

    Attributes:
        room: columns that the input's buffer has beyond the input, the adapters' ranks together; 0: none.
    """

    def __init__(self, modules: Sequence[nn.Module], *, has_room: bool = True) -> None:
        self.modules = tuple(modules)
        self._adapters = [_Adapter(module) if _is_adapted(module) else None for module in modules]
        self._bases = [_base_of(module) for module in modules]
        self._rows = [base.out_features for base in self._bases]
        self._is_four_bit = any(vars(base.weight).get("quant_state") is not None for base in self._bases)
        self._rank = sum(adapter.rank for adapter in self._adapters if adapter is not None)
        self.room = self._rank if has_room and not self._is_four_bit else 0
        self._copies: dict[str, tuple[Any, torch.Tensor]] = {}
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
        found += [parameter for adapter in self._adapters if adapter for parameter in (adapter.a, adapter.b)]
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
        low = self._low(x, seed)
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

        Returns:
            (T, in_features), its rows perhaps further apart; None if it is not wanted.
        """
        own = self._own(x)
        self._base_gradients(own, grad, compute, gradients)
        if not self._rank:
            return compute.multiply_back(self, grad) if needs_input else None
        if needs_input and self.is_joint(compute):
            wide = torch.mm(grad, self._joint(grad.dtype))
            grad_x, grad_low = self._own(wide), wide[:, -self.room :]
        else:
            grad_low = torch.mm(grad, self._scaled_b(grad.dtype))
            grad_x = compute.multiply_back(self, grad) if needs_input else None
        low = x[:, -self.room :] if is_filled and self.room else self._low(x, seed)
        seen = self._dropped(own, seed)
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
        return self.room > 0 and not compute.fp8

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weights (out_features, in_features) in ``dtype``; a 4-bit layer's are unpacked anew."""
        if self._is_four_bit:
            from bitsandbytes.functional import dequantize_4bit

            (base,) = self._bases  # CLIP, where layers share an input, is never in 4 bit
            return dequantize_4bit(base.weight.data, vars(base.weight)["quant_state"]).to(dtype)
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
        state = self._state(sources, dtype)
        kept = self._copies.get(name)
        if kept is None or kept[0] != state:
            with torch.no_grad():
                kept = self._copies[name] = (state, make())
        return kept[1]

    def forget(self) -> None:
        """Lets go of all working copies."""
        self._copies.clear()

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

    def _low(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Returns ``x A^T`` (T, ranks), in the buffer's room where there is one."""
        seen, a = self._dropped(self._own(x), seed), self._stacked_a(x.dtype)
        return torch.mm(seen, a.t(), out=x[:, -self.room :]) if self.room else torch.mm(seen, a.t())

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
    """

    fp8 = False

    def __init__(self, *, accumulates_in_place: bool, keeps_copies: bool) -> None:
        self.accumulates_in_place = accumulates_in_place
        self.keeps_copies = keeps_copies

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
        if self.accumulates_in_place and kept is None:
            parameter.grad = product
        elif kept is not None:
            kept.add_(product)
        else:
            gradients[parameter] = product


class _OptimizerSteps:
    """Counts the steps that torch's optimizers take in this process."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._counted)

    def _counted(self, *_: Any) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


class _Adapter:
    """The active LoRA matrices of one of PEFT's layers."""

    def __init__(self, module: LoraLayer) -> None:
        names = module.active_adapters
        if len(names) != 1 or module.use_dora.get(names[0], False):
            raise ConfigError("training runs with one plain LoRA adapter a layer; merge others first")
        (name,) = names
        self._dropout = module.lora_dropout[name]
        self.a = cast(nn.Parameter, module.lora_A[name].weight)
        self.b = cast(nn.Parameter, module.lora_B[name].weight)
        self.rank = self.a.shape[0]
        self.scaling = float(module.scaling[name])

    @property
    def dropout(self) -> float:
        if isinstance(self._dropout, nn.Dropout) and self._dropout.training:
            return self._dropout.p
        return 0.0


def _base_of(module: nn.Module) -> nn.Linear:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear):
        raise ConfigError(f"the packed forward knows linear layers only, not {type(base).__name__}")
    return base


def _is_adapted(module: nn.Module) -> TypeGuard[LoraLayer]:
    return isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged


def _stack(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([tensor.detach().to(dtype) for tensor in tensors])
