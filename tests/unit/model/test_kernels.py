"""Backward passes by hand equal autograd's through torch's own functions, float32."""

import pytest
import torch
from torch.nn import functional as F

from phi3v.model.kernels import plain

ROWS, WIDTH = 7, 12


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("is_layer_norm", [False, True])
def test_norm(is_layer_norm: bool) -> None:
    residual, delta = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    weight, bias = torch.randn(WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    leaf = (residual + delta).requires_grad_()
    if is_layer_norm:
        expected = F.layer_norm(leaf, (WIDTH,), weight, bias, 1e-5)
    else:
        expected = F.rms_norm(leaf, (WIDTH,), weight, 1e-5)
    normed = torch.empty(ROWS, WIDTH)
    hidden = plain.add_norm(residual, delta, weight.detach(), bias.detach() if is_layer_norm else None, 1e-5, normed)
    close(hidden, leaf.detach())
    close(normed, expected.detach())
    grad_normed, grad_hidden = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    ((expected * grad_normed).sum() + (leaf * grad_hidden).sum()).backward()
    total, grad_weight, grad_bias = plain.norm_backward(
        hidden, weight.detach(), 1e-5, grad_normed, grad_hidden, is_layer_norm=is_layer_norm, needs_weight=True
    )
    assert leaf.grad is not None and weight.grad is not None and grad_weight is not None
    close(total, leaf.grad)
    close(grad_weight, weight.grad)
    if is_layer_norm:
        assert grad_bias is not None and bias.grad is not None
        close(grad_bias, bias.grad)


def test_rotation() -> None:
    angles = torch.randn(ROWS, 3)
    cos, sin = angles.cos(), angles.sin()
    leaf = torch.randn(ROWS, 3, 2, 6, requires_grad=True)
    first, second = leaf[..., :3], leaf[..., 3:]
    c, s = cos[:, None, None], sin[:, None, None]
    rotated = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    expected = torch.cat([rotated[:, :2], leaf[:, 2:]], dim=1)
    qkv = leaf.detach().clone()
    plain.rotate_(qkv, cos, sin)
    close(qkv, expected.detach())
    grad = torch.randn_like(qkv)
    expected.backward(grad)
    assert leaf.grad is not None
    close(plain.rotate_backward(*grad.unbind(1), cos, sin), leaf.grad)


@pytest.mark.parametrize("name", ["swiglu", "quick_gelu"])
def test_activations(name: str) -> None:
    inner = torch.randn(ROWS, 2 * WIDTH if name == "swiglu" else WIDTH, requires_grad=True)
    if name == "swiglu":
        gate, up = inner.chunk(2, dim=-1)
        expected = F.silu(gate) * up
    else:
        expected = inner * torch.sigmoid(1.702 * inner)
    out = torch.empty(ROWS, WIDTH)
    getattr(plain, name)(inner.detach(), out)
    close(out, expected.detach())
    grad = torch.randn_like(out)
    expected.backward(grad)
    assert inner.grad is not None
    close(getattr(plain, f"{name}_backward")(inner.detach(), grad), inner.grad)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_keeps_the_largest_number_and_relative_precision(dtype: torch.dtype) -> None:
    from phi3v.model.linear.float8 import quantised

    x = torch.randn(50, 40) * 1e-3
    small, scale = quantised(x, dtype)
    back = small.float() * scale
    assert back.abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)
    # Half a unit in the last place of 3 or 2 bits of fraction, for numbers that are not among the smallest.
    is_large = x.abs() > x.abs().max() / 256
    assert ((back - x).abs() <= x.abs() * (2**-4 if dtype == torch.float8_e4m3fn else 2**-3) * 1.001)[is_large].all()
    assert quantised(torch.zeros(2, 2), dtype)[1] == 1
