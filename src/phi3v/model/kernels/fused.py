"""The functions of ``plain`` as Triton kernels: each reads and writes every number once. Needs a CUDA device.

Triton compiles a kernel at its first call with new types or widths, in about a second; the number of rows is free.
"""

# ruff: noqa: N803 - Triton's compile-time arguments are written in capitals
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportMissingImports=false

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import triton
import triton.language as tl

_PROGRAMS_A_MULTIPROCESSOR = 8
"""Programs in kernels that sum over rows, a quarter of them for wide rows; each sums its share, then the shares are
added up. With the numbers of warps below the fastest of those tried on one H200 (2 to 16; widths 1024 and 3072)."""

_NARROW = 1024
"""Numbers of a row up to which it counts as narrow."""

_BLOCK = 1024
"""Numbers of a row that one program of an activation kernel handles."""


@triton.jit
def _load_normalised(hidden, columns, mask, width, eps, IS_LAYER_NORM: tl.constexpr):
    if IS_LAYER_NORM:
        hidden = tl.where(mask, hidden - tl.sum(hidden, axis=0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(hidden * hidden, axis=0) / width + eps)
    return hidden * scale, scale


@triton.jit
def _add_norm_kernel(
    residual, delta, weight, bias, hidden_out, normed, width, delta_stride, normed_stride, eps,
    HAS_DELTA: tl.constexpr, IS_LAYER_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    hidden = tl.load(residual + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        hidden += tl.load(delta + row * delta_stride + columns, mask=mask, other=0.0).to(tl.float32)
        # Normalised is what the backward pass will read: the rounded sum.
        rounded = hidden.to(hidden_out.dtype.element_ty)
        tl.store(hidden_out + row * width + columns, rounded, mask=mask)
        hidden = rounded.to(tl.float32)
    normalised, _ = _load_normalised(hidden, columns, mask, width, eps, IS_LAYER_NORM)
    scaled = normalised * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        scaled += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * normed_stride + columns, scaled.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    hidden_in, weight, grad_normed, grad_hidden, grad_out, grad_weight, grad_bias, rows, width, grad_stride, eps,
    IS_LAYER_NORM: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    scale_of = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program.to(tl.int64)
    while row < rows:
        hidden = tl.load(hidden_in + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        normalised, scale = _load_normalised(hidden, columns, mask, width, eps, IS_LAYER_NORM)
        grad = tl.load(grad_normed + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        scaled = grad * scale_of
        inner = scaled - normalised * (tl.sum(scaled * normalised, axis=0) / width)
        if IS_LAYER_NORM:
            inner -= tl.sum(scaled, axis=0) / width
        total = tl.load(grad_hidden + row * width + columns, mask=mask, other=0.0).to(tl.float32) + inner * scale
        tl.store(grad_out + row * width + columns, total.to(grad_out.dtype.element_ty), mask=mask)
        if NEEDS_WEIGHT:
            sum_weight += grad * normalised
            if IS_LAYER_NORM:
                sum_bias += grad
        row += tl.num_programs(0)
    if NEEDS_WEIGHT:
        tl.store(grad_weight + program * width + columns, sum_weight, mask=mask)
        if IS_LAYER_NORM:
            tl.store(grad_bias + program * width + columns, sum_bias, mask=mask)


@triton.jit
def _rotate_kernel(
    qkv, cos, sin, row_stride, heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (column < half)
    cosine = tl.load(cos + row * half + column, mask=column < half, other=0.0)
    sine = tl.load(sin + row * half + column, mask=column < half, other=0.0)
    place = qkv + row * row_stride + tl.program_id(1) * heads * 2 * half + head * 2 * half + column
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, (first * cosine - second * sine).to(qkv.dtype.element_ty), mask=mask)
    tl.store(place + half, (second * cosine + first * sine).to(qkv.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_backward_kernel(
    grad_q, grad_k, grad_v, cos, sin, grad_qkv,
    q_row, q_head, k_row, k_head, v_row, v_head, heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (column < half)
    cosine = tl.load(cos + row * half + column, mask=column < half, other=0.0)
    sine = tl.load(sin + row * half + column, mask=column < half, other=0.0)
    out = grad_qkv + row * (3 * heads * 2 * half) + head * 2 * half + column
    part = tl.program_id(1)
    if part == 0:
        place = grad_q + row * q_row + head * q_head + column
    elif part == 1:
        place = grad_k + row * k_row + head * k_head + column
    else:
        place = grad_v + row * v_row + head * v_head + column
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    if part < 2:
        rotated = first * cosine + second * sine
        second = second * cosine - first * sine
        first = rotated
    out += part * heads * 2 * half
    tl.store(out, first.to(grad_qkv.dtype.element_ty), mask=mask)
    tl.store(out + half, second.to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_kernel(gate_up, out, width, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (up * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(gate_up, grad_out, grad_in, width, grad_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    place = row * 2 * width + columns
    gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_in + place, grad_gate.to(grad_in.dtype.element_ty), mask=mask)
    tl.store(grad_in + place + width, (grad * gate * sigmoid).to(grad_in.dtype.element_ty), mask=mask)


@triton.jit
def _quick_gelu_kernel(inner, out, width, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    wide = tl.load(inner + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (wide * tl.sigmoid(1.702 * wide)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quick_gelu_backward_kernel(inner, grad_out, grad_in, width, grad_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    wide = tl.load(inner + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(1.702 * wide)
    result = grad * sigmoid * (1 + 1.702 * wide * (1 - sigmoid))
    tl.store(grad_in + row * width + columns, result.to(grad_in.dtype.element_ty), mask=mask)


@triton.jit
def _absolute_maximum_kernel(x, largest, rows, width, stride, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            number = tl.load(x + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
            found = tl.maximum(found, tl.abs(number))
        row += tl.num_programs(0)
    tl.atomic_max(largest, tl.max(found, axis=0))


@triton.jit
def _to_float8_kernel(x, scale, out, width, stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    number = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32) / tl.load(scale)
    clamped = tl.minimum(tl.maximum(number, -LARGEST), LARGEST)
    number = tl.where(number == number, clamped, number)  # NaN stays NaN, which a minimum may drop
    tl.store(out + row * width + columns, number.to(out.dtype.element_ty), mask=mask)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the first argument's device the current one, on which Triton launches kernels."""

    @wraps(function)
    def run(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *arguments, **options)

    return run


@_on_its_device
def add_norm(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    normed: torch.Tensor,
) -> torch.Tensor:
    """As ``plain.add_norm``; ``residual`` contiguous."""
    rows, width = residual.shape
    hidden = residual if delta is None else torch.empty_like(residual)
    _add_norm_kernel[(rows,)](
        residual, residual if delta is None else delta, weight, weight if bias is None else bias, hidden, normed,
        width, width if delta is None else delta.stride(0), normed.stride(0), eps,
        HAS_DELTA=delta is not None, IS_LAYER_NORM=bias is not None, BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )  # fmt: skip
    return hidden


@_on_its_device
def norm_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad_normed: torch.Tensor,
    grad_hidden: torch.Tensor,
    *,
    is_layer_norm: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As ``plain.norm_backward``; ``hidden`` and ``grad_hidden`` contiguous."""
    rows, width = hidden.shape
    share = _PROGRAMS_A_MULTIPROCESSOR if width <= _NARROW else _PROGRAMS_A_MULTIPROCESSOR // 4
    programs = min(rows, share * _num_multiprocessors(hidden.device)) if needs_weight else rows
    grad_out = torch.empty_like(grad_hidden)
    shares = hidden.new_empty((2, programs, width), dtype=torch.float32) if needs_weight else grad_out
    _norm_backward_kernel[(programs,)](
        hidden, weight, grad_normed, grad_hidden, grad_out, shares[0], shares[-1], rows, width,
        grad_normed.stride(0), eps,
        IS_LAYER_NORM=is_layer_norm, NEEDS_WEIGHT=needs_weight, BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )  # fmt: skip
    if not needs_weight:
        return grad_out, None, None
    return grad_out, shares[0].sum(dim=0), shares[1].sum(dim=0) if is_layer_norm else None


@_on_its_device
def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As ``plain.rotate_``; a row's numbers contiguous."""
    rows, _, heads, _ = qkv.shape
    half = cos.shape[1]
    _rotate_kernel[(rows, 2)](
        qkv, cos, sin, qkv.stride(0), heads, half,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half),
    )  # fmt: skip


@_on_its_device
def rotate_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """As ``plain.rotate_backward``; a head's numbers contiguous."""
    rows, heads, head_dim = grad_q.shape
    half = head_dim // 2
    grad = torch.empty((rows, 3, heads, head_dim), dtype=grad_q.dtype, device=grad_q.device)
    _rotate_backward_kernel[(rows, 3)](
        grad_q, grad_k, grad_v, cos, sin, grad,
        grad_q.stride(0), grad_q.stride(1), grad_k.stride(0), grad_k.stride(1), grad_v.stride(0), grad_v.stride(1),
        heads, half, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half),
    )  # fmt: skip
    return grad


@_on_its_device
def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """As ``plain.swiglu``; ``gate_up`` contiguous."""
    rows, width = out.shape
    _swiglu_kernel[(rows, triton.cdiv(width, _BLOCK))](gate_up, out, width, out.stride(0), BLOCK=_BLOCK)


@_on_its_device
def swiglu_backward(gate_up: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """As ``plain.swiglu_backward``; ``gate_up`` contiguous."""
    rows, width = grad_out.shape
    grad = torch.empty_like(gate_up)
    _swiglu_backward_kernel[(rows, triton.cdiv(width, _BLOCK))](
        gate_up, grad_out, grad, width, grad_out.stride(0), BLOCK=_BLOCK
    )
    return grad


@_on_its_device
def quick_gelu(inner: torch.Tensor, out: torch.Tensor) -> None:
    """As ``plain.quick_gelu``; ``inner`` contiguous."""
    rows, width = out.shape
    _quick_gelu_kernel[(rows, triton.cdiv(width, _BLOCK))](inner, out, width, out.stride(0), BLOCK=_BLOCK)


@_on_its_device
def quick_gelu_backward(inner: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """As ``plain.quick_gelu_backward``; ``inner`` contiguous."""
    rows, width = inner.shape
    grad = torch.empty_like(inner)
    _quick_gelu_backward_kernel[(rows, triton.cdiv(width, _BLOCK))](
        inner, grad_out, grad, width, grad_out.stride(0), BLOCK=_BLOCK
    )
    return grad


@_on_its_device
def absolute_maximum(x: torch.Tensor) -> torch.Tensor:
    """As ``plain.absolute_maximum``; a row's numbers contiguous."""
    rows, width = x.shape
    largest = torch.zeros((), dtype=torch.float32, device=x.device)
    programs = min(rows, _PROGRAMS_A_MULTIPROCESSOR * _num_multiprocessors(x.device))
    _absolute_maximum_kernel[(programs,)](x, largest, rows, width, x.stride(0), BLOCK=_BLOCK)
    return largest


@_on_its_device
def to_float8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As ``plain.to_float8``; a row's numbers contiguous."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    _to_float8_kernel[(rows, triton.cdiv(width, _BLOCK))](
        x, scale, out, width, x.stride(0), LARGEST=torch.finfo(dtype).max, BLOCK=_BLOCK
    )
    return out


def _warps(width: int) -> int:
    return 2 if width <= _NARROW else 4


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
