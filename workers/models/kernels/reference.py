"""The operators of the layers in plain PyTorch: every device, every dtype, differentiable.

They define what each operator means; faster versions are tested against them. Shapes: T tokens packed one after another,
B sequences, N heads, D values a head, H = N * D. Keys and values may have fewer heads, G: head h then uses h // (N / G).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer normalisation over the last dimension. [T, H] -> [T, H]"""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def residual_layer_norm(
    branch: torch.Tensor,
    normed: torch.Tensor,
    alpha: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """LayerNorm(alpha * normed + branch): ChatGLM-6B's residual is the normalised input (CHATGLM.md A3).

    [T, H], [T, H] -> [T, H]
    """
    return layer_norm(torch.add(branch, normed, alpha=alpha), weight, bias, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in float32 up to the last rounding (CHATGLM.md B3). [T, H] -> [T, H]"""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SiLU(first half) * second half (CHATGLM.md B3). [T, 2F] -> [T, F]"""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x / 2 * (1 + tanh(0.7978845608028654 * x * (1 + 0.044715 x^2)))"""
    return F.gelu(x, approximate="tanh")


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    layer_keys: torch.Tensor | None,
    layer_values: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits the fused projection, rotates queries and keys, and writes keys and values to the cache when there is one.

    qkv: [T, 3H], for each head its D queries, D keys, D values. cos, sin: [max positions, D / 4] float32.
    positions: [2, T] int64; the first row rotates the first half of a head, the second row the second (CHATGLM.md A4).
    layer_keys, layer_values: [num_blocks, N, block_size, D]; slots: [T] int64, block * block_size + offset.
    Returns q, k, v: [T, N, D].
    """
    num_tokens, width = qkv.shape
    head_dim = cos.shape[1] * 4
    heads = qkv.view(num_tokens, width // (3 * head_dim), 3, head_dim)
    # [T, 1, 1, 2, D/4]: one angle for each pair of values of each half.
    angle_cos = cos[positions].transpose(0, 1)[:, None, None]
    angle_sin = sin[positions].transpose(0, 1)[:, None, None]
    q, k = _rotate(heads[:, :, :2], angle_cos, angle_sin).unbind(2)
    v = heads[:, :, 2]
    _store(k, v, layer_keys, layer_values, slots)
    return q, k, v


def rotate_pairs_and_store(
    qkv: torch.Tensor,
    num_kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    layer_keys: torch.Tensor | None,
    layer_values: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for ChatGLM2-6B: rotates the first half of each head in pairs of neighbours (CHATGLM.md B4).

    qkv: [T, (N + 2G) D], all queries, then all keys, then all values. Only the first row of positions is used. Returns
    q: [T, N, D], k, v: [T, G, D].
    """
    head_dim = cos.shape[1] * 4
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    # [T, 1, D/4]
    angle_cos, angle_sin = cos[positions[0]].unsqueeze(1), sin[positions[0]].unsqueeze(1)
    q, k = _rotate_pairs(q, angle_cos, angle_sin), _rotate_pairs(k, angle_cos, angle_sin)
    _store(k, v, layer_keys, layer_values, slots)
    return q, k, v


def _store(
    k: torch.Tensor,
    v: torch.Tensor,
    layer_keys: torch.Tensor | None,
    layer_values: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> None:
    if layer_keys is None or layer_values is None or slots is None:
        return
    block_size = layer_keys.shape[2]
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    # A broken sequence must not leave NaN to the next owner of its blocks: no mask stops 0 * NaN.
    layer_keys[blocks, :, offsets] = k.nan_to_num()
    layer_values[blocks, :, offsets] = v.nan_to_num()


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Values 2j and 2j + 1 of the first half go together; the second half stays."""
    num_tokens, num_heads, head_dim = x.shape
    rotated, kept = x.split(head_dim // 2, dim=-1)
    if x.dtype == torch.float16:
        # Products rounded as the original rounds them: then a whole prompt's logits are its own to the last bit.
        cos, sin = cos.half(), sin.half()
    first, second = rotated.reshape(num_tokens, num_heads, head_dim // 4, 2).to(cos.dtype).unbind(-1)
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), kept), dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each half of the last dimension rotated in NeoX's order: value j of a half goes with value j + D/4."""
    halves = x.unflatten(-1, (2, 2, -1)).to(cos.dtype)
    first, second = halves.unbind(-2)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return rotated.to(x.dtype).flatten(-3)


def attend_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    """Attention of each sequence's tokens to each other: token i sees token j when j <= i or j < prefix_len.

    q: [T, N, D]; k, v: [T, N or G, D]; query_starts: [B + 1]; prefix_lens: [B]. Returns [T, N, D].
    """
    if (num_shared := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(num_shared, dim=1) for x in (k, v))
    starts = query_starts.tolist()
    out = []
    for begin, end, prefix_len in zip(starts, starts[1:], prefix_lens.tolist(), strict=False):
        # [1, N, S, D]; with the prefix as long as the sequence, nothing is hidden.
        one_q, one_k, one_v = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        if prefix_len > 0:
            index = torch.arange(end - begin, device=q.device)
            visible = (index <= index.unsqueeze(1)) | (index < prefix_len)
            attended = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=visible, scale=scale)
        else:
            attended = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale)
        out.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(out)


def attend_decode(
    q: torch.Tensor,
    layer_keys: torch.Tensor,
    layer_values: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token of each sequence to its cache, which already holds that token and only finite values.

    q: [B, N, D]; layer_keys, layer_values: [num_blocks, N or G, block_size, D]; block_tables: [B, max_blocks];
    kv_lens: [B].
    Returns [B, N, D].
    """
    batch_size, num_heads, head_dim = q.shape
    _, num_groups, block_size, _ = layer_keys.shape
    num_blocks, num_shared = -(-max_kv_len // block_size), num_heads // num_groups
    tables = block_tables[:, :num_blocks].flatten()
    # One product for each head of each block, in the order in which the blocks lie: any other would copy them again.
    shape = (batch_size * num_blocks * num_groups, block_size, head_dim)
    keys = layer_keys.index_select(0, tables).view(shape)
    values = layer_values.index_select(0, tables).view(shape)
    queries = q.view(batch_size, 1, num_groups, num_shared, head_dim).expand(-1, num_blocks, -1, -1, -1)
    scores = torch.bmm(queries.reshape(len(keys), num_shared, head_dim), keys.transpose(1, 2)).float() * scale
    scores = scores.view(batch_size, num_blocks, num_groups, num_shared, block_size)
    is_hidden = torch.arange(num_blocks * block_size, device=q.device) >= kv_lens.unsqueeze(1)
    scores = scores.masked_fill(is_hidden.view(batch_size, num_blocks, 1, 1, block_size), -torch.inf)
    # [B, G, N / G, kv], and back to blocks.
    weights = scores.permute(0, 2, 3, 1, 4).flatten(3).softmax(dim=-1).to(values.dtype)
    weights = weights.unflatten(3, (num_blocks, block_size)).permute(0, 3, 1, 2, 4)
    attended = torch.bmm(weights.reshape(len(keys), num_shared, block_size), values)
    return attended.view(batch_size, num_blocks, num_heads, head_dim).sum(dim=1)
