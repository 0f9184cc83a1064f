"""Attention over the pieces of a packed row, forward and backward by hand.

A stem and a whole see themselves, causally. A branch sees its stem and itself: two attentions, over the stem's keys and
over its own, whose results are joined by their log-sum-exps. The backward pass of each half needs the joined result and
log-sum-exp and nothing else of the other half, so no stem's keys are ever copied for a branch.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .packed import PackLayout

MOST_RUNS = 4
"""More runs of pieces of one length than this are computed as pieces of any length: each run is calls of its own."""

SHORTEST_DENSE = 1024
"""Positions from which a piece is worth a call of cuDNN's."""

MOST_PLANS = 48
"""cuDNN plans every new shape once, 0.15 s for forward and backward on an H200. After so many shapes of causal pieces
new ones go to the flash kernels, and new numbers of crops are put together from powers of two: planning ends."""

Stats = tuple[torch.Tensor, ...]
"""What a forward pass leaves for its backward pass besides queries, keys, values and result."""


class _Run(NamedTuple):
    """Pieces of one length behind each other in the row."""

    start: int
    pieces: int
    length: int


DENSE_ALIGNMENT = 16
"""Lengths that are multiples of this have few different values, and so few plans."""


def row_alignment(device: torch.device) -> int:
    """Returns what the lengths of wholes should be multiples of: 1 where a device gains nothing by it."""
    return DENSE_ALIGNMENT if _has_fast_cudnn(device) else 1


