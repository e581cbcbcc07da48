"""How an engine runs: checkpoint, device, and the sizes that bound its memory. Needs no torch, so the worker can build it."""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

DtypeSetting = Literal["auto", "float16", "bfloat16", "float32"]
QuantizeSetting = Literal["none", "int8", "int4", "fp8"]
ActivationsSetting = Literal["auto", "int8", "full"]
CacheSetting = Literal["auto", "int8"]
SpeculationSetting = Literal["auto", "off"]

GIB: Final = 1 << 30


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine. Raises ValueError, which names the field, for a value that cannot be used."""

    checkpoint: str
    """The folder with config.json."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""
    dtype: DtypeSetting = "auto"
    """Of weights, computation and cache; auto is the checkpoint's on a GPU and float32 on a CPU."""
    quantize: QuantizeSetting = "none"
    """What the linear layers of a checkpoint in floating point become while it is loaded. fp8 (e4m3 with a scale a row): on a GPU of Ada or newer only."""
    quantize_head: bool = False
    """The layer that gives the logits becomes int8, and an embedding that shares its weights, too; with fp8 it becomes fp8, and
    the embedding stays beside it."""
    activations: ActivationsSetting = "auto"
    """Of quantized layers on a CPU: int8 (fast, by ONNX Runtime), or full, in `dtype` (exact); auto is int8 where it can be."""
    speculation: SpeculationSetting = "auto"
    """auto: while few sequences run, those that copy from their prompt get several tokens a step. Their tokens are the same."""
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
    cache_dtype: CacheSetting = "auto"
    """auto: the computation's. int8 halves the memory of the KV cache; on a GPU only."""
    context_len: int | None = None
    """Tokens of prompt and answer together, at most; None: the checkpoint's."""
    num_threads: int | None = None
    """CPU threads; None: torch's choice."""
    adapters: dict[str, str] = {}
    """Name → folder of adapters that are loaded at the start; one that cannot be loaded stops it."""
    known_adapters: dict[str, str] = {}
    """Name → folder of adapters that are loaded when a sequence first asks for them."""
    merge_adapter: bool = False
    """Add the one adapter to the weights, instead of running it beside them."""
    max_adapters: int = 8
    """Adapters in memory at the same time."""
    max_adapter_rank: int = 64
    """Of one adapter; all slots have the memory of the largest one that was loaded."""
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
        if self.max_adapters < 0:
            raise ValueError(f"max_adapters is {self.max_adapters}: it must be 0 or more")
        if self.max_adapter_rank < 1:
            raise ValueError(f"max_adapter_rank is {self.max_adapter_rank}: it must be at least 1")
        if self.merge_adapter and len(self.adapters) != 1:
            raise ValueError(
                f"merge_adapter is set with {len(self.adapters)} adapters: give exactly one --adapter to merge"
            )
        if not self.merge_adapter and len(self.adapters) > self.max_adapters:
            raise ValueError(
                f"max_adapters is {self.max_adapters}, and {len(self.adapters)} are to be loaded at the start: raise it"
            )
        if self.cache_gib is not None and not self.cache_gib > 0:
            raise ValueError(f"cache_gib is {self.cache_gib}: it must be above 0")
        index = self.device.removeprefix("cuda:")
        if self.device not in ("auto", "cpu", "cuda") and (index == self.device or not index.isdigit()):
            raise ValueError(f"device is {self.device!r}: it must be auto, cpu, cuda or cuda:N")
        for name, setting in (
            ("dtype", DtypeSetting),
            ("quantize", QuantizeSetting),
            ("activations", ActivationsSetting),
            ("cache_dtype", CacheSetting),
            ("speculation", SpeculationSetting),
        ):
            value, choices = getattr(self, name), get_args(setting)
            if value not in choices:
                raise ValueError(
                    f"{name} is {value!r}: it must be {', '.join(choices[:-1])} or {choices[-1]}"
                )
