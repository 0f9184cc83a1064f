"""The element-wise pieces of both towers: ``plain`` in PyTorch, ``fused`` in Triton; ``for_device`` chooses."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from . import plain


def for_device(device: torch.device) -> ModuleType:
    """Returns the module whose functions run on ``device``: ``fused`` on a GPU that has Triton, else ``plain``."""
    return _for_type(device.type)


@cache
def _for_type(device_type: str) -> ModuleType:
    if device_type == "cuda" and find_spec("triton") is not None:
        from . import fused

        return fused
    return plain
