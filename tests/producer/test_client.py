"""Client and AsyncClient on the real server, the answers given by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import producer.streams
from producer.client import AsyncClient, Client
from producer.contract import (
    ChatRequest,
    Event,
    Finished,
    IdempotencyConflict,
    InvalidRequest,
    RedisUnavailable,
    RequestCancelled,
    RequestFailed,
    Started,
    StreamGone,
    Token,
    UnknownRequest,
    decode_request,
)
from producer.contract.keys import Keys
from producer.embedded import EmbeddedServer
from producer.ledger import Claim, Ledger
from producer.settings import Settings

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

TEXTS = (*"预防感冒，多喝水。", "", "😀")


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def claimed(worker: HandWorker) -> Claim:
    claim = worker.claim()
    assert claim is not None
    return claim


def answer_slowly(worker: HandWorker, claim: Claim, pause: float = 0.005) -> threading.Thread:
    """An answer that is written while the test reads it."""

    def write() -> None:
        worker.start(claim)
        for index, text in enumerate(TEXTS, 1):
            time.sleep(pause)
            worker.emit(claim, index, text)
        worker.finish(claim, "".join(TEXTS))

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def wait_until_listening(worker: HandWorker, keys: Keys, request_id: str) -> None:
    """Until a reader of this request gets what is pushed."""
    redis = worker.ledger.connection
    deadline = time.monotonic() + 10
    while not (
        (reader := redis.hget(keys.request(request_id), "readers"))
        and redis.pubsub_numsub(keys.push(reader))[0][1]
    ):
        assert time.monotonic() < deadline, "nobody listens"
        time.sleep(0.005)


class Either:
    """One of the two clients behind the blocking one's methods, so that every test here is a test of both."""

    def __init__(self, settings: Settings, run: Callable[[Coroutine[Any, Any, Any]], Any] | None) -> None:
        self._run = run
        if run is None:
            self.client: Any = Client(settings)
        else:
            self.client = run(self._made(settings))

    async def _made(self, settings: Settings) -> AsyncClient:
        return AsyncClient(settings)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        run = self._run
        return method if run is None else lambda *args, **fields: run(method(*args, **fields))

    def stream(self, request_id: str, after: int = 0) -> Iterator[Event]:
        events = self.client.stream(request_id, after)
        if self._run is None:
            yield from events
            return
        try:
            while True:
                try:
                    yield self._run(anext(events))
                except StopAsyncIteration:
                    return
        finally:
            self._run(events.aclose())


@pytest.fixture(params=["blocking", "asyncio"])
def make_client(request: pytest.FixtureRequest) -> Iterator[Callable[[Settings], Any]]:
    with contextlib.ExitStack() as cleanup:
        run = None
        if request.param == "asyncio":
            runner = cleanup.enter_context(asyncio.Runner())
            loop = runner.get_loop()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            cleanup.callback(thread.join)
            cleanup.callback(loop.call_soon_threadsafe, loop.stop)

            def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
                return asyncio.run_coroutine_threadsafe(_awaited(coroutine), loop).result(30)

        def make(settings: Settings) -> Either:
            either = Either(settings, run)
            cleanup.callback(either.close)
            return either

        yield make


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


@pytest.fixture
def either(make_client: Callable[[Settings], Any], settings: Settings) -> Any:
    return make_client(settings)


def test_a_submit_is_in_the_ledger_and_a_ticket_in_the_queue(
    either: Any, ledger: Ledger, keys: Keys, worker: HandWorker
) -> None:
    submission = either.submit(ChatRequest(query="怎么预防感冒？", history=(("你好", "你好！"),)))

    assert submission.is_new
    assert ledger.connection.llen(f"{keys.namespace}:{keys.celery_queue('chatglm-6b')}") == 1
    request = decode_request(claimed(worker).request)
    assert isinstance(request, ChatRequest)
    assert request.history == (("你好", "你好！"),)
    assert request.sampling.seed is not None


