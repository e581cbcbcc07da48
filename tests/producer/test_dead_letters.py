"""Dead letters through the client and the command: seen, tried again, dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from producer.cli import app
from producer.client import AsyncClient, Client
from producer.contract import ChatRequest, NotDead, RequestFailed, UnknownRequest
from producer.ledger import calls
from producer.settings import Settings

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

Glmq = Callable[..., Result]


@pytest.fixture
def glmq(settings: Settings) -> Glmq:
    """The command, in this process, on the test's deployment."""
    environ = {
        "REDIS_URL": settings.redis_url,
        "GLMQ_NAMESPACE": settings.namespace,
        "GLMQ_STATE_DIR": str(settings.state_dir),
        "COLUMNS": "240",
    }
    return lambda *arguments: CliRunner().invoke(app, ["dead", *arguments], env=environ)


def dead(worker: HandWorker, query: str, *texts: str) -> str:
    """The id of a dead letter that had these tokens."""
    request_id = worker.submit(ChatRequest(query=query))
    for attempt in range(4 if texts else 3):
        claim = worker.claim()
        assert claim is not None
        if attempt == 0 and texts:
            worker.start(claim)
            worker.emit(claim, len(texts), *texts)
        worker.ledger.run(calls.lose(request_id, claim.attempt, f"the engine died (signal {attempt})"))
    return request_id


def test_who_waits_for_a_dead_letter_learns_what_to_do(worker: HandWorker, client: Client) -> None:
    request_id = dead(worker, "q", "some", " text")
    with pytest.raises(RequestFailed, match=f"glmq dead show {request_id}") as raised:
        client.result(request_id, 5)
    assert raised.value.code == "dead_letter"


def test_a_letter_that_is_tried_again_is_followed_to_its_end(worker: HandWorker, client: Client) -> None:
    request_id = dead(worker, "q", "some")
    client.dead_letters.retry(request_id)
    stream = client.stream(request_id)
    assert [next(stream).type for _ in range(2)] == ["started", "token"]
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    worker.emit(claim, 2, " text")
    worker.finish(claim, "some text")
    assert [event.type for event in stream] == ["started", "token", "finished"]
    assert client.result(request_id, 5).text == "some text"
    assert list(client.dead_letters.list()) == []


def test_an_event_loop_has_the_same(worker: HandWorker, settings: Settings) -> None:
    ids = [dead(worker, "q"), dead(worker, "q")]

    async def main() -> None:
        async with AsyncClient(settings) as client:
            letters = client.dead_letters
            assert [letter.request_id async for letter in letters.list()] == ids[::-1]
            assert (await letters.show(ids[0])).num_tokens == 0
            await letters.retry(ids[0])
            await letters.drop(ids[1])
            with pytest.raises(NotDead):
                await letters.show(ids[0])
            assert [letter.request_id async for letter in letters.list()] == []

    asyncio.run(main())


def test_more_letters_than_a_page_are_all_listed(
    worker: HandWorker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [dead(worker, "q") for _ in range(5)]
    pages = calls.dead_letters
    monkeypatch.setattr(calls, "dead_letters", lambda *, at: pages(at=at, num_looked_at=2))
    assert [letter.request_id for letter in client.dead_letters.list()] == ids[::-1]


def test_the_command_lists_and_shows_them(worker: HandWorker, glmq: Glmq) -> None:
    assert "no dead letters" in glmq("list").stderr
    request_id = dead(worker, "Why is the sky blue?", "Because")

    listed = glmq("list")
    assert request_id in listed.stdout
    assert "the engine died (signal 3)" in listed.stdout
    [line] = glmq("list", "--json").stdout.splitlines()
    assert [loss["attempt"] for loss in json.loads(line)["losses"]] == [1, 2, 3, 4]

    shown = glmq("show", request_id).stdout
    for part in (
        "attempt 2, 1 tokens, worker-1: the engine died (signal 1)",
        "Why is the sky blue?",
        "Because",
    ):
        assert part in shown
    assert json.loads(glmq("show", request_id, "--json").stdout)["answer"] == "Because"


def test_the_command_retries_and_drops_them(worker: HandWorker, client: Client, glmq: Glmq) -> None:
    ids = [dead(worker, "q") for _ in range(4)]
    assert glmq("retry", ids[0]).stdout == f"queued again: {ids[0]}\n"
    assert client.status(ids[0]).state == "queued"
    assert glmq("drop", ids[1]).stdout == f"dropped: {ids[1]}\n"
    assert glmq("drop", "--all").stdout.count("dropped") == 2
    assert list(client.dead_letters.list()) == []
    assert [client.status(id_).state for id_ in ids[1:]] == ["dead"] * 3
    assert glmq("retry").exit_code == glmq("retry", "x", "--all").exit_code == 2


def test_what_is_no_dead_letter_is_said_to_be_none(worker: HandWorker, glmq: Glmq) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    for verb in ("show", "retry", "drop"):
        assert isinstance(glmq(verb, request_id).exception, NotDead)
        assert isinstance(glmq(verb, "nobody").exception, UnknownRequest)
