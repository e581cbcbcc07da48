"""Texts longer than the context, around the real ledger: cut, summarized in pieces that are done once each, summarized again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from producer.contract import Failed, Finished, Progress, SamplingParams, SummaryRequest
from producer.ledger import Ledger, calls
from tests.workers.conftest import MODEL, wait_for

NewBench = Callable[..., Any]

SENTENCES = [f"Sentence {number} is about as long as the others. " for number in range(60)]
TEXT = "".join(SENTENCES)
"""2,800 characters, which are the tokens of these tests' tokenizer; the context has 1,000."""


def submit(bench: Any, text: str = TEXT, *, sampling: SamplingParams | None = None, **fields: Any) -> str:
    request = SummaryRequest(text=text, sampling=sampling or SamplingParams(seed=1), **fields)
    request_id: str = bench.ledger.run(calls.submit(request, model=MODEL)).request_id
    return request_id


def state_of(bench: Any, request_id: str) -> str:
    return str(bench.ledger.run(calls.status(request_id)).state)


def field_of(bench: Any, request_id: str, name: str) -> str | None:
    value: str | None = bench.ledger.connection.hget(bench.ledger.keys.request(request_id), name)
    return value


def piece_ids(bench: Any, request_id: str, level: int) -> list[str]:
    """Ids of a level's pieces, once the document waits for them."""
    levels = wait_for(
        lambda: (
            (found := (field_of(bench, request_id, "levels") or "").split(","))
            and len(found) >= level
            and found[0]
            and found
        )
    )
    return [f"{request_id}.{level}.{number}" for number in range(1, int(levels[level - 1]) + 1)]


def text_of(bench: Any, request_id: str) -> str:
    """What the engine is asked to summarize."""
    return "".join(map(chr, bench.generation(request_id).prompt_ids)).partition("\n")[2]


def summarize(bench: Any, request_id: str, text: str) -> None:
    bench.say(bench.generation(request_id).sequence_id, text, "stop")
    bench.ended(request_id)


def give_back(bench: Any) -> None:
    """What a worker does that drains and does not wait."""
    bench.claims.stop()

    def is_idle() -> bool:
        # More than once: a claim may have been under way.
        for running in bench.running:
            bench.publisher.end(running, "released")
        return bool(bench.ledger.run(calls.overview(MODEL)).num_running == 0)

    wait_for(is_idle)


def test_a_text_that_fits_is_summarized_as_it_is(bench: Any) -> None:
    request_id = submit(bench, "A short text.")

    assert text_of(bench, request_id) == "A short text."
    bench.say(bench.generation(request_id).sequence_id, "Short.", "stop")
    *_, finished = bench.ended(request_id)
    assert finished.usage.pieces == 0


def test_a_long_text_is_summarized_in_pieces_and_then_from_their_summaries(bench: Any) -> None:
    request_id = submit(bench, style="title")
    pieces = piece_ids(bench, request_id, 1)

    texts = [text_of(bench, piece) for piece in pieces]
    assert "".join(texts) == TEXT
    assert all(text.startswith("Sentence ") for text in texts), "cut at the ends of sentences"
    for number, piece in enumerate(pieces, start=1):
        assert bench.generation(piece).sampling.max_new_tokens == 1000 // 8
        summarize(bench, piece, f"Summary {number}.")

    query = "".join(map(chr, bench.generation(request_id).prompt_ids))
    summaries = "".join(f"Summary {number}.\n" for number in range(1, len(pieces) + 1))
    assert query == f"Write a title for the following text:\n{summaries}"
    bench.say(bench.generation(request_id).sequence_id, "A title", "stop")
    events = bench.ended(request_id)
    num_progress = len(pieces) + 1
    assert events[:num_progress] == [
        Progress(level=1, done=done, total=len(pieces)) for done in range(num_progress)
    ]
    assert [event.type for event in events[num_progress:]].count("started") == 1
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.text == "A title"
    assert finished.attempts == 1
    assert finished.usage.prompt_tokens == len(query)
    assert finished.usage.completion_tokens == len("A title")
    assert finished.usage.pieces == len(pieces)
    assert finished.usage.piece_completion_tokens == len("Summary N.") * len(pieces)
    assert finished.usage.piece_prompt_tokens == sum(
        len(bench_prompt) for bench_prompt in (_prompt(text) for text in texts)
    )


def _prompt(text: str) -> str:
    return f"Summarize the following text in one paragraph:\n{text}"


def test_a_document_holds_nothing_while_it_waits(new_bench: NewBench) -> None:
    bench = new_bench(start=False)
    ticket = bench.ticket()
    request_id = submit(bench)
    bench.claims.take(ticket)
    bench.start()
    piece_ids(bench, request_id, 1)

    bench.wait_gone(request_id)
    wait_for(lambda: ticket in bench.completed)
    assert state_of(bench, request_id) == "waiting"
    assert bench.running.get(request_id) is None
    assert bench.ledger.connection.zscore(bench.ledger.keys.leases, request_id) is None


