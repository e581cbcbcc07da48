"""The reference operators against the formulas, written as plainly as possible in float64."""

from __future__ import annotations

import math

import torch

from workers.models import kernels
from workers.models.kernels import reference


def rotate_pairs(x: torch.Tensor, positions: torch.Tensor, half: int) -> torch.Tensor:
    """One head of one token: value j of a half and value j + D/4 turn by position / 10000^(2j / (D/2))."""
    out = x.clone()
    quarter = half // 2
    for part, position in enumerate(positions.tolist()):
        for j in range(quarter):
            angle = position / 10000 ** (2 * j / half)
            a, b = x[part * half + j], x[part * half + j + quarter]
            out[part * half + j] = a * math.cos(angle) - b * math.sin(angle)
            out[part * half + j + quarter] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_rotation_turns_each_half_by_its_own_position_and_stores_keys_and_values():
    torch.manual_seed(0)
    num_heads, head_dim, block_size = 3, 8, 4
    qkv = torch.randn(5, num_heads * 3 * head_dim)
    positions = torch.tensor([[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]])
    angles = torch.arange(8).unsqueeze(1) / 10000 ** (2 * torch.arange(2) / 4)
    keys, values = torch.zeros(2, 6, num_heads, block_size, head_dim)
    slots = torch.tensor([8, 9, 10, 11, 4])

    q, k, v = reference.rotate_and_store(qkv, angles.cos(), angles.sin(), positions, keys, values, slots)

    for token in range(5):
        for head in range(num_heads):
            own = qkv[token, head * 3 * head_dim : (head + 1) * 3 * head_dim]
            expected = [rotate_pairs(own[i * 8 : i * 8 + 8], positions[:, token], 4) for i in (0, 1)]
            torch.testing.assert_close(q[token, head], expected[0])
            torch.testing.assert_close(k[token, head], expected[1])
            assert torch.equal(v[token, head], own[16:])
            block, offset = divmod(int(slots[token]), block_size)
            assert torch.equal(keys[block, head, offset], k[token, head])
            assert torch.equal(values[block, head, offset], v[token, head])
    assert (keys[0] == 0).all()
    assert (keys[3:] == 0).all()


def test_a_broken_sequence_leaves_only_finite_values_in_the_cache():
    keys, values = torch.zeros(2, 1, 1, 2, 8)
    qkv = torch.full((1, 24), torch.nan)
    qkv[:, 16:] = torch.inf
    tables = torch.ones(1, 2)
    q, k, v = reference.rotate_and_store(
        qkv, tables, tables, torch.zeros(2, 1, dtype=torch.int64), keys, values, torch.tensor([1])
    )
    assert q.isnan().all()
    assert k.isnan().all()
    assert v.isinf().all()
    assert keys.isfinite().all()
    assert values.isfinite().all()


def plain_attention(q, k, v, visible, scale):
    scores = torch.einsum("snd,tnd->nst", q.double(), k.double()) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("nst,tnd->snd", weights, v.double()).float()


def test_prefill_sees_the_prefix_in_both_directions_and_the_rest_causally():
    torch.manual_seed(0)
    lens, prefixes = [7, 1, 5, 4], [5, 1, 0, 4]
    q, k, v = torch.randn(3, sum(lens), 2, 8)
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
    out = reference.attend_prefill(q, k, v, starts, torch.tensor(prefixes), max(lens), 0.3)
    for index, (length, prefix) in enumerate(zip(lens, prefixes, strict=True)):
        own = slice(int(starts[index]), int(starts[index + 1]))
        visible = torch.tensor([[j <= i or j < prefix for j in range(length)] for i in range(length)])
        torch.testing.assert_close(out[own], plain_attention(q[own], k[own], v[own], visible, 0.3))


def test_decode_sees_exactly_its_own_cache_whatever_lies_around_it():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 9, 2, 4, 8)
    lens = [1, 4, 5, 11]
    tables = torch.tensor([[3, 0, 0], [1, 0, 0], [2, 7, 0], [8, 4, 5]], dtype=torch.int32)
    poisoned_keys, poisoned_values = torch.full((2, *keys.shape), 1e30)
    gathered = []
    for table, length in zip(tables.tolist(), lens, strict=True):
        slots = [(table[i // 4], i % 4) for i in range(length)]
        for block, offset in slots:
            poisoned_keys[block, :, offset] = keys[block, :, offset]
            poisoned_values[block, :, offset] = values[block, :, offset]
        gathered.append([torch.stack([cache[b, :, o] for b, o in slots]) for cache in (keys, values)])
    q = torch.randn(4, 2, 8)
    out = reference.attend_decode(
        q, poisoned_keys, poisoned_values, tables, torch.tensor(lens), max(lens), 0.3
    )
    for index, (k, v) in enumerate(gathered):
        visible = torch.ones(1, len(k), dtype=torch.bool)
        expected = plain_attention(q[index : index + 1], k, v, visible, 0.3)
        torch.testing.assert_close(out[index : index + 1], expected)


def test_norms_and_gelu_are_their_formulas():
    torch.manual_seed(0)
    x, normed = torch.randn(2, 4, 16)
    weight, bias = torch.randn(2, 16)

    def norm(y: torch.Tensor) -> torch.Tensor:
        y = y.double()
        centered = y - y.mean(-1, keepdim=True)
        scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return (scaled * weight.double() + bias.double()).float()

    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-5), norm(x))
    out = reference.residual_layer_norm(x, normed, 7.48, weight, bias, 1e-5)
    torch.testing.assert_close(out, norm(7.48 * normed + x))
    inner = 0.7978845608028654 * x.double() * (1 + 0.044715 * x.double() ** 2)
    torch.testing.assert_close(reference.gelu(x), (x.double() / 2 * (1 + inner.tanh())).float())


def test_a_registered_operator_runs_on_its_device_but_never_where_a_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(kernels, "_versions", {})
    kernels.register("cpu", gelu=lambda x: x * 0)
    x = torch.ones(2)
    assert kernels.gelu(x).tolist() == [0, 0]
    assert kernels.gelu(x.requires_grad_()).tolist() != [0, 0]
