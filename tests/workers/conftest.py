"""A worker's parts around the real ledger, with an engine that says what the test tells it to say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from producer.contract import ChatRequest, Event, SamplingParams
from producer.ledger import Ledger, calls
from producer.settings import Settings
from workers.claims import Claims
from workers.engine.messages import Generate, Step
from workers.folding import Folding
from workers.metrics import Metrics
from workers.pool import Ticket
from workers.prompts import Prompts
from workers.publisher import Publisher
from workers.running import RunningRequest, RunningRequests
from workers.settings import WorkerSettings

MODEL = "chatglm-6b"
END = 0
"""The end token of `Letters`."""


def wait_for(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """The condition's first true value; fails the test if it does not come in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return value


class Letters:
    """A detokenizer whose token ids are characters; it holds back a space until it knows what comes after it."""

    def __init__(self, stop: Sequence[str] = (), emitted_ids: Sequence[int] = ()) -> None:
        self._held = ""
        self._stop = stop
        self._text = ""
        self.is_stopped = False
        for token_id in emitted_ids:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        text = "" if token_id == END else chr(token_id)
        if text == " ":
            self._held += text
            return ""
        text, self._held = self._held + text, ""
        self._text += text
        for stop in self._stop:
            if stop in self._text:
                self.is_stopped = True
                text = text[: -len(stop)]
        return text

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text

    def build_prompt(self, query: str, history: Any = ()) -> list[int]:
        return [ord(character) for turn in [*history, (query,)] for part in turn for character in part]

    def encode_framed_prompt(self, parts: Any, _labels: Any) -> list[int]:
        return [ord(character) for part in parts for character in part.text]


@dataclass
class Bench:
    """Claims and a publisher as the worker wires them; `generated` and `aborted` are what the engine was asked."""

    ledger: Ledger
    settings: WorkerSettings
    running: RunningRequests = field(default_factory=RunningRequests)
    generated: list[Generate] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    gone: list[RunningRequest] = field(default_factory=list)
    completed: list[Ticket] = field(default_factory=list)
    accepted: list[Ticket] = field(default_factory=list)
    metrics: Metrics = field(default_factory=lambda: Metrics(model=MODEL))
    context_len: int = 1000
    num_folds_due: int = 0

    def __post_init__(self) -> None:
        self.publisher = Publisher(
            self.ledger,
            self.running,
            self.settings.worker_id,
            abort=self.aborted.append,
            on_gone=self._on_gone,
            flush_seconds=self.settings.flush_seconds,
            metrics=self.metrics,
        )
        self.claims = Claims(
            self.ledger,
            self.running,
            self.publisher,
            self.settings,
            generate=self.generated.append,
            new_detokenizer=Letters,
            end_id=END,
            metrics=self.metrics,
        )
        self.fold_ledger = _CountingLedger(self.ledger)
        self.folding = Folding(
            self.fold_ledger,  # type: ignore[arg-type]
            model=MODEL,
            retention_seconds=60.0,
            on_queued=self.claims.look,
        )

    def _on_gone(self, running: RunningRequest) -> None:
        if running.ticket is not None:
            running.ticket.complete()
        self.claims.on_free_slot()
        if running.fold is not None and running.end in ("stop", "length"):
            self.num_folds_due += 1
            self.folding.submit(running.fold, running.request_id)
        # Who waits for this finds all of the above done.
        self.gone.append(running)

    def start(self) -> None:
        self.publisher.start()
        self.folding.start()
        self.claims.start()
        self.reopen()

    def reopen(self) -> None:
        """There is an engine (again)."""
        self.claims.open(Prompts(Letters(), context_len=self.context_len))

    def stop(self) -> None:
        self.claims.stop()
        self.folding.stop()
        self.publisher.stop(1)

    def submit(self, query: str = "hello", **fields: Any) -> str:
        """Queue a request, without a ticket."""
        sampling = SamplingParams(seed=1, **fields.pop("sampling", {}))
        request = ChatRequest(query=query, sampling=sampling, **fields)
        return self.ledger.run(calls.submit(request, model=MODEL)).request_id

    def ticket(self, name: str = "glmq.next", task_id: str = "t", **kwargs: Any) -> Ticket:
        """A ticket as the pool hands it over."""
        ticket = Ticket(
            _NoPool(),  # type: ignore[arg-type]
            1,
            task_name=name,
            task_id=task_id,
            args=[],
            kwargs=kwargs,
            accept_callback=lambda _pid, _when: self.accepted.append(ticket),
            callback=lambda _result: self.completed.append(ticket),
        )
        return ticket

    def generation(self, request_id: str) -> Generate:
        """What the engine was asked for this request, once it was."""
        running = wait_for(lambda: (r := self.running.get(request_id)) and r.is_known_to_engine and r)
        return wait_for(
            lambda: next((g for g in self.generated if g.sequence_id == running.sequence_id), None)
        )

    def say(self, sequence_id: int, text: str, reason: str = "") -> None:
        """The engine makes these tokens, one step each; the reason comes with the last."""
        for number, character in enumerate(text, start=1):
            self.say_ids(sequence_id, [ord(character)], reason if number == len(text) else "")

    def say_ids(self, sequence_id: int, ids: Sequence[int], reason: str = "") -> None:
        for number, token_id in enumerate(ids, start=1):
            self.publisher.on_step(Step([sequence_id], [token_id], [reason if number == len(ids) else ""]))

    def events(self, request_id: str) -> list[Event]:
        followed = self.ledger.run(calls.follow("", [(request_id, "0")]))[0]
        return [] if followed is None else calls.events(followed.entries)

    def types(self, request_id: str) -> list[str]:
        return [event.type for event in self.events(request_id)]

    def ended(self, request_id: str) -> list[Event]:
        """All events of a request, once it has ended and left this worker."""
        wait_for(lambda: self.types(request_id)[-1:] in (["finished"], ["failed"]))
        wait_for(lambda: self.running.get(request_id) is None)
        return self.events(request_id)

    def wait_gone(self, request_id: str) -> None:
        """It has left this worker, and what follows from that is done: the fold that is due is queued."""
        wait_for(lambda: request_id in [running.request_id for running in self.gone])
        wait_for(lambda: self.fold_ledger.num_answered == self.num_folds_due)


class _CountingLedger:
    """Passes calls on."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.num_answered = 0

    def run(self, call: Any) -> Any:
        try:
            return self._ledger.run(call)
        finally:
            self.num_answered += 1


class _NoPool:
    def forget(self, ticket: Ticket) -> None:
        """What a pool does about a completed ticket is the pool's test."""


@pytest.fixture
def new_bench(redis_url: str, settings: Settings) -> Iterator[Callable[..., Bench]]:
    """Makes benches on the test's own namespace; each is another worker."""
    benches: list[Bench] = []

    def new(
        *,
        start: bool = True,
        url: str = redis_url,
        timeout_seconds: float = 1,
        context_len: int = 1000,
        **changes: Any,
    ) -> Bench:
        queue = replace(settings, redis_url=url, model=MODEL)
        worker = WorkerSettings(queue=queue, worker_id=f"worker-{len(benches)}", slots=4, look_seconds=0.1)
        bench = Bench(
            Ledger.at(url, queue.keys, timeout_seconds=timeout_seconds, retries=0),
            replace(worker, **changes),
            context_len=context_len,
        )
        benches.append(bench)
        if start:
            bench.start()
        return bench

    yield new
    for bench in benches:
        bench.stop()
        bench.ledger.close()


@pytest.fixture
def bench(new_bench: Callable[..., Bench]) -> Bench:
    return new_bench()
