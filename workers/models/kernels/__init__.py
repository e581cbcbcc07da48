"""The operators that layers call. Each picks its version by the device of its first argument.

`reference` has their meaning, in PyTorch. A version for another device registers itself for the operators that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from workers.models.kernels import reference

Operator = Callable[..., Any]

_versions: Final[dict[str, dict[str, Operator]]] = {}
"""Device type → operator's name → version; what is not here runs in `reference`."""


def register(device_type: str, **operators: Operator) -> None:
    """Makes these the versions that run on this type of device, as in `register("cuda", gelu=gelu)`."""
    for name in operators:
        if not hasattr(reference, name):
            raise ValueError(f"{name} is not an operator")
    _versions.setdefault(device_type, {}).update(operators)


def _version(name: str, tensor: torch.Tensor) -> Operator:
    version = _versions.get(tensor.device.type, {}).get(name)
    # The fast versions have no backward pass.
    if version is None or (tensor.requires_grad and torch.is_grad_enabled()):
        reference_version: Operator = getattr(reference, name)
        return reference_version
    return version


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, H] -> [T, H]"""
    return _version("layer_norm", x)(x, weight, bias, eps)


def residual_layer_norm(
    branch: torch.Tensor,
    normed: torch.Tensor,
    alpha: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """LayerNorm(alpha * normed + branch): [T, H], [T, H] -> [T, H]"""
    return _version("residual_layer_norm", branch)(branch, normed, alpha, weight, bias, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, H] -> [T, H]"""
    return _version("rms_norm", x)(x, weight, eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SiLU(first half) * second half: [T, 2F] -> [T, F]"""
    return _version("swiglu", x)(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation."""
    return _version("gelu", x)(x)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    layer_keys: torch.Tensor | None,
    layer_values: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, 3H] -> q, k, v [T, N, D], rotated, and written to the cache when there is one."""
    return _version("rotate_and_store", qkv)(qkv, cos, sin, positions, layer_keys, layer_values, slots)


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
    """[T, (N + 2G) D] -> q [T, N, D], k, v [T, G, D], rotated, and written to the cache when there is one."""
    operator = _version("rotate_pairs_and_store", qkv)
    return operator(qkv, num_kv_heads, cos, sin, positions, layer_keys, layer_values, slots)


def attend_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    """[T, N, D] -> [T, N, D]: token i of a sequence sees token j when j <= i or j < prefix_len. k, v: [T, N or G, D]."""
    return _version("attend_prefill", q)(q, k, v, query_starts, prefix_lens, max_query_len, scale)


def attend_decode(
    q: torch.Tensor,
    layer_keys: torch.Tensor,
    layer_values: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    scale: float,
) -> torch.Tensor:
    """[B, N, D] -> [B, N, D]: each sequence's newest token sees its whole cache."""
    return _version("attend_decode", q)(q, layer_keys, layer_values, block_tables, kv_lens, max_kv_len, scale)