def _has_fast_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention, which wants pieces of one length, is the fastest.

    On an H200 it is 1.4 (forward) and 1.5 times (backward) as fast as the flash kernels, which take any lengths.
    """
    return _capability(device) >= (9, 0) and torch.backends.cudnn.is_available()


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


_planned_shapes: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
"""(pieces, positions) of the calls that cuDNN has planned in this process, causal or not."""


def _in_powers_of_two(run: _Run) -> list[_Run]:
    """Cuts a run into runs whose numbers of pieces are powers of two, the largest first.

    >>> [part.pieces for part in _in_powers_of_two(_Run(start=0, pieces=85, length=577))]
    [64, 16, 4, 1]
    """
    parts, start = [], run.start
    for power in reversed(range(run.pieces.bit_length())):
        if run.pieces >> power & 1:
            parts.append(_Run(start, 1 << power, run.length))
            start += run.length << power
    return parts


class PackedAttention:
    """Attention of one layout on one device. Queries, keys, values and results are (T, heads, head_dim).

    Args:
        layout: the pieces.
        device: where.
        dtype: of queries, keys and values.
        is_causal: whether a position sees no later one; CLIP's crops see all of themselves.
        shortest_dense: positions from which a piece is worth a call of cuDNN's.
    """

    def __init__(
        self,
        layout: PackLayout,
        device: torch.device,
        dtype: torch.dtype,
        *,
        is_causal: bool = True,
        shortest_dense: int = SHORTEST_DENSE,
    ) -> None:
        self.layout = layout
        self._device = device
        self._is_causal = is_causal
        self._shortest_dense = shortest_dense
        is_16_bit = dtype in (torch.bfloat16, torch.float16)
        self._has_flash = (
            is_16_bit and _capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()
        )
        self._has_dense = self._has_flash and _has_fast_cudnn(device)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Stats]:
        """Returns the result and what ``backward`` needs of it."""
        if not self._has_flash:
            return self._plain(q, k, v), ()
        end = self.layout.num_trunk_tokens
        if self._dense_runs and not self.layout.stems and len(self._dense_runs) == 1:
            return self._dense_forward(self._dense_runs[0], q, k, v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        stats: list[torch.Tensor] = []
        if self._dense_runs:
            for run in self._dense_runs:
                part, kept = self._dense_forward(run, q, k, v)
                out[run.start : run.start + run.pieces * run.length] = part
                stats += kept
        else:
            part, kept = _flash_forward(q[:end], k[:end], v[:end], self._trunk, self._trunk, is_causal=self._is_causal)
            out[:end] = part
            stats += kept
        if self.layout.stems:
            part, kept = self._branches_forward(q, k, v)
            out[end:] = part
            stats += kept
        return out, tuple(stats)

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        stats: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the gradients of queries, keys and values."""
        if not self._has_flash:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
                result = self._plain(*leaves)
            return torch.autograd.grad(result, leaves, grad)  # pyright: ignore[reportReturnType]
        end = self.layout.num_trunk_tokens
        if self._dense_runs and not self.layout.stems and len(self._dense_runs) == 1:
            return self._dense_backward(self._dense_runs[0], grad, q, k, v, out, stats)
        grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
        kept = list(stats)
        if self._dense_runs:
            for run in self._dense_runs:
                own, kept = kept[:_DENSE_STATS], kept[_DENSE_STATS:]
                place = slice(run.start, run.start + run.pieces * run.length)
                parts = self._dense_backward(run, grad, q, k, v, out[place], own)
                for whole, part in zip(grads, parts, strict=True):
                    whole[place] = part
        else:
            own, kept = kept[:_FLASH_STATS], kept[_FLASH_STATS:]
            parts = _flash_backward(
                grad[:end], q[:end], k[:end], v[:end], out[:end], own, self._trunk, self._trunk,
                is_causal=self._is_causal,
            )  # fmt: skip
            for whole, part in zip(grads, parts, strict=True):
                whole[:end] = part
        if self.layout.stems:
            self._branches_backward(grad, q, k, v, out, kept, grads)
        return grads[0], grads[1], grads[2]

    @cached_property
    def _dense_runs(self) -> list[_Run]:
        """The trunk as a few runs of long pieces; empty where it is not."""
        if not self._has_dense:
            return []
        runs: list[_Run] = []
        layout = self.layout
        for start, length in zip(layout.starts, layout.pieces[: layout.num_trunk_pieces], strict=False):
            if runs and runs[-1].length == length:
                runs[-1] = runs[-1]._replace(pieces=runs[-1].pieces + 1)
            else:
                runs.append(_Run(start, 1, length))
        if len(runs) > MOST_RUNS or any(run.length < self._shortest_dense for run in runs):
            return []
        if all(self._is_planned(run) for run in runs):
            return runs
        return [] if self._is_causal else [part for run in runs for part in _in_powers_of_two(run)]

    def _is_planned(self, run: _Run) -> bool:
        """Whether a run's shape has a plan or may have one, and notes that it has."""
        shape = (run.pieces, run.length)
        planned = _planned_shapes[self._is_causal]
        if shape not in planned and len(planned) < MOST_PLANS:
            planned.add(shape)
        return shape in planned

    @cached_property
    def _trunk(self) -> "_Pieces":
        return _Pieces.of(self.layout.pieces[: self.layout.num_trunk_pieces], self._device)

    @cached_property
    def _stem_keys(self) -> "_Pieces":
        return _Pieces.of(self.layout.stems, self._device)

    @cached_property
    def _branches(self) -> "_Pieces":
        return _Pieces.of(self.layout.pieces[self.layout.num_trunk_pieces :], self._device)

    @cached_property
    def _branches_of_stems(self) -> "_Pieces":
        return _Pieces.of([sum(lengths) for lengths in self.layout.branches], self._device)

    def _dense_forward(
        self, run: _Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(_batched(tensor, run) for tensor in (q, k, v)), None, True, 0.0, self._is_causal, False
        )
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        return out.transpose(1, 2).reshape(-1, *q.shape[1:]), (lse, seed, offset)

    def _dense_backward(
        self,
        run: _Run,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        stats: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lse, seed, offset = stats
        own = _Run(0, run.pieces, run.length)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _batched(grad, run), *(_batched(tensor, run) for tensor in (q, k, v)), _batched(out, own), lse,
            seed, offset, None, None, None, run.length, run.length, 0.0, self._is_causal,
        )  # fmt: skip
        return tuple(part.transpose(1, 2).reshape(-1, *q.shape[1:]) for part in grads)  # pyright: ignore[reportReturnType]

    def _branches_forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Stats]:
        """Joins what the branches see of themselves and of their stems.

        With results o1, o2 and log-sum-exps l1, l2 of the two halves: l = log(exp l1 + exp l2) and
        o = exp(l1 - l) o1 + exp(l2 - l) o2.
        """
        end, stem_end = self.layout.num_trunk_tokens, self.layout.num_stem_tokens
        own, (own_lse, *own_random) = _flash_forward(
            q[end:], k[end:], v[end:], self._branches, self._branches, is_causal=True
        )
        stem, (stem_lse, *stem_random) = _flash_forward(
            q[end:], k[:stem_end], v[:stem_end], self._branches_of_stems, self._stem_keys, is_causal=False
        )
        lse = torch.logaddexp(own_lse, stem_lse)
        weights = [(part - lse).exp().t()[..., None] for part in (own_lse, stem_lse)]
        joined = (own * weights[0] + stem * weights[1]).to(q.dtype)
        return joined, (lse, *own_random, *stem_random)

    def _branches_backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        stats: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
    ) -> None:
        """Writes the branches' gradients, and adds to those of the stems' keys and values.

        A half's backward pass forms its probabilities as exp(score - l) and subtracts the row sum of grad * o: given
        the joined o and l, both are the joined attention's own.
        """
        end, stem_end = self.layout.num_trunk_tokens, self.layout.num_stem_tokens
        lse, own_seed, own_offset, stem_seed, stem_offset = stats
        own = _flash_backward(
            grad[end:], q[end:], k[end:], v[end:], out[end:], (lse, own_seed, own_offset),
            self._branches, self._branches, is_causal=True,
        )  # fmt: skip
        stem = _flash_backward(
            grad[end:], q[end:], k[:stem_end], v[:stem_end], out[end:], (lse, stem_seed, stem_offset),
            self._branches_of_stems, self._stem_keys, is_causal=False,
        )  # fmt: skip
        torch.add(own[0], stem[0], out=grads[0][end:])
        for whole, own_part, stem_part in zip(grads[1:], own[1:], stem[1:], strict=True):
            whole[end:] = own_part
            whole[:stem_end] += stem_part

    def _plain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same in plain PyTorch: every piece a row of a padded batch, its stem's keys before its own."""
        return torch.cat([_padded_attention(q, k, v, pieces) for pieces in self._gathered])

    @cached_property
    def _gathered(self) -> list["_Gathered"]:
        layout = self.layout
        spans = [(start, start + length) for start, length in zip(layout.starts, layout.pieces, strict=False)]
        trunk, branches = spans[: layout.num_trunk_pieces], spans[layout.num_trunk_pieces :]
        stem_of = [stem for stem, lengths in enumerate(layout.branches) for _ in lengths]
        groups = [(trunk, [(0, 0)] * len(trunk)), (branches, [spans[stem] for stem in stem_of])]
        return [_Gathered.of(own, before, self._device, self._is_causal) for own, before in groups if own]


