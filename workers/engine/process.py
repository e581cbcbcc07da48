"""The engine process: loads the model, then reads commands between steps and sends what each step gave.

Started by `EngineClient` as `python -m workers.engine.process FD PARENT_PID`. Ends when its connection or its parent is
gone; a failing step ends it too, with a `Fatal` that says why, because the state of the device is not known then.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final, Protocol, cast

import msgspec

from workers.engine.config import EngineConfig
from workers.engine.messages import (
    Abort,
    Fatal,
    FromEngine,
    Generate,
    LoadAdapter,
    Prefilling,
    Ready,
    Refused,
    Shutdown,
    Step,
    ToEngine,
    UnloadAdapter,
    to_engine_decoder,
)
from workers.logs import Form, set_up

logger = logging.getLogger(__name__)

PARENT_CHECK_SECONDS: Final = 1.0
LOADING_CHECK_SECONDS: Final = 0.005
"""An idle engine looks so often whether an adapter's files have been read."""


class ServedAdapters(Protocol):
    """What this process needs of an engine's adapters."""

    @property
    def is_loading(self) -> bool: ...

    def load(self, command: LoadAdapter) -> None: ...

    def unload(self, command: UnloadAdapter) -> None: ...


class ServedEngine(Protocol):
    """What this process needs of an engine."""

    on_prefill: Callable[[list[int]], None]
    """Called with the sequences of a prefill before it begins."""

    @property
    def adapters(self) -> ServedAdapters: ...

    @property
    def has_work(self) -> bool: ...

    def settle(self) -> list[FromEngine]: ...

    def add(self, message: Generate) -> Refused | None: ...

    def abort(self, sequence_id: int) -> None: ...

    def step(self) -> Step: ...

    def ready(self, load_seconds: float) -> Ready: ...


NewEngine = Callable[[EngineConfig], ServedEngine]
"""Loads a checkpoint. Raises ValueError when the checkpoint or a setting is wrong."""


def serve(connection: Connection, engine: ServedEngine) -> None:
    """Runs steps while there is work and waits for commands while there is none. Returns on Shutdown or a lost parent."""
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromEngine) -> None:
        connection.send_bytes(encoder.encode(message))

    engine.on_prefill = lambda sequence_ids: send(Prefilling(sequence_ids))
    try:
        while True:
            while connection.poll(_patience(engine)):
                message = to_engine_decoder.decode(connection.recv_bytes())
                if isinstance(message, Shutdown):
                    return
                _obey(engine, message, send)
            for news in engine.settle():
                send(news)
            if engine.has_work:
                send(engine.step())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _obey(engine: ServedEngine, message: ToEngine, send: Callable[[FromEngine], None]) -> None:
    if isinstance(message, Generate):
        refused = engine.add(message)
        if refused is not None:
            send(refused)
    elif isinstance(message, Abort):
        engine.abort(message.sequence_id)
    elif isinstance(message, LoadAdapter):
        engine.adapters.load(message)
    elif isinstance(message, UnloadAdapter):
        engine.adapters.unload(message)


def _patience(engine: ServedEngine) -> float | None:
    """How long a command may let itself be waited for; None: there is nothing else to do."""
    if engine.has_work:
        return 0
    return LOADING_CHECK_SECONDS if engine.adapters.is_loading else None


def _native_engine(config: EngineConfig) -> ServedEngine:
    # torch is imported here: only now is the environment complete.
    from workers.engine.engine import Engine  # noqa: PLC0415

    return Engine.from_config(config)


def _load(config: EngineConfig, connection: Connection, new_engine: NewEngine) -> ServedEngine | None:
    """The engine of this config, announced; None when the checkpoint or a setting is wrong, which the worker is told."""
    started = time.monotonic()
    try:
        engine = new_engine(config)
    except ValueError as error:
        connection.send_bytes(msgspec.msgpack.encode(Fatal(str(error))))
        return None
    connection.send_bytes(msgspec.msgpack.encode(engine.ready(load_seconds=time.monotonic() - started)))
    return engine


def main(arguments: list[str], new_engine: NewEngine = _native_engine) -> int:
    """Serves the engine that `new_engine` loads. `arguments`: the connection's file descriptor, and the process id of the parent."""
    file_descriptor, parent_pid = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the worker has accepted: it has the same environment.
    set_up(form=cast(Form, os.environ.get("GLMQ_LOG_FORMAT", "").lower() or "auto"))
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    connection = Connection(file_descriptor)
    try:
        config = msgspec.msgpack.decode(connection.recv_bytes(), type=EngineConfig)
        engine = _load(config, connection, new_engine)
        if engine is None:
            return 1
        serve(connection, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:  # the process's boundary: whatever it was, the worker is told
        logger.exception("the engine failed")
        connection.send_bytes(msgspec.msgpack.encode(Fatal(f"{type(error).__name__}: {error}")))
        return 1
    return 0


def _end_with_parent(parent_pid: int) -> None:
    """The connection tells of a parent's death only between steps; this works while loading, and on a hung device."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
