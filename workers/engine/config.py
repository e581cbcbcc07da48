"""How an engine runs: checkpoint, device, and the sizes that bound its memory. Needs no torch, so the worker can build it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

DtypeSetting = Literal["auto", "float16", "bfloat16", "float32"]

GIB: Final = 1 << 30


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine. Raises ValueError, which names the field, for a value that cannot be used."""

    checkpoint: str
    """The folder with config.json."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""
    dtype: DtypeSetting = "auto"
    """Of weights, computation and cache; auto is the checkpoint's on a GPU and float32 on a CPU."""
    max_num_seqs: int = 64
    """Sequences that run at the same time, at most."""
    max_prefill_tokens: int = 4096
    """Tokens of one prefill. A longer prompt is prefilled by itself: it is never cut."""
    block_size: int = 32
    """Tokens in a block of the KV cache."""
    num_blocks: int | None = None
    """Blocks of the KV cache, one of which is never used; None: from `cache_gib`."""
    cache_gib: float | None = None
    """Memory for the KV cache; None: what the device leaves after loading, but no more than all sequences can use."""
    context_len: int | None = None
    """Tokens of prompt and answer together, at most; None: the checkpoint's."""
    num_threads: int | None = None
    """CPU threads; None: torch's choice."""
    trust_remote_code: bool = False
    """The reference engine alone: it may run the Python files of the checkpoint's folder."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_prefill_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name, least in (("num_blocks", 2), ("context_len", 4), ("num_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.cache_gib is not None and not self.cache_gib > 0:
            raise ValueError(f"cache_gib is {self.cache_gib}: it must be above 0")
        index = self.device.removeprefix("cuda:")
        if self.device not in ("auto", "cpu", "cuda") and (index == self.device or not index.isdigit()):
            raise ValueError(f"device is {self.device!r}: it must be auto, cpu, cuda or cuda:N")
        if self.dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}: it must be auto, float16, bfloat16 or float32")
