"""LongRoPE with its factors chosen per sequence."""

import math
from typing import Any

import torch
from torch import nn

from .configuration_phi3_v import Phi3VConfig


class Phi3VRotaryEmbedding(nn.Module):
    """Cosines and sines of LongRoPE.

    A sequence whose positions stay below ``original_max_position_embeddings`` uses the short factors, a longer one the
    long factors, whatever its neighbours in the batch or in its row are; ``rope_mode`` ``short`` or ``long`` fixes the
    choice. The published code and transformers choose once for the whole batch, so that a long sample changes a short
    one's logits. In a packed row a sequence begins wherever a position is not the one before plus one.

    The frequencies are made from the configuration in float32 and kept out of the module's buffers: casting the model
    to 16 bit must not round them.

    Source: LongRoPE (arXiv 2402.13753); scaling sqrt(1 + ln(M / L) / ln(L)) for M = maximal, L = original positions.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.original_positions = config.original_max_position_embeddings
        self._config = config
        self.theta = rope["rope_theta"]
        ones = [1.0] * (self.head_dim // 2)
        self.factors = [rope.get("short_factor") or ones, rope.get("long_factor") or ones]
        self.scaling = 1.0
        if rope.get("long_factor") and config.max_position_embeddings > self.original_positions:
            ratio = config.max_position_embeddings / self.original_positions
            self.scaling = math.sqrt(1 + math.log(ratio) / math.log(self.original_positions))
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @property
    def mode(self) -> str:
        """How factors are chosen: as the configuration says now."""
        return self._config.rope_mode

    def is_long(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Says for every position whether its sequence uses the long factors: (B, L) int64 -> (B, L) bool."""
        if self.mode != "auto":
            return torch.full_like(position_ids, self.mode == "long", dtype=torch.bool)
        begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
        sequence = begins.cumsum(dim=1)
        last = torch.zeros(position_ids.shape[0], position_ids.shape[1] + 1, dtype=torch.int64, device=sequence.device)
        last.scatter_reduce_(1, sequence, position_ids, reduce="amax")
        return last.gather(1, sequence) >= self.original_positions

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: (B, L) int64 -> cosines and sines, (B, L, head_dim) of ``dtype``, computed in float32."""
        inverse_frequencies = self._frequencies_on(position_ids.device)[self.is_long(position_ids).long()]
        angles = position_ids[..., None].float() * inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    @torch.no_grad()
    def rotations(self, position_ids: torch.Tensor, is_long: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines of a packed row, whose sequences' lengths are known.

        Args:
            position_ids: (T,) int64.
            is_long: (T,) bool, whether the position's sequence outgrows the short factors; a fixed mode decides itself.

        Returns:
            (T, head_dim / 2) float32 each; the other half of a head's rotation is the same.
        """
        if self.mode != "auto":
            is_long = torch.full_like(is_long, self.mode == "long")
        angles = position_ids[:, None].float() * self._frequencies_on(position_ids.device)[is_long.long()]
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def _frequencies_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = self._inverse_frequencies().to(device)
        return self._on_device[device]

    def _inverse_frequencies(self) -> torch.Tensor:
        """Returns the short and the long ones, (2, head_dim / 2) float32.

        In float32 step by step, as the published code: what is exact here would be another angle at far positions.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        return 1.0 / (torch.tensor(self.factors, dtype=torch.float32, device="cpu") * self.theta**exponents)
