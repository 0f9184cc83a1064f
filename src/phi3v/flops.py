"""Counts the floating-point operations of a training step exactly, from the model's sizes: matrix products only.

A product of (m, k) by (k, n) is 2 m k n operations. Causal attention is counted as the half that it needs, a branch on
its stem as what it sees. What is computed twice to save memory is no part of the count: see ``FlopCount.recomputed``.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import add, sub
from typing import NamedTuple

from phi3v.geometry import ModelDims
from phi3v.memory import Checkpointing


class Passes(NamedTuple):
    """Operations of some layers.

    Attributes:
        forward: of the forward pass.
        data_gradient: of the gradients of their inputs.
        weight_gradient: of the gradients of their weights, or of their adapters'.
    """

    forward: int = 0
    data_gradient: int = 0
    weight_gradient: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return sum(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a row of the decoder holds, or several rows together; lengths as in ``PackLayout``.

    Attributes:
        stems: length of every common beginning, positions.
        wholes: length of every sequence that shares nothing.
        branches: for every stem, the lengths of its branches.
        crops: crops that CLIP computes.
        image_rows: rows that the projector computes.
        targets: supervised positions.
    """

    stems: Sequence[int] = ()
    wholes: Sequence[int] = ()
    branches: Sequence[Sequence[int]] = ()
    crops: int = 0
    image_rows: int = 0
    targets: int = 0

    @property
    def positions(self) -> int:
        """Positions that the decoder computes."""
        return sum(self.stems) + sum(self.wholes) + sum(map(sum, self.branches))

    @property
    def seen_twice(self) -> int:
        """Twice the number of (query, key) pairs, causal attention counted half.

        >>> Work(stems=[10], branches=[[2, 3]]).seen_twice  # 10 x 10 / 2, then 2 x 10 + 2 x 2 / 2, 3 x 10 + 3 x 3 / 2
        213
        """
        alone = sum(length * length for length in (*self.stems, *self.wholes))
        on_stems = sum(
            2 * branch * stem + branch * branch
            for stem, group in zip(self.stems, self.branches, strict=True)
            for branch in group
        )
        return alone + on_stems


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCount:
    """Operations of forward and backward pass.

    Attributes:
        clip: CLIP's patch embedding and linear layers; the last layer, which nothing uses, is not in it.
        clip_attention: CLIP's products of queries, keys and values.
        projector: its two linear layers.
        decoder: the decoder's linear layers.
        decoder_attention: its products of queries, keys and values.
        head: ``lm_head`` at the supervised positions.
        layers_again: what it costs to compute both towers' layers a second time, where the backward pass goes through.
        spared: the part of the total that the packed forward leaves out without a change of the result: ``o_proj`` and
            MLP of the last decoder layer at positions that are not supervised.
    """

    clip: Passes
    clip_attention: Passes
    projector: Passes
    decoder: Passes
    decoder_attention: Passes
    head: Passes
    layers_again: int
    spared: int

    @property
    def total(self) -> int:
        """Everything in the model's layers, nothing computed twice."""
        return sum(passes.total for passes in self._passes().values())

    @property
    def needed(self) -> int:
        """What the result needs: what speed is measured by."""
        return self.total - self.spared

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(
            **{name: Passes(*map(add, passes, getattr(other, name))) for name, passes in self._passes().items()},
            layers_again=self.layers_again + other.layers_again,
            spared=self.spared + other.spared,
        )

    def recomputed(self, checkpointing: Checkpointing) -> int:
        """Returns what checkpointing adds; ``selective`` recomputes norms and activations, no product."""
        return self.layers_again if checkpointing == "full" else 0

    def to_dict(self) -> dict[str, object]:
        """Returns all numbers by name, for a JSON file."""
        return {
            **{name: passes._asdict() for name, passes in self._passes().items()},
            "total": self.total,
            "needed": self.needed,
            "recomputed": {mode: self.recomputed(mode) for mode in ("off", "selective", "full")},
        }

    def _passes(self) -> dict[str, Passes]:
        return {name: getattr(self, name) for name in _COUNTED}


