"""Where a model runs and in which number format, from the words of a configuration."""

import torch

from ..errors import ConfigError

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_device(device: str) -> str:
    """Turns ``auto`` into ``cuda`` where there is one, else ``cpu``.

    Raises:
        ConfigError: ``cuda`` on a machine without a usable GPU.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no GPU here; use device: cpu or auto")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """Turns ``auto`` into ``bf16`` on a GPU that has it, else ``fp32``.

    Raises:
        ConfigError: ``fp16`` on the CPU, where half of the needed operations are missing or slow beyond use.
    """
    if precision == "auto":
        has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if precision == "fp16" and device == "cpu":
        raise ConfigError("precision: fp16 needs a GPU; on the CPU use fp32 (or bf16)")
    return precision
