"""What a checkpoint's config.json says, validated. Knows nothing about weights or torch.

`ModelConfig` has the shape of the network; the ids of special tokens are the tokenizer's business, but what config.json
claims about them is kept here, so that the two can be compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

CONFIG_FILE: Final = "config.json"

# Far above any model of this family: beyond them a file is damaged, or made to exhaust memory.
MAX_SIZES: Final = {
    "hidden_size": 1 << 16,
    "inner_hidden_size": 1 << 19,
    "num_layers": 1024,
    "num_attention_heads": 1024,
    "vocab_size": 1 << 22,
    "max_sequence_length": 1 << 20,
    "ffn_hidden_size": 1 << 19,
    "padded_vocab_size": 1 << 22,
    "seq_length": 1 << 20,
    "kv_channels": 1 << 12,
    "multi_query_group_num": 1024,
}
MAX_JSON_BYTES: Final = 16 << 20
MAX_QUOTED: Final = 1000

Dtype = Literal["float16", "bfloat16", "float32"]
ModelType = Literal["chatglm", "chatglm2"]
"""Ours: config.json says chatglm for both."""
QuantizationBit = Literal[0, 4, 8]
"""Bits of the linear layers' weights; 0: they are not quantized."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file, what was found and what to do."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        path, problem = _printable(str(path)), _printable(problem)
        super().__init__(f"{path}: {problem}. {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


def _printable(text: str) -> str:
    """A problem quotes names from the file: they must not steer a terminal, fill a log or break its encoding."""
    if len(text) > MAX_QUOTED:
        text = f"{text[: MAX_QUOTED - 3]}..."
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a ChatGLM network (CHATGLM.md A1, B1)."""

    hidden_size: int
    inner_hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    """Rows of the embedding; more than the tokenizer has pieces."""
    layernorm_eps: float = 1e-5
    max_sequence_length: int = 2048
    dtype: Dtype = "float16"
    """Of the stored weights; the engine may compute in another one."""
    tie_word_embeddings: bool = True
    model_type: ModelType = "chatglm"
    special_ids: dict[str, int] = field(default_factory=dict)
    """What config.json says about bos, eos, pad, mask and gmask; a name is absent when the file has none."""
    kv_channels: int | None = None
    """Values of a head; None: hidden_size over num_heads."""
    num_kv_groups: int | None = None
    """Heads that keys and values have; None: as many as there are queries."""
    quantization_bit: QuantizationBit = 0
    """How the linear layers are stored."""

    def __post_init__(self) -> None:
        if self.kv_channels is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is not a multiple of multi_query_group_num {self.num_kv_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"a head of {self.head_dim} values cannot be rotated in two halves: it must be a multiple of 4"
            )

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_kv_groups or self.num_heads

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelConfig:
        """Reads `config.json` in this folder.

        Raises CheckpointError, which names the file and the field.
        """
        path = Path(folder) / CONFIG_FILE
        return cls.from_fields(read_json(path, "config.json comes with every checkpoint"), path)

    @classmethod
    def from_fields(cls, fields: dict[str, Any], path: Path | str = CONFIG_FILE) -> ModelConfig:
        """The config with these fields; `path` is named in errors."""
        model_type = fields.get("model_type", "chatglm")
        if model_type != "chatglm":
            raise CheckpointError(
                path,
                f"model_type is {repr(model_type)[:80]}: it is neither ChatGLM-6B nor ChatGLM2-6B",
                "Use a checkpoint with the architecture of one of them",
            )
        if fields.get("pre_seq_len") is not None:
            raise CheckpointError(
                path, "pre_seq_len is set: P-tuning is not supported", "Use the base checkpoint"
            )
        of_generation = cls._chatglm2 if _is_second_generation(fields) else cls._chatglm
        try:
            return of_generation(_Fields(fields, path))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(path, str(error), "Correct the file or download it again") from error

    @classmethod
    def _chatglm(cls, fields: _Fields) -> ModelConfig:
        fields.require("position_encoding_2d", True, "the released models' positions are two-dimensional")
        return cls(
            hidden_size=fields.positive_int("hidden_size"),
            inner_hidden_size=fields.positive_int("inner_hidden_size"),
            num_layers=fields.positive_int("num_layers"),
            num_heads=fields.positive_int("num_attention_heads"),
            vocab_size=fields.positive_int("vocab_size"),
            layernorm_eps=fields.positive_float("layernorm_epsilon", 1e-5),
            max_sequence_length=fields.positive_int("max_sequence_length", 2048),
            dtype=fields.dtype("torch_dtype", "float16"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            special_ids={
                name: fields.positive_int(f"{name}_token_id")
                for name in ("bos", "eos", "pad", "mask", "gmask")
                if fields.fields.get(f"{name}_token_id") is not None
            },
            quantization_bit=fields.quantization_bit(),
        )

    @classmethod
    def _chatglm2(cls, fields: _Fields) -> ModelConfig:
        released = "the released models' network has it so"
        fields.require("rmsnorm", True, released)
        fields.require("post_layer_norm", True, released)
        fields.require("apply_residual_connection_post_layernorm", False, released)
        fields.require("add_bias_linear", False, released)
        fields.require("add_qkv_bias", True, released)
        fields.require("original_rope", True, released)
        fields.require("rope_ratio", 1, "longer rotary periods are not supported")
        num_heads = fields.positive_int("num_attention_heads")
        is_grouped = fields.flag("multi_query_attention", False)
        return cls(
            model_type="chatglm2",
            hidden_size=fields.positive_int("hidden_size"),
            inner_hidden_size=fields.positive_int("ffn_hidden_size"),
            num_layers=fields.positive_int("num_layers"),
            num_heads=num_heads,
            vocab_size=fields.positive_int("padded_vocab_size"),
            layernorm_eps=fields.positive_float("layernorm_epsilon", 1e-5),
            max_sequence_length=fields.positive_int("seq_length", 2048),
            dtype=fields.dtype("torch_dtype", "float16"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            special_ids={"eos": fields.positive_int("eos_token_id", 2)},
            kv_channels=fields.positive_int("kv_channels", 128),
            num_kv_groups=fields.positive_int("multi_query_group_num", 1) if is_grouped else num_heads,
            quantization_bit=fields.quantization_bit(),
        )


def _is_second_generation(fields: dict[str, Any]) -> bool:
    """Both generations say model_type chatglm; these names came with the second."""
    return any(name in fields for name in ("multi_query_attention", "ffn_hidden_size", "padded_vocab_size"))


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to config.json, with errors that name the field."""

    fields: dict[str, Any]
    path: Path | str

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, value, "a positive integer")
        if value > (largest := MAX_SIZES.get(name, 1 << 31)):
            raise self._wrong(name, value, f"at most {largest}")
        return value

    def positive_float(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 31:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def dtype(self, name: str, default: Dtype) -> Dtype:
        value = self._get(name, default)
        if value not in ("float16", "bfloat16", "float32"):
            raise self._wrong(name, value, "float16, bfloat16 or float32")
        return cast(Dtype, value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def quantization_bit(self) -> QuantizationBit:
        value = self._get("quantization_bit", 0)
        if isinstance(value, bool) or value not in (0, 4, 8):
            raise self._wrong("quantization_bit", value, "0, 4 or 8")
        return cast(QuantizationBit, value)

    def require(self, name: str, only: object, reason: str) -> None:
        """Raises CheckpointError unless the field has this value, or is absent."""
        value = self._get(name, only)
        if value != only:
            raise CheckpointError(
                self.path,
                f"{name} is {repr(value)[:80]}, and only {only!r} is supported: {reason}",
                "Use a checkpoint with the released architecture",
            )

    def _get(self, name: str, default: object) -> Any:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(self.path, f"{name} is missing", "Download the file again")
        return value

    def _wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            self.path,
            f"{name} is {repr(value)[:80]}",
            f"It must be {expected}: correct the file or download it again",
        )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in this file. Raises CheckpointError, with this remedy when the file does not exist."""
    text = read_bytes(path, f"{remedy}: check the folder", MAX_JSON_BYTES)
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"the file is not valid JSON ({error})", "Download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(path, "the file does not hold a JSON object", "Download it again")
    return data


def read_bytes(path: Path, remedy: str, limit: int) -> bytes:
    """The content of a small file. Raises CheckpointError, with this remedy when the file does not exist.

    A pipe or a device, which would block or never end, is refused, and so is a file of more than `limit` bytes.
    """
    try:
        if not path.is_file() and path.exists():
            raise CheckpointError(path, "it is not a regular file", "Replace it by the checkpoint's own file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise CheckpointError(path, "the file does not exist", remedy) from None
    except OSError as error:
        raise CheckpointError(path, f"the file cannot be read ({error})", "Check its permissions") from error
    if len(content) > limit:
        raise CheckpointError(path, f"the file has more than {limit} bytes", "Download it again")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: readers differ in which of two equal keys they take, so there must be none."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} comes twice")
    return fields
