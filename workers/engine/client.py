"""The worker's end of the engine process: start it, talk to it, notice its death. Imports no torch.

Sending is safe from any thread; one thread receives. The two must be different threads: the engine reads commands only
when its last messages have been taken from it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec

from workers.engine.config import EngineConfig
from workers.engine.messages import (
    Fatal,
    FromEngine,
    Prefilling,
    Ready,
    Shutdown,
    Step,
    ToEngine,
    from_engine_decoder,
    to_engine_encoder,
)

ENGINE_MODULE: Final = "workers.engine.process"


class EngineDied(RuntimeError):
    """The engine process is gone. `reason` is its last word, when it could give one, `prefilling` the sequences that it died over."""

    def __init__(
        self, exit_code: int | None, reason: str | None, prefilling: frozenset[int] = frozenset()
    ) -> None:
        self.exit_code = exit_code
        self.reason = reason
        self.prefilling = prefilling
        super().__init__(
            f"the engine process ended ({_exit_text(exit_code)}): {reason or 'it gave no reason'}"
        )

    @property
    def how(self) -> str:
        """Such as `signal 11`."""
        return _exit_text(self.exit_code)

    @property
    def is_killed(self) -> bool:
        """By SIGKILL, which an engine does not do to itself."""
        return self.exit_code == -signal.SIGKILL


class EngineClient:
    """One engine process. It is started here and dies with this process."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        module: str = ENGINE_MODULE,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the process; `receive` gives `Ready` once its model is loaded.

        `module` is what the process runs, `environ` its environment (this process's by default).
        """
        ours, theirs = socket.socketpair()
        with theirs:
            environ = dict(os.environ if environ is None else environ)
            # The child must find the same packages, however this process found them.
            root = str(Path(__file__).resolve().parents[2])
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
            # Threads of OpenMP that spin while they wait starve each other when the cores are shared: on two busy cores a
            # decode step of the demo model took 267 ms so, and 30 ms with this.
            environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            config, environ = _pin_device(config, environ)
            self._process = subprocess.Popen(  # noqa: S603  (our own module)
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=environ,
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal is for the worker, which finishes what runs.
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._send_lock = threading.Lock()
        self._fatal: str | None = None
        # A prefill may be launched before the tokens of the step before it were read, and a sequence that is aborted in it gets none.
        self._prefills: tuple[frozenset[int], ...] = ()
        self._is_closed = False
        with contextlib.suppress(OSError):  # it died at once: `receive` reports that
            self._connection.send_bytes(msgspec.msgpack.encode(config))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def prefilling(self) -> frozenset[int]:
        """The sequences that it computes from their beginning at this moment: those without a token yet."""
        return frozenset().union(*self._prefills)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def send(self, message: ToEngine) -> None:
        """Hands this to the engine, which reads it before its next step. Raises EngineDied."""
        data = to_engine_encoder.encode(message)
        try:
            with self._send_lock:
                self._connection.send_bytes(data)
        except OSError as error:
            raise self._death() from error

    def receive(self, timeout_seconds: float | None = None) -> FromEngine | None:
        """The engine's next message; None when none comes in time.

        Raises EngineDied, once everything that it said before has been received. A `Fatal` is not returned: it is the
        `reason` of that error; nor is a `Prefilling`: see `prefilling`.
        """
        try:
            while timeout_seconds is None or self._connection.poll(timeout_seconds):
                message = from_engine_decoder.decode(self._connection.recv_bytes())
                if isinstance(message, Fatal):
                    self._fatal = message.message
                elif isinstance(message, Prefilling):
                    self._prefills = (*self._prefills[-1:], frozenset(message.sequence_ids))
                else:
                    if isinstance(message, Step) and self._prefills:
                        left = (prefill.difference(message.sequence_ids) for prefill in self._prefills)
                        self._prefills = tuple(prefill for prefill in left if prefill)
                    return message
        except (EOFError, OSError) as error:
            raise self._death() from error
        return None

    def messages(self) -> Iterator[FromEngine]:
        """All further messages, as they come. Ends when the client is closed; raises EngineDied like `receive`."""
        while True:
            try:
                message = self.receive()
            except EngineDied:
                if self._is_closed:
                    return
                raise
            if message is not None:
                yield message

    def wait_until_ready(self, timeout_seconds: float | None = None) -> Ready:
        """The engine's first message. Raises EngineDied when it cannot load, TimeoutError when it takes too long."""
        message = self.receive(timeout_seconds)
        if message is None:
            raise TimeoutError(f"the engine was not ready after {timeout_seconds} s")
        if not isinstance(message, Ready):
            raise TypeError(f"the engine's first message was {type(message).__name__}, not Ready")
        return message

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Ends the process: asks it first, then kills it."""
        self._is_closed = True
        with contextlib.suppress(EngineDied):
            self.send(Shutdown())
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # A thread in `messages` still reads: it comes to the end by itself, and closing under it would give its file
        # number to somebody else.
        with contextlib.suppress(OSError):
            socket_end = socket.socket(fileno=os.dup(self._connection.fileno()))
            with socket_end:
                socket_end.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Ends the process at once, whatever it does. `receive` then raises EngineDied."""
        self._process.kill()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _death(self) -> EngineDied:
        """The process has closed its end, so it ends now, if it has not ended yet."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        return EngineDied(self._process.poll(), self._fatal, self.prefilling)


def _pin_device(config: EngineConfig, environ: dict[str, str]) -> tuple[EngineConfig, dict[str, str]]:
    """Lets the process see one GPU alone: it then has nothing of its own on the others, and a fault stays on this one."""
    if not config.device.startswith("cuda:"):
        return config, environ
    index = int(config.device.removeprefix("cuda:"))
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and index >= len(visible):
        raise ValueError(f"device is cuda:{index}, but CUDA_VISIBLE_DEVICES has only {len(visible)} devices")
    name = visible[index] if visible else str(index)
    # Count as the driver does, and nvidia-smi, and the metrics; CUDA's own order puts the fastest card first.
    environ = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environ, "CUDA_VISIBLE_DEVICES": name}
    return msgspec.structs.replace(config, device="cuda"), environ


def _exit_text(exit_code: int | None) -> str:
    if exit_code is None:
        return "still running"
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
