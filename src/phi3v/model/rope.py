"""LongRoPE with its factors chosen per sequence."""

import math
from typing import Any

import torch
from torch import nn

from .configuration_phi3_v import Phi3VConfig


class Phi3VRotaryEmbedding(nn.Module):
    """Cosines and sines of LongRoPE.

    A sequence whose positions stay below ``original_max_position_embeddings`` uses the short factors, a longer one the
    long factors, whatever its neighbours in the batch are; ``rope_mode`` ``short`` or ``long`` fixes the choice. The
    published code and transformers choose once for the whole batch, so that a long sample changes a short one's logits.

    The frequencies are made from the configuration in float32 and kept out of the module's buffers: casting the model
    to 16 bit must not round them.

    Source: LongRoPE (arXiv 2402.13753); scaling sqrt(1 + ln(M / L) / ln(L)) for M = maximal, L = original positions.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        head_dim = config.hidden_size // config.num_attention_heads
        self.original_positions = config.original_max_position_embeddings
        self.mode = config.rope_mode
        wavelengths = [rope["rope_theta"] ** (2 * index / head_dim) for index in range(head_dim // 2)]
        ones = [1.0] * len(wavelengths)
        self._inverse_frequencies = [
            [1.0 / (factor * wavelength) for factor, wavelength in zip(factors, wavelengths, strict=True)]
            for factors in (rope.get("short_factor") or ones, rope.get("long_factor") or ones)
        ]
        self.scaling = 1.0
        if rope.get("long_factor") and config.max_position_embeddings > self.original_positions:
            ratio = config.max_position_embeddings / self.original_positions
            self.scaling = math.sqrt(1 + math.log(ratio) / math.log(self.original_positions))
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def is_long(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Says per sequence whether the long factors apply. position_ids: (B, L) int64 -> (B,) bool."""
        if self.mode == "auto":
            return position_ids.amax(dim=1) >= self.original_positions
        return torch.full(position_ids.shape[:1], self.mode == "long", device=position_ids.device)

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: (B, L) int64 -> cosines and sines, (B, L, head_dim) of ``dtype``, computed in float32."""
        device = position_ids.device
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self._inverse_frequencies, dtype=torch.float32, device=device)
        inverse_frequencies = self._on_device[device][self.is_long(position_ids).long()]
        angles = position_ids[..., None].float() * inverse_frequencies[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
