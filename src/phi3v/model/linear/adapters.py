"""PEFT's LoRA matrices as a projection reads them: one adapter a layer, and all of a projection's together."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from ...errors import ConfigError
from .working_copies import WorkingCopies, stack, state_of


def active_adapters(module: nn.Module | LoraLayer) -> list[str]:
    """Names the adapters that a layer computes now: those of its own that are active, not disabled and not merged.

    Raises:
        ConfigError: disabled ones are merged into the weights, which PEFT's own forward would take out of them.
    """
    if not isinstance(module, LoraLayer):
        return []
    if module.disable_adapters and module.merged:
        raise ConfigError(
            "adapters are disabled, but merged into the weights that the packed forward computes with: call "
            "unmerge_adapter() before disable_adapter()"
        )
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def adapters_key(module: nn.Module) -> Hashable:
    """Returns what differs when a layer computes other adapters, adapters of another kind, or merged ones.

    PEFT merges through ``.data``, which nothing about the weight tells.
    """
    if not isinstance(module, LoraLayer):
        return ()
    computed = tuple(
        (name, _rank(module, name), type(module.lora_variant.get(name))) for name in active_adapters(module)
    )
    return (*computed, *module.merged_adapters)


class Adapter:
    """The active LoRA matrices of one of PEFT's layers, and DoRA's magnitude where it has one.

    Args:
        module: a layer with an active adapter.

    Attributes:
        rank: columns that it has in the input's room.
        has_magnitude: whether it is a DoRA adapter.

    Raises:
        ConfigError: several active adapters, or one of a kind that is not computed.
    """

    def __init__(self, module: LoraLayer) -> None:
        names = active_adapters(module)
        variants = [module.lora_variant.get(name) for name in names]
        is_known = all(variant is None or type(variant) is DoraLinearVariant for variant in variants)
        if len(names) != 1 or not is_known or module.lora_bias[names[0]]:
            raise ConfigError(
                f"the packed forward computes one LoRA or DoRA adapter a layer, without a bias of its own; found "
                f"{', '.join(names)}. Merge others first"
            )
        (self._name,) = names
        self._module = module
        self.rank = _rank(module, self._name)
        self.has_magnitude = variants[0] is not None

    @property
    def scaling(self) -> float:
        """s, which PEFT may change at any time."""
        return float(self._module.scaling[self._name])

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
        """Share of the input that is dropped now: 0 outside training."""
        dropout = self._module.lora_dropout[self._name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class Place(NamedTuple):
    """Where an adapter stands in a projection.

    Attributes:
        rows: of the output, its layer's.
        columns: of the room, its own.
        adapter: the adapter.
        layer: index of its layer.
    """

    rows: slice
    columns: slice
    adapter: Adapter
    layer: int


class Adapters:
    """The adapters of layers that read the same input, as one.

    Args:
        modules: the layers, with adapters or without.
        num_rows: out_features of every layer.
        copies: where what is made of them is kept.

    Attributes:
        rank: the adapters' ranks together; 0: no layer has one.
    """

    def __init__(self, modules: Sequence[nn.Module], num_rows: Sequence[int], copies: WorkingCopies) -> None:
        self.places: list[Place] = []
        row = column = 0
        for layer, (module, rows) in enumerate(zip(modules, num_rows, strict=True)):
            if active_adapters(module):
                adapter = Adapter(cast(LoraLayer, module))
                columns = slice(column, column + adapter.rank)
                self.places.append(Place(slice(row, row + rows), columns, adapter, layer))
                column += adapter.rank
            row += rows
        self.rank = column
        self._num_rows = row
        self._copies = copies

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for place in self.places for parameter in place.adapter.parameters]

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(place.adapter.scaling for place in self.places)

    @property
    def dropout(self) -> float:
        """Share of the adapters' inputs that is dropped now."""
        return max((place.adapter.dropout for place in self.places), default=0.0)

    def dropped(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Drops a share of ``x`` and scales up the rest; without dropout ``x`` itself."""
        if not self.dropout:
            return x
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = torch.rand(x.shape, device=x.device, generator=generator) >= self.dropout
        return x * kept / (1 - self.dropout)

    def stacked_a(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns all A below each other, (rank, in_features)."""
        matrices = [place.adapter.a for place in self.places]
        return self._copies.get("a", state_of(matrices, dtype), lambda: stack(matrices, dtype))

    def scaled_b(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns every ``s B`` at the place of its layer's rows and its A's columns, (out_features, rank)."""

        def make() -> torch.Tensor:
            return self.write_scaled_b(self.places[0].adapter.b.new_empty((self._num_rows, self.rank), dtype=dtype))

        return self._copies.get("b", self.state_of_scaled_b(dtype), make)

    def state_of_scaled_b(self, dtype: torch.dtype) -> Hashable:
        """Returns what changes when ``s B`` may have changed."""
        return state_of([place.adapter.b for place in self.places], dtype, self.scalings)

    def write_scaled_b(self, out: torch.Tensor) -> torch.Tensor:
        """Writes ``scaled_b`` to ``out`` and returns it."""
        out.zero_()
        for place in self.places:
            out[place.rows, place.columns] = place.adapter.b.detach() * place.adapter.scaling
        return out


def _rank(module: LoraLayer, name: str) -> int:
    """Returns an adapter's rank: PEFT's own number is that of before a swap; a sharded matrix has no rows to count."""
    a = cast(nn.Parameter, module.lora_A[name].weight)
    return len(a) if a.ndim == 2 else module.r[name]