def test_chat_and_summarize_take_the_fields_of_their_requests(either: Any, worker: HandWorker) -> None:
    either.chat("q", priority=3, sampling={"temperature": 0})
    either.summarize("t", style="title")
    with pytest.raises(InvalidRequest, match="styel"):
        either.summarize("t", styel="title")
    kinds = [decode_request(claimed(worker).request).kind for _ in range(2)]
    assert kinds == ["chat", "summary"]


def test_an_answer_streams_as_it_is_written(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    thread = answer_slowly(worker, claimed(worker))
    events = list(either.stream(submission.request_id))
    thread.join()
    assert isinstance(events[0], Started)
    assert [event.index for event in events if isinstance(event, Token)] == list(range(1, len(TEXTS) + 1))
    assert isinstance(events[-1], Finished)
    assert texts(events) == events[-1].text == "".join(TEXTS)


def test_a_stream_can_be_opened_before_the_request_is_claimed(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    stream = either.stream(submission.request_id)
    thread = threading.Timer(0.05, lambda: worker.answer(claimed(worker), *TEXTS))
    thread.start()
    assert texts(list(stream)) == "".join(TEXTS)
    thread.join()


def write_in_pieces(worker: HandWorker, claim: Claim) -> None:
    """Events of one, two and three tokens: most indices are in the middle of one."""
    worker.start(claim)
    for index, count in ((1, 1), (3, 2), (6, 3), (9, 3), (11, 2)):
        worker.emit(claim, index, *TEXTS[index - count : index])


def test_a_finished_stream_resumes_behind_every_token(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    claim = claimed(worker)
    write_in_pieces(worker, claim)
    worker.finish(claim, "".join(TEXTS))
    for after in range(len(TEXTS) + 1):
        events = list(either.stream(submission.request_id, after=after))
        assert texts(events) == "".join(TEXTS[after:])
        assert isinstance(events[-1], Finished)
    with pytest.raises(InvalidRequest, match="after: 12 is beyond the answer's 11 tokens"):
        list(either.stream(submission.request_id, after=12))


def test_a_running_stream_resumes_behind_every_token(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    claim = claimed(worker)
    streams = [either.stream(submission.request_id, after=after) for after in range(1, len(TEXTS) + 1)]
    with ThreadPoolExecutor(len(streams)) as pool:
        reading = [pool.submit(list, stream) for stream in streams]
        time.sleep(0.1)
        write_in_pieces(worker, claim)
        worker.finish(claim, "".join(TEXTS))
        for after, each in enumerate(reading, 1):
            assert texts(each.result(20)) == "".join(TEXTS[after:])


def test_two_readers_of_one_client_and_one_of_another_get_the_same(
    either: Any, client: Client, worker: HandWorker
) -> None:
    submission = either.chat("q")
    with ThreadPoolExecutor(3) as pool:
        readers = [
            pool.submit(lambda reader: list(reader.stream(submission.request_id)), each)
            for each in (either, either, client)
        ]
        time.sleep(0.05)
        answer_slowly(worker, claimed(worker)).join()
        results = [reader.result(10) for reader in readers]
    assert results[0] == results[1] == results[2]
    assert texts(results[0]) == "".join(TEXTS)


def test_lost_pushes_are_read_from_the_stream(
    either: Any, worker: HandWorker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = producer.streams._Inboxes.deliver
    count = 0

    def deliver_every_third(self: Any, message: str) -> None:
        nonlocal count
        count += 1
        if count % 3 == 0:
            deliver(self, message)

    monkeypatch.setattr(producer.streams._Inboxes, "deliver", deliver_every_third)
    monkeypatch.setattr(producer.streams, "_SILENT_SECONDS", 0.05)
    submission = either.chat("q")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, either.stream(submission.request_id))
        wait_until_listening(worker, keys, submission.request_id)
        answer_slowly(worker, claimed(worker), pause=0.002).join()
        events = reading.result(20)
    assert texts(events) == "".join(TEXTS)
    # The last ones may come after the reader has found the end in the stream.
    assert count > 6


def test_a_reader_without_any_push_still_gets_everything(
    either: Any, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer.streams._Inboxes, "deliver", lambda self, message: None)
    monkeypatch.setattr(producer.streams, "_SILENT_SECONDS", 0.05)
    submission = either.chat("q")
    thread = answer_slowly(worker, claimed(worker))
    events = list(either.stream(submission.request_id))
    thread.join()
    assert texts(events) == "".join(TEXTS)


def test_a_slow_reader_costs_bounded_memory_and_loses_nothing(
    either: Any, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer.streams, "_MAX_WAITING", 3)
    submission = either.chat("q")
    stream = either.stream(submission.request_id)
    claim = claimed(worker)
    worker.start(claim)
    events = [next(stream)]
    for index, text in enumerate(TEXTS, 1):
        worker.emit(claim, index, text)
    worker.finish(claim, "".join(TEXTS))
    time.sleep(0.1)
    events += stream
    assert texts(events) == "".join(TEXTS)


def test_a_killed_push_connection_is_replaced_without_a_gap(
    either: Any, worker: HandWorker, ledger: Ledger
) -> None:
    def listeners() -> set[str]:
        return {each["id"] for each in ledger.connection.client_list(_type="pubsub")}

    others = listeners()
    submission = either.chat("q")
    claim = claimed(worker)
    worker.start(claim)
    stream = either.stream(submission.request_id)
    events = [next(stream)]
    for index, text in enumerate(TEXTS, 1):
        for each in listeners() - others:
            ledger.connection.client_kill_filter(_id=each)
        worker.emit(claim, index, text)
        events.append(next(stream))
    worker.finish(claim, "".join(TEXTS))
    events += stream
    assert texts(events) == "".join(TEXTS)


def test_result_is_the_whole_answer(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    thread = answer_slowly(worker, claimed(worker))
    assert either.result(submission.request_id, timeout=10).text == "".join(TEXTS)
    thread.join()


def test_result_gives_up_in_time_and_the_request_goes_on(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"did not end within 0\.1 s"):
        either.result(submission.request_id, timeout=0.1)
    assert time.monotonic() - begin < 2
    assert claimed(worker).request_id == submission.request_id


def test_a_failed_request_raises_its_code(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    claim = claimed(worker)
    worker.fail(claim, "context_exceeded")
    with pytest.raises(RequestFailed, match="Send another") as caught:
        either.result(submission.request_id)
    assert caught.value.code == "context_exceeded"


def test_a_cancelled_request_raises_with_its_text(either: Any, worker: HandWorker) -> None:
    submission = either.chat("q")
    claim = claimed(worker)
    worker.start(claim)
    worker.emit(claim, 1, "多")
    assert either.cancel(submission.request_id) == "running"
    worker.finish(claim, "多", "cancelled")
    with pytest.raises(RequestCancelled) as caught:
        either.result(submission.request_id)
    assert caught.value.text == "多"


def test_a_request_cancelled_in_the_queue_ends_its_stream(either: Any) -> None:
    submission = either.chat("q")
    assert either.cancel(submission.request_id) == "queued"
    [event] = either.stream(submission.request_id)
    assert isinstance(event, Finished)
    assert event.reason == "cancelled"


def test_status_and_overview_show_the_queue(either: Any) -> None:
    either.chat("first")
    second = either.chat("second")
    status = either.status(second.request_id)
    assert (status.state, status.place) == ("queued", 1)
    assert either.overview().num_queued == 2


def test_the_same_idempotency_key_is_the_same_request(either: Any) -> None:
    first = either.chat("q", idempotency_key="k")
    assert either.chat("q", idempotency_key="k").request_id == first.request_id
    with pytest.raises(IdempotencyConflict):
        either.chat("other", idempotency_key="k")


def test_a_request_that_nobody_knows_is_said_so(either: Any) -> None:
    for ask in (either.cancel, either.status, either.result, lambda each: list(either.stream(each))):
        with pytest.raises(UnknownRequest):
            ask("nobody")
    with pytest.raises(StreamGone):
        list(either.stream("nobody", after=4))


def test_a_stream_that_was_kept_long_enough_is_gone(either: Any, worker: HandWorker, keys: Keys) -> None:
    submission = either.chat("q")
    worker.answer(claimed(worker), "a")
    worker.ledger.connection.delete(keys.events(submission.request_id))
    with pytest.raises(StreamGone):
        list(either.stream(submission.request_id))


def test_a_reader_that_leaves_is_not_written_to_any_more(
    either: Any, worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    submission = either.chat("q")
    worker.start(claimed(worker))
    stream = either.stream(submission.request_id)
    next(stream)
    assert ledger.connection.hget(keys.request(submission.request_id), "readers")
    stream.close()
    assert not ledger.connection.hget(keys.request(submission.request_id), "readers")


def test_many_streams_share_one_connection(
    either: Any, worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    def num_listeners() -> int:
        return len(ledger.connection.client_list(_type="pubsub"))

    before = num_listeners()
    ids = [either.chat("q").request_id for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        reading = [pool.submit(lambda each: list(either.stream(each)), request_id) for request_id in ids]
        for request_id in ids:
            wait_until_listening(worker, keys, request_id)
        assert num_listeners() == before + 1
        for _ in ids:
            worker.answer(claimed(worker), *TEXTS)
        assert {texts(each.result(20)) for each in reading} == {"".join(TEXTS)}


def test_without_redis_the_error_says_what_was_tried(
    make_client: Callable[[Settings], Any], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    either = make_client(Settings(redis_url=f"redis://:s3cret@127.0.0.1:{port}/0", state_dir=tmp_path))
    for ask in (
        lambda: either.chat("q"),
        lambda: either.status("r"),
        lambda: list(either.stream("r")),
        lambda: either.result("r"),
    ):
        begin = time.monotonic()
        with pytest.raises(RedisUnavailable, match=f"127.0.0.1:{port}/0 cannot be reached") as caught:
            ask()
        assert "s3cret" not in str(caught.value)
        assert time.monotonic() - begin < 3


def test_a_stream_outlives_a_restart_of_redis(make_client: Callable[[Settings], Any], tmp_path: Path) -> None:
    from tests.producer.conftest import HandWorker

    server = EmbeddedServer.start(tmp_path)
    settings = Settings(redis_url=server.url, state_dir=tmp_path)
    either = make_client(settings)
    submission = either.chat("q")
    first_ledger = Ledger.at(server.url, settings.keys)
    worker = HandWorker(first_ledger)
    claim = claimed(worker)
    worker.start(claim)
    worker.emit(claim, 1, TEXTS[0])
    stream = either.stream(submission.request_id)
    events = [next(stream), next(stream)]
    first_ledger.close()
    server.stop()
    time.sleep(0.3)
    record = (tmp_path / "server.json").read_text()
    with restarted(tmp_path, record) as url:
        assert url == server.url
        worker.ledger = Ledger.at(url, settings.keys)
        for index, text in enumerate(TEXTS[1:], 2):
            worker.emit(claim, index, text)
        worker.finish(claim, "".join(TEXTS))
        events += stream
        worker.ledger.close()
        either.close()
    assert texts(events) == "".join(TEXTS)


@contextlib.contextmanager
def restarted(state_dir: Path, record: str) -> Iterator[str]:
    """The server again, at its old address and with its old password, as an operator's server would come back."""
    import json
    import subprocess

    from producer.embedded import find_binary

    process = subprocess.Popen(
        [find_binary().path, state_dir / "server.conf"], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    fields = json.loads(record)
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", fields["port"])).close()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server did not come back"
            time.sleep(0.01)
    try:
        yield f"redis://:{fields['password']}@127.0.0.1:{fields['port']}/0"
    finally:
        process.terminate()
        process.wait()
