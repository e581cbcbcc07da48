"""Who is under suspicion when an engine dies, and what becomes of them all, on the real ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from producer.ledger import calls
from tests.workers.conftest import wait_for
from workers.engine.client import EngineDied
from workers.engine.messages import Generate
from workers.running import RunningRequest
from workers.supervisor import Death
from workers.trials import TRIAL_TOKENS, Trials

NewBench = Callable[..., Any]
CRASH = "signal 11"


@dataclass
class Court:
    """A bench whose engine dies when the test says so."""

    bench: Any
    num_opened: int = 0
    refuses: bool = False
    others_serve: bool = False
    resumed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        bench = self.bench
        self.trials = Trials(
            bench.running,
            bench.publisher,
            resume=self._resume,
            on_done=self._on_done,
            others_serve=lambda: self.others_serve,
        )
        bench.publisher._on_kept = self.trials.on_kept
        bench.publisher._on_gone = self._on_gone

    def _resume(self, running: RunningRequest) -> None:
        if self.refuses:
            raise EngineDied(None, None)
        self.bench.claims.resume(running)
        self.resumed.append(running.request_id)

    def _on_done(self) -> None:
        self.num_opened += 1

    def _on_gone(self, running: RunningRequest) -> None:
        self.bench._on_gone(running)
        self.trials.on_gone(running)

    def begin(self, *queries: str, tokens: str = "") -> list[Generate]:
        """These requests run, and each has these tokens."""
        asked = [self.bench.generation(self.bench.submit(query)) for query in queries]
        self.trials.on_ready()
        for each in asked:
            if tokens:
                self.bench.say(each.sequence_id, tokens)
        return asked

    def id_of(self, generate: Generate) -> str:
        running = self.bench.running.of_sequence(generate.sequence_id)
        assert running is not None
        return str(running.request_id)

    def die(self, *prefilling: Generate, killed: bool = False) -> int:
        # Nothing new is claimed meanwhile, as in the worker.
        self.bench.claims.close()
        sequence_ids = frozenset(each.sequence_id for each in prefilling)
        return self.trials.on_death(Death(CRASH, sequence_ids, is_from_outside=killed))

    def latest(self, request_id: str) -> Generate:
        """What the engine was asked last for this request."""
        running = self.bench.running.get(request_id)
        return next(g for g in reversed(self.bench.generated) if g.sequence_id == running.sequence_id)

    def num_losses(self, request_id: str) -> int | None:
        """In this attempt; None once it is not this worker's any more."""
        running = self.bench.running.get(request_id)
        return None if running is None else int(running.num_losses)

    def state(self, request_id: str) -> str:
        return str(self.bench.ledger.run(calls.status(request_id)).state)


@pytest.fixture
def court(bench: Any) -> Court:
    return Court(bench)


def test_an_engine_that_dies_in_a_decode_gives_everything_back_at_once(court: Court) -> None:
    first, second = court.begin("a", "b", tokens="xyz")
    ids = [court.id_of(first), court.id_of(second)]

    assert court.die() == 2

    for request_id in ids:
        wait_for(lambda request_id=request_id: court.state(request_id) == "queued")
    wait_for(lambda: len(court.bench.running) == 0)
    claim = court.bench.ledger.run(calls.claim("chatglm-6b", "another", 5))
    assert claim is not None
    assert (claim.failures, "".join(claim.emitted_texts)) == (0, "xyz")
    court.trials.on_ready()
    assert court.num_opened == 2


def test_of_a_prefill_only_those_in_it_are_suspects_and_stay(court: Court) -> None:
    [running] = court.begin("runs", tokens="x")
    waiting = court.bench.generation(court.bench.submit("waits"))
    prefilled = court.bench.generation(court.bench.submit("poison"))
    ids = [court.id_of(each) for each in (running, waiting, prefilled)]

    court.die(prefilled)

    wait_for(lambda: court.state(ids[0]) == "queued")
    wait_for(lambda: court.state(ids[1]) == "queued")
    wait_for(lambda: court.bench.running.get(ids[2]).num_losses == 1)
    assert court.state(ids[2]) == "running"
    assert court.trials.num_left == 1
    claims = [court.bench.ledger.run(calls.claim("chatglm-6b", "another", 5)) for _ in range(3)]
    # Who only waited is not blamed for anything.
    assert [claim and claim.failures for claim in claims] == [0, 0, None]


def test_suspects_are_tried_one_by_one_and_nothing_is_claimed_before_the_last(court: Court) -> None:
    suspects = court.begin("a", "b")
    ids = [court.id_of(each) for each in suspects]
    court.die(*suspects)
    wait_for(lambda: all(court.bench.running.get(id_).num_losses for id_ in ids))
    court.trials.on_ready()

    assert court.resumed == ids[:1]
    court.bench.say(court.latest(ids[0]).sequence_id, "x" * (TRIAL_TOKENS - 1))
    court.trials.on_step()
    assert court.resumed == ids[:1]
    court.bench.say(court.latest(ids[0]).sequence_id, "y")
    court.trials.on_step()

    wait_for(lambda: court.state(ids[0]) == "queued")
    wait_for(lambda: court.resumed == ids)
    assert court.num_opened == 1
    # This one ends by itself within its trial.
    court.bench.say(court.latest(ids[1]).sequence_id, "z", "stop")
    assert court.bench.ended(ids[1])[-1].text == "z"
    wait_for(lambda: court.num_opened == 2)
    claim = court.bench.ledger.run(calls.claim("chatglm-6b", "another", 5))
    assert claim is not None
    assert (claim.failures, "".join(claim.emitted_texts)) == (0, "xxxy")


