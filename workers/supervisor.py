"""Keeps an engine running: starts one, hands on what it says, kills it when it hangs, and starts another one when it has died.

Knows nothing of Redis or of requests.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from workers.engine.client import EngineClient, EngineDied
from workers.engine.config import EngineConfig
from workers.engine.messages import FromEngine, Generate, Ready, ToEngine
from workers.logs import get_logger
from workers.pool import StartFailed

logger = get_logger(__name__)

RESTART_SECONDS: Final = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the engine is started again, for deaths in a row; the last one repeats."""
RESTART_FOR_SUSPECTS_SECONDS: Final = 1.0
"""The longest wait while requests wait for their trials: it is rather them than the engine."""
GOOD_LIFE_SECONDS: Final = 60.0
"""An engine that was ready for so long does not belong to the row."""
CPU_PREFILL_SECONDS_PER_TOKEN: Final = 0.25
"""What a prefill may take on a CPU beyond the time in which a step must end: 6 billion parameters on two old cores."""


@dataclass(frozen=True, slots=True)
class Death:
    """How an engine ended."""

    cause: str
    """Such as `signal 11`."""
    prefilling: frozenset[int] = frozenset()
    """Sequences that had no token yet of what it was computing."""
    is_from_outside: bool = False
    """Somebody killed it, so that a request is the less likely reason."""


class Toll(NamedTuple):
    """What a death has cost."""

    num_requests: int
    num_suspects: int
    """Of them, those that the next engine is to try alone."""


class Supervisor:
    """One engine after another, in a thread of its own. Its methods may be called from any thread.

    `new_config(is_first)` is asked before each start; a ValueError or an OSError is the end of that engine. `on_message` is told what the engine says.
    When it has died, `on_death` sees to its requests; `on_down` is called before, and also when the first engine could not start. `num_generating`: requests that the engine works on; `num_prefill_tokens`: of these sequences.
    """

    def __init__(
        self,
        module: str,
        *,
        stall_seconds: float,
        load_seconds: float,
        new_config: Callable[[bool], EngineConfig],
        num_generating: Callable[[], int],
        num_prefill_tokens: Callable[[frozenset[int]], int],
        on_message: Callable[[FromEngine], None],
        on_down: Callable[[], None],
        on_death: Callable[[Death], Toll],
    ) -> None:
        self._module = module
        self._stall_seconds = stall_seconds
        self._load_seconds = load_seconds
        self._new_config = new_config
        self._num_generating = num_generating
        self._num_prefill_tokens = num_prefill_tokens
        self._on_message = on_message
        self._on_down = on_down
        self._on_death = on_death
        self._engine: EngineClient | None = None
        self._killed: EngineClient | None = None
        """Because it was stuck."""
        self._failure: str | None = None
        self._last_progress = time.monotonic()
        self._loading_since = math.inf
        self._ready_since = 0.0
        self._is_stopping = threading.Event()
        self._has_changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.ready: Ready | None = None
        """What the engine said when it had loaded; None while there is none that has."""
        self.num_restarts = 0

    def start(self) -> None:
        self._thread.start()

    def wait_until_ready(self, check_interrupted: Callable[[], None]) -> None:
        """Raises StartFailed when the first engine dies, and what `check_interrupted` raises."""
        while self.ready is None:
            check_interrupted()
            if self._failure is not None:
                raise StartFailed(self._failure)
            self._has_changed.wait(0.1)

    def stop(self) -> None:
        """End the engine. It has nothing to lose, and is deaf while it loads: an ordinary exit would take seconds."""
        self.expect_end()
        if self._engine is not None:
            self._engine.kill()
            self._engine.close()

    def expect_end(self) -> None:
        """From now on an engine that dies is not started again."""
        self._is_stopping.set()

    @property
    def pid(self) -> int | None:
        engine = self._engine
        return engine.pid if engine is not None and engine.is_alive else None

    def send(self, message: ToEngine) -> None:
        """Raises EngineDied."""
        if self._engine is None:
            raise EngineDied(None, "it is not started")
        self._engine.send(message)

    def generate(self, message: Generate) -> None:
        """Raises EngineDied."""
        if self._num_generating() <= 1:
            # It was idle: its silence until now was no lack of progress.
            self._last_progress = time.monotonic()
        self.send(message)

    # --- a hang -------------------------------------------------------------------------------------------------------

    def is_stuck(self) -> bool:
        """It loads, or has work, and has been silent for too long."""
        now = time.monotonic()
        if now - self._loading_since > self._load_seconds:
            return True
        if self._num_generating() == 0:
            return False
        return now - self._last_progress > self._stall_seconds + self._prefill_seconds()

    def _prefill_seconds(self) -> float:
        """How long the prefill in progress may take, if there is one. On a GPU it is a step like any other."""
        if self._engine is None or self.ready is None or not self.ready.device.startswith("cpu"):
            return 0.0
        return CPU_PREFILL_SECONDS_PER_TOKEN * self._num_prefill_tokens(self._engine.prefilling)

    def kill_stuck(self) -> None:
        """It will not come back by itself."""
        if self._engine is not None:
            self._killed = self._engine
            self._engine.kill()

    # --- one life after another -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        num_in_a_row = 0
        for life in range(sys.maxsize):
            self._failure = None
            death = self._live(is_first=life == 0)
            if self._is_stopping.is_set():
                return
            was_ready, self.ready = self.ready is not None, None
            self._failure = death.cause
            self._on_down()
            if not was_ready and life == 0:
                # The operator's mistake rather than bad luck: a restart would not help.
                self._has_changed.set()
                return
            toll = self._on_death(death)
            self.num_restarts += 1
            if was_ready and time.monotonic() - self._ready_since > GOOD_LIFE_SECONDS:
                num_in_a_row = 0
            pause = RESTART_SECONDS[min(num_in_a_row, len(RESTART_SECONDS) - 1)]
            num_in_a_row += 1
            if toll.num_suspects:
                pause = min(pause, RESTART_FOR_SUSPECTS_SECONDS)
            logger.error(
                "the engine died",
                reason=death.cause,
                requests=toll.num_requests,
                suspects=toll.num_suspects,
                restart_in_seconds=pause,
            )
            if self._is_stopping.wait(pause):
                return

    def _live(self, *, is_first: bool) -> Death:
        """From its start to its death."""
        try:
            engine = self._engine = EngineClient(self._new_config(is_first), module=self._module)
        except (ValueError, OSError) as error:
            # A setting that only the engine can judge, or a machine that has no room for another process.
            return Death(str(error))
        self._loading_since = time.monotonic()
        try:
            for message in engine.messages():
                self._last_progress = time.monotonic()
                if isinstance(message, Ready):
                    self._loading_since, self._ready_since = math.inf, time.monotonic()
                    self.ready = message
                    self._has_changed.set()
                self._on_message(message)
        except EngineDied as error:
            if engine is self._killed:
                return Death(self._what_took_too_long(), error.prefilling)
            return Death(error.reason or error.how, error.prefilling, is_from_outside=error.is_killed)
        except Exception as error:  # the engine's output is a boundary: a new engine may do better
            logger.exception("the engine's output could not be used")
            return Death(str(error), engine.prefilling)
        finally:
            self._loading_since = math.inf
            engine.close()
        return Death("it was closed")

    def _what_took_too_long(self) -> str:
        if self.ready is not None:
            return f"no step ended for {self._stall_seconds:g} s"
        return (
            f"the model was not loaded after {self._load_seconds:g} s: a slow disk needs a longer GLMQ_LOAD_SECONDS, "
            "an engine that hangs a look at its device"
        )
