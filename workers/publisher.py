"""Token ids to text, and text to the readers: one fenced flush for all running requests, from a thread of its own.

Text waits here while Redis is down. It needs no bound of its own: nothing is claimed meanwhile, and what runs ends at the context's length.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar, assert_never

from redis.exceptions import RedisError

from producer.contract import Failed, Finished, NewTokens, RedisUnavailable, Started, UnknownRequest
from producer.contract.keys import MAX_ATTEMPTS
from producer.ledger import Call, Emission, EmitCode, Ledger, calls
from workers.engine.messages import Refused, Step
from workers.logs import get_logger
from workers.metrics import Metrics
from workers.running import RELEASED, End, Lost, RunningRequest, RunningRequests
from workers.speed import Speed

logger = get_logger(__name__)

T = TypeVar("T")

_NO_TEXT = Failed(
    code="internal_error",
    message="The worker could not turn the model's output into text; its log says why. Submit the request again once that is repaired.",
)
MAX_OUT_OF_STEP: Final = 5
"""So often in a row the ledger may be without what was published; then somebody else shall try."""
MAX_RETRY_SECONDS = 1.0
"""Between two attempts to reach Redis."""
MAX_PAUSE_SECONDS = 2.0
"""Between two flushes, however long the last one took."""
ENDS_AT_ONCE = 32
"""Requests that are ended in one round trip."""
EVENTS_AT_ONCE = 256
"""In one call of `emit`: others' calls wait as long as it takes."""


