"""The operators of `reference` on an NVIDIA GPU in fp16, and the fused forms that a decode step is made of.

Each launch can be a dependent one: set up while the kernel before it still runs. Shapes or dtypes that the kernels do not
have go to `reference`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Literal

import torch

from workers.models import kernels
from workers.models.kernels import reference
from workers.models.kernels.cuda_driver import Kernel

HEAD_DIMS: Final = (16, 32, 64, 128)
MAX_BLOCKS: Final = 1024
"""Blocks of the longest sequence that the decode kernel takes."""


def _row_threads(size: int) -> int:
    vectors = size // 8
    return 512 if vectors >= 512 else -(-vectors // 32) * 32


# --- norms and element-wise ------------------------------------------------------------------------------------------


NormSource = Literal["PLAIN", "RESIDUAL", "EMBEDDING", "PACKED_EMBEDDING"]


@functools.cache
def _norm_kernel(size: int, source: NormSource, is_bfloat: bool, e4m3: bool) -> Kernel:
    defines: dict[str, int | str] = {
        "SIZE": size,
        "INPUT": source,
        "BRANCH_BF16": int(is_bfloat),
        "E4M3": int(e4m3),
    }
    return Kernel("norm.cu", "layer_norm", "ppppppppppff", defines, _row_threads(size))


def run_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    normed: torch.Tensor | None = None,
    alpha: float = 1.0,
    token_ids: torch.Tensor | None = None,
    token_rows: torch.Tensor | None = None,
    embedding_scales: torch.Tensor | None = None,
    out_e4m3: torch.Tensor | None = None,
    out_scales: torch.Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """out[T, H] = LayerNorm of x, of alpha * normed + x, or of the rows of x (an embedding [V, H]) at token_ids, or at
    token_ids[token_rows]. With embedding_scales [V] float32 the embedding is packed int8 (`weight_packing`).

    out_e4m3 [T, H] and out_scales [T] float32 receive the same as e4m3 * scale. x may be bfloat16.
    """
    source: NormSource = "PLAIN"
    if normed is not None:
        source = "RESIDUAL"
    elif token_ids is not None:
        source = "EMBEDDING" if embedding_scales is None else "PACKED_EMBEDDING"
    kernel = _norm_kernel(out.shape[1], source, x.dtype == torch.bfloat16, out_e4m3 is not None)
    kernel.launch(
        (out.shape[0],),
        x,
        normed,
        token_ids,
        token_rows,
        embedding_scales,
        weight,
        bias,
        out,
        out_e4m3,
        out_scales,
        alpha,
        eps,
        is_dependent=is_dependent,
    )


@functools.cache
def _rows_kernel(size: int, is_bfloat: bool, has_gelu: bool, e4m3: bool) -> Kernel:
    defines: dict[str, int | str] = {
        "SIZE": size,
        "INPUT_BF16": int(is_bfloat),
        "GELU": int(has_gelu),
        "E4M3": int(e4m3),
    }
    return Kernel("elementwise.cu", "rows", "pppp", defines, _row_threads(size))


def run_rows(
    x: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_e4m3: torch.Tensor | None = None,
    out_scales: torch.Tensor | None = None,
    has_gelu: bool = False,
    is_dependent: bool = False,
) -> None:
    """x[T, H] (fp16 or bfloat16), through GELU if asked, to fp16 `out`, or to e4m3 with one float32 scale a row."""
    kernel = _rows_kernel(x.shape[1], x.dtype == torch.bfloat16, has_gelu, out_e4m3 is not None)
    kernel.launch((x.shape[0],), x, out, out_e4m3, out_scales, is_dependent=is_dependent)


def _is_half(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float16 and tensor.is_contiguous() for tensor in tensors)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    if not _is_half(x, weight, bias) or x.shape[1] % 8 or not len(x):
        return reference.layer_norm(x, weight, bias, eps)
    out = torch.empty_like(x)
    run_layer_norm(x, weight, bias, eps, out)
    return out


def residual_layer_norm(
    branch: torch.Tensor,
    normed: torch.Tensor,
    alpha: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    if not _is_half(branch, normed, weight, bias) or branch.shape[1] % 8 or not len(branch):
        return reference.residual_layer_norm(branch, normed, alpha, weight, bias, eps)
    out = torch.empty_like(branch)
    run_layer_norm(branch, weight, bias, eps, out, normed=normed, alpha=alpha)
    return out


def gelu(x: torch.Tensor) -> torch.Tensor:
    if not _is_half(x) or x.shape[1] % 8 or not len(x):
        return reference.gelu(x)
    out = torch.empty_like(x)
    run_rows(x, out=out, has_gelu=True)
    return out


# --- positions and cache ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values [num_blocks, N, block_size, D], in fp16, or in int8 with fp16 scales without D."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def is_int8(self) -> bool:
        return self.keys.dtype == torch.int8

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]


@functools.cache
def _rotate_kernel(head_dim: int, num_heads: int, block_size: int, kv_int8: bool, stores: bool) -> Kernel:
    defines: dict[str, int | str] = {
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "BLOCK_SIZE": block_size,
        "KV_INT8": int(kv_int8),
        "STORE": int(stores),
    }
    return Kernel("rotate.cu", "rotate_and_store", "pppppppppi", defines, 256)


def run_rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    cache: LayerCache | None,
    slots: torch.Tensor | None,
    *,
    is_dependent: bool = False,
) -> None:
    """Rotates q and k of the fused projection [T, 3H] in place, and writes k and v to the cache."""
    head_dim = cos.shape[1] * 4
    num_heads = qkv.shape[1] // (3 * head_dim)
    block_size, kv_int8 = (cache.block_size, cache.is_int8) if cache is not None else (1, False)
    kernel = _rotate_kernel(head_dim, num_heads, block_size, kv_int8, cache is not None)
    stored = (
        (cache.keys, cache.values, cache.key_scales, cache.value_scales) if cache is not None else (None,) * 4
    )
    grid = (-(-qkv.shape[0] * num_heads // 8),)
    kernel.launch(grid, qkv, cos, sin, positions, slots, *stored, qkv.shape[0], is_dependent=is_dependent)


def _has_kernel_for(head_dim: int) -> bool:
    return head_dim in HEAD_DIMS


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    layer_keys: torch.Tensor | None,
    layer_values: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three are views of `qkv`, which is changed in place: nobody else reads the projection."""
    head_dim = cos.shape[1] * 4
    if not _is_half(qkv) or not _has_kernel_for(head_dim) or not len(qkv):
        return reference.rotate_and_store(qkv, cos, sin, positions, layer_keys, layer_values, slots)
    cache = (
        LayerCache(layer_keys, layer_values) if layer_keys is not None and layer_values is not None else None
    )
    run_rotate_and_store(qkv, cos, sin, positions.contiguous(), cache, slots)
    q, k, v = qkv.view(qkv.shape[0], -1, 3, head_dim).unbind(2)
    return q, k, v


