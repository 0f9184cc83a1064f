"""What a training step holds in a device's memory: plain arithmetic over a model's sizes.

Two kinds of bytes. *State* is there all the time: weights, gradients, optimizer, and the 16-bit copies of
float32 weights. *Activations* grow with the positions and crops that are computed at once, and depend on how
much of them is kept for the backward pass (:data:`CHECKPOINTING`). Bytes are one device's; GB are 10**9 bytes.

H, I, V: the decoder's width, MLP width and vocabulary. W, M: CLIP's width and MLP width. b: bytes of a number that the
computation works in (2 in bf16 and fp16, 4 in fp32).
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from phi3v.geometry import ModelDims

Checkpointing = Literal["off", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)
"""What the backward pass computes again, from nothing to most. off: nothing. selective: what is cheap, norms and
activations. full: every layer of both towers."""

FLOAT32_BYTES = 4

OPTIMIZER_BYTES = 8
"""AdamW's two float32 averages of a trained number."""

ZERO_BUCKET_NUMBERS = 200_000_000
"""Numbers that ZeRO sends at once, in each of two buckets."""

FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A number in nf4: half a byte, an 8-bit scale for 64 of them, and a float32 scale for 256 of those scales.

Source: QLoRA, Dettmers et al. 2023, section 3.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """How many numbers of each width a step keeps; the one place to calibrate the activation model.

    The defaults count what the packed forward's layers keep for their backward pass.

    Attributes:
        stream: of width H or W, per position and layer, in the residual stream's format: the stream twice.
        attention: of width q + k + v + attention output, per position and layer.
        attention_sums: float32 numbers a head, per position and layer: the softmax's normaliser.
        decoder_mlp: of width I, per position and layer: gate and up.
        normed: of width H or W, per position and layer where nothing is computed again: both normalised streams.
        activated: of width I or M, likewise: the MLP's activations.
        decoder_ends: of width H, per position, once: embeddings, the last stream, its norm.
        clip_mlp: of width M, per CLIP position and layer: before the activation.
        clip_forward: of width W, per CLIP position, while one layer is computed without a gradient.
        checkpoint_stream: of width H or W, per position and layer that is computed again, in the stream's format.
        checkpoint_added: likewise, of what the layer before adds to the stream, in b.
        backward_hidden: of width H or W, per position of the layer whose backward pass runs: gradients.
        backward_mlp: of width I, likewise in the decoder: gradients of gate, up and product.
        backward_clip_mlp: of width M, likewise in CLIP.
        logit_bytes: a vocabulary entry of a supervised position: logits in 16 bit and float32, their softmax, and the
            gradients of both.
        dora_logit_bytes: with DoRA's adapter on the head, a vocabulary entry of a supervised position more: PEFT's
            terms of its result in float32.
        dora_head_bytes: likewise, a number of the head: it and the adapter's product in float32, and their sum.
        fragmentation: share of the activations that the allocator cannot use.
        workspace_bytes: what libraries and compiled kernels take for themselves, and one layer's weight gradients.

    Source: counted by hand.
    """

    stream: float = 2
    attention: float = 1
    attention_sums: float = 1
    decoder_mlp: float = 2
    normed: float = 2
    activated: float = 1
    decoder_ends: float = 3
    clip_mlp: float = 1
    clip_forward: float = 16
    checkpoint_stream: float = 1
    checkpoint_added: float = 1
    backward_hidden: float = 4
    backward_mlp: float = 3
    backward_clip_mlp: float = 2
    logit_bytes: float = 16
    dora_logit_bytes: float = 12
    dora_head_bytes: float = 18
    fragmentation: float = 0.05
    workspace_bytes: float = 1e9


