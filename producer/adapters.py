"""The adapters of running workers: which there are, and commands that load and unload them while they serve.

Talks to the workers of one model over their control channels and waits for each one's reply. What a command has loaded
is forgotten when the worker ends: options and folders of the worker are for what shall last.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from producer.client import Client
from producer.contract.control import (
    AdapterCommand,
    LoadAdapterCommand,
    Reply,
    UnloadAdapterCommand,
    check_adapter_name,
    encode_command,
)
from producer.ledger import calls
from producer.ledger.ledger import raise_unavailable

REPLY_TIMEOUT_SECONDS = 60.0
"""Reading an adapter takes a second or two; from a slow disk, more."""
_UNHEARD_SECONDS = 0.2
_REPEAT_SECONDS = 1.0
"""A worker that has not replied is told again: its connection may have been about to close. It obeys a command once."""


@dataclass(frozen=True, slots=True)
class WorkerAdapters:
    """What one worker can answer with."""

    worker: str
    known: tuple[str, ...]
    """Names that a request can ask for."""
    loaded: tuple[str, ...]
    """Those in its memory; the others are loaded when a request asks for them."""


class Adapters:
    """Of the workers that serve `model`, the client's one by default."""

    def __init__(self, client: Client, model: str | None = None) -> None:
        self._model = model or client.model
        self._ledger = client.ledger
        self._connection: Any = client.ledger.connection

    def of_workers(self) -> list[WorkerAdapters]:
        """Of each worker that is alive. Raises RedisUnavailable."""
        overview = self._ledger.run(calls.overview(self._model))
        return [
            WorkerAdapters(
                worker.worker,
                _names(worker.about.get("adapters", "")),
                _names(worker.about.get("adapters_loaded", "")),
            )
            for worker in sorted(overview.workers, key=lambda worker: worker.worker)
            if worker.about.get("model") == self._model
        ]

    def load(
        self, name: str, folder: str | os.PathLike[str], timeout: float = REPLY_TIMEOUT_SECONDS
    ) -> Iterator[Reply]:
        """Let every worker answer with the adapter in this folder when a request asks for this name; the replies, as they
        come. Answers that run with an adapter of that name finish with the one that they have.

        folder: as the workers' machines see it. Raises InvalidRequest, RedisUnavailable.
        """
        path = str(Path(folder).absolute())
        check_adapter_name(name)
        return self._give(
            lambda command_id: LoadAdapterCommand(command_id=command_id, name=name, folder=path), timeout
        )

    def unload(self, name: str, timeout: float = REPLY_TIMEOUT_SECONDS) -> Iterator[Reply]:
        """Let no request have this adapter any more; answers that run with it finish with it. The replies, as they come.

        Raises InvalidRequest, RedisUnavailable.
        """
        check_adapter_name(name)
        return self._give(lambda command_id: UnloadAdapterCommand(command_id=command_id, name=name), timeout)

    def _give(self, command_of: Callable[[str], AdapterCommand], timeout: float) -> Iterator[Reply]:
        """One reply of each worker; of one that is silent, a reply that says so."""
        command_id = secrets.token_hex(8)
        line = encode_command(command_of(command_id))
        deadline = time.monotonic() + timeout
        silent = {worker.worker for worker in self.of_workers()}
        try:
            while silent and (left := deadline - time.monotonic()) > 0:
                # A worker that has just lost its connection hears nothing: nobody has received it then.
                heard = [self._publish(worker, line) for worker in silent]
                yield from self._replies(
                    command_id, silent, min(left, _REPEAT_SECONDS if all(heard) else _UNHEARD_SECONDS)
                )
        except redis.RedisError as error:
            raise_unavailable(self._ledger.address, error)
            raise
        for worker in sorted(silent):
            yield Reply(
                worker=worker,
                problem=f"no reply within {timeout:g} s: `glmq status` shows whether it is alive, `glmq adapters list` "
                "whether it has obeyed since",
            )

    def _replies(self, command_id: str, silent: set[str], seconds: float) -> Iterator[Reply]:
        """The replies of so many seconds. Their workers are silent no more."""
        end = time.monotonic() + seconds
        while silent and (left := end - time.monotonic()) > 0:
            popped = self._connection.blpop([self._ledger.keys.replies(command_id)], timeout=max(left, 0.01))
            if popped is not None:
                reply = Reply.model_validate_json(popped[1])
                silent.discard(reply.worker)
                yield reply

    def _publish(self, worker: str, line: str) -> bool:
        """Whether somebody has heard it."""
        return bool(self._connection.publish(self._ledger.keys.control(worker), line))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
