"""Attention over a layout equals attention over each of its sequences alone, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from phi3v.model.packed import PackLayout
from phi3v.model.packed_attention import PackedAttention

LAYOUTS = [
    PackLayout(wholes=(5,)),
    PackLayout(wholes=(4, 6, 1)),
    PackLayout(stems=(7,), branches=((3, 1),)),
    PackLayout(stems=(7, 3), wholes=(4, 6), branches=((3, 1), (2,))),
]


def sequences(layout: PackLayout) -> list[torch.Tensor]:
    """The row's positions of every sequence: wholes, then every branch behind its stem."""
    spans = [torch.arange(a, a + n) for a, n in zip(layout.starts, layout.pieces, strict=False)]
    stems, wholes = spans[: len(layout.stems)], spans[len(layout.stems) : layout.num_trunk_pieces]
    branches = iter(spans[layout.num_trunk_pieces :])
    return wholes + [
        torch.cat([stem, next(branches)]) for stem, group in zip(stems, layout.branches, strict=True) for _ in group
    ]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor, is_causal: bool) -> torch.Tensor:
    rows = [tensor[places].transpose(0, 1)[None] for tensor in (q, k, v)]
    return F.scaled_dot_product_attention(*rows, is_causal=is_causal)[0].transpose(0, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_every_sequence_alone(layout: PackLayout, is_causal: bool) -> None:
    if layout.stems and not is_causal:
        pytest.skip("only the decoder, which is causal, has stems")
    torch.manual_seed(0)
    q, k, v = (torch.randn(layout.num_tokens, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attention = PackedAttention(layout, q.device, q.dtype, is_causal=is_causal)
    out, stats = attention.forward(q.detach(), k.detach(), v.detach())
    grad = torch.randn_like(out)
    first_branch = layout.num_trunk_tokens
    loss = torch.zeros((), dtype=torch.float64)
    for number, places in enumerate(sequences(layout)):
        expected = alone(q, k, v, places, is_causal)
        torch.testing.assert_close(out[places], expected, rtol=1e-12, atol=1e-12)
        # A stem's own result counts once, however many branches it has.
        own = places >= first_branch if number >= len(layout.wholes) else torch.ones(len(places), dtype=torch.bool)
        loss = loss + (expected * grad[places])[own].sum()
    for start, length in zip(layout.starts, layout.stems, strict=False):
        places = torch.arange(start, start + length)
        loss = loss + (alone(q, k, v, places, is_causal) * grad[places]).sum()
    expected_grads = torch.autograd.grad(loss, (q, k, v))
    found = attention.backward(grad, q.detach(), k.detach(), v.detach(), out, stats)
    for one, expected in zip(found, expected_grads, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "pieces",
    [
        {"stems": (3,), "branches": ()},
        {"stems": (3,), "branches": ((),)},
        {"branches": ((2,),)},
        {"wholes": (3, 0)},
        {"stems": (3,), "branches": ((2, 0),)},
    ],
)
def test_layouts_without_sense_are_refused(pieces: dict) -> None:
    with pytest.raises(ValueError, match=r"branches|at least one position"):
        PackLayout(**pieces)