def test_who_kills_every_engine_becomes_a_dead_letter_with_its_reasons(court: Court) -> None:
    [poison] = court.begin("poison")
    request_id = court.id_of(poison)
    court.die(poison)
    for number in range(1, 4):
        wait_for(lambda number=number: court.num_losses(request_id) in (number, None))
        court.trials.on_ready()
        if court.state(request_id) == "dead":
            break
        assert court.num_opened == 1
        court.die(court.latest(request_id))

    assert number == 3
    assert court.bench.ended(request_id)[-1].code == "dead_letter"
    letter = court.bench.ledger.run(calls.dead_letter(request_id))
    assert [loss.what for loss in letter.losses] == [
        f"the engine died over it ({CRASH})",
        f"the engine died while it ran alone ({CRASH})",
        f"the engine died while it ran alone ({CRASH})",
    ]
    wait_for(lambda: court.num_opened == 2)


@pytest.mark.parametrize("others_serve", [True, False])
def test_once_one_has_killed_alone_the_other_suspects_go_to_whoever_else_serves(
    court: Court, others_serve: bool
) -> None:
    court.others_serve = others_serve
    suspects = court.begin("poison", "innocent")
    poison, innocent = (court.id_of(each) for each in suspects)
    court.die(*suspects)
    wait_for(lambda: all(court.bench.running.get(id_).num_losses for id_ in (poison, innocent)))
    court.trials.on_ready()

    court.die(court.latest(poison))

    wait_for(lambda: court.bench.running.get(poison).num_losses == 2)
    if others_serve:
        wait_for(lambda: court.state(innocent) == "queued")
        assert court.trials.num_left == 1
    else:
        assert court.state(innocent) == "running"
        court.trials.on_ready()
        assert court.resumed == [poison, innocent]


def test_who_kills_in_a_decode_is_found_at_the_second_time(court: Court) -> None:
    poison, other = court.begin("poison", "other", tokens="x")
    poison_id, other_id = court.id_of(poison), court.id_of(other)
    court.die()
    wait_for(lambda: len(court.bench.running) == 0)
    court.bench.ledger.run(calls.cancel(other_id))
    court.trials.on_ready()
    court.bench.reopen()
    bystander = court.bench.generation(court.bench.submit("bystander"))
    bystander_id = court.id_of(bystander)
    again = court.bench.generation(poison_id)
    for each in (again, bystander):
        court.bench.say(each.sequence_id, "y")

    court.die()

    wait_for(lambda: court.state(bystander_id) == "queued")
    wait_for(lambda: court.bench.running.get(poison_id).num_losses == 1)
    assert court.state(poison_id) == "running"


def test_a_kill_from_outside_makes_no_suspects_at_first(court: Court) -> None:
    [generate] = court.begin("a")
    request_id = court.id_of(generate)

    court.die(generate, killed=True)

    wait_for(lambda: court.state(request_id) == "queued")
    assert court.trials.num_left == 0


def test_but_who_is_lost_a_second_time_without_a_token_is_tried_alone(court: Court) -> None:
    [generate] = court.begin("a")
    request_id = court.id_of(generate)
    court.die(generate, killed=True)
    wait_for(lambda: len(court.bench.running) == 0)
    court.trials.on_ready()
    court.bench.reopen()
    again = wait_for(lambda: court.bench.running.get(request_id) and court.bench.generation(request_id))

    court.die(again, killed=True)

    wait_for(lambda: court.bench.running.get(request_id).num_losses == 1)
    assert court.trials.num_left == 1


def test_suspects_are_given_up_where_no_engine_comes_to_life(court: Court) -> None:
    [generate] = court.begin("a")
    request_id = court.id_of(generate)
    court.die(generate)
    wait_for(lambda: court.trials.num_left == 1 and court.bench.running.get(request_id).num_losses == 1)

    court.die()

    wait_for(lambda: court.state(request_id) == "queued")
    assert court.trials.num_left == 0


def test_a_suspect_that_is_cancelled_lets_the_next_one_in(court: Court) -> None:
    suspects = court.begin("a", "b")
    ids = [court.id_of(each) for each in suspects]
    court.die(*suspects)
    wait_for(lambda: all(court.bench.running.get(id_).num_losses for id_ in ids))
    court.trials.on_ready()
    wait_for(lambda: court.resumed == ids[:1])

    court.bench.ledger.run(calls.cancel(ids[0]))
    court.bench.publisher.end(court.bench.running.get(ids[0]), "cancelled")

    wait_for(lambda: court.resumed == ids)
    assert court.state(ids[0]) == "cancelled"


def test_an_engine_that_dies_before_the_trial_begins_says_nothing_about_the_suspect(court: Court) -> None:
    [generate] = court.begin("a")
    request_id = court.id_of(generate)
    court.die(generate)
    wait_for(lambda: court.bench.running.get(request_id).num_losses == 1)
    court.refuses = True
    court.trials.on_ready()
    court.die()
    time.sleep(0.1)
    assert court.bench.running.get(request_id).num_losses == 1
    court.refuses = False
    court.trials.on_ready()
    wait_for(lambda: court.resumed == [request_id])
