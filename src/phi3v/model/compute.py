"""How the packed forward computes."""

from dataclasses import dataclass
from typing import Literal

Checkpointing = Literal["off", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Compute:
    """Choices that change time and memory, and (``fp8`` aside) no result beyond rounding.

    Attributes:
        checkpointing: what the backward pass computes again instead of keeping it. ``off``: nothing; ``selective``:
            what is cheap, norms and activations; ``full``: every layer of both towers.
        fp8: the decoder's linear layers multiply in float8 (e4m3, one scale a tensor) in the forward pass and for the
            gradient of their input; gradients of weights stay in 16 bit.
        accumulates_in_place: weight gradients of linear layers are added to ``parameter.grad`` by the matrix product
            itself, in float32. Gradient hooks of those parameters do not run, so whoever needs them (DDP, FSDP,
            DeepSpeed) leaves this off.
        is_sharded: parameters are whole only while their module computes (FSDP, ZeRO-3): nothing keeps copies of them.
    """

    checkpointing: Checkpointing = "off"
    fp8: bool = False
    accumulates_in_place: bool = False
    is_sharded: bool = False
