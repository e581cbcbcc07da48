"""The workers of one machine: which there are and what each is pinned to, started, watched, started again, and drained together.

It knows processes, their output and their exit codes. What a worker does, and how one sees that it is ready, it is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TextIO

from producer.contract import InvalidSetting
from producer.tether import tethered

LOOK_SECONDS: Final = 0.05
MAX_STARTS_IN_VAIN: Final = 5
"""A worker that never was ready, and was killed so often while it started, is not started again."""
NAMES_OF_CARDS: Final = ("GPU-", "MIG-")


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker of the fleet: its name in the log, and what it is given beyond what all of them get."""

    name: str
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


def gpu_plans(selection: str, environ: Mapping[str, str], num_gpus: Callable[[], int]) -> list[WorkerPlan]:
    """A worker for each GPU of the selection: `all`, or indices and UUIDs with commas between them.

    Indices count the cards that this process may see: with CUDA_VISIBLE_DEVICES=4,5 card 0 is the driver's card 4. num_gpus: how
    many the driver has; asked only where that variable is not set. Raises InvalidSetting.
    """
    visible = _visible(environ)
    if visible is None:
        visible = [str(index) for index in range(num_gpus())]
    if not visible:
        raise InvalidSetting(
            "--gpus",
            "no GPU can be seen",
            "Look at nvidia-smi and CUDA_VISIBLE_DEVICES; for CPU workers say --workers N.",
        )
    chosen: list[tuple[int, str]] = []
    names = (
        [str(index) for index in range(len(visible))] if selection.strip() == "all" else selection.split(",")
    )
    for name in (name.strip() for name in names):
        if name.startswith(NAMES_OF_CARDS):
            chosen.append((visible.index(name) if name in visible else len(visible) + len(chosen), name))
        elif name.isdecimal() and int(name) < len(visible):
            chosen.append((int(name), visible[int(name)]))
        else:
            raise InvalidSetting(
                "--gpus",
                f"{name!r} is none of the {len(visible)} that can be seen",
                f"Use all, or indices from 0 to {len(visible) - 1} such as 0,2, or UUIDs.",
            )
    if len({card for _, card in chosen}) < len(chosen):
        raise InvalidSetting(
            "--gpus", f"{selection!r} names one twice", "Name each once: a GPU has one worker."
        )
    return [
        WorkerPlan(
            f"gpu{index}",
            ("--device", "cuda:0"),
            {
                "CUDA_VISIBLE_DEVICES": card,
                # Else CUDA numbers cards by speed, and nvidia-smi and the metrics by their place.
                "CUDA_DEVICE_ORDER": environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
                "GLMQ_WORKER_INDEX": str(index),
            },
        )
        for index, card in chosen
    ]


def cpu_plans(num_workers: int, num_threads: int | None) -> list[WorkerPlan]:
    """So many workers on the CPU. num_threads: of each engine; None: it was said elsewhere."""
    threads = {} if num_threads is None else {"GLMQ_THREADS": str(num_threads)}
    return [
        # Engines of several workers have no card of their own to lose: none of them shall reserve memory on one.
        WorkerPlan(f"cpu{index}", ("--device", "cpu"), {"GLMQ_WORKER_INDEX": str(index), **threads})
        for index in range(num_workers)
    ]


def num_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: its affinity, and the quota of its container (cgroup v2), rounded down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = cpu_max.read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


