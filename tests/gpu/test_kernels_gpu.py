"""The Triton kernels give what their plain versions give."""

import pytest
import torch

from phi3v.model.kernels import for_device, plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative, of a whole tensor: one rounding to the type."""

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
ROWS = 301


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    found, expected = found.double(), expected.double()
    assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.fixture
def fused():
    return for_device(torch.device("cuda"))


def random(*shape: int, dtype: torch.dtype = torch.float32, room: int = 0) -> torch.Tensor:
    """Random numbers, rows ``room`` further apart than they are long."""
    wide = torch.randn(*shape[:-1], shape[-1] + room, device="cuda").to(dtype)
    return wide[..., : shape[-1]]


@DTYPES
@pytest.mark.parametrize("width", [40, 1024, 3072])
@pytest.mark.parametrize("is_layer_norm", [False, True])
@pytest.mark.parametrize("has_delta", [False, True])
def test_norm(fused, dtype: torch.dtype, width: int, is_layer_norm: bool, has_delta: bool) -> None:
    residual, delta = random(ROWS, width, dtype=dtype), random(ROWS, width, dtype=dtype, room=8)
    weight, bias = random(width), random(width) if is_layer_norm else None
    outs = [torch.full((ROWS, width + 64), 7.0, device="cuda", dtype=dtype) for _ in range(2)]
    sums = [
        one.add_norm(residual, delta if has_delta else None, weight, bias, 1e-5, out[:, :width])
        for one, out in zip((fused, plain), outs, strict=True)
    ]
    assert_close(sums[0], sums[1], dtype)
    assert_close(outs[0], outs[1], dtype)  # what is beyond the rows included
    grad_normed, grad_hidden = random(ROWS, width, dtype=dtype, room=64), random(ROWS, width, dtype=dtype)
    for needs_weight in (False, True):
        results = [
            one.norm_backward(
                residual, weight, 1e-5, grad_normed, grad_hidden,
                is_layer_norm=is_layer_norm, needs_weight=needs_weight,
            )
            for one in (fused, plain)
        ]  # fmt: skip
        for found, expected in zip(*results, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                assert_close(found, expected, dtype)


@DTYPES
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 96), (3, 12)])
def test_rotation(fused, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    qkv = random(ROWS, 3, heads, head_dim, dtype=dtype).contiguous()
    angles = random(ROWS, head_dim // 2)
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    rotated = [qkv.clone(), qkv.clone()]
    fused.rotate_(rotated[0], cos, sin)
    plain.rotate_(rotated[1], cos, sin)
    assert_close(rotated[0], rotated[1], dtype)
    grads = [
        random(ROWS, heads, head_dim, dtype=dtype),
        random(ROWS, heads, head_dim, dtype=dtype, room=4),
        random(heads, ROWS, head_dim, dtype=dtype).transpose(0, 1),
    ]
    assert_close(fused.rotate_backward(*grads, cos, sin), plain.rotate_backward(*grads, cos, sin), dtype)


@DTYPES
@pytest.mark.parametrize("name", ["swiglu", "quick_gelu"])
@pytest.mark.parametrize("width", [40, 4096, 8192])
def test_activations(fused, dtype: torch.dtype, name: str, width: int) -> None:
    inner = random(ROWS, width * (2 if name == "swiglu" else 1), dtype=dtype).contiguous()
    outs = [torch.full((ROWS, width + 64), 7.0, device="cuda", dtype=dtype) for _ in range(2)]
    for one, out in zip((fused, plain), outs, strict=True):
        getattr(one, name)(inner, out[:, :width])
    assert_close(outs[0], outs[1], dtype)
    grad = random(ROWS, width, dtype=dtype, room=64)
    found, expected = (getattr(one, f"{name}_backward")(inner, grad) for one in (fused, plain))
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(fused, dtype: torch.dtype) -> None:
    x = random(ROWS, 3072, dtype=torch.bfloat16, room=64)
    assert fused.absolute_maximum(x) == plain.absolute_maximum(x)
    scale = plain.absolute_maximum(x) / torch.finfo(dtype).max
    assert torch.equal(fused.to_float8(x, scale, dtype).float(), plain.to_float8(x, scale, dtype).float())


def test_float8_keeps_what_is_no_number(fused) -> None:
    x = random(ROWS, 3072, dtype=torch.bfloat16)
    x[3, 5], x[7, 9] = float("nan"), float("inf")
    scale = torch.ones((), device="cuda")
    found, expected = (one.to_float8(x, scale, torch.float8_e4m3fn).float() for one in (fused, plain))
    assert torch.equal(found.isnan(), expected.isnan()) and bool(found[3, 5].isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_where_its_tensors_are(fused) -> None:
    x = torch.randn(ROWS, 3072, device="cuda:1").bfloat16()
    assert torch.cuda.current_device() == 0
    assert fused.absolute_maximum(x).to("cuda:0") == plain.absolute_maximum(x).to("cuda:0")
