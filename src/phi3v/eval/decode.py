"""Decoding many rows at once: keys and values at fixed places, common beginnings read once for all their rows.

A *stem* is a beginning in the cache, a *row* is an answer that grows behind one. A row's own keys and values are those
of its prompt behind the stem and of what it has generated; they lie in its *branch*. A prompt that shares nothing is a
stem with one row and an empty branch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..model.modeling_phi3_v import Phi3VForCausalLM
from ..model.packed_forward import product_dtype, run_decoder, stream_dtype

logger = logging.getLogger(__name__)

ROW_MULTIPLE, STEM_MULTIPLE, BRANCH_MULTIPLE = 8, 128, 16
"""On a GPU rows, and the positions of stems and branches, are filled up to multiples of these, so that few different
shapes come up: each needs a graph."""

FEWEST_STEPS_OF_A_GRAPH = 4
"""Steps that must lie ahead for a graph to be captured: one costs about as much as three steps without."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a batch that is decoded; padding included.

    Attributes:
        num_stems: stems.
        stem_length: positions of each.
        num_rows: rows.
        branch_length: positions of each row's branch.
        rows_per_stem: rows of a stem at most.
    """

    num_stems: int
    stem_length: int
    num_rows: int
    branch_length: int
    rows_per_stem: int

    @property
    def num_positions(self) -> int:
        """Positions that the cache holds."""
        return self.num_stems * self.stem_length + self.num_rows * self.branch_length


@dataclass(frozen=True, slots=True)
class Row:
    """An answer that grows.

    Attributes:
        stem: number of its stem.
        length: positions of its prompt, stem included.
        branch: positions of its prompt behind the stem.
        is_long: whether LongRoPE's long factors apply.
    """

    stem: int
    length: int
    branch: int
    is_long: bool


def shape_of(stem_lengths: Sequence[int], rows: Sequence[Row], most_tokens: int, *, is_rounded: bool) -> Shape:
    """Returns the sizes of a batch.

    Args:
        stem_lengths: positions of every stem.
        rows: at least one.
        most_tokens: longest answer, tokens.
        is_rounded: fill up, so that few different shapes come up.
    """

    def filled_up(number: int, multiple: int) -> int:
        return -(-number // multiple) * multiple if is_rounded else number

    per_stem = [0] * len(stem_lengths)
    for row in rows:
        per_stem[row.stem] += 1
    return Shape(
        # To three leading bits: what is filled up here is read in every step.
        num_stems=filled_up(len(stem_lengths), 1 << max(0, len(stem_lengths).bit_length() - 3)),
        stem_length=filled_up(max(stem_lengths), STEM_MULTIPLE),
        num_rows=filled_up(len(rows), ROW_MULTIPLE),
        branch_length=filled_up(max(row.branch for row in rows) + most_tokens, BRANCH_MULTIPLE),
        rows_per_stem=1 << (max(per_stem) - 1).bit_length() if is_rounded else max(per_stem),
    )


class KeyValueStore:
    """Keys and values of a batch.

    Its memory is taken once and laid out anew for every batch, so that what lies where depends on the batch's shape
    alone. Heads stand outside positions: a product over one head's positions then reads consecutive memory.

    Args:
        num_layers: layers of the decoder.
        num_heads: heads.
        head_dim: width of a head.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_heads = num_heads
        self._head_dim = head_dim
        self._dtype = dtype
        self._device = device
        self._layers = [torch.empty(2, 0, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return sum(layer.nbytes for layer in self._layers)

    def lay_out(self, shape: Shape) -> bool:
        """Makes room for a batch, all zeros; returns whether the memory is where it was.

        Zeros, because what a row does not see still counts zero times in a product, which only a number survives.
        """
        needed = shape.num_positions * self._num_heads * self._head_dim
        is_in_place = needed <= self._layers[0].shape[1]
        for number in range(len(self._layers)):
            if is_in_place:
                self._layers[number][:, :needed].zero_()
            else:
                self._layers[number] = torch.empty(2, 0, dtype=self._dtype, device=self._device)
        if not is_in_place:
            self._layers = [torch.zeros(2, needed, dtype=self._dtype, device=self._device) for _ in self._layers]
        return is_in_place

    def release(self) -> None:
        """Gives the memory back."""
        self._layers = [torch.empty(2, 0, dtype=self._dtype, device=self._device) for _ in self._layers]

    def stems(self, layer: int, shape: Shape) -> torch.Tensor:
        """Returns keys and values of a layer's stems: (2, stems, heads, positions, head_dim)."""
        size = (2, shape.num_stems, self._num_heads, shape.stem_length, self._head_dim)
        end = shape.num_stems * shape.stem_length * self._num_heads * self._head_dim
        return self._layers[layer][:, :end].view(size)

    def branches(self, layer: int, shape: Shape) -> torch.Tensor:
        """Returns keys and values of a layer's branches: (2, rows, heads, positions, head_dim)."""
        size = (2, shape.num_rows, self._num_heads, shape.branch_length, self._head_dim)
        width = self._num_heads * self._head_dim
        begin = shape.num_stems * shape.stem_length * width
        return self._layers[layer][:, begin : begin + shape.num_rows * shape.branch_length * width].view(size)

    def keep(self, old: Shape, new: Shape, stems: Sequence[int], rows: Sequence[int]) -> None:
        """Lays out anew what goes on: the stems and rows of these numbers become the first ones of a smaller shape."""
        stem_numbers, row_numbers = (torch.tensor(numbers, device=self._device) for numbers in (stems, rows))
        for layer in range(len(self._layers)):
            kept = (self.stems(layer, old)[:, stem_numbers], self.branches(layer, old)[:, row_numbers])  # copies
            for target, source in zip((self.stems(layer, new), self.branches(layer, new)), kept, strict=True):
                length = min(target.shape[3], source.shape[3])
                target[:, : source.shape[1], :, :length].copy_(source[:, :, :, :length])


class Step:
    """One token more for every row, computed by the same operations on the same memory every time.

    Args:
        model: in evaluation mode.
        store: holds the prompts' keys and values.
        shape: of the batch.
        max_new_tokens: longest answer, tokens.
    """

    def __init__(self, model: Phi3VForCausalLM, store: KeyValueStore, shape: Shape, max_new_tokens: int) -> None:
        self.shape = shape
        self.graph: torch.cuda.CUDAGraph | None = None
        self._model = model
        self._store = store
        device = model.model.embed_tokens.weight.device
        integers = {"dtype": torch.int64, "device": device}
        num_slots = shape.num_stems * shape.rows_per_stem
        self._tokens = torch.zeros(shape.num_rows, **integers)
        self._positions = torch.zeros(shape.num_rows, **integers)
        self._filled = torch.zeros(shape.num_rows, **integers)
        self._is_long = torch.zeros(shape.num_rows, dtype=torch.bool, device=device)
        self._count = torch.zeros(1, **integers)
        self._generated = torch.zeros(shape.num_rows, max_new_tokens, **integers)
        # A slot is a place for a row beside its stem: rows of a stem stand side by side there, each product with the
        # stem's keys serves all of them.
        self._row_of_slot = torch.zeros(num_slots, **integers)
        self._slot_of_row = torch.zeros(shape.num_rows, **integers)
        self._stem_lengths = torch.zeros(shape.num_stems, **integers)
        self._row_numbers = torch.arange(shape.num_rows, device=device)
        self._stem_places = torch.arange(shape.stem_length, device=device)
        self._branch_places = torch.arange(shape.branch_length, device=device)

    def start(self, stem_lengths: Sequence[int], rows: Sequence[Row], generated: torch.Tensor) -> None:
        """Takes rows in.

        Args:
            stem_lengths: positions of every stem.
            rows: in the order of the store's branches.
            generated: (rows, n) int64, what they have generated so far, at least one token each; the last one has no
                keys and values yet.
        """
        shape = self.shape
        row_of_slot = [0] * len(self._row_of_slot)
        slot_of_row = [0] * shape.num_rows
        taken = [0] * len(stem_lengths)
        for number, row in enumerate(rows):
            slot = row.stem * shape.rows_per_stem + taken[row.stem]
            taken[row.stem] += 1
            row_of_slot[slot], slot_of_row[number] = number, slot
        fill = [0] * (shape.num_rows - len(rows))
        already = generated.shape[1] - 1
        for target, values in (
            (self._row_of_slot, row_of_slot),
            (self._slot_of_row, slot_of_row),
            (self._stem_lengths, [*stem_lengths, *[0] * (shape.num_stems - len(stem_lengths))]),
            (self._positions, [row.length + already for row in rows] + fill),
            (self._filled, [row.branch + already for row in rows] + fill),
            (self._is_long, [row.is_long for row in rows] + fill),
            (self._count, [already + 1]),
        ):
            target.copy_(torch.tensor(values))
        self._generated[: len(rows), : already + 1] = generated
        self._tokens.zero_()
        self._tokens[: len(rows)] = generated[:, -1]

    def generated(self, num_rows: int, num_tokens: int) -> torch.Tensor:
        """Returns what the rows have generated: (num_rows, num_tokens) int64."""
        return self._generated[:num_rows, :num_tokens]

    def run(self) -> None:
        """Generates one token."""
        model = self._model.model
        embedded = model.embed_tokens(self._tokens).to(stream_dtype(product_dtype(model)))
        hidden = run_decoder(model, embedded, self._positions, self._is_long, self._attention())
        self._tokens.copy_(logits_of(self._model, hidden).argmax(dim=-1))
        self._generated.index_copy_(1, self._count, self._tokens[:, None])
        for number in (self._positions, self._filled, self._count):
            number.add_(1)

    def _attention(self) -> Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns what ``run_decoder`` calls in every layer."""
        shape = self.shape
        is_padding = self._stem_places >= self._stem_lengths[:, None]
        is_ahead = (self._branch_places > self._filled[:, None])[self._row_of_slot]
        slots = (shape.num_stems, shape.rows_per_stem)
        # (stems, 1, rows per stem, stem and branch positions)
        is_unseen = torch.cat(
            [is_padding[:, None].expand(*slots, -1), is_ahead.view(*slots, shape.branch_length)], dim=2
        )[:, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            branches = self._store.branches(layer, shape)
            for kept, new in zip(branches, (k, v), strict=True):
                kept[self._row_numbers, :, self._filled] = new
            return self._attend(q, self._store.stems(layer, shape), branches, is_unseen)

        return attend

    def _attend(
        self, q: torch.Tensor, stems: torch.Tensor, branches: torch.Tensor, is_unseen: torch.Tensor
    ) -> torch.Tensor:
        """One softmax over a row's stem and branch: q (rows, heads, head_dim) -> (rows, heads, head_dim)."""
        shape, (heads, width) = self.shape, q.shape[1:]
        num_stems, per_stem, num_rows = shape.num_stems, shape.rows_per_stem, shape.num_rows

        def by_stem(slots: torch.Tensor) -> torch.Tensor:
            """(slots, heads, n) -> (stems, heads, rows per stem, n)."""
            return slots.view(num_stems, per_stem, heads, -1).transpose(1, 2)

        def by_row(stacked: torch.Tensor) -> torch.Tensor:
            """(stems, heads, rows per stem, n) -> (rows, heads, n)."""
            return stacked.transpose(1, 2).reshape(num_stems * per_stem, heads, -1)[self._slot_of_row]

        (stem_keys, stem_values), (branch_keys, branch_values) = (part.flatten(1, 2) for part in (stems, branches))
        beside_stems = by_stem(q[self._row_of_slot]).reshape(num_stems * heads, per_stem, width)
        on_stems = _product(beside_stems, stem_keys.mT).view(num_stems, heads, per_stem, -1)
        on_branches = _product(q.reshape(num_rows * heads, 1, width), branch_keys.mT).view(num_rows, heads, -1)
        scores = torch.cat([on_stems, by_stem(on_branches[self._row_of_slot])], dim=-1).mul_(width**-0.5)
        shares = scores.masked_fill_(is_unseen, float("-inf")).softmax(dim=-1).to(stems.dtype)
        of_stems, of_branches = shares.split([shape.stem_length, shape.branch_length], dim=-1)
        from_stems = _product(of_stems.reshape(num_stems * heads, per_stem, -1), stem_values)
        from_branches = _product(by_row(of_branches).reshape(num_rows * heads, 1, -1), branch_values)
        seen = by_row(from_stems.view(num_stems, heads, per_stem, width)) + from_branches.view(num_rows, heads, width)
        return seen.to(stems.dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched matrix product, summed and returned in float32: (B, n, k) x (B, k, m) -> (B, n, m)."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def logits_of(model: Phi3VForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the next token's logits: (n, hidden_size) -> (n, vocab_size) float32."""
    return model.lm_head(hidden.to(product_dtype(model.model))).float()


def unrounded_logits_of(model: Phi3VForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Does ``logits_of`` without rounding logits to 16 bit: a bfloat16 near 20 may be 0.06 off, and two of them equal.

    Args:
        model: in evaluation mode.
        hidden: (n, hidden_size) behind the final norm.
    """
    dtype, head = product_dtype(model.model), model.lm_head
    if dtype == torch.float32:
        return logits_of(model, hidden)
    rounded = hidden.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if type(head) is nn.Linear and head.bias is None:
            return _product(rounded[None], head.weight.to(dtype).t()[None])[0]
        weights = {name: parameter.float() for name, parameter in head.named_parameters()}
        return functional_call(head, weights, rounded.float())


class Stepper:
    """Runs steps, from graphs where that pays.

    A step is some thousand small operations whose start costs the host more than their work costs the device; a CUDA
    graph starts them all at once. A graph belongs to a shape, and to the place of the store's memory.
    """

    def __init__(self, model: Phi3VForCausalLM, store: KeyValueStore, max_new_tokens: int) -> None:
        self._model = model
        self._store = store
        self._max_new_tokens = max_new_tokens
        self._steps: dict[Shape, Step] = {}
        self._pool: Any = None
        self._may_capture = model.model.embed_tokens.weight.device.type == "cuda"

    def forget(self) -> None:
        """Drops all graphs: the store's memory has moved."""
        self._steps.clear()
        self._pool = None

    def step_of(self, shape: Shape) -> Step:
        """Returns the step of a shape, with its graph if there is one already."""
        if shape not in self._steps:
            self._steps[shape] = Step(self._model, self._store, shape, self._max_new_tokens)
        return self._steps[shape]

    def run(self, step: Step, num_steps: int, num_ahead: int) -> None:
        """Runs some of the ``num_ahead`` steps that a batch may still need."""
        for done in range(num_steps):
            if step.graph is not None:
                step.graph.replay()
                continue
            # The first run outside of a graph also sets up what libraries and compilers set up once.
            step.run()
            if self._may_capture and num_ahead - done > FEWEST_STEPS_OF_A_GRAPH:
                self._capture(step)

    def _capture(self, step: Step) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads load images into page-locked memory meanwhile, which is none of this graph's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step.run()
        except RuntimeError as error:
            logger.warning("Decoding goes on without CUDA graphs, which this model's layers do not allow: %s", error)
            self._may_capture = False
            self.forget()
            return
        step.graph = graph