def test_summaries_that_are_too_long_together_are_summarized_in_another_level(new_bench: NewBench) -> None:
    bench = new_bench(slots=64)
    request_id = submit(bench, TEXT * 3)
    first = piece_ids(bench, request_id, 1)
    for piece in first:
        summarize(bench, piece, f"{'long ' * 24}{piece.rpartition('.')[2]}.")

    second = piece_ids(bench, request_id, 2)
    assert 1 < len(second) < len(first)
    texts = [text_of(bench, piece) for piece in second]
    numbers = [line.split()[-1] for text in texts for line in text.splitlines()]
    assert numbers == [f"{number}." for number in range(1, len(first) + 1)], "whole summaries, in order"
    for piece in second:
        summarize(bench, piece, "Short.")
    summarize(bench, request_id, "Done.")

    finished = bench.events(request_id)[-1]
    assert finished.usage.pieces == len(first) + len(second)
    progress = [event for event in bench.events(request_id) if event.type == "progress"]
    assert progress[-1] == Progress(level=2, done=len(second), total=len(second))


def test_cancelling_a_document_ends_its_pieces_running_and_queued(new_bench: NewBench) -> None:
    bench = new_bench(slots=2)
    request_id = submit(bench)
    pieces = piece_ids(bench, request_id, 1)
    sequences = [bench.generation(piece).sequence_id for piece in pieces[:2]]
    bench.say(sequences[0], "Su")
    wait_for(lambda: len(bench.events(pieces[0])) >= 2)

    assert bench.ledger.run(calls.cancel(request_id)) == "waiting"

    assert [state_of(bench, piece) for piece in pieces[2:]] == ["cancelled"] * len(pieces[2:])
    assert bench.events(request_id)[-1].reason == "cancelled"
    assert bench.ledger.run(calls.overview(MODEL)).num_queued == 0
    # No control channel here: the next flush or renewal tells of it.
    for sequence in sequences:
        bench.say(sequence, "mm")
    wait_for(lambda: {state_of(bench, piece) for piece in pieces} == {"cancelled"})
    assert sorted(bench.aborted) == sorted(sequences)


def test_cancelling_a_piece_cancels_its_document(bench: Any) -> None:
    request_id = submit(bench)
    *_, last = piece_ids(bench, request_id, 1)

    bench.ledger.run(calls.cancel(last))
    for piece in piece_ids(bench, request_id, 1):
        running = bench.running.get(piece)
        if running is not None and running.is_known_to_engine:
            bench.say(running.sequence_id, "x")

    wait_for(lambda: state_of(bench, request_id) == "cancelled")


def test_a_piece_that_fails_is_tried_once_more_and_goes_on_from_its_last_token(bench: Any) -> None:
    request_id = submit(bench)
    piece, *others = piece_ids(bench, request_id, 1)
    first = bench.generation(piece)
    bench.say(first.sequence_id, "Sum")
    wait_for(lambda: len(bench.events(piece)) >= 2)
    bench.publisher.end(bench.running.get(piece), Failed(code="internal_error", message="Bad luck."))

    again = wait_for(lambda: (g := bench.generation(piece)) and g.sequence_id != first.sequence_id and g)
    assert again.emitted_ids == [*map(ord, "Sum")]
    bench.say(again.sequence_id, "mary.", "stop")
    assert bench.ended(piece)[-1].text == "Summary."
    for other in others:
        summarize(bench, other, "Other.")
    assert text_of(bench, request_id).startswith("Summary.\n")


def test_a_piece_that_fails_twice_fails_its_document_with_its_reason_and_ends_the_others(
    new_bench: NewBench,
) -> None:
    bench = new_bench(slots=2)
    request_id = submit(bench)
    pieces = piece_ids(bench, request_id, 1)
    failing = pieces[0]
    for attempt in (1, 2):
        running = wait_for(
            lambda attempt=attempt: (
                (r := bench.running.get(failing)) and r.attempt == attempt and r.is_known_to_engine and r
            )
        )
        bench.publisher.end(running, Failed(code="internal_error", message="Bad luck."))

    *_, failed = bench.ended(request_id)
    assert failed == Failed(code="internal_error", message=f"Its piece {failing} failed: Bad luck.")
    queued = [piece for piece in pieces if bench.running.get(piece) is None and piece != failing]
    assert {state_of(bench, piece) for piece in queued} == {"cancelled"}
    assert bench.ledger.run(calls.overview(MODEL)).num_queued == 0


def test_results_of_pieces_live_until_their_document_has_ended_and_then_as_long(
    bench: Any, ledger: Ledger
) -> None:
    request_id = submit(bench)
    pieces = piece_ids(bench, request_id, 1)
    for piece in pieces:
        summarize(bench, piece, "Summary.")
        assert ledger.connection.ttl(ledger.keys.request(piece)) == -1
        assert ledger.connection.ttl(ledger.keys.events(piece)) == -1

    summarize(bench, request_id, "Done.")

    for name in (request_id, *pieces):
        assert 500 < ledger.connection.ttl(ledger.keys.request(name)) <= 600
        assert 500 < ledger.connection.ttl(ledger.keys.events(name)) <= 600


