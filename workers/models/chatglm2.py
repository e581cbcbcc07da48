"""ChatGLM2-6B's network: packed token ids to logits (CHATGLM.md B2 to B5). Knows nothing about requests or sampling.

Parameters have the released checkpoint's names. Without a cache a packed prefill is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from workers.models import kernels
from workers.models.batch import Batch, KVCache
from workers.models.config import ModelConfig
from workers.models.layers import RMSNorm, TokenEmbedding, pair_rotary_tables
from workers.models.network import Network


class SelfAttention(nn.Module):
    """Grouped attention: all queries, then the groups' keys and values, from one fused projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.num_kv_heads = config.num_kv_heads
        width = config.num_heads * config.head_dim
        fused = width + 2 * config.num_kv_heads * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, fused)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

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
        q, k, v = kernels.rotate_pairs_and_store(
            self.query_key_value(x), self.num_kv_heads, cos, sin, batch.positions, keys, values, slots
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
        return self.dense(attended.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.inner_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(kernels.swiglu(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_eps)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_eps)
        self.mlp = MLP(config)


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_eps)


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class ChatGLM2(Network):
    """The network. Embedding and output layer are two tensors, unless the config ties them."""

    final_norm = "transformer.encoder.final_layernorm"
    embedding = "transformer.embedding.word_embeddings"
    head = "transformer.output_layer"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        if config.tie_word_embeddings:
            self.transformer.output_layer.weight = self.transformer.embedding.word_embeddings.weight

    def _rotary_tables(
        self, num_positions: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return pair_rotary_tables(num_positions, self.config.head_dim, dtype, device)

    def forward(
        self, batch: Batch, cache: KVCache | None = None, *, all_positions: bool = False
    ) -> torch.Tensor:
        rotary = self.rotary()
        x = self.transformer.embedding.word_embeddings(batch.token_ids).to(self.dtype)
        for index, layer in enumerate(cast(Sequence[Layer], self.transformer.encoder.layers)):
            layer_cache = (cache.keys[index], cache.values[index]) if cache is not None else None
            x = x + layer.self_attention(_norm(x, layer.input_layernorm), batch, rotary, layer_cache)
            x = x + layer.mlp(_norm(x, layer.post_attention_layernorm))
        if batch.is_prefill and not all_positions:
            x = x[batch.query_starts[1:].long() - 1]
        return self.transformer.output_layer(_norm(x, self.transformer.encoder.final_layernorm))


def _norm(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    return kernels.rms_norm(x, norm.weight, norm.eps)
