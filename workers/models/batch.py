"""What one forward pass runs on, and the KV cache that it reads and writes. Shared by models, kernels and the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class KVCache:
    """Keys and values of all layers in blocks of `block_size` tokens. Block 0 is never given to a sequence: padding
    rows of a captured graph write there.

    keys, values: [num_layers, num_blocks, num_kv_heads, block_size, head_dim]. Keys are stored rotated. In int8 each vector
    has a scale, in fp16: key_scales, value_scales, without the last dimension.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]


@dataclass(slots=True)
class Batch:
    """The tokens of several sequences, packed one after another. T tokens, B sequences.

    In a prefill each sequence brings all its tokens (prompt, then emitted ones after a takeover or a preemption); in a
    decode it brings one, so T = B.
    """

    is_prefill: bool
    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[2, T] int64: first and block positions (CHATGLM.md A6). One-dimensional models use row 0."""
    slots: torch.Tensor
    """[T] int64: where the token's key and value go, `block * block_size + offset`."""
    kv_lens: torch.Tensor
    """[B] int32: tokens in the cache of each sequence once this pass has written."""
    block_tables: torch.Tensor
    """[B, max_blocks] int32, padded with 0. Decode only."""
    query_starts: torch.Tensor
    """[B + 1] int32: sequence b owns tokens query_starts[b] .. query_starts[b + 1]."""
    prefix_lens: torch.Tensor
    """[B] int32: the first so many tokens see each other in both directions (0: plain causal). Prefill only."""
    max_query_len: int = 1
    """The longest sequence's number of tokens in this pass, a host value."""
    max_kv_len: int = 0
    """A host-side bound for kv_lens."""
    adapter_slots: torch.Tensor | None = None
    """[T] int64: each token's slot in the adapter bank, 0 for none. None: no token of the batch has an adapter."""
