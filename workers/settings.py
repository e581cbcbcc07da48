"""How one worker works: which checkpoint on which device, how many requests at a time, how long it waits for what.

Read once, where the worker is composed. A bad value raises InvalidSetting, which names the variable.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from producer.contract import InvalidRequest, InvalidSetting
from producer.contract.control import check_adapter_name
from producer.contract.keys import MAX_ATTEMPTS
from producer.settings import Settings
from workers.engine.config import (
    ActivationsSetting,
    CacheSetting,
    DtypeSetting,
    QuantizeSetting,
    SpeculationSetting,
)
from workers.logs import FORMS, LEVELS, Form

DEMO_CHECKPOINT = Path(__file__).parent / "models" / "demo"
DTYPES: tuple[DtypeSetting, ...] = get_args(DtypeSetting)
QUANTIZE: tuple[QuantizeSetting, ...] = get_args(QuantizeSetting)
CACHE_DTYPES: tuple[CacheSetting, ...] = get_args(CacheSetting)
ACTIVATIONS: tuple[ActivationsSetting, ...] = get_args(ActivationsSetting)
SPECULATION: tuple[SpeculationSetting, ...] = get_args(SpeculationSetting)
Backend = Literal["native", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def new_worker_id() -> str:
    """Names the machine and the process; the random part keeps a restarted container apart from its predecessor."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings of one worker. Times are in seconds."""

    queue: Settings = field(default_factory=Settings)
    """Where Redis is, and the names that all parts of a deployment share."""
    model: str = ""
    """The name under which requests ask for this model; empty: the deployment's."""
    checkpoint: Path = DEMO_CHECKPOINT
    device: str = "auto"
    """auto, cpu, or cuda:N."""
    dtype: DtypeSetting = "auto"
    quantize: QuantizeSetting = "none"
    """What the linear layers become while the checkpoint is loaded. A quantized checkpoint needs no setting."""
    quantize_head: bool = False
    """The head becomes int8, too; with fp8 it becomes fp8."""
    activations: ActivationsSetting = "auto"
    """Of quantized layers on a CPU: int8 is fast, full is exact."""
    speculation: SpeculationSetting = "auto"
    """auto: answers that copy from their prompt get several tokens a step, the same ones, while few requests run; off: never."""
    backend: Backend = "native"
    """native, or reference: the checkpoint's own code on transformers."""
    trust_remote_code: bool = False
    """The reference backend may run the Python files of the checkpoint's folder."""
    slots: int = 64
    """Requests that are answered at the same time. The reference backend answers one."""
    context_len: int | None = None
    """Tokens of prompt and answer together; None: the checkpoint's."""
    cache_gib: float | None = None
    """Memory for the KV cache; None: the engine decides."""
    cache_dtype: CacheSetting = "auto"
    """Of the KV cache: auto is the computation's, int8 has room for twice the tokens (GPU only)."""
    num_threads: int | None = None
    """CPU threads of the engine; None: torch decides."""
    adapters: tuple[tuple[str, Path], ...] = ()
    """(name, folder) of LoRA adapters that are loaded at the start."""
    adapters_dir: Path | None = None
    """Each folder in it is an adapter of that name, loaded when a request first asks for it."""
    merge_adapter: bool = False
    """Add the one adapter to the weights instead of running it beside them."""
    max_adapters: int = 8
    """In memory at the same time."""
    max_adapter_rank: int = 64
    worker_id: str = field(default_factory=new_worker_id)
    lease_seconds: float = 2.0
    """A worker that is silent for so long has lost its requests. Renewed four times in it."""
    max_attempts: int = MAX_ATTEMPTS
    """Attempts in a row that a request may be lost at, without a new token; then it is a dead letter."""
    stall_seconds: float = 60.0
    """An engine that has work and ends no step for so long is stuck, and killed. A long prefill on a CPU has more time."""
    load_seconds: float = 1800.0
    """An engine that has not loaded its model by then is killed."""
    look_seconds: float = 1.0
    """How often a worker with free slots looks for work of which no ticket told it."""
    flush_seconds: float = 0.03
    """New tokens are published so often; the first one of an answer at once."""
    grace_seconds: float = 25.0
    """How long SIGTERM waits for running requests; what is not done then is released."""
    metrics_host: str = "127.0.0.1"
    """Where metrics are served; 0.0.0.0 in a container, so that Prometheus reaches them."""
    metrics_port: int | None = None
    """The port of index 0; a worker's is that plus its index. 0: none. None: 9750 and so on, the first that is free."""
    index: int | None = None
    """Of this worker on its machine; None: its GPU's, else 0."""
    log_level: str = "INFO"
    log_form: Form = "auto"
    """json, console, or auto: console at a terminal."""
    log_text: bool = False
    """Questions and answers may be in the log."""

    def __post_init__(self) -> None:
        if not self.model:
            object.__setattr__(self, "model", self.queue.model)
        if self.device not in ("auto", "cpu", "cuda") and not (
            self.device.startswith("cuda:") and self.device[5:].isdigit()
        ):
            raise InvalidSetting(
                "GLMQ_DEVICE", f"{self.device!r} is no device", "Use auto, cpu, cuda or cuda:N."
            )
        self._check_forms()
        if self.backend not in BACKENDS:
            raise InvalidSetting(
                "GLMQ_BACKEND", f"{self.backend!r} is no backend", f"Use {' or '.join(BACKENDS)}."
            )
        if self.backend == "reference":
            self._check_trust()
            object.__setattr__(self, "slots", 1)
        self._check_adapters()
        if not 1 <= self.slots <= 4096:
            raise InvalidSetting("GLMQ_SLOTS", f"{self.slots} is out of range", "Use 1 to 4096.")
        if not 1 <= self.max_attempts <= 100:
            raise InvalidSetting("GLMQ_MAX_ATTEMPTS", f"{self.max_attempts} is out of range", "Use 1 to 100.")
        if self.num_threads is not None and self.num_threads < 1:
            raise InvalidSetting("GLMQ_THREADS", f"{self.num_threads} is out of range", "Use 1 or more.")
        if self.context_len is not None and self.context_len < 16:
            raise InvalidSetting("GLMQ_CONTEXT", f"{self.context_len} is too short", "Use 16 tokens or more.")
        self._check_sizes()
        self._check_log()
        self._check_metrics()

    @property
    def engine_index(self) -> int:
        """Tells the workers of a machine apart: their GPU's index, or what GLMQ_WORKER_INDEX says."""
        if self.index is not None:
            return self.index
        return int(self.device.partition(":")[2] or 0)

    def _check_sizes(self) -> None:
        for name in (
            "lease_seconds",
            "stall_seconds",
            "load_seconds",
            "look_seconds",
            "flush_seconds",
            "grace_seconds",
            "cache_gib",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InvalidSetting(
                    f"GLMQ_{name.upper()}", f"{value} is no duration or size", "Use 0 or more."
                )
        if self.lease_seconds < 0.4:
            raise InvalidSetting(
                "GLMQ_LEASE_SECONDS", f"{self.lease_seconds} cannot be renewed in time", "Use 0.4 or more."
            )

    def _check_log(self) -> None:
        for variable, value, known in (
            ("GLMQ_LOG_LEVEL", self.log_level, LEVELS),
            ("GLMQ_LOG_FORMAT", self.log_form, FORMS),
        ):
            if value not in known:
                raise InvalidSetting(variable, f"{value!r} is not known", f"Use one of {', '.join(known)}.")

    def _check_metrics(self) -> None:
        if self.index is not None and not 0 <= self.index <= 1023:
            raise InvalidSetting("GLMQ_WORKER_INDEX", f"{self.index} is out of range", "Use 0 to 1023.")
        port = self.metrics_port
        if port is not None and port != 0 and not 1 <= port + self.engine_index <= 65_535:
            raise InvalidSetting(
                "GLMQ_METRICS_PORT", f"{port} is out of range", "Use 1 to 65000, or 0 to serve no metrics."
            )

    def _check_forms(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidSetting(
                "GLMQ_DTYPE", f"{self.dtype!r} is no dtype", f"Use one of {', '.join(DTYPES)}."
            )
        if self.quantize not in QUANTIZE:
            raise InvalidSetting(
                "GLMQ_QUANTIZE", f"{self.quantize!r} is no form", f"Use one of {', '.join(QUANTIZE)}."
            )
        if self.cache_dtype not in CACHE_DTYPES:
            raise InvalidSetting(
                "GLMQ_CACHE_DTYPE",
                f"{self.cache_dtype!r} is unknown",
                f"Use one of {', '.join(CACHE_DTYPES)}.",
            )
        if self.activations not in ACTIVATIONS:
            raise InvalidSetting(
                "GLMQ_ACTIVATIONS",
                f"{self.activations!r} is unknown",
                f"Use one of {', '.join(ACTIVATIONS)}.",
            )
        if self.speculation not in SPECULATION:
            raise InvalidSetting(
                "GLMQ_SPECULATION",
                f"{self.speculation!r} is unknown",
                f"Use {' or '.join(SPECULATION)}.",
            )

    def _check_trust(self) -> None:
        if not self.trust_remote_code:
            raise InvalidSetting(
                "GLMQ_BACKEND",
                f"the reference backend runs the Python files in {self.checkpoint} with all your rights, "
                "and that has not been allowed",
                "Read them, then say --trust-remote-code; or use the native backend, which runs nothing from a checkpoint.",
            )

    def _check_adapters(self) -> None:
        names = [name for name, _ in self.adapters]
        for name, folder in self.adapters:
            try:
                check_adapter_name(name)
            except InvalidRequest as error:
                raise InvalidSetting("GLMQ_ADAPTERS", error.problem, error.remedy) from error
            if names.count(name) > 1:
                raise InvalidSetting(
                    "GLMQ_ADAPTERS", f"{name} comes twice", "Give each adapter its own name."
                )
            if not folder.is_dir():
                raise InvalidSetting(
                    "GLMQ_ADAPTERS", f"{folder} is no folder", "Give NAME=PATH, PATH being PEFT's folder."
                )
        if self.adapters_dir is not None and not self.adapters_dir.is_dir():
            raise InvalidSetting(
                "GLMQ_ADAPTERS_DIR", f"{self.adapters_dir} is no folder", "Create it, or unset it."
            )
        if not 0 <= self.max_adapters <= 256:
            raise InvalidSetting("GLMQ_MAX_ADAPTERS", f"{self.max_adapters} is out of range", "Use 0 to 256.")
        if not 1 <= self.max_adapter_rank <= 1024:
            raise InvalidSetting(
                "GLMQ_MAX_ADAPTER_RANK", f"{self.max_adapter_rank} is out of range", "Use 1 to 1024."
            )
        if self.merge_adapter and (len(self.adapters) != 1 or self.adapters_dir is not None):
            raise InvalidSetting(
                "GLMQ_MERGE_ADAPTER",
                "merging takes one adapter, which is in every answer then",
                "Give exactly one --adapter, and no --adapters-dir.",
            )
        if not self.merge_adapter and len(self.adapters) > self.max_adapters:
            raise InvalidSetting(
                "GLMQ_MAX_ADAPTERS",
                f"{self.max_adapters} are fewer than the {len(self.adapters)} given",
                "Raise it, or put adapters into a folder for --adapters-dir.",
            )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Read GLMQ_* (and what `Settings` reads); `overrides` that are not None win."""
        environ = os.environ if environ is None else environ
        fields: dict[str, Any] = {"queue": Settings.from_environ(environ)}
        for name, (variable, convert) in _VARIABLES.items():
            text = environ.get(variable, "").strip()
            if text:
                fields[name] = _converted(variable, text, convert)
        fields.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**fields)


def named_folders(texts: Iterable[str]) -> tuple[tuple[str, Path], ...]:
    """(name, folder) from each NAME=PATH. Raises InvalidSetting."""
    named = []
    for text in texts:
        name, is_given, folder = text.partition("=")
        if not is_given or not folder:
            raise InvalidSetting(
                "GLMQ_ADAPTERS", f"{text!r} is not NAME=PATH", "Write it as fitness=/adapters/fitness."
            )
        named.append((name.strip(), Path(folder.strip())))
    return tuple(named)


def _listed_folders(text: str) -> tuple[tuple[str, Path], ...]:
    return named_folders(part for part in text.split(",") if part.strip())


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "checkpoint": ("GLMQ_CHECKPOINT", Path),
    "device": ("GLMQ_DEVICE", str),
    "dtype": ("GLMQ_DTYPE", str),
    "quantize": ("GLMQ_QUANTIZE", str),
    "activations": ("GLMQ_ACTIVATIONS", str),
    "speculation": ("GLMQ_SPECULATION", str),
    "backend": ("GLMQ_BACKEND", str),
    "slots": ("GLMQ_SLOTS", int),
    "context_len": ("GLMQ_CONTEXT", int),
    "cache_gib": ("GLMQ_CACHE_GIB", float),
    "cache_dtype": ("GLMQ_CACHE_DTYPE", str),
    "num_threads": ("GLMQ_THREADS", int),
    "adapters": ("GLMQ_ADAPTERS", _listed_folders),
    "adapters_dir": ("GLMQ_ADAPTERS_DIR", Path),
    "merge_adapter": ("GLMQ_MERGE_ADAPTER", _switch),
    "max_adapters": ("GLMQ_MAX_ADAPTERS", int),
    "max_adapter_rank": ("GLMQ_MAX_ADAPTER_RANK", int),
    "worker_id": ("GLMQ_WORKER_ID", str),
    "lease_seconds": ("GLMQ_LEASE_SECONDS", float),
    "max_attempts": ("GLMQ_MAX_ATTEMPTS", int),
    "stall_seconds": ("GLMQ_STALL_SECONDS", float),
    "load_seconds": ("GLMQ_LOAD_SECONDS", float),
    "look_seconds": ("GLMQ_LOOK_SECONDS", float),
    "flush_seconds": ("GLMQ_FLUSH_SECONDS", float),
    "grace_seconds": ("GLMQ_GRACE_SECONDS", float),
    "metrics_host": ("GLMQ_METRICS_HOST", str),
    "metrics_port": ("GLMQ_METRICS_PORT", int),
    "index": ("GLMQ_WORKER_INDEX", int),
    "log_level": ("GLMQ_LOG_LEVEL", str.upper),
    "log_form": ("GLMQ_LOG_FORMAT", str.lower),
    "log_text": ("GLMQ_LOG_TEXT", _switch),
}


_KINDS: dict[Callable[[str], Any], str] = {int: "a whole number", float: "a number", _switch: "1 or 0"}


def _converted(variable: str, text: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(text)
    except InvalidSetting:
        raise
    except ValueError as error:
        kind = _KINDS.get(convert, "such a value")
        raise InvalidSetting(
            variable, f"{text!r} is not {kind}", f"Set it to {kind}, or unset it."
        ) from error