def count_flops(
    dims: ModelDims, work: Work, trained_parts: Collection[str], *, lora_rank: int | None = None
) -> FlopCount:
    """Counts the operations of ``work``, forward and backward.

    Gradients are counted where autograd computes them: a layer's input has one if anything before it learns.

    Args:
        dims: the model's sizes.
        work: what is computed.
        trained_parts: the parts that learn, as ``TrainConfig.trained_parts`` names them.
        lora_rank: rank of the adapters on the linear layers of those parts, which then learn alone; None: the parts'
            own weights learn. DoRA's magnitudes scale what is there, and are no product that the result needs.
    """
    walk = _Walk(frozenset(trained_parts), lora_rank)
    positions = work.crops * dims.clip_positions
    walk.linear("clip", "vision", work.crops * dims.patches, 3 * dims.patch_px**2, (dims.clip_width,), is_adapted=False)
    walk.begin("vision", bool(work.crops))
    before_clip = walk.forward("clip")
    for _ in range(dims.clip_layers_computed):
        width = dims.clip_width
        walk.linear("clip", "vision", positions, width, (width, width, width))
        walk.attention("clip_attention", 2 * work.crops * dims.clip_positions**2, width)
        walk.linear("clip", "vision", positions, width, (width,))
        walk.linear("clip", "vision", positions, width, (dims.clip_mlp,))
        walk.linear("clip", "vision", positions, dims.clip_mlp, (width,))
    layers_again = (walk.forward("clip", "clip_attention") - before_clip) * walk.is_needed
    walk.begin("projector", bool(work.image_rows))
    walk.linear("projector", "projector", work.image_rows, dims.merged_width, (dims.hidden,))
    walk.linear("projector", "projector", work.image_rows, dims.hidden, (dims.hidden,))
    walk.begin("embeddings", True)
    walk.begin("decoder", True)
    attention_width = dims.heads * dims.head_dim
    behind_attention = Passes()
    for _ in range(dims.layers):
        walk.linear("decoder", "decoder", work.positions, dims.hidden, (dims.qkv,))
        walk.attention("decoder_attention", work.seen_twice, attention_width)
        before = walk.counted["decoder"].copy()
        walk.linear("decoder", "decoder", work.positions, attention_width, (dims.hidden,))
        walk.linear("decoder", "decoder", work.positions, dims.hidden, (2 * dims.mlp,))
        walk.linear("decoder", "decoder", work.positions, dims.mlp, (dims.hidden,))
        behind_attention = Passes(*map(sub, walk.counted["decoder"], before))
    unasked = work.positions - work.targets
    spared = Passes(*(number // max(1, work.positions) * unasked for number in behind_attention))
    layers_again += (walk.forward("decoder", "decoder_attention") - spared.forward) * walk.is_needed
    walk.linear("head", "head", work.targets, dims.hidden, (dims.vocab,))
    counted = {name: Passes(*numbers) for name, numbers in walk.counted.items()}
    return FlopCount(**counted, layers_again=layers_again, spared=spared.total)


_COUNTED = ("clip", "clip_attention", "projector", "decoder", "decoder_attention", "head")


@dataclass
class _Walk:
    """Goes through the layers in the order of the forward pass and adds up what each costs.

    Attributes:
        trained: the parts that learn.
        rank: of the adapters; None: the weights themselves learn.
        is_needed: whether the gradient of what the next layer reads is needed, because something before it learns.
        counted: forward, data gradient and weight gradient by name.
    """

    trained: frozenset[str]
    rank: int | None
    is_needed: bool = False
    counted: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0, 0] for name in _COUNTED})

    def forward(self, *names: str) -> int:
        """Returns the forward pass so far."""
        return sum(self.counted[name][0] for name in names)

    def begin(self, part: str, is_computed: bool) -> None:
        """Enters a part: where its weights learn, the norms, separators or embeddings in front of its layers do too."""
        if is_computed and self.rank is None and part in self.trained:
            self.is_needed = True

    def linear(
        self, name: str, part: str, rows: int, inputs: int, outputs: Sequence[int], *, is_adapted: bool = True
    ) -> None:
        """Adds layers that read the same (rows, inputs), one for each of ``outputs``."""
        learns = part in self.trained and rows > 0
        has_adapter = learns and self.rank is not None and is_adapted
        passes = self.counted[name]
        for width in outputs:
            product = 2 * rows * inputs * width
            passes[0] += product
            passes[1] += product * self.is_needed
            passes[2] += product * (learns and self.rank is None)
            if has_adapter:
                assert self.rank is not None
                down, up = 2 * rows * inputs * self.rank, 2 * rows * self.rank * width
                passes[0] += down + up
                passes[1] += down * self.is_needed + up
                passes[2] += down + up
        self.is_needed |= has_adapter or (learns and self.rank is None)

    def attention(self, name: str, seen_twice: int, width: int) -> None:
        """Adds two products: scores, and the mean of the values; two of the same size each in the backward pass."""
        product = seen_twice * width
        passes = self.counted[name]
        passes[0] += 2 * product
        passes[1] += 4 * product * self.is_needed
