"""Workers, clients and readers call every script in any order; calls are lost, doubled and late, workers die and come back.

After each call its answer, its pushes and what it may have touched are compared with the model, and every few steps all keys are. When
the steps are over everything that lives must come to an end, and nothing may be left behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from producer.contract import ChatRequest, Request, Started, SummaryRequest
from producer.ledger import Emission
from tests.producer.ledger.model_check.actors import Held, Worker
from tests.producer.ledger.model_check.agreement import check_nothing_is_left
from tests.producer.ledger.model_check.clients import Clients
from tests.producer.ledger.model_check.deployment import CONVERSATION_SECONDS, TENANTS, act, pick
from tests.producer.ledger.model_check.following import Readers
from tests.producer.ledger.model_check.model import Model
from tests.producer.ledger.model_check.working import LEASE_SECONDS, Workers

FULL_CHECK_STEPS: Final = 12
"""All keys are read every so many steps; the others read what a call may have touched."""
NEVER_MS: Final = 86_400_000 + int(CONVERSATION_SECONDS * 1000)
"""Longer than anything is kept."""


class LedgerMachine(Clients, Readers, Workers, RuleBasedStateMachine):
    """One rule: whoever it is does what makes sense now. Rules of their own would be switched off in half of the runs each, so that

    those in which several things happen together, often enough to meet, would be rare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_steps = 0
        self.server_is_mortal = False
        self.saved: Model | None = None
        """As everything was when it was last written to the disk."""
        self.dies_at = -1
        self.is_broken = False
        self.acts: list[tuple[str, int, Callable[[Any], object]]] = []
        for name in dir(type(self)):
            if (marked := getattr(getattr(type(self), name), "act", None)) is not None:
                self.acts.append((name, *marked))

    @initialize(number=st.integers(0, 6), server_is_mortal=st.sampled_from((False, False, False, True)))
    def begin(self, number: int, server_is_mortal: bool) -> None:
        """With some requests, so that there is something to do; in some runs the server may come back without its last writes."""
        self.server_is_mortal = server_is_mortal
        for i in range(number):
            request: Request = ChatRequest(query="q", tenant=pick(i, TENANTS))
            if i % 3 == 1:
                request = SummaryRequest(text="t", tenant=pick(i, TENANTS))
            elif i % 3 == 2:
                request = ChatRequest(query="q", tenant=pick(i, TENANTS), conversation_id="c1")
            self.submit(request, self.new_id("i"))

    def possible(self) -> list[str]:
        """The acts that make sense now, each as often as its weight."""
        return [name for name, weight, when in self.acts if when(self) for _ in range(weight)]

    @rule(
        name=st.runner().flatmap(lambda machine: st.sampled_from(machine.possible())),
        which=st.integers(0, 11),
        option=st.integers(0, 47),
        is_lost=st.sampled_from((False, False, False, True)),
    )
    def step(self, name: str, which: int, option: int, is_lost: bool) -> None:
        try:
            getattr(self, name)(which, option, is_lost)
            self.num_steps += 1
            if self.num_steps == self.dies_at:
                self.lose_last_writes()
            if self.num_steps % FULL_CHECK_STEPS == 0:
                self.check()
        except BaseException:
            self.is_broken = True
            raise
        self.tally["step"] += 1

    @act(4)
    def time_passes(self, which: int, option: int, is_lost: bool) -> None:
        self.server.advance(pick(option, (1, 100, 900, 900, 2_100, 2_100, 5_000, 5_000, 11_000, 61_000)))

    @act(6, when=lambda self: self.server_is_mortal)
    def disk_falls_behind(self, which: int, option: int, is_lost: bool) -> None:
        """What is written in the next few steps never reaches the disk: then the server dies."""
        self.server.save()
        self.saved = copy.deepcopy(self.model)
        self.dies_at = self.num_steps + option % 4 + 2

    def lose_last_writes(self) -> None:
        """The server comes back as it was. Workers and clients remember more than it does."""
        assert self.saved is not None
        self.server.restore()
        self.model = copy.deepcopy(self.saved)
        self.has_lost_writes = True
        for reader in self.readers.values():
            # They may have seen what will come in other words.
            for request_id in list(reader.cursors):
                reader.leave(request_id)
        self.tally["last writes lost"] += 1

    @act(6, when=lambda self: self.sent)
    def call_arrives_again(self, which: int, option: int, is_lost: bool) -> None:
        """Its sender had no answer in time and sent it twice; the first copy was only late. Or the sender was paused."""
        operation = pick(which + 12 * option, list(self.sent))
        if operation.name == "submit" and self.is_over(str(operation.call.args[0])):
            # So long afterwards it would be a new request with an old id: only an idempotency key is kept for longer.
            return
        self.perform(operation)
        self.tally["doubled call"] += 1

    # --- the end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if not self.is_broken:
                self.check()
                self.drain()
                self.check_readers()
                self.let_everything_expire()
        finally:
            self.server.clear()

    def drain(self) -> None:
        """All workers are gone for good, and a new one does whatever there is to do: then every request has ended."""
        worker = Worker("w1")
        for _ in range(20):
            if not any(request.is_live for request in self.model.requests.values()):
                break
            self.server.advance(int(LEASE_SECONDS * 1000) + 1)
            while self.perform(self.reap_operation(100)):
                pass
            while (claim := self.perform(self.claim_operation(worker.name))) is not None:
                held = Held.of(worker, claim)
                started = Started(attempt=held.attempt, worker=worker.name)
                self.perform(
                    self.emit_operation(worker.name, [Emission(held.request_id, held.attempt, started)])
                )
                self.perform(self.finish_operation(held))
        live = [request.id for request in self.model.requests.values() if request.is_live]
        assert live == [], f"these never end: {live}"
        assert self.model.ends == self.model.creations, "each request has exactly one end"
        self.check()

    def let_everything_expire(self) -> None:
        for request in self.model.dead_letters():
            self.drop(request.id)
        self.server.advance(NEVER_MS)
        check_nothing_is_left(self.server.snapshot())
