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
from workers.models.layers import LayerNorm, TokenEmbedding, rotary_tables
from workers.models.network import Network

# The released code gives each block its default of 28 layers, however many the model has.
RESIDUAL_SCALE: Final = math.sqrt(2 * 28)


class Attention(nn.Module):
    """Multi-head attention with a fused projection and two-dimensional rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.scale = config.head_dim**-0.5
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

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
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(kernels.gelu(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layernorm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layernorm_eps)
        self.mlp = MLP(config)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, config.layernorm_eps)


class ChatGLM(Network):
    """The network. `lm_head` and `transformer.word_embeddings` share one tensor when the config ties them."""

    final_norm = "transformer.final_layernorm"
    embedding = "transformer.word_embeddings"
    head = "lm_head"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    def _rotary_tables(
        self, num_positions: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_tables(num_positions, self.config.head_dim, dtype, device)

    def forward(
        self, batch: Batch, cache: KVCache | None = None, *, all_positions: bool = False
    ) -> torch.Tensor:
        rotary = self.rotary()
        layers = cast(Sequence[Layer], self.transformer.layers)
        hidden = self.transformer.word_embeddings(batch.token_ids).to(self.dtype)
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