# --- attention -------------------------------------------------------------------------------------------------------


@functools.cache
def _prefill_kernel(head_dim: int, num_heads: int, num_kv_heads: int) -> Kernel:
    defines: dict[str, int | str] = {
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
    }
    return Kernel(
        "attention_prefill.cu", "attend_prefill", "ppppppllllf", defines, 128, 5 * 64 * head_dim * 2
    )


def attend_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    if q.dtype != torch.float16 or not _has_kernel_for(head_dim) or not num_tokens:
        return reference.attend_prefill(q, k, v, query_starts, prefix_lens, max_query_len, scale)
    if k.stride() != v.stride() or not q.stride(2) == k.stride(2) == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    grid = (-(-max_query_len // 64), num_heads, prefix_lens.shape[0])
    kernel = _prefill_kernel(head_dim, num_heads, k.shape[1])
    strides = (*q.stride()[:2], *k.stride()[:2])
    kernel.launch(grid, q, k, v, out, query_starts, prefix_lens, *strides, scale)
    return out


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How `attention_decode.cu` divides its work: parts of the keys (at least `part_keys` each), warps, keys at a time."""

    parts: int = 1
    part_keys: int = 256
    warps: int = 4
    unroll: int = 4


def decode_plan(batch_size: int, num_heads: int, kv_int8: bool) -> DecodePlan:
    """The division for this batch. Few sequences: parts, so that long contexts fill the GPU."""
    if batch_size * num_heads <= 64:
        return DecodePlan(8, 512, 8, 8)
    if batch_size * num_heads <= 256:
        return DecodePlan(4, 512, 8, 4)
    if kv_int8 and batch_size * num_heads >= 2048:
        return DecodePlan(1, 512, 3, 2)
    return DecodePlan(1, 512, 4, 4)


@functools.cache
def decode_kernel(
    plan: DecodePlan,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    kv_int8: bool,
    is_fused: bool,
    is_projection: bool = False,
) -> Kernel:
    defines: dict[str, int | str] = {
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "MAX_BLOCKS": MAX_BLOCKS,
        "PARTS": plan.parts,
        "PART_KEYS": plan.part_keys,
        "WARPS": plan.warps,
        "UNROLL": plan.unroll,
        "KV_INT8": int(kv_int8),
        "FUSED": int(is_fused),
        "PROJECTION": int(is_projection),
    }
    return Kernel("attention_decode.cu", "attend_decode", "ppppppppppppppif", defines, plan.warps * 32)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where the parts of one attention leave their sums. Shared by all layers; `counters` is zero between runs."""

    partial: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def create(
        cls, plan: DecodePlan, batch_size: int, num_heads: int, head_dim: int, device: torch.device
    ) -> DecodeWorkspace:
        size = batch_size * num_heads * plan.parts * (head_dim + 2)
        return cls(
            torch.empty(size, dtype=torch.float32, device=device),
            torch.zeros(batch_size * num_heads, dtype=torch.int32, device=device),
        )


def run_attend_decode(
    plan: DecodePlan,
    workspace: DecodeWorkspace,
    q_or_qkv: torch.Tensor,
    cache: LayerCache,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """out[B, H]: attention of one token of each sequence to its cache.

    With `rotary`, the input is the fused projection [B, 3H]: it is rotated here and the token's key and value are written
    to the cache at `slots`. Without, it is q [B, H] or the fused projection, rotated, and the cache holds the token.
    """
    num_kv_heads, block_size, head_dim = cache.keys.shape[1:]
    num_heads = out.shape[1] // head_dim
    kernel = decode_kernel(
        plan,
        head_dim,
        num_heads,
        num_kv_heads,
        block_size,
        cache.is_int8,
        rotary is not None,
        q_or_qkv.numel() > out.numel(),
    )
    cos, sin = rotary if rotary is not None else (None, None)
    kernel.launch(
        (num_heads, out.shape[0], plan.parts),
        q_or_qkv,
        cos,
        sin,
        positions,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        slots,
        block_tables,
        kv_lens,
        out,
        workspace.partial,
        workspace.counters,
        block_tables.shape[1],
        scale,
        is_dependent=is_dependent,
    )


@functools.cache
def shared_workspace(
    plan: DecodePlan, batch_size: int, num_heads: int, head_dim: int, device: torch.device
) -> DecodeWorkspace:
    """The one of this size. Runs that share it must follow each other in one stream."""
    return DecodeWorkspace.create(plan, batch_size, num_heads, head_dim, device)


def attend_decode(
    q: torch.Tensor,
    layer_keys: torch.Tensor,
    layer_values: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    scale: float,
) -> torch.Tensor:
    batch_size, num_heads, head_dim = q.shape
    if (
        q.dtype != torch.float16
        or not _has_kernel_for(head_dim)
        or block_tables.shape[1] > MAX_BLOCKS
        or not batch_size
    ):
        return reference.attend_decode(q, layer_keys, layer_values, block_tables, kv_lens, max_kv_len, scale)
    plan = decode_plan(batch_size, num_heads, False)
    workspace = shared_workspace(plan, batch_size, num_heads, head_dim, q.device)
    out = torch.empty(batch_size, num_heads * head_dim, dtype=q.dtype, device=q.device)
    cache = LayerCache(layer_keys, layer_values)
    run_attend_decode(plan, workspace, q.contiguous(), cache, block_tables.contiguous(), kv_lens, scale, out)
    return out.view(batch_size, num_heads, head_dim)


def register() -> None:
    """Makes these the versions of the operators that networks of modules run on a GPU."""
    kernels.register(
        "cuda",
        layer_norm=layer_norm,
        residual_layer_norm=residual_layer_norm,
        gelu=gelu,
        rotate_and_store=rotate_and_store,
        attend_prefill=attend_prefill,
        attend_decode=attend_decode,
    )


# --- weights ---------------------------------------------------------------------------------------------------------


@functools.cache
def _dequantize_kernel(bits: int, out_features: int, in_features: int, to_e4m3: bool) -> Kernel:
    defines: dict[str, int | str] = {
        "N": out_features,
        "K": in_features,
        "FORMAT": f"INT{bits}",
        "TO_E4M3": int(to_e4m3),
    }
    return Kernel("dequantize.cu", "dequantize", "ppp", defines, 256)


def run_dequantize(packed: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Packed weights to out[N, K]: fp16 with the scale, or e4m3 without it (int4 only: exact)."""
    out_features, in_features = out.shape
    kernel = _dequantize_kernel(bits, out_features, in_features, out.dtype == torch.float8_e4m3fn)
    kernel.launch((-(-out_features // 16 * (in_features // 64) // 8),), packed, scales, out)


# --- sampling --------------------------------------------------------------------------------------------------------

MAX_TOP_K: Final = 256


@functools.cache
def _sample_kernel(vocab_size: int, first_id: int, end_id: int, eos_id: int, invalid_token: int) -> Kernel:
    defines: dict[str, int | str] = {
        "VOCABULARY": vocab_size,
        "FIRST_ID": first_id,
        "END_ID": end_id,
        "EOS_ID": eos_id,
        "INVALID_TOKEN": invalid_token,
    }
    return Kernel("sample.cu", "sample", "pppppppppp", defines, 1024)


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Parameters of B rows, on the GPU."""

    temperatures: torch.Tensor
    """float32; 0: the largest"""
    top_ks: torch.Tensor
    """int32, 1 to MAX_TOP_K"""
    top_ps: torch.Tensor
    """float64"""
    seeds: torch.Tensor
    """int64"""
    token_indexes: torch.Tensor
    """int64: answer tokens before this one"""
    min_new_tokens: torch.Tensor
    """int32"""
    rows: torch.Tensor
    """int32: where in `last_tokens` the row's token goes"""


def run_sample(
    logits: torch.Tensor,
    inputs: SamplingInputs,
    tokens: torch.Tensor,
    last_tokens: torch.Tensor,
    *,
    first_id: int,
    end_id: int,
    eos_id: int,
    invalid_token: int,
    is_dependent: bool = False,
) -> None:
    """One token for each row of fp16 logits [B, vocab], into tokens [B] int64 and last_tokens[rows] int64."""
    kernel = _sample_kernel(logits.shape[1], first_id, end_id, eos_id, invalid_token)
    kernel.launch(
        (logits.shape[0],),
        logits,
        inputs.temperatures,
        inputs.top_ks,
        inputs.top_ps,
        inputs.seeds,
        inputs.token_indexes,
        inputs.min_new_tokens,
        inputs.rows,
        tokens,
        last_tokens,
        is_dependent=is_dependent,
    )