def test_whoever_takes_over_the_last_summary_asks_for_the_same_and_goes_on(new_bench: NewBench) -> None:
    bench = new_bench()
    request_id = submit(bench)
    for piece in piece_ids(bench, request_id, 1):
        summarize(bench, piece, "Summary.")
    first = bench.generation(request_id)
    bench.say(first.sequence_id, "Al")
    wait_for(lambda: bench.types(request_id)[-1] == "token")
    give_back(bench)

    other = new_bench()
    second = other.generation(request_id)
    assert second.prompt_ids == first.prompt_ids
    assert second.emitted_ids == [*map(ord, "Al")]
    other.say(second.sequence_id, "l.", "stop")
    finished = other.ended(request_id)[-1]
    assert finished.text == "All."
    assert finished.usage.pieces > 1


def test_pieces_that_are_done_are_not_done_again_when_a_worker_gives_back_the_rest(
    new_bench: NewBench,
) -> None:
    bench = new_bench(slots=2)
    request_id = submit(bench)
    done, given_back, *rest = piece_ids(bench, request_id, 1)
    summarize(bench, done, "Summary.")
    bench.generation(given_back)
    give_back(bench)

    other = new_bench()
    for piece in (given_back, *rest):
        summarize(other, piece, "Summary.")
    assert other.generation(request_id)
    assert bench.types(done).count("started") == 1
    assert field_of(bench, done, "attempt") == "1"


def test_the_deadline_of_a_document_is_that_of_its_pieces(bench: Any) -> None:
    request_id = submit(bench, deadline_seconds=1.0)
    pieces = piece_ids(bench, request_id, 1)
    deadlines = {field_of(bench, name, "deadline") for name in (request_id, *pieces)}
    assert len(deadlines) == 1
    give_back(bench)
    time.sleep(1.0)

    bench.ledger.run(calls.claim(MODEL, "another", 2.0))

    assert bench.ended(request_id)[-1].code == "deadline_exceeded"


def test_a_piece_is_less_urgent_than_a_question_and_says_nothing_of_the_callers_wishes_for_the_answer(
    bench: Any,
) -> None:
    sampling = SamplingParams(seed=7, temperature=0.5, stop=("END",), min_new_tokens=3, max_new_tokens=50)
    request_id = submit(bench, priority=4, sampling=sampling)
    piece = piece_ids(bench, request_id, 1)[0]

    asked = bench.generation(piece).sampling
    assert (asked.seed, asked.temperature, asked.min_new_tokens) == (7, 0.5, 0)
    assert bench.ledger.run(calls.status(piece)).priority == 5
    bench.say(bench.generation(piece).sequence_id, "ENDE.", "stop")
    assert bench.ended(piece)[-1].text == "ENDE."


def test_a_context_too_small_for_pieces_refuses_the_text(new_bench: NewBench) -> None:
    bench = new_bench(context_len=60)
    *_, failed = bench.ended(submit(bench))
    assert failed.code == "context_exceeded"
    assert "is too small for pieces of it" in failed.message


def test_an_id_that_a_piece_would_need_and_another_request_has_fails_the_document_alone(
    new_bench: NewBench,
) -> None:
    bench = new_bench(start=False)
    other = SummaryRequest(text="Mine.", sampling=SamplingParams(seed=1))
    bench.ledger.run(calls.submit(other, model=MODEL, request_id="doc.1.2"))
    bench.ledger.run(
        calls.submit(
            SummaryRequest(text=TEXT, sampling=SamplingParams(seed=1), priority=0),
            model=MODEL,
            request_id="doc",
        )
    )

    bench.start()
    *_, failed = bench.ended("doc")
    assert (failed.code, failed.message.split(",")[0]) == ("invalid_request", "request_id: 'doc.1.2'")
    assert bench.ledger.connection.exists(bench.ledger.keys.request("doc.1.1")) == 0
    summarize(bench, "doc.1.2", "Still answered.")


def test_a_piece_too_long_for_the_worker_that_takes_it_is_cut_again(new_bench: NewBench) -> None:
    large, small = new_bench(), new_bench(start=False, context_len=500, slots=64)
    request_id = submit(large)
    pieces = piece_ids(large, request_id, 1)
    give_back(large)
    small.start()
    for piece in pieces:
        for part in piece_ids(small, piece, 1):
            summarize(small, part, "Part.")
        summarize(small, piece, "Summary.")
    summarize(small, request_id, "Done.")

    usage = small.events(request_id)[-1].usage
    assert usage.pieces > 2 * len(pieces)
    assert usage.piece_completion_tokens == (usage.pieces - len(pieces)) * len("Part.") + len(pieces) * len(
        "Summary."
    )


def test_pieces_that_say_nothing_fail_the_document(bench: Any) -> None:
    request_id = submit(bench)
    for piece in piece_ids(bench, request_id, 1):
        bench.say_ids(bench.generation(piece).sequence_id, [0], "stop")
    *_, failed = bench.ended(request_id)
    assert failed.code == "empty_summary"
