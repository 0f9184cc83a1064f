"""The element-wise pieces of both towers in plain PyTorch: what the Triton kernels compute, and what a CPU runs.

Shapes: T rows (positions), widths as named. Everything is computed in float32 and rounded once, to the type of the
tensor that it is written to. Backward functions take what their forward read, so that nothing else has to be kept.
"""

import torch


def add_norm(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    normed: torch.Tensor,
) -> torch.Tensor:
    """Adds a layer's result to the residual stream and normalises the sum.

    Args:
        residual: (T, H).
        delta: (T, H) to add; None: nothing.
        weight: (H,) scale.
        bias: (H,): LayerNorm; None: RMSNorm.
        eps: added to the variance (LayerNorm) or the mean square (RMSNorm).
        normed: (T, H) to write to; rows may be apart further than H.

    Returns:
        ``residual + delta``, (T, H) of residual's type; ``residual`` itself without a delta.
    """
    hidden = residual if delta is None else (residual.float() + delta.float()).to(residual.dtype)
    scaled = _normalised(hidden.float(), eps, centred=bias is not None)[0] * weight.float()
    normed.copy_(scaled if bias is None else scaled + bias.float())
    return hidden


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
    """Carries a gradient back through ``add_norm``.

    Args:
        hidden: (T, H) that was normalised.
        weight: (H,).
        eps: as in the forward.
        grad_normed: (T, H).
        grad_hidden: (T, H) gradient that reaches the sum along the residual stream.
        is_layer_norm: LayerNorm, else RMSNorm.
        needs_weight: whether the gradients of weight and bias are wanted.

    Returns:
        The sum's gradient (T, H) in the type of ``grad_hidden``, then those of weight and bias, (H,) float32, or None.
    """
    normalised, scale = _normalised(hidden.float(), eps, centred=is_layer_norm)
    grad = grad_normed.float()
    scaled = grad * weight.float()
    inner = scaled - normalised * (scaled * normalised).mean(dim=-1, keepdim=True)
    if is_layer_norm:
        inner = inner - scaled.mean(dim=-1, keepdim=True)
    total = (grad_hidden.float() + inner * scale).to(grad_hidden.dtype)
    if not needs_weight:
        return total, None, None
    return total, (grad * normalised).sum(dim=0), grad.sum(dim=0) if is_layer_norm else None


def _normalised(hidden: torch.Tensor, eps: float, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if centred:
        hidden = hidden - hidden.mean(dim=-1, keepdim=True)
    scale = torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True) + eps)
    return hidden * scale, scale


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates queries and keys in place, as RoPE does.

    Args:
        qkv: (T, 3, heads, head_dim) queries, keys, values.
        cos: (T, head_dim / 2) float32.
        sin: (T, head_dim / 2) float32.
    """
    half = cos.shape[1]
    first, second = qkv[:, :2, :, :half].float(), qkv[:, :2, :, half:].float()
    cos, sin = cos[:, None, None], sin[:, None, None]
    # Both halves before either is written: in float32 the reads above are views.
    qkv[:, :2] = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype)


def rotate_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Carries gradients (T, heads, head_dim) of rotated queries and keys, and values, back: (T, 3, heads, head_dim)."""
    grad = torch.stack([grad_q, grad_k, grad_v], dim=1)
    rotate_(grad, cos, -sin)
    return grad


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes up * silu(gate) of (T, 2 I), gate first, to ``out`` (T, I)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(up * torch.nn.functional.silu(gate))


def swiglu_backward(gate_up: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """Carries a gradient (T, I) back to gate and up, (T, 2 I) of their type."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    grad = grad_out.float()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, grad * gate * sigmoid], dim=-1).to(gate_up.dtype)


def quick_gelu(inner: torch.Tensor, out: torch.Tensor) -> None:
    """Writes x * sigmoid(1.702 x) of (T, M) to ``out`` (T, M)."""
    wide = inner.float()
    out.copy_(wide * torch.sigmoid(1.702 * wide))


def quick_gelu_backward(inner: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """Carries a gradient (T, M) back, to the type of ``inner``."""
    wide = inner.float()
    sigmoid = torch.sigmoid(1.702 * wide)
    return (grad_out.float() * sigmoid * (1 + 1.702 * wide * (1 - sigmoid))).to(inner.dtype)


def absolute_maximum(x: torch.Tensor) -> torch.Tensor:
    """Returns the largest absolute value of (T, K), () float32."""
    return x.abs().amax().float()


def to_float8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``x / scale`` of (T, K) in a float8 type, contiguous, numbers beyond its range at its ends."""
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)
