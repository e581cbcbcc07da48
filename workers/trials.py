"""What becomes of the requests over which an engine died: most go back to the queue, and those that may have killed it are tried alone.

A suspect stays with this worker, under its lease. The next engine gets the suspects one after another, each by itself, before anything else is
claimed: who kills it again is told to the ledger, which makes a dead letter of it in the end; who does not goes back to the queue with its new
tokens. So a request that kills engines takes others down with it once, and they never share its fate. Knows nothing about processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from workers.engine.client import EngineDied
from workers.logs import get_logger
from workers.publisher import Publisher
from workers.running import RELEASED, Lost, RunningRequest, RunningRequests
from workers.supervisor import Death

logger = get_logger(__name__)

TRIAL_TOKENS: Final = 4
"""A trial is over after so many new tokens: a prefill and some decodes."""
_DEATHS_REMEMBERED: Final = 2


class Trials:
    """Told of each engine's beginning and end, and of what becomes of requests; methods may be called from any thread.

    `resume` hands a request to the engine again and raises EngineDied; `on_done` is called when a new engine is free for others;
    `others_serve` says whether another worker could take what is released.
    """

    def __init__(
        self,
        running: RunningRequests,
        publisher: Publisher,
        *,
        resume: Callable[[RunningRequest], None],
        on_done: Callable[[], None],
        others_serve: Callable[[], bool],
    ) -> None:
        self._running = running
        self._publisher = publisher
        self._resume = resume
        self._on_done = on_done
        self._others_serve = others_serve
        self._lock = threading.RLock()
        self._accused: list[RunningRequest] = []
        """The ledger has not said yet what becomes of them."""
        self._waiting: deque[RunningRequest] = deque()
        self._tried: RunningRequest | None = None
        self._num_needed = 0
        self._is_ready = False
        self._present: deque[frozenset[str]] = deque(maxlen=_DEATHS_REMEMBERED)
        """Requests that were running when an engine died over none in particular."""

    @property
    def num_left(self) -> int:
        """Suspects that have not been tried yet, the one in the engine included."""
        with self._lock:
            return len(self._accused) + len(self._waiting) + (self._tried is not None)

    def on_ready(self) -> None:
        """There is a new engine."""
        with self._lock:
            self._is_ready = True
            self._go_on()

    def on_death(self, death: Death) -> int:
        """The engine is gone. Answers how many requests it was working on."""
        with self._lock:
            was_ready, self._is_ready = self._is_ready, False
            tried, self._tried = self._tried, None
            if not was_ready:
                # No engine here, for who knows how long: others may have one.
                self._give_up()
            elif tried is not None and self._waiting and self._others_serve():
                # Found, and hardly two at a time: the others need not wait for what this one still has to go through.
                self._give_up()
            working = [each for each in self._running if each.is_known_to_engine and each.end is None]
            working = [each for each in working if each not in self._waiting and each not in self._accused]
            suspects = [] if tried is not None else self._suspects(working, death)
            for running in working:
                if running is tried:
                    lost = Lost(f"the engine died while it ran alone ({death.cause})", True, True)
                elif running in suspects:
                    lost = Lost(f"the engine died over it ({death.cause})", keep=True)
                elif running.num_new or running.sequence_id in death.prefilling:
                    lost = Lost(f"the engine died while it ran ({death.cause})")
                else:
                    # It has only waited there: nothing is said about it.
                    self._publisher.end(running, RELEASED)
                    continue
                if lost.keep:
                    self._accused.append(running)
                self._publisher.end(running, lost)
            return len(working)

    def on_kept(self, running: RunningRequest) -> None:
        """The ledger leaves this one here."""
        with self._lock:
            if running in self._accused:
                self._accused.remove(running)
                self._waiting.append(running)
                self._go_on()

    def on_gone(self, running: RunningRequest) -> None:
        """This one is not this worker's any more."""
        with self._lock:
            if running is self._tried:
                self._tried = None
            elif running in self._accused:
                self._accused.remove(running)
            elif running in self._waiting:
                self._waiting.remove(running)
            else:
                return
            self._go_on()

    def on_step(self) -> None:
        """The engine has made tokens."""
        tried = self._tried
        if tried is not None and tried.end is None and tried.num_new >= self._num_needed:
            logger.info("it did not kill the engine: released", request_id=tried.request_id)
            self._publisher.end(tried, RELEASED)

    def _suspects(self, working: list[RunningRequest], death: Death) -> list[RunningRequest]:
        prefilling = [each for each in working if each.sequence_id in death.prefilling]
        again = [each for each in working if not each.num_new and each.failures]
        if death.is_from_outside:
            return again
        if prefilling:
            return prefilling
        ids = frozenset(each.request_id for each in working)
        also_before = [each for each in working if any(each.request_id in before for before in self._present)]
        self._present.append(ids)
        return list({each.request_id: each for each in [*again, *also_before]}.values())

    def _go_on(self) -> None:
        """The next trial, or the end of them all."""
        if not self._is_ready or self._tried is not None:
            return
        while self._waiting:
            running = self._waiting.popleft()
            if running.end is not None:
                continue
            self._tried = running
            self._num_needed = running.num_new + TRIAL_TOKENS
            logger.warning("tried alone", request_id=running.request_id, attempt=running.attempt)
            try:
                self._resume(running)
            except EngineDied:
                # Before it came to this one.
                self._tried = None
                self._waiting.appendleft(running)
            return
        if not self._accused:
            self._on_done()

    def _give_up(self) -> None:
        for running in [*self._waiting, *self._accused]:
            self._publisher.end(running, RELEASED)
        self._waiting.clear()
        self._accused.clear()
