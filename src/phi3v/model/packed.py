"""Several sequences in one row of the decoder, without padding; sequences with a common beginning share it.

Words: a *stem* is the beginning that several sequences have in common, its images included; a *branch* is what one of
them goes on with; a *whole* is a sequence that shares nothing. All three are *pieces* of the row. A branch sees its
stem and itself, a stem and a whole see themselves, and positions go on from the stem's end in every branch: each
sequence computes what it would compute alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import torch


@dataclass(frozen=True)
class PackLayout:
    """Where the pieces of a row lie: all stems, then all wholes, then all branches, stem by stem.

    Plain numbers on the host, so that no step of the model has to wait for the device to learn them.

    Attributes:
        stems: length of every stem, positions.
        wholes: length of every whole sequence.
        branches: for every stem, the lengths of its branches; at least one each.

    >>> layout = PackLayout(stems=(5,), wholes=(4, 2), branches=((3, 1),))
    >>> layout.num_tokens, layout.num_trunk_tokens, layout.pieces
    (15, 11, (5, 4, 2, 3, 1))
    """

    stems: tuple[int, ...] = ()
    wholes: tuple[int, ...] = ()
    branches: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.branches) != len(self.stems) or not all(self.branches):
            raise ValueError(f"{len(self.stems)} stems need as many groups of branches, none of them empty")
        if not all(length > 0 for length in self.pieces):
            raise ValueError("a piece has at least one position")

    @cached_property
    def pieces(self) -> tuple[int, ...]:
        """Lengths of all pieces in the row's order."""
        return (*self.stems, *self.wholes, *chain.from_iterable(self.branches))

    @cached_property
    def num_tokens(self) -> int:
        """Positions of the row."""
        return sum(self.pieces)

    @cached_property
    def num_stem_tokens(self) -> int:
        """Positions of the stems, at the row's start."""
        return sum(self.stems)

    @cached_property
    def num_trunk_tokens(self) -> int:
        """Positions of stems and wholes: those that see nothing outside their own piece."""
        return self.num_stem_tokens + sum(self.wholes)

    @cached_property
    def num_trunk_pieces(self) -> int:
        """Stems and wholes."""
        return len(self.stems) + len(self.wholes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each piece starts in the row, and at the end the row's length."""
        return (0, *accumulate(self.pieces))

    @cached_property
    def num_sequences(self) -> int:
        """Sequences that the row holds: wholes and branches."""
        return len(self.pieces) - len(self.stems)


MOST_ALIGNING_SHARE = 0.02
"""Share of the wholes' positions that aligning them may add; uneven ones are left as they are."""


def aligned_lengths(lengths: Sequence[int], alignment: int) -> list[int]:
    """Returns what wholes are filled up to behind their last position, where nothing of theirs sees the filling.

    Args:
        lengths: of the wholes of a row.
        alignment: wholes of nearly one length get one that is a multiple of this; 1: none is filled.

    >>> aligned_lengths([2530, 2541, 2544], 16), aligned_lengths([700, 2544], 16)
    ([2544, 2544, 2544], [700, 2544])
    """
    if alignment == 1 or not lengths:
        return list(lengths)
    longest = -(-max(lengths) // alignment) * alignment
    filling = longest * len(lengths) - sum(lengths)
    return [longest] * len(lengths) if filling <= MOST_ALIGNING_SHARE * sum(lengths) else list(lengths)


@dataclass
class PackedBatch:
    """One micro-batch, packed: what the packed forward takes. T = ``layout.num_tokens``, without any padding.

    Attributes:
        layout: where the pieces lie.
        input_ids: (T,) int64.
        position_ids: (T,) int64; from 0 in a stem and a whole, from the stem's length in a branch.
        is_long: (T,) bool, whether the position's sequences are longer than the short LongRoPE factors reach. A stem's
            branches agree in this.
        target_positions: (K,) int64, ascending; positions whose next token is supervised.
        target_ids: (K,) int64, those next tokens.
        target_weights: (K,) float32, their weights in the loss.
        image_positions: (I,) int64, ascending; positions that show a row of an image.
        image_rows: (I,) int64, which row stands there: first those that ``crops`` give, then those of ``features``.
        crops: (S, 3, crop_px, crop_px) float32: the crops of every different image, global view first; None without
            images.
        grids: (rows, columns) of every different image's tiles, in the order of ``crops``.
        features: (R, hidden_size) rows of images whose rows were at hand; None without such images.
        image_keys: names of the images in ``crops``, in their order: equal names are equal pixels and settings.
        num_samples: samples with something to learn.
        num_positions: decoder positions that the samples have separately, stems counted once for every branch.
    """

    layout: PackLayout
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    is_long: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_weights: torch.Tensor
    image_positions: torch.Tensor
    image_rows: torch.Tensor
    crops: torch.Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()
    features: torch.Tensor | None = None
    image_keys: tuple[str, ...] = ()
    num_samples: int = 0
    num_positions: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Returns the batch with its tensors on ``device``."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Returns the batch in page-locked memory; a DataLoader calls it."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Any) -> "PackedBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PackedBatch(
            **{name: change(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        )
