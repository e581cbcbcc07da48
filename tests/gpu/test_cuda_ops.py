"""The CUDA kernels against float32 on fresh random data, into outputs that were poisoned first."""

from __future__ import annotations

import pytest
import torch

from workers.models.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HALF_TOLERANCE = 2e-3
ROWS = (1, 3, 16, 17, 64, 255)
NUM_HEADS, BLOCK_SIZE = 8, 16


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float32; NaN when anything was left unwritten."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=torch.float16)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [64, 256, 4096, 16384])
def test_layer_norm_and_its_residual_and_embedding_forms_agree_with_float32(rows: int, size: int) -> None:
    from workers.models.kernels import cuda_ops

    x, normed, weight, bias = half(rows, size), half(rows, size), half(size), half(size)
    expected = reference.layer_norm(x.float(), weight.float(), bias.float(), 1e-5)
    out = poisoned(rows, size)
    cuda_ops.run_layer_norm(x, weight, bias, 1e-5, out)
    assert relative_error(out, expected) < HALF_TOLERANCE

    expected = reference.residual_layer_norm(
        x.float(), normed.float(), 7.5, weight.float(), bias.float(), 1e-5
    )
    out = poisoned(rows, size)
    cuda_ops.run_layer_norm(x, weight, bias, 1e-5, out, normed=normed, alpha=7.5)
    assert relative_error(out, expected) < HALF_TOLERANCE

    token_ids = torch.randint(rows, (rows,), device="cuda")
    expected = reference.layer_norm(x[token_ids].float(), weight.float(), bias.float(), 1e-5)
    out = poisoned(rows, size)
    cuda_ops.run_layer_norm(x, weight, bias, 1e-5, out, token_ids=token_ids)
    assert relative_error(out, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("size", [64, 4096])
def test_rows_of_a_packed_head_serve_as_embedding(size: int) -> None:
    from workers.models.kernels import cuda_ops, weight_packing

    values = torch.randint(-128, 128, (160, size), dtype=torch.int8)
    scales = torch.rand(160).half()
    token_ids = torch.randint(160, (255,), device="cuda")
    weight, bias = half(size), half(size)
    embedding = (values.half() * scales[:, None]).cuda()
    expected = reference.layer_norm(embedding[token_ids].float(), weight.float(), bias.float(), 1e-5)
    out = poisoned(255, size)
    packed = weight_packing.pack(values, 8).cuda()
    cuda_ops.run_layer_norm(
        packed, weight, bias, 1e-5, out, token_ids=token_ids, embedding_scales=scales.float().cuda()
    )
    assert relative_error(out, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("rows", ROWS)
def test_gelu_agrees_with_float32(rows: int) -> None:
    from workers.models.kernels import cuda_ops

    x = half(rows, 16384) * 3
    out = poisoned(rows, 16384)
    cuda_ops.run_rows(x, out=out, has_gelu=True)
    assert relative_error(out, reference.gelu(x.float())) < HALF_TOLERANCE


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("source", ["norm", "rows"])
def test_rows_in_e4m3_carry_their_scale(rows: int, source: str) -> None:
    from workers.models.kernels import cuda_ops

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    x = half(rows, 4096) * torch.logspace(-3, 3, rows, device="cuda")[:, None].half()
    quantized = torch.empty(rows, 4096, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.full((rows,), float("nan"), device="cuda")
    if source == "norm":
        weight, bias = half(4096), half(4096)
        expected = reference.layer_norm(x.float(), weight.float(), bias.float(), 1e-5)
        out = poisoned(rows, 4096)
        cuda_ops.run_layer_norm(x, weight, bias, 1e-5, out, out_e4m3=quantized, out_scales=scales)
        assert relative_error(out, expected) < HALF_TOLERANCE
    else:
        expected = reference.gelu(x.float())
        cuda_ops.run_rows(x, out_e4m3=quantized, out_scales=scales, has_gelu=True)
    for found, row in zip(quantized.float() * scales[:, None], expected, strict=True):
        assert relative_error(found, row) < 4e-2


def make_cache(num_blocks: int, head_dim: int, kv_int8: bool) -> LayerCache:  # noqa: F821
    from workers.models.kernels.cuda_ops import LayerCache

    shape = (num_blocks, NUM_HEADS, BLOCK_SIZE, head_dim)
    if not kv_int8:
        return LayerCache(half(*shape), half(*shape))
    keys, values = (torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8) for _ in range(2))
    scales = [torch.rand(shape[:3], device="cuda").half() / 50 + 0.005 for _ in range(2)]
    return LayerCache(keys, values, *scales)


def widened(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: F821
    if cache.key_scales is None or cache.value_scales is None:
        return cache.keys.float(), cache.values.float()
    return (
        cache.keys.float() * cache.key_scales.float()[..., None],
        cache.values.float() * cache.value_scales.float()[..., None],
    )


def make_tables(kv_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(block_tables, kv_lens, slots of the newest tokens, blocks in all), blocks given out in random order."""
    counts = [-(-length // BLOCK_SIZE) for length in kv_lens]
    order = torch.randperm(sum(counts)) + 1
    tables = torch.zeros(len(kv_lens), max(counts) + 3, dtype=torch.int32)
    slots, taken = [], 0
    for row, (count, length) in enumerate(zip(counts, kv_lens, strict=True)):
        tables[row, :count] = order[taken : taken + count]
        slots.append(int(tables[row, count - 1]) * BLOCK_SIZE + (length - 1) % BLOCK_SIZE)
        taken += count
    return (
        tables.cuda(),
        torch.tensor(kv_lens, dtype=torch.int32).cuda(),
        torch.tensor(slots).cuda(),
        taken + 1,
    )


def lengths(rows: int) -> list[int]:
    return [int(x) for x in torch.randint(1, 700, (rows,))] if rows > 3 else [1, 2047, 260][:rows]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("kv_int8", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_decode_attention_agrees_with_float32(rows: int, head_dim: int, kv_int8: bool, parts: int) -> None:
    from workers.models.kernels import cuda_ops

    tables, kv_lens, _, num_blocks = make_tables(lengths(rows))
    cache = make_cache(num_blocks, head_dim, kv_int8)
    q = half(rows, NUM_HEADS, head_dim)
    plan = cuda_ops.DecodePlan(parts, 128, 4, 4)
    workspace = cuda_ops.DecodeWorkspace.create(plan, rows, NUM_HEADS, head_dim, q.device)
    out = poisoned(rows, NUM_HEADS * head_dim)
    cuda_ops.run_attend_decode(plan, workspace, q, cache, tables, kv_lens, head_dim**-0.5, out)
    keys, values = widened(cache)
    expected = reference.attend_decode(
        q.float(), keys, values, tables, kv_lens, int(kv_lens.max()), head_dim**-0.5
    )
    assert relative_error(out, expected.flatten(1)) < HALF_TOLERANCE
    assert not workspace.counters.any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kv_int8", [False, True])
def test_the_fused_decode_rotates_stores_and_attends_as_the_three_operators_do(
    rows: int, head_dim: int, kv_int8: bool
) -> None:
    from workers.models.kernels import cuda_ops
    from workers.models.layers import rotary_tables

    tables, kv_lens, slots, num_blocks = make_tables(lengths(rows))
    cache = make_cache(num_blocks, head_dim, kv_int8)
    keys, values = widened(cache)
    qkv = half(rows, 3 * NUM_HEADS * head_dim)
    rotary = rotary_tables(2049, head_dim, torch.float16, torch.device("cuda"))
    positions = torch.randint(2048, (2, rows), device="cuda")
    plan = cuda_ops.decode_plan(rows, NUM_HEADS, kv_int8)
    workspace = cuda_ops.DecodeWorkspace.create(plan, rows, NUM_HEADS, head_dim, qkv.device)
    out = poisoned(rows, NUM_HEADS * head_dim)
    cuda_ops.run_attend_decode(
        plan,
        workspace,
        qkv,
        cache,
        tables,
        kv_lens,
        head_dim**-0.5,
        out,
        rotary=rotary,
        positions=positions,
        slots=slots,
    )
    q, _, _ = reference.rotate_and_store(qkv.float(), *rotary, positions, keys, values, slots)
    expected = reference.attend_decode(q, keys, values, tables, kv_lens, int(kv_lens.max()), head_dim**-0.5)
    assert relative_error(out, expected.flatten(1)) < HALF_TOLERANCE * (3 if kv_int8 else 1)
    found_keys, found_values = widened(cache)
    at = (slots // BLOCK_SIZE, slice(None), slots % BLOCK_SIZE)
    tolerance = 1e-2 if kv_int8 else HALF_TOLERANCE
    assert relative_error(found_keys[at], keys[at]) < tolerance
    assert relative_error(found_values[at], values[at]) < tolerance
    found_keys[at], found_values[at] = keys[at], values[at]
    assert torch.equal(found_keys, keys)
    assert torch.equal(found_values, values)


@pytest.mark.parametrize("num_tokens", [1, 17, 255])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_rotating_in_place_and_storing_agree_with_float32(num_tokens: int, head_dim: int) -> None:
    from workers.models.kernels import cuda_ops
    from workers.models.layers import rotary_tables

    qkv = half(num_tokens, 3 * NUM_HEADS * head_dim)
    rotary = rotary_tables(2049, head_dim, torch.float16, torch.device("cuda"))
    positions = torch.randint(2048, (2, num_tokens), device="cuda")
    slots = torch.randperm(20 * BLOCK_SIZE, device="cuda")[:num_tokens]
    cache = make_cache(20, head_dim, False)
    keys, values = widened(cache)
    expected = reference.rotate_and_store(qkv.float(), *rotary, positions, keys, values, slots)
    found = cuda_ops.rotate_and_store(qkv, *rotary, positions, cache.keys, cache.values, slots)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < HALF_TOLERANCE
    assert relative_error(cache.keys, keys) < HALF_TOLERANCE
    assert torch.equal(cache.values.float(), values)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "sequences",
    [
        [(1, 0)],
        [(3, 2)],
        [(64, 63), (1, 1), (65, 64), (200, 0), (17, 5)],
        [(700, 699), (130, 129)],
        [(513, 250)],
    ],
)
def test_prefix_attention_agrees_with_float32(head_dim: int, sequences: list[tuple[int, int]]) -> None:
    from workers.models.kernels import cuda_ops

    query_starts = torch.tensor([0, *[length for length, _ in sequences]]).cumsum(0).int().cuda()
    prefix_lens = torch.tensor([prefix for _, prefix in sequences], dtype=torch.int32).cuda()
    num_tokens, longest = int(query_starts[-1]), max(length for length, _ in sequences)
    qkv = half(num_tokens, NUM_HEADS, 3, head_dim) * 2
    q, k, v = qkv.unbind(2)
    out = cuda_ops.attend_prefill(q, k, v, query_starts, prefix_lens, longest, head_dim**-0.5)
    expected = reference.attend_prefill(
        q.float(), k.float(), v.float(), query_starts, prefix_lens, longest, head_dim**-0.5
    )
    assert relative_error(out, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_heads_may_share_keys_and_values(num_kv_heads: int) -> None:
    from workers.models.kernels import cuda_ops

    tables, kv_lens, _, num_blocks = make_tables([1, 300, 77])
    cache = cuda_ops.LayerCache(*(half(num_blocks, num_kv_heads, BLOCK_SIZE, 128) for _ in range(2)))
    q = half(3, NUM_HEADS, 128)
    arguments = (tables, kv_lens, 300, 128**-0.5)
    out = cuda_ops.attend_decode(q, cache.keys, cache.values, *arguments)
    expected = reference.attend_decode(q.float(), cache.keys.float(), cache.values.float(), *arguments)
    assert relative_error(out, expected) < HALF_TOLERANCE

    query_starts = torch.tensor([0, 70, 200], dtype=torch.int32, device="cuda")
    prefix_lens = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
    q, k, v = half(200, NUM_HEADS, 128), half(200, num_kv_heads, 128), half(200, num_kv_heads, 128)
    out = cuda_ops.attend_prefill(q, k, v, query_starts, prefix_lens, 130, 128**-0.5)
    expected = reference.attend_prefill(
        q.float(), k.float(), v.float(), query_starts, prefix_lens, 130, 128**-0.5
    )
    assert relative_error(out, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_come_back_as_the_original_dequantizes_them(bits: int) -> None:
    from workers.models.kernels import cuda_ops, weight_packing

    limit = 2 ** (bits - 1)
    values = torch.randint(-limit, limit, (272, 192), dtype=torch.int8)
    scales = torch.rand(272).half()
    packed = weight_packing.pack(values, bits).cuda()
    out = poisoned(272, 192)
    cuda_ops.run_dequantize(packed, scales.float().cuda(), bits, out)
    assert torch.equal(out.cpu(), values.half() * scales[:, None])
    if bits == 4 and torch.cuda.get_device_capability() >= (8, 9):
        eight = torch.empty(272, 192, device="cuda", dtype=torch.float8_e4m3fn)
        cuda_ops.run_dequantize(packed, scales.float().cuda(), bits, eight)
        assert torch.equal(eight.float().cpu(), values.float())