COEFFICIENTS = Coefficients()


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a device computes at once.

    Attributes:
        positions: decoder positions.
        crops: crops that CLIP computes.
        targets: supervised positions.
    """

    positions: int
    crops: int
    targets: int


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Predicts the bytes of a kind of training run.

    Attributes:
        dims: the model's sizes.
        trained_parts: parts that change: their own weights, or with ``adapter_rank`` their adapters'.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        adapter_rank: rank of the adapters; None where weights themselves are trained.
        has_magnitudes: whether every adapter trains DoRA's magnitudes too.
        four_bit_parts: parts whose matrices are held in nf4: of vision, projector and decoder.
        num_ranks: processes of the run.
        parallel: what they share, as ``TrainConfig.parallel`` says.
        offloads: whether what is shared out lies in the machine's memory.
        coefficients: numbers kept.

    >>> every_part = ("vision", "projector", "decoder", "embeddings", "head")
    >>> full = MemoryModel(dims=ModelDims.published(), trained_parts=every_part)
    >>> {name: round(size / 1e9, 1) for name, size in full.state_bytes().items()}
    {'weights': 16.6, 'gradients': 16.5, 'optimizer': 33.1, '16-bit copies': 8.1}
    """

    dims: ModelDims
    trained_parts: Collection[str]
    precision: str = "bf16"
    adapter_rank: int | None = None
    has_magnitudes: bool = False
    four_bit_parts: Collection[str] = ()
    num_ranks: int = 1
    parallel: str = "ddp"
    offloads: bool = False
    coefficients: Coefficients = COEFFICIENTS

    @property
    def number_bytes(self) -> int:
        """b: bytes of a number that the computation works in."""
        return FLOAT32_BYTES if self.precision == "fp32" else 2

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number of the residual stream: b, but float32 in fp16, which would overflow."""
        return 2 if self.precision == "bf16" else FLOAT32_BYTES

    def is_reached(self, part: str) -> bool:
        """Whether the backward pass goes through a part: it is trained, or one that feeds it is."""
        feeding = {"vision": ("vision",), "projector": ("vision", "projector"), "embeddings": ("embeddings",)}
        sources = feeding.get(part, ("vision", "projector", "embeddings", "decoder"))
        return part == "head" or any(source in self.trained_parts for source in sources)

    @property
    def num_trained(self) -> int:
        """Numbers that the optimizer changes.

        Weights: the trained parts' own, CLIP's last layer and its last norm aside, which are never computed. Adapters:
        rank times (inputs + outputs) of every adapted matrix, and with magnitudes its outputs once more.
        """
        if self.adapter_rank is not None:
            return sum(
                count * (self.adapter_rank * (inputs + outputs) + self.has_magnitudes * outputs)
                for part in self.trained_parts
                for count, inputs, outputs in self._matrices(part)
            )
        return sum(self._num_used(part) for part in self.trained_parts)

    def state_bytes(self, checkpointing: Checkpointing = "off") -> dict[str, int]:
        """Returns what is held all the time, by name.

        - weights: 4 bytes a number where weights are trained; b under adapters, and :data:`FOUR_BIT_BYTES` for
          matrices in 4 bit.
        - adapters: 4 bytes a number.
        - gradients: 4 bytes a trained number; with DDP on several devices twice: all micro-batches of a step but the
          last add theirs up beside what is sent. With ZeRO b besides, before they are shared out.
        - optimizer: :data:`OPTIMIZER_BYTES` a trained number.
        - 16-bit copies: in bf16 and fp16, 2 bytes for every float32 number of a part that multiplies by its weights;
          with adapters that is theirs alone. Where every layer is computed again: those of one layer and the head.

        FSDP2 shares weights, gradients and optimizer out to all processes, and puts two layers and the ends together in
        b. ZeRO shares out float32 masters, gradients and optimizer; its weights are b, in stage 3 shared out as well.
        """
        sizes = self._replicated_bytes(checkpointing)
        if self.parallel == "ddp":
            return sizes if self.num_ranks == 1 else sizes | {"gradients": 2 * sizes["gradients"]}
        dims, trained = self.dims, self.num_trained
        part = 0.0 if self.offloads else 1 / self.num_ranks
        stored, number = dims.num_parameters, self.number_bytes
        ends = 2 * dims.num_embedding_parameters + 2 * dims.decoder_layer_matrices
        shared: dict[str, float] = {"optimizer": part * OPTIMIZER_BYTES * trained}
        if self.parallel == "fsdp2":
            shared["weights"] = part * (sizes["weights"] + sizes.get("adapters", 0)) + number * ends
            shared["gradients"] = part * FLOAT32_BYTES * trained + FLOAT32_BYTES * dims.decoder_layer_matrices
        else:
            whole = number * (stored + (trained if self.adapter_rank is not None else 0))
            shared["weights"] = whole if self.parallel == "zero2" else part * whole + number * ends
            shared["masters"] = part * FLOAT32_BYTES * trained
            shared["gradients"] = part * FLOAT32_BYTES * trained + number * 2 * ZERO_BUCKET_NUMBERS
        return {name: ceil(size) for name, size in shared.items()}

    def _replicated_bytes(self, checkpointing: Checkpointing) -> dict[str, int]:
        """Returns what a process holds that has everything."""
        dims, trained = self.dims, self.num_trained
        stored = dims.num_parameters
        if self.adapter_rank is None:
            sizes = {"weights": FLOAT32_BYTES * stored}
            copied = sum(self._num_used(part) for part in ("vision", "projector", "decoder"))
            copied += dims.num_embedding_parameters  # the head's, tied or not
            at_once = dims.decoder_layer_matrices + dims.num_embedding_parameters
        else:
            four_bit = sum(map(self._num_four_bit, self.four_bit_parts))
            weights = self.number_bytes * (stored - four_bit) + FOUR_BIT_BYTES * four_bit
            sizes = {"weights": ceil(weights), "adapters": FLOAT32_BYTES * trained}
            copied = trained
            at_once = trained // dims.layers
        sizes["gradients"] = FLOAT32_BYTES * trained
        sizes["optimizer"] = OPTIMIZER_BYTES * trained
        if self.precision != "fp32":
            sizes["16-bit copies"] = 2 * (at_once if checkpointing == "full" else copied)
        return sizes

    def activation_bytes(self, checkpointing: Checkpointing, batch: MicroBatch) -> dict[str, int]:
        """Returns what a micro-batch adds at the worst moment, the beginning of the backward pass, by name.

        - decoder: :meth:`decoder_layer_bytes` a position and layer, or its inputs where layers are computed again.
        - vision: :meth:`clip_layer_bytes` a CLIP position and layer, or its inputs; nothing without a gradient. The
          pixels, in float32 and b. Of the projector: its input of 4 W, and H before and after its activation.
        - layer at work: the largest of: a decoder layer's gradients, and what is computed again of it; the same of a
          CLIP layer; a CLIP layer's forward pass without a gradient.
        - logits: at supervised positions only; with DoRA on the head what PEFT's layer takes for a moment.
        - allowance: ``fragmentation`` of all that, and ``workspace_bytes``.
        """
        dims, fixed, number = self.dims, self.coefficients, self.number_bytes
        clip_positions = batch.crops * dims.clip_positions
        decoder_kept, clip_kept = self.decoder_layer_bytes(checkpointing), self.clip_layer_bytes(checkpointing)
        decoder_again = number * (fixed.normed * dims.hidden + fixed.activated * dims.mlp)
        clip_again = number * (fixed.normed * dims.clip_width + fixed.activated * dims.clip_mlp)
        if checkpointing == "off":
            decoder_again = clip_again = 0.0
        elif checkpointing == "full":
            inputs = fixed.checkpoint_stream * self.stream_bytes + fixed.checkpoint_added * number
            decoder_kept, decoder_again = inputs * dims.hidden, decoder_again + decoder_kept
            clip_kept, clip_again = inputs * dims.clip_width, clip_again + clip_kept
        decoder = batch.positions * fixed.decoder_ends * dims.hidden * self.stream_bytes
        decoder_work = number * (fixed.backward_hidden * dims.hidden + fixed.backward_mlp * dims.mlp)
        if self.is_reached("decoder"):
            decoder += batch.positions * dims.layers * decoder_kept
            decoder_work += decoder_again
        pixels = batch.crops * 3 * dims.crop_px**2
        vision = pixels * (FLOAT32_BYTES + number)
        if self.is_reached("projector"):
            vision += batch.crops * dims.crop_tokens * (dims.merged_width + 2 * dims.hidden) * number
        if self.is_reached("vision"):
            vision += clip_positions * dims.clip_layers_computed * clip_kept
            clip_work = fixed.backward_hidden * dims.clip_width + fixed.backward_clip_mlp * dims.clip_mlp
        else:
            clip_work, clip_again = fixed.clip_forward * dims.clip_width, 0.0
        logits = batch.targets * dims.vocab * fixed.logit_bytes
        if self.has_magnitudes and "head" in self.trained_parts:
            logits += dims.vocab * (batch.targets * fixed.dora_logit_bytes + dims.hidden * fixed.dora_head_bytes)
        sizes = {
            "decoder": decoder,
            "vision": vision,
            "layer at work": max(batch.positions * decoder_work, clip_positions * (number * clip_work + clip_again)),
            "logits": logits,
        }
        sizes["allowance"] = fixed.fragmentation * sum(sizes.values()) + fixed.workspace_bytes
        return {name: ceil(size) for name, size in sizes.items()}

    def predict(self, checkpointing: Checkpointing, batch: MicroBatch) -> dict[str, int]:
        """Returns state and activations, by name; their sum is the most that the device must hold."""
        return self.state_bytes(checkpointing) | self.activation_bytes(checkpointing, batch)

    def decoder_layer_bytes(self, checkpointing: Checkpointing) -> float:
        """Returns the bytes that one decoder layer keeps of one position, where it is not computed again as a whole.

        The stream's 2 H, ``q + k + v + attention output + 2 I`` of b bytes, and a float32 number a head; with ``off``
        2 H + I of b bytes more. In bf16, where every head has its own key and value: 2 (6 H + 2 I) and 2 (8 H + 3 I).

        >>> decoder = MemoryModel(dims=ModelDims.published(), trained_parts=("decoder",))
        >>> decoder.decoder_layer_bytes("selective"), decoder.decoder_layer_bytes("off")
        (69760.0, 98432.0)
        """
        dims, fixed = self.dims, self.coefficients
        attention = dims.qkv + dims.heads * dims.head_dim
        products = fixed.attention * attention + fixed.decoder_mlp * dims.mlp
        if checkpointing == "off":
            products += fixed.normed * dims.hidden + fixed.activated * dims.mlp
        stream = fixed.stream * dims.hidden
        return float(self.stream_bytes * stream + self.number_bytes * products + self._sums_bytes(dims.heads))

    def clip_layer_bytes(self, checkpointing: Checkpointing) -> float:
        """Returns the same of a CLIP layer and its positions: in bf16 2 (6 W + M), with ``off`` 2 (8 W + 2 M)."""
        dims, fixed = self.dims, self.coefficients
        products = fixed.attention * 4 * dims.clip_width + fixed.clip_mlp * dims.clip_mlp
        if checkpointing == "off":
            products += fixed.normed * dims.clip_width + fixed.activated * dims.clip_mlp
        stream = fixed.stream * dims.clip_width
        return float(self.stream_bytes * stream + self.number_bytes * products + self._sums_bytes(dims.clip_heads))

    def _sums_bytes(self, heads: int) -> float:
        return FLOAT32_BYTES * self.coefficients.attention_sums * heads

    def _num_four_bit(self, part: str) -> int:
        """Numbers of a part's matrices as stored, CLIP's last layer among them."""
        per_layer = sum(count * inputs * outputs for count, inputs, outputs in self._matrices(part))
        if part == "vision":
            return per_layer // self.dims.clip_layers_computed * self.dims.clip_layers
        return per_layer

    def _num_used(self, part: str) -> int:
        """Parameters of a part that are computed. A tied head counts as the embedding's."""
        dims = self.dims
        return {
            "vision": dims.num_vision_parameters - dims.clip_layer_parameters - 2 * dims.clip_width,
            "projector": dims.num_projector_parameters,
            "decoder": dims.num_decoder_parameters,
            "embeddings": dims.num_embedding_parameters,
            "head": 0 if dims.has_tied_head else dims.num_embedding_parameters,
        }[part]

    def _matrices(self, part: str) -> list[tuple[int, int, int]]:
        """Matrices of a part that take adapters: how many, their inputs and their outputs."""
        dims = self.dims
        clip, layers = dims.clip_layers_computed, dims.layers
        return {
            "vision": [
                (4 * clip, dims.clip_width, dims.clip_width),
                (clip, dims.clip_width, dims.clip_mlp),
                (clip, dims.clip_mlp, dims.clip_width),
            ],
            "projector": [(1, dims.merged_width, dims.hidden), (1, dims.hidden, dims.hidden)],
            "decoder": [
                (layers, dims.hidden, dims.qkv),
                (layers, dims.heads * dims.head_dim, dims.hidden),
                (layers, dims.hidden, 2 * dims.mlp),
                (layers, dims.mlp, dims.hidden),
            ],
            "embeddings": [],
            "head": [(1, dims.hidden, dims.vocab)],
        }[part]
