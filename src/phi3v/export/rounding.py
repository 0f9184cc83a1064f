"""What rounding weights to 16 bit does to a model's answers, measured by rounding them another way."""

from collections.abc import Collection

import torch
from torch import nn


def names_to_round(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Names the parameters that ``dtype`` cannot hold as they are.

    Args:
        model: its weights in float32.
        dtype: the format that they will be rounded to.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype != dtype and not torch.equal(parameter.data.to(dtype).to(parameter.dtype), parameter.data)
    ]


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns how far neighbouring numbers of ``dtype`` lie apart at each of ``values``, as float32.

    >>> spacing(torch.tensor([1.0, 1.5, 2.0, -0.75, 0.0]), torch.bfloat16).tolist()[:4]
    [0.0078125, 0.0078125, 0.015625, 0.00390625]
    """
    format_of = torch.finfo(dtype)
    _, exponent = torch.frexp(values.float())
    apart = torch.ldexp(torch.full_like(values, format_of.eps / 2, dtype=torch.float32), exponent)
    # Below its normal numbers a format's spacing stays what it is at the smallest of them.
    return torch.where(values == 0, 0.0, apart).clamp_(min=format_of.tiny * format_of.eps)


@torch.no_grad()
def move_within_rounding(model: nn.Module, names: Collection[str], dtype: torch.dtype, seed: int = 0) -> None:
    """Moves every weight of some rounded parameters by up to half a spacing, evenly distributed, in place.

    Rounding moves a weight by just such an amount. So what this changes in the answers is what another rounding of the
    same model, as good as the one that was written, could have changed.

    Args:
        model: its weights in float32, each a number of ``dtype``.
        names: of the parameters that were rounded.
        dtype: what they were rounded to.
        seed: of the random numbers.
    """
    generator: torch.Generator | None = None
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(seed)
        share = torch.rand(parameter.shape, generator=generator, device=parameter.device) - 0.5
        parameter.add_(share.mul_(spacing(parameter.data, dtype)))