def _visible(environ: Mapping[str, str]) -> list[str] | None:
    """Cards as CUDA_VISIBLE_DEVICES names them, which ends at the first name that is none; None: it does not say."""
    if (text := environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    cards: list[str] = []
    for name in (name.strip() for name in text.split(",")):
        if not name.isdecimal() and not name.startswith(NAMES_OF_CARDS):
            break
        cards.append(name)
    return cards


@dataclass(slots=True)
class Backoff:
    """How long to wait before a worker is started again: twice as long each time, anew after a healthy while. In seconds."""

    first: float = 1.0
    longest: float = 60.0
    healthy: float = 60.0
    num_deaths: int = 0
    """Since the last healthy while."""

    def on_death(self, seconds_ready: float) -> float:
        """The wait after a life in which the worker was ready for so long."""
        if seconds_ready >= self.healthy:
            self.num_deaths = 0
        self.num_deaths += 1
        # 2.0 ** 1024 overflows.
        return min(self.first * 2.0 ** min(self.num_deaths - 1, 64), self.longest)


class ReadyPids(Protocol):
    """Process ids of this machine's workers that serve. Empty when nobody can tell at the moment."""

    def __call__(self) -> Collection[int]: ...


class _Member:
    """One worker through all of its lives."""

    def __init__(self, plan: WorkerPlan, backoff: Backoff) -> None:
        self.plan = plan
        self.backoff = backoff
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None
        self.last_line = ""
        self.ready_at: float | None = None
        """Of this life; on the monotonic clock."""
        self.was_ready = False
        self.start_at = 0.0
        self.num_starts = 0
        self.exit_code: int | None = None
        """Of a worker that is not started again."""

    @property
    def has_ended(self) -> bool:
        return self.exit_code is not None


class Fleet:
    """Runs workers until it is told to drain, or none of them can be started. One thread runs it; signals may come at any time.

    A worker that dies is started again after a pause that grows (`Backoff`). One that exits with an error before it was ever ready
    has a configuration that no restart will mend: the others go on without it.
    """

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        command: Sequence[str],
        ready_pids: ReadyPids,
        *,
        environ: Mapping[str, str],
        say: Callable[[str], None],
        log: TextIO,
        on_all_ready: Callable[[], None] = lambda: None,
        new_backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        """command: the worker's, its first word a path; a plan's arguments are appended.

        say: what happens to the fleet, a line each. log: where the workers' lines go, each with its worker's name in front; a single
        worker writes to our stderr itself.
        """
        self._members = [_Member(plan, new_backoff()) for plan in plans]
        self._command = command
        self._ready_pids = ready_pids
        self._environ = environ
        self._say = say
        self._log = log
        self._log_lock = threading.Lock()
        self._on_all_ready = on_all_ready
        self._num_signals = 0
        self._num_obeyed = 0
        self._were_all_ready = False

    def drain(self) -> None:
        """Drain all; the second call releases running requests at once, the third kills. Safe in a signal's handler."""
        self._num_signals += 1

    def run(self) -> int:
        """Blocks until the last worker has ended. Returns 0 after a drain, else the exit code of a worker that could not start."""
        try:
            while not all(member.has_ended for member in self._members):
                self._obey()
                for member in self._members:
                    self._look_after(member)
                self._look_who_is_ready()
                time.sleep(LOOK_SECONDS)
        finally:
            # Only after an error of ours: no worker outlives its supervisor.
            for member in self._members:
                if member.process is not None:
                    member.process.terminate()
        return max((abs(member.exit_code or 0) for member in self._members), default=0)

    def _obey(self) -> None:
        while self._num_obeyed < self._num_signals:
            self._num_obeyed += 1
            alive = [member for member in self._members if member.process is not None]
            names = ", ".join(member.plan.name for member in alive) or "nothing runs"
            if self._num_obeyed == 1:
                self._say(f"draining: {names}. Once more: release what they answer at once")
            elif self._num_obeyed == 2:
                self._say(f"releasing: {names}. Once more: kill")
            else:
                self._say(f"killing: {names}")
            for member in alive:
                _signal(member, signal.SIGTERM if self._num_obeyed <= 2 else signal.SIGKILL)

    def _look_after(self, member: _Member) -> None:
        if member.has_ended:
            return
        if member.process is None:
            if self._num_signals:
                member.exit_code = 0
            elif time.monotonic() >= member.start_at:
                self._start(member)
        elif (code := member.process.poll()) is not None:
            self._on_exit(member, code)

    def _start(self, member: _Member) -> None:
        is_alone = len(self._members) == 1
        member.num_starts += 1
        member.ready_at, member.last_line = None, ""
        # A session of its own: Ctrl-C at the terminal is for the fleet, which tells its workers what to do.
        member.process = subprocess.Popen(  # noqa: S603
            tethered([*self._command, *member.plan.arguments]),
            env={**self._environ, **member.plan.environ},
            stdin=subprocess.DEVNULL,
            stdout=None if is_alone else subprocess.PIPE,
            stderr=None if is_alone else subprocess.STDOUT,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if member.process.stdout is not None:
            member.reader = threading.Thread(
                target=self._pass_on, args=(member, member.process.stdout), name=member.plan.name, daemon=True
            )
            member.reader.start()

    def _pass_on(self, member: _Member, lines: TextIO) -> None:
        """The worker's lines, each with its name, until the last process that writes there has ended."""
        name = member.plan.name
        with lines:
            for line in lines:
                if line.strip():
                    member.last_line = line.strip()
                # A program reads lines of JSON: they stay JSON.
                text = f'{{"from":"{name}",{line[1:]}' if line.startswith('{"') else f"{name} | {line}"
                with self._log_lock:
                    self._log.write(text if text.endswith("\n") else text + "\n")
                    self._log.flush()

    def _on_exit(self, member: _Member, code: int) -> None:
        if member.reader is not None:
            # What it said last is the reason; an engine that is slower to end must not hold us up.
            member.reader.join(1)
        seconds_ready = 0.0 if member.ready_at is None else time.monotonic() - member.ready_at
        member.process, member.ready_at = None, None
        name = member.plan.name
        if self._num_signals:
            # Before its own handler is there, SIGTERM ends a worker that has nothing to drain yet.
            member.exit_code = 0 if code in (-signal.SIGTERM, -signal.SIGKILL) else code
            self._say(f"{name} has stopped{'' if code == 0 else f' ({_how(code)})'}")
            return
        if not member.was_ready and (code > 0 or member.num_starts >= MAX_STARTS_IN_VAIN):
            member.exit_code = code
            reason = f": {member.last_line}" if member.last_line else ", see above"
            self._say(
                f"{name} could not start ({_how(code)}){reason}\n{name} is not started again: mend that, then start anew"
            )
            return
        pause = member.backoff.on_death(seconds_ready)
        member.start_at = time.monotonic() + pause
        self._say(f"{name} has ended ({_how(code)}); it is started again in {pause:g} s")

    def _look_who_is_ready(self) -> None:
        if self._num_signals:
            return
        starting = [member for member in self._members if member.process and member.ready_at is None]
        pids = self._ready_pids() if starting else ()
        for member in starting:
            if member.process is not None and member.process.pid in pids:
                member.ready_at = time.monotonic()
                again = " again" if member.was_ready else ""
                member.was_ready = True
                if len(self._members) > 1:
                    num_ready = sum(other.ready_at is not None for other in self._members)
                    self._say(f"{member.plan.name} is ready{again}: {num_ready} of {len(self._members)}")
        # Those that are given up are not waited for.
        serving = [member for member in self._members if not member.has_ended]
        if not self._were_all_ready and serving and all(member.was_ready for member in serving):
            self._were_all_ready = True
            self._on_all_ready()


def _signal(member: _Member, number: signal.Signals) -> None:
    """Popen sends nothing to a process whose end it has seen."""
    if member.process is not None:
        with contextlib.suppress(ProcessLookupError):
            member.process.send_signal(number)


def _how(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
