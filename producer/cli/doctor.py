"""`glmq doctor`: looks at everything that must be right before a worker can serve, and says what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import redis
import typer
from rich.console import Console

from producer.cli.worker import missing_packages
from producer.contract import GlmqError, RedisUnavailable
from producer.embedded import find_binary, find_server
from producer.ledger import connect
from producer.settings import Settings

MIN_REDIS = (6, 2)
MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def doctor(
    checkpoint: Annotated[
        str | None, typer.Option(help="Look at this checkpoint instead of the bundled demo.")
    ] = None,
) -> None:
    """Check Python, packages, Redis and its settings, the GPU and the checkpoint. Exit code 1 if something must be mended."""
    console = Console(highlight=False, soft_wrap=True)
    worst = "ok"
    for check in _checks(checkpoint):
        console.print(f"{MARKS[check.verdict]} {check.name}: {check.found}", markup=True)
        if check.remedy:
            console.print(f"       → {check.remedy}", markup=False)
        worst = "fail" if "fail" in (worst, check.verdict) else worst
    if worst == "fail":
        raise typer.Exit(1)


def _checks(checkpoint: str | None) -> Iterator[Check]:
    yield from _packages()
    yield from _redis()
    yield _gpu()
    yield from _worker(checkpoint)


def _packages() -> Iterator[Check]:
    yield Check("Python", "ok", platform.python_version())
    for name in ("glmq", "celery", "redis", "pydantic"):
        yield Check(name, "ok", importlib.metadata.version(name))


def _redis() -> Iterator[Check]:
    settings = Settings.from_environ()
    try:
        connection = connect(find_server(settings), timeout_seconds=5, retries=0)
        info: Any = connection.info()
    except RedisUnavailable as error:
        yield _no_server(settings, error)
        return
    except redis.RedisError as error:
        yield Check(
            "Redis", "fail", str(error), "Start one with `glmq up`, or set REDIS_URL to a server that runs."
        )
        return
    version = str(info.get("valkey_version") or info["redis_version"])
    name = "Valkey" if "valkey_version" in info else "Redis"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS:
        yield Check(name, "fail", version, "Use Redis 6.2 or newer, or Valkey.")
    else:
        yield Check(name, "ok", version)
    yield _memory_policy(info)
    yield _durability(info)


def _no_server(settings: Settings, error: RedisUnavailable) -> Check:
    """Nothing to mend if `glmq up` can start one."""
    if settings.redis_url is not None:
        return Check("Redis", "fail", str(error))
    try:
        binary = find_binary()
    except GlmqError as nothing:
        return Check("Redis", "fail", str(nothing))
    version = ".".join(map(str, binary.version))
    return Check("Redis", "warn", f"none runs; `glmq up` starts {binary.name} {version}")


def _memory_policy(info: dict[str, Any]) -> Check:
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return Check("maxmemory-policy", "ok", policy)
    return Check(
        "maxmemory-policy",
        "fail" if int(info.get("maxmemory", 0)) else "warn",
        f"{policy}: when memory runs out Redis would drop requests and streams silently",
        "CONFIG SET maxmemory-policy noeviction, and set it in redis.conf.",
    )


def _durability(info: dict[str, Any]) -> Check:
    if not int(info.get("aof_enabled", 0)):
        return Check(
            "appendonly",
            "warn",
            "no: a restart of Redis loses queued requests",
            "CONFIG SET appendonly yes, and set it in redis.conf.",
        )
    if info.get("aof_last_write_status") != "ok":
        return Check(
            "appendonly",
            "fail",
            "the last write to the append-only file failed",
            "Look at Redis' log and at free disk space.",
        )
    return Check("appendonly", "ok", "yes")


def _gpu() -> Check:
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return Check("GPU", "warn", "no NVIDIA driver found: workers run on the CPU")
    query = [nvidia_smi, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    if answer.returncode:
        return Check(
            "GPU", "fail", answer.stderr.strip() or answer.stdout.strip(), "Mend the driver's installation."
        )
    return Check("GPU", "ok", "; ".join(answer.stdout.strip().splitlines()))


def _worker(checkpoint: str | None) -> Iterator[Check]:
    """The worker's own checks, in a process of its own: the producer imports nothing of it."""
    missing = missing_packages()
    if missing:
        yield Check(
            "worker",
            "warn",
            f"{', '.join(missing)} not installed: only producers run here",
            "Install glmq[worker].",
        )
        return
    command = [sys.executable, "-m", "workers.doctor", *([checkpoint] if checkpoint else [])]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    for line in answer.stdout.splitlines():
        yield Check(**json.loads(line))
    if answer.returncode:
        yield Check("worker", "fail", (answer.stderr.strip().splitlines() or ["ended without a word"])[-1])
