"""What the networks have in common: dtype, device, and rotary tables for as many positions as an engine allows.

Knows nothing about layers.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from workers.models.batch import Batch, KVCache
from workers.models.config import ModelConfig


class Network(nn.Module):
    """A network from packed token ids to logits. Parameters have the released checkpoint's names."""

    final_norm: str
    """The last norm's path. It is kept in the dtype of the computation, whatever form larger parameters have."""
    embedding: str
    """The path of the embedding."""
    head: str
    """The path of the layer that gives the logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rotary_dtype: torch.dtype | None = None
        self._max_positions = config.max_sequence_length + 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation, the cache and the logits."""
        return self.get_parameter(f"{self.final_norm}.weight").dtype

    @property
    def device(self) -> torch.device:
        return self.get_parameter(f"{self.final_norm}.weight").device

    def set_max_positions(self, max_positions: int) -> None:
        """Sequences of up to so many tokens can be run; config.json's maximum otherwise."""
        self._max_positions = max_positions + 1
        self._rotary = None

    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), built for the model's present dtype and device."""
        dtype, device = self.dtype, self.device
        if self._rotary is None or (self._rotary_dtype, self._rotary[0].device) != (dtype, device):
            self._rotary = self._rotary_tables(self._max_positions, dtype, device)
            self._rotary_dtype = dtype
        return self._rotary

    @abstractmethod
    def _rotary_tables(
        self, num_positions: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [num_positions, head_dim / 4] float32."""

    @abstractmethod
    def forward(
        self, batch: Batch, cache: KVCache | None = None, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Logits in the model's dtype: [B, vocab] for the last token of each sequence, or [T, vocab] for all tokens.

        With a cache, keys and values of all tokens are written to it. A prefill attends within the batch alone; a decode
        attends to the cache.
        """
