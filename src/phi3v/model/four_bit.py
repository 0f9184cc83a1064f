"""Parts in 4 bit: bitsandbytes' nf4 with double quantisation, as a base for adapters.

bitsandbytes is an optional package; only runs that ask for 4 bit import it from here.
Source: QLoRA, Dettmers et al. 2023, section 3; bitsandbytes 0.50.2.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..errors import ConfigError
from .parts import part_of

PLACES = {
    "vision": "model.vision_embed_tokens.img_processor",
    "projector": "model.vision_embed_tokens.img_projection",
    "decoder": "model.layers",
    "head": "lm_head",
}
"""Where the linear layers of every part lie."""

BLOCK = 64
"""Weights that share a scale: consecutive ones, in row-major order."""


def require_four_bit(device: str | torch.device) -> None:
    """Checks, on one small tensor, that ``device`` can hold 4-bit weights.

    Raises:
        ConfigError: bitsandbytes is not installed, or does not work here.
    """
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise ConfigError(
            f'method qlora needs the package bitsandbytes ({error}); pip install "phi3v[qlora]", or use method: lora'
        ) from error
    try:
        quantize_4bit(torch.ones(64, device=device), quant_type="nf4")
    except RuntimeError as error:
        raise ConfigError(
            f"method qlora: bitsandbytes does not work on {device}: {str(error).strip()}\n"
            "Install a version of bitsandbytes that supports this machine, or use method: lora"
        ) from error


def four_bit_loading(
    compute_dtype: torch.dtype, device: str | torch.device, parts: Collection[str] = ("decoder",)
) -> dict[str, Any]:
    """Returns what ``from_pretrained`` takes to quantise parts of a model while it reads them.

    Args:
        compute_dtype: what the 4-bit layers multiply in; the run's precision decides it and nothing else.
        device: where to. Each matrix is quantised there, one after the other: the whole 16-bit model is never held.
        parts: whose linear layers.
    """
    untouched = [place for part, place in PLACES.items() if part not in parts]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=untouched,  # also read for 4 bit, whatever its name says
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def make_exact_on_cpu(model: nn.Module) -> None:
    """Makes 4-bit layers on a CPU compute from their weights as they were quantised, in evaluation as in training.

    On a CPU with AVX512-BF16 a layer's first forward pass in evaluation mode would otherwise rearrange its weights, for
    good and to bf16 scales, and training would go on from there with other numbers, without an error.

    Raises:
        ConfigError: a layer whose rows are no whole number of quantisation blocks. The AVX512 kernels take the scale
            of the wrong block there, also without an error (a relative difference of 0.2 to 0.4 of the weights).

    Source: bitsandbytes 0.50.2, ``Linear4bit.forward``; ``dequantize_4bit`` measured at widths of 16 to 344.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        if module.in_features % BLOCK:
            part = part_of(f"{name}.weight")
            remedy = "method: lora" if part == "decoder" else f"take {part} out of four_bit_parts"
            raise ConfigError(
                f"method qlora on a CPU needs 4-bit layers whose widths are multiples of {BLOCK}; {name} of this model "
                f"has rows of {module.in_features}. Use a GPU, or {remedy}"
            )
        module.support_avx512bf16_for_cpu = False
