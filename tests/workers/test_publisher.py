"""What readers get of what the engine says: all of it, once, in order, and an end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from producer.contract import Failed, Finished, Started, Token
from producer.embedded import EmbeddedServer
from producer.ledger import Call, calls
from tests.workers.conftest import wait_for
from workers.engine.messages import Refused, Step

NewBench = Callable[..., Any]
T = TypeVar("T")


def test_an_answer_is_started_then_tokens_then_finished(bench: Any) -> None:
    request_id = bench.submit("hello")
    generation = bench.generation(request_id)

    bench.say(generation.sequence_id, "good day")
    bench.say_ids(generation.sequence_id, [0], "stop")

    started, *tokens, finished = bench.ended(request_id)
    assert started == Started(attempt=1, worker="worker-0", prompt_tokens=5)
    assert all(isinstance(token, Token) for token in tokens)
    assert [id_ for token in tokens for id_ in token.ids] == [*map(ord, "good day"), 0]
    assert "".join(token.text for token in tokens) == "good day"
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.text) == ("stop", "good day")
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 9)
    assert 0 < finished.timings.first_token_seconds <= finished.timings.total_seconds


def test_text_that_was_held_back_comes_with_the_last_token(bench: Any) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)

    bench.say(generation.sequence_id, "a b ", "length")

    *_, last, finished = bench.ended(request_id)
    assert last.texts[-1] == " "
    assert (finished.reason, finished.text) == ("length", "a b ")


def test_the_first_token_is_sent_at_once_and_the_next_ones_together(new_bench: NewBench) -> None:
    bench = new_bench(flush_seconds=1.5)
    request_id = bench.submit()
    generation = bench.generation(request_id)
    time.sleep(1.6)  # the flush of Started is over, and the next may come

    begin = time.monotonic()
    bench.say(generation.sequence_id, "a")
    while "token" not in bench.types(request_id):
        assert time.monotonic() - begin < 1
    bench.say(generation.sequence_id, "bcd")
    assert bench.types(request_id).count("token") == 1
    bench.say(generation.sequence_id, "e", "stop")

    _, first, second, _ = bench.ended(request_id)
    assert first.texts == ("a",)
    assert second.texts == ("b", "c", "d", "e")
    assert time.monotonic() - begin > 1.4


def test_one_flush_of_many_requests_is_one_call(new_bench: NewBench) -> None:
    bench = new_bench(start=False, slots=32)
    counted: list[int] = []
    run = bench.ledger.run

    def counting(call: Call[T]) -> T:
        if call.script == "emit":
            counted.append(call.args[0].count("\n"))
        return run(call)

    bench.ledger.run = counting
    ids = [bench.submit() for _ in range(32)]
    bench.claims.start()
    bench.reopen()
    sequences = [bench.generation(request_id).sequence_id for request_id in ids]
    bench.publisher.on_step(Step(sequences, [65] * 32, [""] * 32))
    bench.publisher.on_step(Step(sequences, [66] * 32, ["stop"] * 32))
    bench.publisher.start()

    for request_id in ids:
        assert bench.ended(request_id)[-1].text == "AB"
    # That it was started, and both tokens.
    assert counted == [2 * 32]


def test_a_stop_text_ends_the_answer_before_it_and_aborts_the_engine(bench: Any) -> None:
    request_id = bench.submit(sampling={"stop": ("END",)})
    generation = bench.generation(request_id)

    bench.say(generation.sequence_id, "abcEND and more")

    finished = bench.ended(request_id)[-1]
    assert finished.reason == "stop"
    assert finished.usage.completion_tokens == 6
    assert bench.aborted == [generation.sequence_id]


def test_a_sequence_that_the_engine_refuses_fails_with_its_reason(bench: Any) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)

    bench.publisher.on_refused(Refused(generation.sequence_id, "context_exceeded", "too long"))

    assert bench.ended(request_id)[-1] == Failed(code="context_exceeded", message="too long")
    assert len(bench.running) == 0


def test_a_cancelled_request_ends_with_what_was_published(bench: Any) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "some ")

    bench.ledger.run(calls.cancel(request_id))
    bench.say(generation.sequence_id, "text")

    events = bench.ended(request_id)
    finished = events[-1]
    assert finished.reason == "cancelled"
    assert finished.text == "".join(event.text for event in events if isinstance(event, Token))
    assert finished.text.startswith("some")
    assert bench.aborted == [generation.sequence_id]
    assert len(bench.running) == 0


def test_a_request_that_was_taken_over_is_dropped_and_nothing_is_written(new_bench: NewBench) -> None:
    bench = new_bench()
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "mine")
    wait_for(lambda: bench.types(request_id)[-1:] == ["token"])
    bench.claims.stop()

    assert bench.ledger.run(calls.release(request_id, 1))
    claim = bench.ledger.run(calls.claim("chatglm-6b", "another", 5))
    before = bench.events(request_id)
    bench.say(generation.sequence_id, "not mine", "stop")

    wait_for(lambda: bench.gone)
    assert claim is not None
    assert claim.attempt == 2
    assert bench.events(request_id) == before
    assert bench.ledger.run(calls.status(request_id)).state == "running"
    assert [running.request_id for running in bench.gone] == [request_id]


def test_a_released_request_keeps_every_token_that_was_made(bench: Any, new_bench: NewBench) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "half ")
    bench.claims.stop()

    bench.publisher.end(bench.running.get(request_id), "released")
    successor = new_bench()
    continued = successor.generation(request_id)
    successor.say(continued.sequence_id, "done", "stop")

    assert continued.emitted_ids == [*map(ord, "half ")]
    events = successor.ended(request_id)
    assert [event.attempt for event in events if isinstance(event, Started)] == [1, 2]
    assert "".join(event.text for event in events if isinstance(event, Token)) == "half done"
    assert (events[-1].text, events[-1].attempts) == ("half done", 2)


def test_tokens_wait_while_redis_is_away_and_come_once(new_bench: NewBench, tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        bench = new_bench(url=server.url, timeout_seconds=0.2)
        request_id = bench.submit()
        generation = bench.generation(request_id)
        bench.say(generation.sequence_id, "before ")

        os.kill(server.pid, signal.SIGSTOP)
        try:
            bench.say(generation.sequence_id, "while ")
            time.sleep(0.6)  # several attempts time out; the server finds them all when it wakes up
            bench.say(generation.sequence_id, "after", "stop")
        finally:
            os.kill(server.pid, signal.SIGCONT)

        events = bench.ended(request_id)
        assert events[-1].text == "before while after"
        assert "".join(event.text for event in events if isinstance(event, Token)) == "before while after"
        bench.stop()


def test_a_publisher_that_must_stop_does_not_wait_for_redis_for_ever(
    new_bench: NewBench, tmp_path: Path
) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        bench = new_bench(url=server.url, timeout_seconds=0.2)
        generation = bench.generation(bench.submit())
    bench.say(generation.sequence_id, "lost")

    begin = time.monotonic()
    bench.publisher.stop(0.5)

    assert time.monotonic() - begin < 2.5


def test_a_token_that_is_no_text_ends_its_own_request_alone(bench: Any) -> None:
    ids = [bench.submit(), bench.submit()]
    bad, good = (bench.generation(request_id).sequence_id for request_id in ids)

    bench.publisher.on_step(Step([bad, good], [-5, 65], ["", "stop"]))

    assert bench.ended(ids[0])[-1].code == "internal_error"
    assert bench.ended(ids[1])[-1].text == "A"
    assert bench.aborted == [bad]


def forget_since(bench: Any, request_id: str, count: int) -> None:
    """As if Redis had come back without what was written after about so many tokens."""
    connection, keys = bench.ledger.connection, bench.ledger.keys
    entries = connection.xrange(keys.events(request_id))
    kept = [(entry_id, fields) for entry_id, fields in entries if int(entry_id.split("-")[0]) <= count]
    connection.delete(keys.events(request_id))
    for entry_id, fields in kept:
        connection.xadd(keys.events(request_id), fields, id=entry_id)
    connection.hset(
        keys.request(request_id), mapping={"count": kept[-1][0].split("-")[0], "last": kept[-1][0]}
    )


def test_what_redis_has_lost_is_published_again(bench: Any) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    for letter in "abcdef":
        bench.say(generation.sequence_id, letter)
        time.sleep(0.05)
    forget_since(bench, request_id, 3)

    bench.say(generation.sequence_id, "gh", "stop")

    started, *tokens, finished = bench.ended(request_id)
    assert started.type == "started"
    assert "".join(token.text for token in tokens) == finished.text == "abcdefgh"
    assert [token.index - len(token.ids) for token in tokens] == [0, *(token.index for token in tokens[:-1])]


def test_what_redis_has_lost_before_the_last_word_is_published_again(bench: Any) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "abcdef")
    wait_for(lambda: bench.ledger.run(calls.status(request_id)).num_tokens == 6)
    forget_since(bench, request_id, 1)

    # An end that comes without a token.
    bench.publisher.end(bench.running.get(request_id), "length")

    _, *tokens, finished = bench.ended(request_id)
    assert "".join(token.text for token in tokens) == finished.text == "abcdef"


def test_a_claim_that_redis_has_lost_and_another_worker_made_is_not_written_to(new_bench: NewBench) -> None:
    bench = new_bench()
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "ab")
    wait_for(lambda: "token" in bench.types(request_id))
    bench.claims.stop()
    # The same attempt, by somebody else.
    bench.ledger.connection.hset(bench.ledger.keys.request(request_id), "worker", "another")
    before = bench.events(request_id)

    bench.say(generation.sequence_id, "cd", "stop")

    wait_for(lambda: len(bench.running) == 0)
    assert bench.events(request_id) == before


def test_a_stream_that_never_fits_is_left_to_somebody_else(bench: Any) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "ab")
    wait_for(lambda: "token" in bench.types(request_id))
    bench.claims.stop()
    # More than this worker ever said.
    bench.ledger.connection.hset(bench.ledger.keys.request(request_id), "count", 7)

    bench.say(generation.sequence_id, "c", "stop")

    wait_for(lambda: bench.ledger.run(calls.status(request_id)).state == "queued")
    wait_for(lambda: len(bench.running) == 0)
