"""The model on packed rows: what training computes, and the decoder that generation shares with it.

``PackedTowers`` holds, beside a model, what its layers need for it. The parameters stay the model's own, but frozen
weights under adapters come to lie in other memory, with the adapters' columns between their rows: PEFT and optimizers
see nothing of it, safetensors would refuse it. ``state_dict`` therefore lays them apart again (``release_towers``), and
with it everything that saves.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .compute import Compute
from .linear.float8 import Float8Compute
from .linear.products import ProjectionCompute
from .loss import target_loss
from .packed import PackedBatch, PackLayout
from .packed_attention import PackedAttention
from .packed_layers import Call, Layer, Rope, run_layer

if TYPE_CHECKING:
    from .modeling_phi3_v import Phi3VForCausalLM, Phi3VModel

LayerAttend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer index and its rotated queries, keys, values (T, heads, head_dim) -> attention's result of that shape."""


class PackedTowers:
    """The layers of both towers as the packed forward runs them.

    Args:
        model: whose layers; the last CLIP layer is never computed.

    Raises:
        ValueError: the model has fewer key than query heads, dropout or other activations than the published ones, none
            of which the packed forward computes.
    """

    def __init__(self, model: "Phi3VModel") -> None:
        config = model.config
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError("the packed forward needs as many key and value heads as query heads")
        if config.resid_pdrop or config.embd_pdrop or config.attention_dropout:
            raise ValueError(
                "the packed forward computes no dropout; set resid_pdrop, embd_pdrop and attention_dropout to 0"
            )
        activations = (config.hidden_act, config.vision_config.hidden_act)
        if activations != ("silu", "quick_gelu"):
            raise ValueError(f"the packed forward computes silu and, in CLIP, quick_gelu; the model has {activations}")
        self.decoder = [Layer(module) for module in model.layers]
        self.vision = [Layer(module) for module in _vision_layers(model)]

    def is_of(self, model: "Phi3VModel") -> bool:
        """Says whether the model's layers are still those that this was made from, computing the same adapters."""
        return all(
            len(layers) == len(modules)
            and all(layer.is_of(module) for layer, module in zip(layers, modules, strict=True))
            for layers, modules in ((self.decoder, model.layers), (self.vision, _vision_layers(model)))
        )


def _vision_layers(model: "Phi3VModel") -> list[nn.Module]:
    return list(model.vision_embed_tokens.img_processor.vision_model.encoder.layers)[:-1]


def towers_of(model: "Phi3VModel") -> PackedTowers:
    """Returns a model's towers, made anew when its layers or their adapters are others."""
    towers: PackedTowers | None = vars(model).get("_packed_towers")
    if towers is None or not towers.is_of(model):
        towers = PackedTowers(model)
        # Past nn.Module's own bookkeeping: no parameter is registered a second time.
        object.__setattr__(model, "_packed_towers", towers)
    return towers


def release_towers(model: "Phi3VModel") -> None:
    """Lets go of working copies; every weight lies by itself again, and not beside adapters' columns.

    The next packed forward makes all of it anew.
    """
    vars(model).pop("_packed_towers", None)
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def product_dtype(model: "Phi3VModel") -> torch.dtype:
    """Returns what matrix products compute in: autocast's type where that is on, else the embedding's own."""
    own = model.embed_tokens.weight
    if torch.is_autocast_enabled(own.device.type):
        return torch.get_autocast_dtype(own.device.type)
    return own.dtype


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the residual stream's type: float16 would overflow in it."""
    return torch.float32 if dtype == torch.float16 else dtype


def packed_loss(model: "Phi3VForCausalLM", batch: PackedBatch) -> torch.Tensor:
    """Returns the weighted sum of a packed batch's cross entropies.

    Equals the sum over its sequences, each computed alone, of ``weighted_token_loss``. The last layer's output
    projection and MLP, the final norm and the head run at supervised positions only.
    """
    body, compute = model.model, model.compute
    device, dtype = batch.input_ids.device, product_dtype(model.model)
    embedded = embed_packed(body, batch, compute)
    with torch.autocast(device.type, enabled=False):
        attention = PackedAttention(batch.layout, device, dtype)
        call = Call(
            attention, products(compute, fp8=compute.fp8), dtype, rope_of(body, batch.position_ids, batch.is_long),
            checkpointing=compute.checkpointing,
        )  # fmt: skip
        stream, added = embedded, None
        layers = towers_of(body).decoder
        for index, layer in enumerate(layers):
            rows = batch.target_positions if index == len(layers) - 1 else None
            stream, added = run_layer(layer, stream, added, call._replace(rows=rows))
        assert added is not None
        hidden = body.norm(stream + added)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return target_loss(hidden, model.lm_head, batch.target_ids, batch.target_weights)


