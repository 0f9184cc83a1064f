"""The layers' own weights as a projection reads them: as they are held, in another number format, or beside ``s B``."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ...errors import ConfigError
from .adapters import Adapters
from .working_copies import WorkingCopies, stack, state_of


class HeldWeights:
    """The weights of linear layers that read the same input, below each other, and their biases.

    Args:
        bases: the linear layers, without their adapters.
        adapters: the layers' adapters.
        copies: where what is made of the weights is kept.
        has_room: whether the input comes in a buffer with room for the adapters' columns.

    Attributes:
        rows: out_features of every layer.
        width: in_features.
        is_four_bit: whether some of the weights are held in 4 bit.
        room: columns that stand beside the weights, and beside the input in its buffer; 0: none.
    """

    def __init__(
        self, bases: Sequence[nn.Linear], adapters: Adapters, copies: WorkingCopies, *, has_room: bool
    ) -> None:
        self.bases = tuple(bases)
        self.rows = [base.out_features for base in bases]
        self.width = bases[0].in_features
        self.is_four_bit = any(is_four_bit(base) for base in bases)
        self.room = adapters.rank if has_room and not self.is_four_bit else 0
        self.copies = copies
        self._adapters = adapters
        self._joint: _Joint | None = None

    @property
    def weights(self) -> list[torch.Tensor]:
        """The layers' own weights."""
        return [base.weight for base in self.bases]

    @property
    def parameters(self) -> list[nn.Parameter]:
        found: list[Any] = [parameter for base in self.bases for parameter in (base.weight, base.bias)]
        return [parameter for parameter in found if parameter is not None]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weights (out_features, in_features) in ``dtype``; a 4-bit layer's are unpacked anew."""
        if self.is_four_bit:
            held = [held_weight(base).to(dtype) for base in self.bases]
            return held[0] if len(held) == 1 else torch.cat(held)
        weights = self.weights
        if len(weights) == 1 and weights[0].dtype == dtype:
            return weights[0].detach()
        return self.copies.get("weight", state_of(weights, dtype), lambda: stack(weights, dtype))

    def exact_weight(self) -> torch.Tensor:
        """Returns the weights (out_features, in_features) as they are held."""
        first, *others = self.weights
        return torch.cat([one.detach() for one in self.weights]) if others else first.detach()

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the biases (out_features,) in ``dtype``; None: the layers have none."""
        biases = [base.bias for base in self.bases if base.bias is not None]
        if not biases:
            return None
        return self.copies.get("bias", state_of(biases, dtype), lambda: stack(biases, dtype))

    def joint(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns ``[W | s B]`` (out_features, in_features + room) in ``dtype``.

        Frozen weights of that type move into its left part, so that they are in memory once. The right part is renewed
        when an adapter has changed.
        """
        if self._joint is None or not self._joint.is_of(self.weights, dtype):
            with torch.no_grad():
                self._joint = _Joint(self.weights, self.room, dtype)
        joint, state = self._joint, self._adapters.state_of_scaled_b(dtype)
        if joint.state_of_b != state:
            with torch.no_grad():
                self._adapters.write_scaled_b(joint.memory[:, self.width :])
            joint.state_of_b = state
        return joint.memory

    def forget(self) -> None:
        """Lets go of all working copies."""
        self.copies.forget()
        if self._joint is not None and not self._joint.holds_weights:
            self._joint = None


class _Joint:
    """The memory of ``[W | s B]``, its left part filled.

    Args:
        weights: the layers' weights; frozen ones of type ``dtype`` become views of the left part.
        room: columns of the right part.
        dtype: of the memory.

    Attributes:
        memory: (out_features, in_features + room).
        holds_weights: whether the weights themselves lie here, and not copies of them.
        state_of_b: of the adapters that the right part was made from; None: not yet.
    """

    def __init__(self, weights: Sequence[torch.Tensor], room: int, dtype: torch.dtype) -> None:
        rows, width = [len(weight) for weight in weights], weights[0].shape[1]
        self.memory = weights[0].new_empty((sum(rows), width + room), dtype=dtype)
        self.memory[:, :width] = stack(weights, dtype)
        self.state_of_b: Hashable = None
        self._places = self.memory[:, :width].split(rows)
        self.holds_weights = all(weight.dtype == dtype and not weight.requires_grad for weight in weights)
        if self.holds_weights:
            for weight, place in zip(weights, self._places, strict=True):
                weight.data = place
        self._state = state_of(weights, dtype)

    def is_of(self, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
        """Says whether the left part is still these weights in ``dtype``."""
        if not self.holds_weights:
            return self._state == state_of(weights, dtype)
        pairs = zip(weights, self._places, strict=True)
        return self.memory.dtype == dtype and all(weight.data_ptr() == place.data_ptr() for weight, place in pairs)


def base_of(module: nn.Module) -> nn.Linear:
    """Returns the linear layer under a layer's adapters, or the layer itself.

    Raises:
        ConfigError: a layer of another kind.
    """
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear):
        raise ConfigError(f"the packed forward knows linear layers only, not {type(base).__name__}")
    return base


def is_four_bit(base: nn.Linear) -> bool:
    """Says whether a layer's weight is held in 4 bit."""
    return vars(base.weight).get("quant_state") is not None


def held_weight(base: nn.Linear) -> torch.Tensor:
    """Returns a layer's weight (out_features, in_features); of one in 4 bit what it stands for, unpacked anew."""
    if not is_four_bit(base):
        return base.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, vars(base.weight)["quant_state"])
