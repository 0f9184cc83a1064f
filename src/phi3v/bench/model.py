"""The model that is measured: published sizes, random weights, made on the device."""

from typing import Any

import torch
from torch import nn

from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.four_bit import make_exact_on_cpu, require_four_bit
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "pad_token_id": 0,
    "image_token_id": 511,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}
"""A model for tests: a second on a CPU; its decoder is as wide as a block of 4-bit weights."""


def bench_config(is_tiny: bool) -> Phi3VConfig:
    """Returns the published sizes, or tiny ones, with LongRoPE switched on (its factors are all 1)."""
    sizes = TINY if is_tiny else {}
    head = sizes.get("hidden_size", 3072) // sizes.get("num_attention_heads", 32)
    ones = [1.0] * (head // 2)
    rope: dict[str, Any] = {"rope_scaling": {"type": "su", "short_factor": ones, "long_factor": ones}}
    return Phi3VConfig(**sizes, **rope)


def build_model(
    config: Phi3VConfig, dtype: torch.dtype, device: torch.device, *, seed: int, is_four_bit: bool = False
) -> Phi3VForCausalLM:
    """Makes a model of random weights on ``device``, in training mode.

    Args:
        config: its sizes.
        dtype: of its weights.
        device: where to.
        seed: of the weights.
        is_four_bit: hold the linear layers of the decoder in nf4, as ``load_four_bit_model`` does.

    Raises:
        ConfigError: 4 bit without a working bitsandbytes.
    """
    if is_four_bit:
        require_four_bit(device)
    torch.manual_seed(seed)
    with device:
        model = Phi3VForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    if is_four_bit:
        _quantise(model, dtype)
    return model.train()


def _quantise(model: Phi3VForCausalLM, compute_dtype: torch.dtype) -> None:
    """Replaces the decoder's linear layers by 4-bit ones of the same weights, one after the other."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for parent in list(model.model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.uint8}
                with torch.device("meta"):
                    quantised = Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=compute_dtype, **kind
                    )
                weight: Any = Params4bit(layer.weight.detach(), requires_grad=False, **kind)
                quantised.weight = weight.to(layer.weight.device)
                setattr(parent, name, quantised)
    model.is_loaded_in_4bit = True  # pyright: ignore[reportArgumentType]  # PEFT looks at it
    if model.device.type == "cpu":
        make_exact_on_cpu(model)
