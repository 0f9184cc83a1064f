"""Layers of both towers for training: forward and backward by hand, so that each keeps only what it must.

A layer takes the residual stream and what its predecessor adds to it, apart: the sum is formed while it is normalised.
Kept for the backward pass are the summed stream twice, rotated queries, keys and values, the attention's result and the
MLP's inner product, 68 kB a position of a published decoder layer in 16 bit, and unless memory is to be saved both
normalised streams and the MLP's activations, 28 kB more, which are cheap to compute again. A layer that is recomputed
keeps its two inputs only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from . import kernels
from .compute import Checkpointing
from .linear.products import Gradients, ProjectionCompute
from .linear.projection import Projection
from .packed_attention import PackedAttention, Stats

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Stats]]
"""Queries, keys, values (T, heads, head_dim) -> the result of that shape, and what its backward pass needs."""

Saved = tuple[Any, ...]
"""Tensors that a layer's backward pass reads; None in place of those that it makes again."""


class Rope(NamedTuple):
    """Cosines and sines of every position, (T, head_dim / 2) float32."""

    cos: torch.Tensor
    sin: torch.Tensor


class Norm:
    """RMSNorm or LayerNorm behind an addition.

    Args:
        module: holds weight, perhaps bias, and epsilon. Tensors are read from it at every use: what shards a model puts
            others in their place.
        eps: epsilon.
    """

    def __init__(self, module: nn.Module, eps: float) -> None:
        self.module = module
        self.eps = eps

    @property
    def weight(self) -> nn.Parameter:
        """(H,)."""
        return self.module.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> nn.Parameter | None:
        """(H,); RMSNorm has none."""
        return getattr(self.module, "bias", None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [one for one in (self.weight, self.bias) if one is not None and one.requires_grad]

    def add(
        self, residual: torch.Tensor, delta: torch.Tensor | None, reader: Projection, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum (T, H) and, in a buffer for ``reader``, the normalised sum in ``dtype``."""
        normed = reader.buffer(len(residual), residual.new_empty((), dtype=dtype))
        hidden = kernels.for_device(residual.device).add_norm(
            residual, delta, self.weight.detach(), None if self.bias is None else self.bias.detach(), self.eps,
            normed[:, : residual.shape[1]],
        )  # fmt: skip
        return hidden, normed

    def backward(
        self, hidden: torch.Tensor, grad_normed: torch.Tensor, grad_hidden: torch.Tensor, gradients: Gradients
    ) -> torch.Tensor:
        """Returns the sum's gradient (T, H); ``grad_hidden`` is what reaches it along the stream."""
        total, grad_weight, grad_bias = kernels.for_device(hidden.device).norm_backward(
            hidden, self.weight.detach(), self.eps, grad_normed, grad_hidden,
            is_layer_norm=self.bias is not None, needs_weight=bool(self.parameters),
        )  # fmt: skip
        if self.weight.requires_grad:
            gradients[self.weight] = grad_weight.to(self.weight.dtype)
        if self.bias is not None and self.bias.requires_grad:
            gradients[self.bias] = grad_bias.to(self.bias.dtype)
        return total


class Layer:
    """A decoder or CLIP layer's computation on packed rows; the parameters stay the module's.

    Args:
        module: the layer. Its dropout is not computed: the published model has none.
    """

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, PackedDecoderLayer | PackedClipLayer)
        self.module = module
        if isinstance(module, PackedClipLayer):
            eps = module.layer_norm1.eps
            self._activation = "quick_gelu"
        else:
            eps = module.input_layernorm.variance_epsilon
            self._activation = "swiglu"
        self._norm1, self._norm2 = (Norm(norm, eps) for norm in _norms(module))
        qkv, out, up, down = _linears(module)
        # Attention gives its result in memory of its own: its reader's adapters do without room in it.
        self._qkv, self._out = Projection(qkv), Projection(out, has_room=False)
        self._up, self._down = Projection(up), Projection(down)
        self._head_dim = module.self_attn.head_dim

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        parts = (self._norm1, self._norm2, *self._projections)
        return [parameter for part in parts for parameter in part.parameters]

    @property
    def has_dropout(self) -> bool:
        """Whether an adapter drops some of its input now."""
        return any(projection.dropout for projection in self._projections)

    def is_of(self, module: nn.Module) -> bool:
        """Says whether this is still made from the module's norms and linear layers, computing the same adapters."""
        return (
            module is self.module
            and all(own.module is norm for own, norm in zip((self._norm1, self._norm2), _norms(module), strict=True))
            and all(own.is_of(sources) for own, sources in zip(self._projections, _linears(module), strict=True))
        )

    def forward(
        self, residual: torch.Tensor, delta: torch.Tensor | None, call: "Call", attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor, Saved]:
        """Runs the layer.

        Args:
            residual: (T, H) residual stream.
            delta: (T, H) that the layer before adds to it; None in the first layer.
            call: what all layers of a tower share.
            attend: attention.

        Returns:
            The stream and what this layer adds to it, (T, H) each or (K, H) where ``call.rows`` asks for K rows; and
            what ``backward`` needs.
        """
        kernel = kernels.for_device(residual.device)
        hidden, normed1 = self._norm1.add(residual, delta, self._qkv, call.dtype)
        qkv = self._qkv.forward(normed1, call.compute, call.seed).unflatten(1, (3, -1, self._head_dim))
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        if call.rope is not None:
            kernel.rotate_(qkv, *call.rope)
        attended, stats = attend(q, k, v)
        seen, stream = attended.flatten(1), hidden
        if call.rows is not None:
            seen, stream = seen[call.rows], stream[call.rows]
        out = self._out.forward(seen, call.compute, call.seed + 1)
        stream, normed2 = self._norm2.add(stream, out, self._up, call.dtype)
        inner = self._up.forward(normed2, call.compute, call.seed + 2)
        activated = self._activated(inner)
        added = self._down.forward(activated, call.compute, call.seed + 3)
        cheap = (normed1, normed2, activated) if call.checkpointing == "off" else (None, None, None)
        return stream, added, (hidden, qkv, attended, stream, inner, *cheap, *stats)

    def backward(
        self,
        saved: Saved,
        grad_stream: torch.Tensor,
        grad_added: torch.Tensor,
        call: "Call",
        gradients: Gradients,
        *,
        needs_input: bool = True,
    ) -> torch.Tensor | None:
        """Carries gradients back through ``forward``.

        Args:
            saved: as the forward returned it.
            grad_stream: (T or K, H).
            grad_added: (T or K, H).
            call: as in the forward.
            gradients: where the parameters' gradients are collected.
            needs_input: whether the gradient of the inputs is wanted.

        Returns:
            The gradient (T, H) of the residual stream and of the delta, which are the same; None if not wanted.
        """
        hidden, qkv, attended, stream, inner, normed1, normed2, activated, *stats = saved
        kernel = kernels.for_device(hidden.device)
        compute, seed, is_filled = call.compute, call.seed, normed1 is not None
        if not is_filled:
            activated = self._activated(inner)
        grad = self._down.backward(activated, grad_added, compute, gradients, seed=seed + 3, is_filled=is_filled)
        del activated
        grad_inner = getattr(kernel, f"{self._activation}_backward")(inner, grad)
        if not is_filled:
            normed2 = self._norm2.add(stream, None, self._up, call.dtype)[1]
        grad = self._up.backward(
            normed2, grad_inner, compute, gradients, seed=seed + 2, is_filled=is_filled, output=inner
        )
        del grad_inner, normed2
        grad_stream = self._norm2.backward(stream, grad, grad_stream.contiguous(), gradients)
        seen = attended.flatten(1) if call.rows is None else attended.flatten(1)[call.rows]
        grad = self._out.backward(seen, grad_stream.to(call.dtype), compute, gradients, seed=seed + 1)
        if call.rows is not None:
            grad = torch.zeros_like(attended.flatten(1)).index_copy_(0, call.rows, grad)
            grad_stream = torch.zeros_like(hidden).index_copy_(0, call.rows, grad_stream)
        grad = grad.unflatten(1, attended.shape[1:])
        parts = call.attention.backward(grad, qkv[:, 0], qkv[:, 1], qkv[:, 2], attended, stats)
        rope = call.rope
        grad_qkv = torch.stack(parts, dim=1) if rope is None else kernel.rotate_backward(*parts, *rope)
        del parts
        if not is_filled:
            normed1 = self._norm1.add(hidden, None, self._qkv, call.dtype)[1]
        needs_normed = needs_input or bool(self._norm1.parameters)
        grad = self._qkv.backward(
            normed1, grad_qkv.flatten(1), compute, gradients,
            needs_input=needs_normed, seed=seed, is_filled=is_filled,
        )  # fmt: skip
        if not needs_normed:
            return None
        return self._norm1.backward(hidden, grad, grad_stream, gradients)

    @property
    def _projections(self) -> tuple[Projection, ...]:
        return self._qkv, self._out, self._up, self._down

    def _activated(self, inner: torch.Tensor) -> torch.Tensor:
        """Returns the activation of the MLP's inner product, in a buffer for the down projection."""
        out = self._down.buffer(len(inner), inner)
        width = out.shape[1] - self._down.room
        getattr(kernels.for_device(inner.device), self._activation)(inner, out[:, :width])
        return out


def _norms(module: Any) -> tuple[nn.Module, nn.Module]:
    """Returns a layer's norms: in front of attention and of the MLP."""
    if isinstance(module, PackedClipLayer):
        return module.layer_norm1, module.layer_norm2
    return module.input_layernorm, module.post_attention_layernorm


def _linears(module: Any) -> tuple[list[nn.Module], ...]:
    """Returns a layer's linear layers: queries, keys and values; attention's output; the MLP's two."""
    attention, mlp = module.self_attn, module.mlp
    if isinstance(module, PackedClipLayer):
        return [attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [mlp.fc1], [mlp.fc2]
    return [attention.qkv_proj], [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj]


class Call(NamedTuple):
    """What the layers of a tower share in one forward and backward.

    Attributes:
        attention: over the row's pieces.
        compute: how products are formed.
        dtype: of products.
        rope: rotations; None in CLIP.
        rows: (K,) int64, the only positions whose result the last layer is asked for; None: all.
        checkpointing: what the backward pass computes again, as in ``Compute``.
        seed: of the adapters' dropout in this layer.
    """

    attention: PackedAttention
    compute: ProjectionCompute
    dtype: torch.dtype
    rope: Rope | None = None
    rows: torch.Tensor | None = None
    checkpointing: Checkpointing = "off"
    seed: int = 0


class _LayerFunction(torch.autograd.Function):
    """A layer in autograd's eyes: its inputs and trainable parameters in, stream and addition out."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        layer: Layer,
        call: Call,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        *parameters: nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.layer, ctx.call, ctx.parameters = layer, call, parameters
        ctx.delta_dtype = None if delta is None else delta.dtype
        stream, added, saved = layer.forward(residual, delta, call, call.attention.forward)
        ctx.save_for_backward(*((residual, delta) if call.checkpointing == "full" else saved))
        return stream, added

    @staticmethod
    @once_differentiable  # autograd would take the gradients for constants
    def backward(ctx: Any, grad_stream: torch.Tensor, grad_added: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer: Layer = ctx.layer
        call: Call = ctx.call
        saved = ctx.saved_tensors
        if call.checkpointing == "full":
            residual, delta = saved
            _, _, saved = layer.forward(residual, delta, call, call.attention.forward)
        gradients: Gradients = {}
        needs_input = any(ctx.needs_input_grad[2:4])
        grad = layer.backward(saved, grad_stream, grad_added, call, gradients, needs_input=needs_input)
        grad_delta = None if grad is None or ctx.delta_dtype is None else grad.to(ctx.delta_dtype)
        return None, None, grad, grad_delta, *(gradients.get(parameter) for parameter in ctx.parameters)


def run_layer(
    layer: Layer, residual: torch.Tensor, delta: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a layer with gradients; arguments and results as ``Layer.forward``."""
    if layer.has_dropout:
        # From torch's global generator, as a dropout layer's own draws would be; recomputation draws nothing again.
        call = call._replace(seed=int(torch.randint(2**62, ())))
    if call.compute.is_sharded and not residual.requires_grad and layer.parameters:
        # DeepSpeed knows by the gradient of a module's input when the module's own are complete.
        residual = residual.detach().requires_grad_()
    return layer.module(residual, delta, packed=(layer, call))


class _PackedCalls:
    """Lets a layer of transformers be called with a packed row, too.

    The computation is ``Layer``'s and would not need it. What shards a model does: it gathers a module's parameters
    when the module is called, and lets go of them when its backward pass is over.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, packed: tuple[Layer, Call] | None = None, **kwargs: Any
    ) -> Any:
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        layer, call = packed
        (delta,) = args
        return _LayerFunction.apply(layer, call, hidden_states, delta, *layer.parameters)


class PackedDecoderLayer(_PackedCalls, Phi3DecoderLayer):
    """A decoder layer."""


class PackedClipLayer(_PackedCalls, CLIPEncoderLayer):
    """A layer of CLIP."""