def embed_packed(model: "Phi3VModel", batch: PackedBatch, compute: Compute | None = None) -> torch.Tensor:
    """Embeds a packed row's ids and puts image rows in their places: (T, hidden_size) of the residual stream's type."""
    dtype = product_dtype(model)
    embedded = model.embed_tokens(batch.input_ids).to(stream_dtype(dtype))
    rows = []
    if batch.crops is not None:
        rows.append(image_rows(model, batch.crops, batch.grids, compute or Compute(), dtype))
    if batch.features is not None:
        rows.append(batch.features)
    if not rows:
        return embedded
    shown = torch.cat([part.to(embedded.dtype) for part in rows])[batch.image_rows]
    return embedded.index_copy(0, batch.image_positions, shown)


def image_rows(
    model: "Phi3VModel",
    crops: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    compute: Compute,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computes the decoder rows of images, (rows, hidden_size), from crops and grids as ``PackedBatch`` has them."""
    with torch.autocast(crops.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model.vision_embed_tokens(crops, grids, lambda own: encode_crops(model, own, compute, dtype))


def encode_crops(model: "Phi3VModel", crops: torch.Tensor, compute: Compute, dtype: torch.dtype) -> torch.Tensor:
    """Runs CLIP's layers but the last on crops (S, 3, crop_px, crop_px): (S, patches, clip_width)."""
    tower = model.vision_embed_tokens.img_processor.vision_model
    embedded = tower.pre_layrnorm(tower.embeddings(crops)).to(stream_dtype(dtype))
    num_crops, positions, width = embedded.shape
    with torch.autocast(crops.device.type, enabled=False):
        layout = PackLayout(wholes=(positions,) * num_crops)
        attention = PackedAttention(layout, crops.device, dtype, is_causal=False, shortest_dense=1)
        call = Call(attention, products(compute), dtype, checkpointing=compute.checkpointing)
        stream, added = embedded.flatten(0, 1), None
        for layer in towers_of(model).vision:
            stream, added = run_layer(layer, stream, added, call)
        hidden = stream if added is None else stream + added
    return hidden.view(num_crops, positions, width)[:, 1:]


def products(compute: Compute, *, fp8: bool = False) -> ProjectionCompute:
    """Returns how a tower's products are formed."""
    kind = Float8Compute if fp8 else ProjectionCompute
    return kind(
        accumulates_in_place=compute.accumulates_in_place,
        keeps_copies=compute.checkpointing != "full" and not compute.is_sharded,
        is_sharded=compute.is_sharded,
    )


def rope_of(model: "Phi3VModel", position_ids: torch.Tensor, is_long: torch.Tensor) -> Rope:
    """Returns the rotations of a packed row's positions; ``is_long`` counts where the model chooses by length."""
    return Rope(*model.rotary_emb.rotations(position_ids, is_long))


@torch.no_grad()
def run_decoder(
    model: "Phi3VModel",
    embedded: torch.Tensor,
    position_ids: torch.Tensor,
    is_long: torch.Tensor,
    attend: LayerAttend,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the decoder without gradients, with an attention of the caller's.

    Args:
        model: the model's body.
        embedded: (T, hidden_size) of the residual stream's type.
        position_ids: (T,) int64.
        is_long: (T,) bool, whether a position's sequence needs LongRoPE's long factors.
        attend: called by every layer.
        rows: (K,) int64, the only positions whose result is wanted; None: all.

    Returns:
        The hidden states behind the final norm, (T or K, hidden_size).
    """
    dtype = product_dtype(model)
    layers = towers_of(model).decoder
    with torch.autocast(embedded.device.type, enabled=False):
        compute = ProjectionCompute(accumulates_in_place=False, keeps_copies=True)
        call = Call(None, compute, dtype, rope_of(model, position_ids, is_long))  # pyright: ignore[reportArgumentType]
        stream, added = embedded, None
        for index, layer in enumerate(layers):
            asked = call._replace(rows=rows if index == len(layers) - 1 else None)
            stream, added, _ = layer.forward(stream, added, asked, lambda q, k, v, i=index: (attend(i, q, k, v), ()))
        assert added is not None
        return model.norm(stream + added)
