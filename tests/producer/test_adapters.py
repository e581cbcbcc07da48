"""Commands about adapters reach each worker of the model, and every worker's reply comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from producer.adapters import Adapters, WorkerAdapters
from producer.client import Client
from producer.contract import InvalidRequest, RedisUnavailable
from producer.contract.control import LoadAdapterCommand, Reply, UnloadAdapterCommand, decode_command
from producer.ledger import Ledger, calls

MODEL = "chatglm-6b"


class ListeningWorker:
    """Says that it is alive, hears commands and replies, as a worker does."""

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        *,
        about: dict[str, str] | None = None,
        reply: str | None = "",
        deaf_for: float = 0,
    ) -> None:
        self.heard: list[Any] = []
        self.name = name
        self._ledger = ledger
        self._reply = reply
        self._deaf_for = deaf_for
        self._stop = threading.Event()
        ledger.run(calls.renew(name, [], 5, about={"model": MODEL, **(about or {})}))
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        if not deaf_for:
            assert self._is_listening.wait(5)

    def _listen(self) -> None:
        time.sleep(self._deaf_for)
        keys, connection = self._ledger.keys, self._ledger.connection
        with connection.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(keys.control(self.name))
            channel.get_message(timeout=5)
            self._is_listening.set()
            while not self._stop.is_set():
                message = channel.get_message(timeout=0.05)
                if message is not None:
                    command = decode_command(message["data"])
                    self.heard.append(command)
                    if self._reply is not None:
                        reply = Reply(worker=self.name, problem=self._reply)
                        connection.rpush(keys.replies(command.command_id), reply.model_dump_json())  # type: ignore[union-attr]

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


NewWorker = Callable[..., ListeningWorker]


@pytest.fixture
def new_worker(ledger: Ledger) -> Iterator[NewWorker]:
    workers: list[ListeningWorker] = []

    def new(name: str, **fields: Any) -> ListeningWorker:
        workers.append(ListeningWorker(ledger, name, **fields))
        return workers[-1]

    yield new
    for worker in workers:
        worker.stop()


@pytest.fixture
def adapters(client: Client) -> Adapters:
    return Adapters(client)


def test_what_workers_have_is_listed_by_worker(adapters: Adapters, new_worker: NewWorker) -> None:
    new_worker("b", about={"adapters": "", "adapters_loaded": ""})
    new_worker("a", about={"adapters": "fitness,law", "adapters_loaded": "law"})
    new_worker("c")
    new_worker("other", about={"model": "another"})
    assert adapters.of_workers() == [
        WorkerAdapters("a", ("fitness", "law"), ("law",)),
        WorkerAdapters("b", (), ()),
        WorkerAdapters("c", (), ()),
    ]


def test_a_load_reaches_every_worker_of_the_model_and_no_other(
    adapters: Adapters, new_worker: NewWorker
) -> None:
    one, two = new_worker("one"), new_worker("two", reply="it does not fit")
    other = new_worker("other", about={"model": "another"})

    replies = sorted(adapters.load("law", "/adapters/law", timeout=5), key=lambda reply: reply.worker)

    assert replies == [Reply(worker="one"), Reply(worker="two", problem="it does not fit")]
    for worker in (one, two):
        (command,) = worker.heard
        assert isinstance(command, LoadAdapterCommand)
        assert (command.name, command.folder) == ("law", "/adapters/law")
    assert other.heard == []


def test_an_unload_is_heard_as_one(adapters: Adapters, new_worker: NewWorker) -> None:
    worker = new_worker("one")
    assert list(adapters.unload("law", timeout=5)) == [Reply(worker="one")]
    (command,) = worker.heard
    assert isinstance(command, UnloadAdapterCommand)


def test_a_relative_folder_is_told_as_an_absolute_one(
    adapters: Adapters, new_worker: NewWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = new_worker("one")
    list(adapters.load("law", "law", timeout=5))
    assert worker.heard[0].folder == str(tmp_path / "law")


def test_a_worker_that_has_just_lost_its_connection_is_told_once_it_listens(
    adapters: Adapters, new_worker: NewWorker
) -> None:
    worker = new_worker("one", deaf_for=0.7)
    assert list(adapters.unload("law", timeout=10)) == [Reply(worker="one")]
    assert len(worker.heard) == 1


def test_a_worker_that_does_not_reply_is_told_again_with_the_same_id(
    adapters: Adapters, new_worker: NewWorker
) -> None:
    worker = new_worker("one", reply=None)
    assert [reply.worker for reply in adapters.unload("law", timeout=2.5)] == ["one"]
    assert len(worker.heard) == 3
    assert len({command.command_id for command in worker.heard}) == 1


def test_a_silent_worker_is_named_when_the_time_is_over(adapters: Adapters, new_worker: NewWorker) -> None:
    new_worker("loud")
    new_worker("silent", reply=None)
    begin = time.monotonic()
    first, second = adapters.unload("law", timeout=1.2)
    assert 1.2 <= time.monotonic() - begin < 4
    assert first == Reply(worker="loud")
    assert second.worker == "silent"
    assert "no reply within 1.2 s" in second.problem


def test_without_workers_there_are_no_replies(adapters: Adapters) -> None:
    assert list(adapters.load("law", "/adapters/law", timeout=5)) == []


def test_a_name_that_no_request_can_give_is_refused_before_anything_is_sent(adapters: Adapters) -> None:
    with pytest.raises(InvalidRequest, match="adapter"):
        adapters.load("no such name", "/adapters/law")
    with pytest.raises(InvalidRequest, match="adapter"):
        adapters.unload("../law")


def test_a_server_that_is_gone_is_said_to_be_unavailable(
    adapters: Adapters, new_worker: NewWorker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_worker("one", reply=None)

    def gone(*args: object, **kwargs: object) -> None:
        raise redis.ConnectionError("reset by peer")

    replies = adapters.unload("law", timeout=5)
    monkeypatch.setattr(client.ledger.connection, "blpop", gone)
    with pytest.raises(RedisUnavailable, match="reset by peer"):
        list(replies)
