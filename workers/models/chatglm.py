"""ChatGLM-6B's network: packed token ids to logits (CHATGLM.md A2 to A7). Knows nothing about requests or sampling.

Parameters have the released checkpoint's names. Without a cache a packed prefill is differentiable, so the same module
trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import nn

from workers.models import kernels
from workers.models.batch import Batch, KVCache
from workers.models.config import ModelConfig
from workers.models.layers import LayerNorm, LinearFactory, plain_linear, rotary_tables

# The released code gives each block its default of 28 layers, however many the model has.
RESIDUAL_SCALE: Final = math.sqrt(2 * 28)


class Attention(nn.Module):
    """Multi-head attention with a fused projection and two-dimensional rotary positions."""

    def __init__(self, config: ModelConfig, name: str, make_linear: LinearFactory) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.scale = config.head_dim**-0.5
        self.query_key_value = make_linear(f"{name}.query_key_value", hidden, 3 * hidden)
        self.dense = make_linear(f"{name}.dense", hidden, hidden)

    def forward(
        self,
        x: torch.Tensor,
        batch: Batch,
        rotary: tuple[torch.Tensor, torch.Tensor],
        layer_cache: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        keys, values = layer_cache if layer_cache is not None else (None, None)
        slots = batch.slots if layer_cache is not None else None
        cos, sin = rotary
        q, k, v = kernels.rotate_and_store(
            self.query_key_value(x), cos, sin, batch.positions, keys, values, slots
        )
        if batch.is_prefill:
            attended = kernels.attend_prefill(
                q, k, v, batch.query_starts, batch.prefix_lens, batch.max_query_len, self.scale
            )
        else:
            if keys is None or values is None:
                raise ValueError("a decode needs a cache")
            attended = kernels.attend_decode(
                q, keys, values, batch.block_tables, batch.kv_lens, batch.max_kv_len, self.scale
            )
        return self.dense(attended.reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, name: str, make_linear: LinearFactory) -> None:
        super().__init__()
        self.dense_h_to_4h = make_linear(
            f"{name}.dense_h_to_4h", config.hidden_size, config.inner_hidden_size
        )
        self.dense_4h_to_h = make_linear(
            f"{name}.dense_4h_to_h", config.inner_hidden_size, config.hidden_size
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(kernels.gelu(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, name: str, make_linear: LinearFactory) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layernorm_eps)
        self.attention = Attention(config, f"{name}.attention", make_linear)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layernorm_eps)
        self.mlp = MLP(config, f"{name}.mlp", make_linear)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, make_linear: LinearFactory) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, f"transformer.layers.{index}", make_linear) for index in range(config.num_layers)
        )
        self.final_layernorm = LayerNorm(config.hidden_size, config.layernorm_eps)


class ChatGLM(nn.Module):
    """The network. `lm_head` and `transformer.word_embeddings` share one tensor when the config ties them."""

    def __init__(self, config: ModelConfig, make_linear: LinearFactory = plain_linear) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, make_linear)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rotary_dtype: torch.dtype | None = None
        self._max_positions = config.max_sequence_length + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.word_embeddings.weight.device

    def set_max_positions(self, max_positions: int) -> None:
        """Sequences of up to so many tokens can be run; config.json's max_sequence_length otherwise."""
        self._max_positions = max_positions + 1
        self._rotary = None

    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), built for the model's present dtype and device."""
        if self._rotary is None or (self._rotary_dtype, self._rotary[0].device) != (self.dtype, self.device):
            self._rotary = rotary_tables(self._max_positions, self.config.head_dim, self.dtype, self.device)
            self._rotary_dtype = self.dtype
        return self._rotary

    def forward(
        self, batch: Batch, cache: KVCache | None = None, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Logits in the model's dtype: [B, vocab] for the last token of each sequence, or [T, vocab] for all tokens.

        With a cache, keys and values of all tokens are written to it. A prefill attends within the batch alone; a decode
        attends to the cache.
        """
        rotary = self.rotary()
        layers = cast(Sequence[Layer], self.transformer.layers)
        hidden = self.transformer.word_embeddings(batch.token_ids)
        norm = layers[0].input_layernorm
        normed = kernels.layer_norm(hidden, norm.weight, norm.bias, norm.eps)
        for index, layer in enumerate(layers):
            layer_cache = (cache.keys[index], cache.values[index]) if cache is not None else None
            branch = layer.attention(normed, batch, rotary, layer_cache)
            normed = _residual_norm(branch, normed, layer.post_attention_layernorm)
            branch = layer.mlp(normed)
            is_last = index + 1 == len(layers)
            norm = self.transformer.final_layernorm if is_last else layers[index + 1].input_layernorm
            normed = _residual_norm(branch, normed, norm)
        if batch.is_prefill and not all_positions:
            normed = normed[batch.query_starts[1:].long() - 1]
        return self.lm_head(normed)


def _residual_norm(branch: torch.Tensor, normed: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    return kernels.residual_layer_norm(branch, normed, RESIDUAL_SCALE, norm.weight, norm.bias, norm.eps)