class Publisher:
    """Writes what the engine says into the ledger, in the order in which it came, and ends requests.

    `abort` makes the engine forget a sequence; `on_gone` is told of each request that is no longer this worker's, `on_kept` of each that the
    engine died with and that this worker is to try alone.
    """

    def __init__(
        self,
        ledger: Ledger,
        running: RunningRequests,
        worker_id: str,
        *,
        abort: Callable[[int], None],
        on_gone: Callable[[RunningRequest], None],
        flush_seconds: float,
        metrics: Metrics,
        log_text: bool = False,
        on_kept: Callable[[RunningRequest], None] = lambda _running: None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._worker_id = worker_id
        self._abort = abort
        self._on_gone = on_gone
        self._flush_seconds = flush_seconds
        self._metrics = metrics
        self._log_text = log_text
        self._on_kept = on_kept
        self._max_attempts = max_attempts
        self._wake = threading.Condition()
        self._has_news = False
        self._is_urgent = False
        self._is_stopping = False
        self._give_up_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self.speed = Speed()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Publish what there is, for at most so many seconds, and end."""
        with self._wake:
            self._give_up_at = time.monotonic() + timeout
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout + 2)

    # --- what becomes known, from any thread ------------------------------------------------------------------------

    def on_step(self, step: Step) -> None:
        """The engine made tokens."""
        now = time.monotonic()
        first: list[RunningRequest] = []
        gaps: dict[float, int] = {}
        with self._running.lock:
            for sequence_id, token_id, reason in zip(
                step.sequence_ids, step.token_ids, step.finish_reasons, strict=True
            ):
                running = self._running.of_sequence(sequence_id)
                # Unknown: aborted a moment ago, and the engine had not heard of it yet.
                if running is not None:
                    if running.last_token is None:
                        first.append(running)
                    else:
                        gaps[running.last_token] = gaps.get(running.last_token, 0) + 1
                    try:
                        self._add_token(running, token_id, reason, now)
                    except Exception:  # one request is a boundary
                        logger.exception(
                            "a token cannot be used", request_id=running.request_id, token_id=token_id
                        )
                        self.end(running, _NO_TEXT)
        self.speed.count(len(step.token_ids))
        self._metrics.on_step(now, first, gaps, num_sequences=len(step.token_ids))
        self._notify(is_urgent=bool(first))

    def _add_token(self, running: RunningRequest, token_id: int, reason: str, now: float) -> None:
        detokenizer = running.detokenizer
        assert detokenizer is not None, "bound to a sequence without a detokenizer"
        text = detokenizer.add(token_id)
        if detokenizer.is_stopped and not reason:
            self._abort(running.sequence_id)
            reason = "stop"
        if reason:
            # What was held back can be held back no longer: it belongs to this last token.
            text += detokenizer.finish()
        running.add(token_id, text, now)
        if reason:
            self._running.unbind(running)
            running.end = "length" if reason == "length" else "stop"

    def on_refused(self, refused: Refused) -> None:
        """The engine will not run this sequence."""
        with self._running.lock:
            running = self._running.of_sequence(refused.sequence_id)
        if running is not None:
            self.end(running, Failed(code=refused.code, message=refused.message))

    def end(self, running: RunningRequest, end: End) -> None:
        """This request is over here, for a reason that did not come as a token. Does nothing if it has ended already."""
        with self._running.lock:
            if running.end is None:
                self._abort_sequence(running)
                running.end = end
        self._notify(is_urgent=True)

    def drop(self, running: RunningRequest) -> None:
        """It is not this worker's any more: forget it without a word to the ledger."""
        with self._running.lock:
            self._abort_sequence(running)
            is_ours = self._running.remove(running)
        if is_ours:
            self._on_gone(running)

    def _abort_sequence(self, running: RunningRequest) -> None:
        if self._running.of_sequence(running.sequence_id) is running:
            self._running.unbind(running)
            self._abort(running.sequence_id)

    def on_started(self) -> None:
        """A claimed request has been handed to the engine: its readers may know."""
        self._notify(is_urgent=False)

    def _notify(self, *, is_urgent: bool) -> None:
        with self._wake:
            self._has_news = True
            self._is_urgent |= is_urgent
            self._wake.notify()

    # --- publishing, in the publisher's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        last_flush = last_took = 0.0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._has_news or self._is_stopping)
                # Half of the time belongs to others: with a thousand streams more tokens then come in one event.
                self._sleep_until(last_flush + 2 * last_took, is_urgent=False)
                self._sleep_until(last_flush + self._flush_seconds, is_urgent=True)
                self._has_news = self._is_urgent = False
                is_stopping = self._is_stopping
            last_flush = time.monotonic()
            try:
                self._flush()
            except _GaveUp:
                return
            except Exception:  # the loop is a boundary: the other requests go on
                logger.exception("publishing failed")
                time.sleep(self._flush_seconds)
            last_took = time.monotonic() - last_flush
            if is_stopping:
                return

    def _sleep_until(self, due: float, *, is_urgent: bool) -> None:
        """is_urgent: urgent news end it before."""
        left = min(due - time.monotonic(), MAX_PAUSE_SECONDS)
        if left > 0:
            self._wake.wait_for(lambda: (is_urgent and self._is_urgent) or self._is_stopping, timeout=left)

    def _flush(self) -> None:
        """Everything new, then the ends of those requests that have said everything."""
        batch = self._collect()
        if batch:
            begin = time.monotonic()
            codes: list[EmitCode] = []
            for start in range(0, len(batch), EVENTS_AT_ONCE):
                emissions = (emission for _, emission in batch[start : start + EVENTS_AT_ONCE])
                call = calls.emit(emissions, worker=self._worker_id)
                codes += self._insist(partial(self._ledger.run, call))
            num_tokens = sum(
                len(emission.event.ids) for _, emission in batch if isinstance(emission.event, NewTokens)
            )
            self._metrics.on_flush(time.monotonic() - begin, num_tokens)
            for (running, emission), code in zip(batch, codes, strict=True):
                self._settle(running, emission, code)
        ended = [
            running
            for running in self._running
            if running.end is not None and running.num_published == len(running.token_ids)
        ]
        lost = [running for running in ended if isinstance(running.end, Lost)]
        ended = [running for running in ended if not isinstance(running.end, Lost)]
        for start in range(0, len(ended), ENDS_AT_ONCE):
            self._publish_ends(ended[start : start + ENDS_AT_ONCE])
        for running in lost:
            self._publish_loss(running)

    def _collect(self) -> list[tuple[RunningRequest, Emission]]:
        """What the ledger does not have yet. A batch is sent until it is answered, so the next one starts after it."""
        batch = []
        with self._running.lock:
            for running in self._running:
                if not running.is_started_published and running.is_known_to_engine:
                    running.is_started_published = True
                    started = Started(
                        attempt=running.attempt, worker=self._worker_id, prompt_tokens=running.prompt_len
                    )
                    batch.append((running, Emission(running.request_id, running.attempt, started)))
                before, after = running.num_published, len(running.token_ids)
                if after > before:
                    running.num_published = after
                    tokens = NewTokens(after, running.token_ids[before:], running.texts[before:])
                    batch.append((running, Emission(running.request_id, running.attempt, tokens)))
        return batch

    def _settle(self, running: RunningRequest, emission: Emission, code: EmitCode) -> None:
        match code:
            case EmitCode.WRITTEN | EmitCode.ALREADY_WRITTEN:
                if isinstance(emission.event, NewTokens):
                    running.num_out_of_step = 0
            case EmitCode.CANCEL_ASKED:
                self.end(running, "cancelled")
            case EmitCode.FENCED:
                self._metrics.fenced_writes.inc()
                logger.info(
                    "a write was fenced: another attempt has the request",
                    request_id=running.request_id,
                    attempt=running.attempt,
                )
                self.drop(running)
            case EmitCode.OUT_OF_STEP:
                self._publish_again(running)
            case _:
                assert_never(code)

    def _publish_again(self, running: RunningRequest) -> None:
        """Redis has come back without its last writes: what it has lost is still here."""
        try:
            status = self._insist(lambda: self._ledger.run(calls.status(running.request_id)))
        except UnknownRequest:
            self.drop(running)
            return
        if (status.state, status.attempt, status.worker) != ("running", running.attempt, self._worker_id):
            self.drop(running)
            return
        log = logger.bind(request_id=running.request_id, attempt=running.attempt, tokens=status.num_tokens)
        with self._running.lock:
            running.num_out_of_step += 1
            is_hopeless = running.num_out_of_step > MAX_OUT_OF_STEP or status.num_tokens > len(
                running.token_ids
            )
            if is_hopeless:
                self._abort_sequence(running)
                running.num_published, running.end = len(running.token_ids), RELEASED
                log.error("the ledger does not have what was published: released")
            else:
                running.num_published, running.is_started_published = status.num_tokens, False
                log.warning("the ledger has lost what was published: it is published again")
        self._notify(is_urgent=True)

    def _publish_ends(self, ended: list[RunningRequest]) -> None:
        """In one round trip."""
        ends = [self._end_of(running) for running in ended]
        written = self._insist(lambda: self._ledger.run_many([call for _, call in ends]))
        for running, (event, _), is_written in zip(ended, ends, written, strict=True):
            if is_written is None:
                self._publish_again(running)
                continue
            self._record(running, event, is_written=is_written)
            if self._running.remove(running):
                self._on_gone(running)

    def _end_of(self, running: RunningRequest) -> tuple[Finished | Failed | None, Call[bool | None]]:
        """What its reader is told, None if nothing, and how the ledger is."""
        end = running.end
        assert end is not None, "only requests that have ended"
        assert not isinstance(end, Lost), "that is no end"
        id_, attempt, worker = running.request_id, running.attempt, self._worker_id
        if isinstance(end, Failed):
            return end, calls.fail(id_, attempt, end, worker=worker)
        if end == RELEASED:
            return None, calls.release(id_, attempt, worker=worker)
        finished = running.finished(end)
        event = running.check(finished) or finished
        if isinstance(event, Failed):
            return event, calls.fail(id_, attempt, event, worker=worker)
        return event, calls.finish(id_, attempt, event, worker=worker, num_tokens=len(running.token_ids))

    def _publish_loss(self, running: RunningRequest) -> None:
        lost = running.end
        assert isinstance(lost, Lost), "only what is lost"
        call = calls.lose(
            running.request_id,
            running.attempt,
            lost.what,
            max_attempts=self._max_attempts,
            num_before=running.num_losses,
            keep=lost.keep,
            is_trial=lost.is_trial,
            worker=self._worker_id,
        )
        outcome = self._insist(lambda: self._ledger.run(call))
        logger.info(
            "lost with its engine",
            request_id=running.request_id,
            attempt=running.attempt,
            tokens=len(running.token_ids),
            outcome=outcome,
        )
        self._metrics.on_lost(outcome)
        if outcome == "kept":
            with self._running.lock:
                running.num_losses += 1
                running.end = None
            self._on_kept(running)
            return
        if outcome == "queued":
            self._metrics.on_released()
        if self._running.remove(running):
            self._on_gone(running)

    def _record(self, running: RunningRequest, event: Finished | Failed | None, *, is_written: bool) -> None:
        """One line in the log for each request, and its figures."""
        log = logger.bind(request_id=running.request_id, attempt=running.attempt)
        if not is_written:
            self._metrics.fenced_writes.inc()
            log.info("its end was fenced: another attempt has the request")
        elif event is None:
            self._metrics.on_released()
            log.info("released", tokens=len(running.token_ids))
        elif isinstance(event, Failed):
            self._metrics.on_end(running, event)
            log.info("failed", kind=running.kind, tenant=running.tenant, code=event.code)
        else:
            self._metrics.on_end(running, event)
            log.info(
                "answered" if event.reason != "cancelled" else "cancelled",
                kind=running.kind,
                tenant=running.tenant,
                reason=event.reason,
                prompt_tokens=running.prompt_len,
                tokens=len(running.token_ids),
                queue_seconds=round(event.timings.queue_seconds, 3),
                first_token_seconds=round(event.timings.first_token_seconds, 3),
                total_seconds=round(event.timings.total_seconds, 3),
                **({"text": event.text} if self._log_text else {}),
            )

    def _insist(self, call: Callable[[], T]) -> T:
        """The answer to this call, however long Redis is away. Every call here may be repeated."""
        pause = 0.05
        while True:
            try:
                return call()
            except (RedisUnavailable, RedisError) as error:
                if time.monotonic() > self._give_up_at:
                    raise _GaveUp from error
                if pause >= MAX_RETRY_SECONDS:
                    logger.warning(
                        "cannot publish, trying on (%d requests wait): %s", len(self._running), error
                    )
                time.sleep(pause)
                pause = min(2 * pause, MAX_RETRY_SECONDS)


class _GaveUp(Exception):
    """Redis did not come back before the worker had to stop. The leases run out, and others go on."""