class _Pieces(NamedTuple):
    """Lengths of pieces as the flash kernels take them.

    Attributes:
        ends: (n + 1,) int32 on the device, from 0.
        longest: positions of the longest.
    """

    ends: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "_Pieces":
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(ends.to(device, non_blocking=True), max(lengths))


_FLASH_STATS = _DENSE_STATS = 3
"""Tensors that one call leaves for its backward pass: log-sum-exp and two of the random state (there is no dropout)."""


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: _Pieces, keys: _Pieces, *, is_causal: bool
) -> tuple[torch.Tensor, Stats]:
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, queries.ends, keys.ends, queries.longest, keys.longest, 0.0, is_causal, False
    )
    return out, (lse, seed, offset)


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: Sequence[torch.Tensor],
    queries: _Pieces,
    keys: _Pieces,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lse, seed, offset = stats
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, queries.ends, keys.ends, queries.longest, keys.longest, 0.0, is_causal, seed, offset
    )


def _batched(tensor: torch.Tensor, run: _Run) -> torch.Tensor:
    """(T, heads, head_dim) -> (pieces, heads, positions, head_dim) of a run, without a copy."""
    own = tensor[run.start : run.start + run.pieces * run.length]
    return own.unflatten(0, (run.pieces, run.length)).transpose(1, 2)


class _Gathered(NamedTuple):
    """Pieces as rows of a padded batch.

    Attributes:
        queries: (n, Lq) int64, the row's position of every query; padding names position 0.
        keys: (n, Lk) int64 likewise: the stem's, then the piece's own.
        is_seen: (n, 1, Lq, Lk) bool.
        kept: indices, in the flattened (n, Lq), of what is no padding, in the row's order.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    is_seen: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(
        cls,
        own: Sequence[tuple[int, int]],
        before: Sequence[tuple[int, int]],
        device: torch.device,
        is_causal: bool,
    ) -> "_Gathered":
        queries = [torch.arange(*span) for span in own]
        keys = [torch.cat([torch.arange(*first), torch.arange(*span)]) for first, span in zip(before, own, strict=True)]
        padded_queries, padded_keys = (torch.nn.utils.rnn.pad_sequence(rows, True) for rows in (queries, keys))
        key_numbers = torch.arange(padded_keys.shape[1])
        if is_causal:
            offsets = torch.tensor([last - first for first, last in before])[:, None, None]
            is_seen = key_numbers <= torch.arange(padded_queries.shape[1])[:, None] + offsets
        else:
            is_seen = (key_numbers < torch.tensor([len(row) for row in keys])[:, None])[:, None]
        longest = padded_queries.shape[1]
        kept = torch.cat([torch.arange(len(row)) + number * longest for number, row in enumerate(queries)])
        return cls(*(part.to(device) for part in (padded_queries, padded_keys, is_seen[:, None], kept)))


def _padded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: _Gathered) -> torch.Tensor:
    queries = q[pieces.queries].transpose(1, 2)
    keys, values = (tensor[pieces.keys].transpose(1, 2) for tensor in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=pieces.is_seen)
    return out.transpose(1, 2).flatten(0, 1)[pieces.kept]
