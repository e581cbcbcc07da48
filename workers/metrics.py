"""Every metric of a worker, on one page: names, labels, buckets, and what is counted when.

Engine metrics have vLLM's names and queue metrics celery-exporter's, because people have dashboards for them; what neither knows begins with
`glmq_`. Labels are bounded: tenants and adapters beyond the busiest ones are `other`. Knows nothing about HTTP (`exporter.py`), and is told
what happens rather than looking for it; what is a state rather than an event is read when somebody scrapes.
"""

from __future__ import annotations

import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Final

from prometheus_client import Counter, Histogram, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from producer.celery_settings import TICKET_TASK
from producer.contract import Failed, Finished
from producer.ledger.calls import Backlog
from workers.gpu import GpuReading
from workers.recent import RecentLatencies
from workers.running import RunningRequest

# --- buckets: vLLM's, so that its dashboards' quantiles mean the same ---------------------------------------------------

FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_SECONDS: Final = (
    # Two below vLLM's first one: a small model on a big GPU is faster than 10 ms.
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_SECONDS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FLUSH_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
TURNS: Final = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)

MAX_TENANTS: Final = 20
MAX_ADAPTERS: Final = 20
OTHER: Final = "other"
_TRACKED_PER_LABEL: Final = 10
_FADE_EVERY: Final = 10_000

# Known before they happen, so that the first one is an increase, too.
REJECTIONS: Final = (
    "conversation_busy",
    "deadline_exceeded",
    "deadline_unmeetable",
    "idempotency_conflict",
    "queue_full",
    "tenant_queue_full",
)
FAILURES: Final = ("deadline_exceeded", "internal_error")

STATES: Final = ("loading", "ready", "draining")
_FINISHED_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "abort", "failed": "error"}
"""Ours to vLLM's."""
_BACKGROUND: Final = frozenset({"fold", "piece", "document"})
"""Kinds that nobody waits for, or that take as long as the text is: they count as work, not as somebody's latency."""
_IDENTITY: Final = ("model_name", "engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """What a worker is at this moment; `glmq status` and a scrape read the same."""

    state: str = "loading"
    """loading, ready or draining."""
    slots: int = 0
    num_claimed: int = 0
    """Requests that hold a slot."""
    num_running: int = 0
    """Sequences that the engine works on."""
    num_waiting: int = 0
    """Sequences that it has not begun, or has preempted."""
    num_blocks: int = 0
    """Of the KV cache, that sequences can have."""
    num_free_blocks: int = 0
    num_unpublished_tokens: int = 0
    known_adapters: Sequence[str] = ()
    loaded_adapters: Sequence[str] = ()
    running_adapters: Sequence[str] = ()
    """Of the requests that hold a slot."""
    max_adapters: int = 0
    is_stuck: bool = False
    """The engine has work and makes no progress."""
    renewal_age_seconds: float = 0.0
    """Since the leases were last renewed."""
    load_seconds: float = 0.0
    engine_pid: int | None = None
    info: Mapping[str, str] = field(default_factory=dict)
    """What stays as it is: worker, version, device, dtype, backend."""

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that is in use, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


class Metrics:
    """Counts what one worker does. Methods may be called from any thread."""

    def __init__(
        self, *, model: str, engine: str = "0", namespace: str = "glmq", queue_name: str = ""
    ) -> None:
        """model: the name under which requests ask for it. engine: index of the GPU, or of the worker on its machine.
        namespace: of the deployment."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._identity = (model, engine)
        self._namespace = namespace
        self._queue_name = queue_name
        self._hostname = socket.gethostname()
        self._tenants = BusiestNames(MAX_TENANTS)
        self._adapters = BusiestNames(MAX_ADAPTERS)
        self.recent_first_token = RecentLatencies()
        self.recent_between_tokens = RecentLatencies()

        self._define_engine_metrics()
        self._define_task_metrics()
        self._define_own_metrics()

    def _define_engine_metrics(self) -> None:
        """By vLLM's names."""
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Answer tokens generated.")
        self._preemptions = self._counter(
            "vllm:num_preemptions", "Sequences preempted because the KV cache was full."
        )
        self._success = self._counters(
            "vllm:request_success",
            "Requests that ended, by reason: stop, length, abort or error.",
            "finished_reason",
        )
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From submit to the first token.", FIRST_TOKEN_SECONDS
        )
        self._between_tokens = WeightedHistogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a request.",
            BETWEEN_TOKENS_SECONDS,
            dict(zip(_IDENTITY, self._identity, strict=True)),
        )
        self.registry.register(self._between_tokens)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            BETWEEN_TOKENS_SECONDS,
        )
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "From submit to the end.", REQUEST_SECONDS
        )
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "From submit to the first claim.", REQUEST_SECONDS
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "From the claim to the first token.", REQUEST_SECONDS
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST_SECONDS
        )
        self._inference_time = self._histogram(
            "vllm:request_inference_time_seconds", "From the claim to the last token.", REQUEST_SECONDS
        )
        self._request_prompt = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", REQUEST_TOKENS
        )
        self._request_answer = self._histogram(
            "vllm:request_generation_tokens", "Answer tokens of a request.", REQUEST_TOKENS
        )
        self._request_max = self._histogram(
            "vllm:request_params_max_tokens", "Answer tokens that a request could have had.", REQUEST_TOKENS
        )
        self._iteration = self._histogram(
            "vllm:iteration_tokens_total", "Tokens of an engine step, prompts included.", ITERATION_TOKENS
        )

        for reason in _FINISHED_REASONS.values():
            self._success.labels(*self._identity, reason)

    def _define_task_metrics(self) -> None:
        """By celery-exporter's names, without Celery's events."""
        self._received = self._task_counter("celery_task_received", "Tickets that reached this worker.")
        self._started = self._task_counter("celery_task_started", "Requests claimed.")
        self._succeeded = self._task_counter("celery_task_succeeded", "Requests answered.")
        self._failed = self._task_counter("celery_task_failed", "Requests failed.", "exception")
        self._revoked = self._task_counter("celery_task_revoked", "Requests cancelled.")
        self._runtime = Histogram(
            "celery_task_runtime",
            "Seconds from the claim to the end.",
            ("name", "hostname", "queue_name"),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )

    def _define_own_metrics(self) -> None:
        self._requests = self._counters(
            "glmq_requests", "Requests that ended here.", "tenant", "kind", "outcome"
        )
        self._failures = self._counters("glmq_request_failures", "Requests that failed, by code.", "code")
        for code in FAILURES:
            self._failures.labels(*self._identity, code)
        self._tenant_tokens = self._counters("glmq_answer_tokens", "Answer tokens, by tenant.", "tenant")
        self._adapter_requests = self._counters(
            "glmq_adapter_requests", "Requests that ended, by adapter.", "adapter"
        )
        self._refused = self._counters(
            "glmq_tasks_refused", "Plain Celery tasks that could not become a request, by reason.", "reason"
        )
        self._claims = self._counter("glmq_claims", "Requests claimed.")
        self._takeovers = self._counter(
            "glmq_takeovers", "Of these, begun by an earlier attempt, here or elsewhere."
        )
        self._released = self._counter("glmq_requests_released", "Requests handed back to the queue.")
        self.attempts_lost = self._counters(
            "glmq_attempts_lost",
            "Attempts that an engine took down with it, by what became of the request: queued, kept (to be tried alone) or ended.",
            "outcome",
        )
        self.leases_lost = self._counter(
            "glmq_leases_lost", "Requests whose lease had gone when it was to be renewed."
        )
        self.leases_reaped = self._counter(
            "glmq_leases_reaped", "Requests of silent workers that this one sent back to the queue."
        )
        self.fenced_writes = self._counter(
            "glmq_fenced_writes", "Writes refused because another attempt has the request."
        )
        self.engine_restarts = self._counter(
            "glmq_engine_restarts", "Times that the engine died and was started again."
        )
        self._batch = self._histogram("glmq_step_sequences", "Sequences of an engine step: the batch.", BATCH)
        self._flush = self._histogram(
            "glmq_flush_seconds", "One flush of new tokens to Redis, retries included.", FLUSH_SECONDS
        )
        self._flush_tokens = self._histogram("glmq_flush_tokens", "Tokens of one flush.", ITERATION_TOKENS)
        self._left_out = self._histogram(
            "glmq_left_out_turns",
            "Turns of a conversation that its prompt lacked because folding lags.",
            TURNS,
        )

    # --- what happens -------------------------------------------------------------------------------------------------

    def on_ticket(self, task_name: str) -> None:
        """A Celery message has arrived."""
        self._received.labels(task_name, self._hostname, self._queue_name).inc()

    def on_task_refused(self, reason: str) -> None:
        """A plain task's arguments are no request."""
        self._refused.labels(*self._identity, reason).inc()

    def on_claim(self, running: RunningRequest) -> None:
        """A request is this worker's."""
        self._claims.inc()
        self._started.labels(*self._task(running)).inc()
        if running.num_tries > 1:
            self._takeovers.inc()

    def on_step(
        self, now: float, first: Iterable[RunningRequest], gaps: Mapping[float, int], *, num_sequences: int
    ) -> None:
        """The engine made a token for each of `num_sequences`.

        first: requests whose first token here it was. gaps: time of the token before → how many requests had it then. A
        step costs a constant: requests that ran together have one gap.
        """
        num_prefilled = 0
        for running in first:
            num_prefilled += running.prompt_len + running.num_emitted_before
            self._prompt_tokens.inc(running.prompt_len)
            if running.num_emitted_before == 0 and running.kind not in _BACKGROUND:
                seconds = running.age_seconds + now - running.claimed
                self._first_token.observe(seconds)
                self.recent_first_token.count(seconds)
        for before, times in gaps.items():
            self._between_tokens.observe(now - before, times)
            self.recent_between_tokens.count(now - before, times)
        if num_sequences:
            self._generation_tokens.inc(num_sequences)
            self._iteration.observe(num_sequences + num_prefilled)
            self._batch.observe(num_sequences)

    def on_preemptions(self, number: int) -> None:
        """So many more sequences were preempted."""
        self._preemptions.inc(number)

    def on_flush(self, seconds: float, num_tokens: int) -> None:
        """Redis has the new tokens of all requests."""
        self._flush.observe(seconds)
        self._flush_tokens.observe(num_tokens)

    def on_end(self, running: RunningRequest, end: Finished | Failed) -> None:
        """A request has ended, and the ledger has its end."""
        outcome = end.reason if isinstance(end, Finished) else "failed"
        now = time.monotonic()
        self._success.labels(*self._identity, _FINISHED_REASONS[outcome]).inc()
        tenant = self._tenants.label(running.tenant, forget=self._forget_tenant)
        self._requests.labels(*self._identity, tenant, running.kind, outcome).inc()
        num_new = len(running.token_ids) - running.num_emitted_before
        self._tenant_tokens.labels(*self._identity, tenant).inc(num_new)
        if running.adapter is not None:
            adapter = self._adapters.label(running.adapter, forget=self._forget_adapter)
            self._adapter_requests.labels(*self._identity, adapter).inc()
        task = self._task(running)
        self._runtime.labels(*task).observe(now - running.claimed)
        if isinstance(end, Failed):
            self._failures.labels(*self._identity, end.code).inc()
            self._failed.labels(*task, end.code).inc()
            return
        (self._revoked if outcome == "cancelled" else self._succeeded).labels(*task).inc()
        if running.kind not in _BACKGROUND:
            self._e2e.observe(running.age_seconds + now - running.claimed)
            self._queue_time.observe(running.queue_seconds)
        self._request_prompt.observe(running.prompt_len)
        self._request_answer.observe(len(running.token_ids))
        self._request_max.observe(running.max_new_tokens)
        if running.first_token is not None and running.last_token is not None:
            decode_seconds = running.last_token - running.first_token
            self._prefill_time.observe(running.first_token - running.claimed)
            self._decode_time.observe(decode_seconds)
            self._inference_time.observe(running.last_token - running.claimed)
            if num_new > 1:
                self._per_token.observe(decode_seconds / (num_new - 1))
        usage = end.usage
        if usage.summary_turns or usage.recent_turns or usage.left_out_turns:
            self._left_out.observe(usage.left_out_turns)

    def on_lost(self, outcome: str) -> None:
        """The engine died with an attempt at a request."""
        self.attempts_lost.labels(*self._identity, outcome).inc()

    def on_released(self) -> None:
        """A request goes back to the queue."""
        self._released.inc()

    # --- what is looked at when somebody scrapes ----------------------------------------------------------------------

    def watch(self, state: Callable[[], WorkerState]) -> None:
        """The worker's own state, and its processes'."""
        self.registry.register(_Watched(partial(self._state_metrics, state)))
        ProcessCollector(registry=self.registry)
        ProcessCollector("glmq_engine", pid=lambda: state().engine_pid or "none", registry=self.registry)

    def watch_backlog(self, read: Callable[[], tuple[Backlog, int] | None]) -> None:
        """What the whole deployment has, and its tickets; None: Redis does not answer.

        Each worker says the same: dashboards take the maximum, not the sum.
        """
        self.registry.register(_Watched(partial(self._backlog_metrics, read)))

    def watch_gpu(self, read: Callable[[], GpuReading | None]) -> None:
        """The GPU of this worker; None: it cannot be read."""
        self.registry.register(_Watched(partial(self._gpu_metrics, read)))

    def _state_metrics(self, read: Callable[[], WorkerState]) -> Iterator[Metric]:
        now = read()
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences that the engine works on.", now.num_running),
            (
                "vllm:num_requests_waiting",
                "Sequences that the engine has not begun or has preempted.",
                now.num_waiting,
            ),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 is all.", now.kv_usage),
            ("glmq_slots", "Requests that this worker answers at the same time.", now.slots),
            ("glmq_requests_claimed", "Requests that hold a slot.", now.num_claimed),
            ("glmq_unpublished_tokens", "Tokens that Redis does not have yet.", now.num_unpublished_tokens),
            ("glmq_adapters_known", "Adapters that a request can ask for.", len(now.known_adapters)),
            ("glmq_adapters_loaded", "Adapters in memory.", len(now.loaded_adapters)),
            ("glmq_engine_stuck", "1: the engine has work and makes no progress.", now.is_stuck),
            ("glmq_engine_load_seconds", "How long the model took to load.", now.load_seconds),
            ("glmq_renewal_age_seconds", "Since the leases were last renewed.", now.renewal_age_seconds),
        ):
            yield self._gauge(name, text, float(value))
        states = GaugeMetricFamily(
            "glmq_worker_state", "1 for the state that the worker is in.", labels=(*_IDENTITY, "state")
        )
        for state in STATES:
            states.add_metric((*self._identity, state), float(now.state == state))
        yield states
        yield InfoMetricFamily(
            "glmq_worker",
            "What this worker is.",
            {**dict(zip(_IDENTITY, self._identity, strict=True)), **now.info},
        )
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of the requests here, with the time as value.",
            labels=(*_IDENTITY, "max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        running = ",".join(sorted(now.running_adapters)[:MAX_ADAPTERS])
        lora.add_metric((*self._identity, str(now.max_adapters), "", running), time.time())
        yield lora
        slots = GaugeMetricFamily(
            "celery_worker_tasks_active", "Requests that hold a slot.", labels=("hostname",)
        )
        slots.add_metric((self._hostname,), now.num_claimed)
        yield slots
        up = GaugeMetricFamily("celery_worker_up", "1: the worker takes tickets.", labels=("hostname",))
        up.add_metric((self._hostname,), float(now.state == "ready"))
        yield up
        processes = GaugeMetricFamily(
            "celery_active_process_count", "Slots of this worker.", labels=("queue_name",)
        )
        processes.add_metric((self._queue_name,), now.slots)
        yield processes

    def _backlog_metrics(self, read: Callable[[], tuple[Backlog, int] | None]) -> Iterator[Metric]:
        answer = read()
        yield self._gauge("glmq_redis_up", "1: Redis answers this worker.", float(answer is not None))
        if answer is None:
            return
        backlog, num_tickets = answer
        model = self._identity[0]
        queued = GaugeMetricFamily(
            "glmq_queue_length",
            "Requests that wait in the queue, by priority.",
            labels=("model_name", "priority"),
        )
        oldest = GaugeMetricFamily(
            "glmq_queue_oldest_seconds",
            "How long the oldest request in the queue has waited, by priority.",
            labels=("model_name", "priority"),
        )
        for priority, (number, seconds) in enumerate(
            zip(backlog.num_queued, backlog.oldest_seconds, strict=True)
        ):
            queued.add_metric((model, str(priority)), number)
            oldest.add_metric((model, str(priority)), seconds)
        yield queued
        yield oldest
        for name, text, value in (
            ("glmq_queue_tokens", "Tokens that wait in the queue, by estimate.", backlog.num_queued_tokens),
            (
                "glmq_queue_drain_tokens_per_second",
                "How fast the queue drained when last something waited, in the same estimated tokens; 0: not measured yet.",
                backlog.drain_tokens_per_second,
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric((model,), value)
            yield gauge
        for name, text, value in (
            ("glmq_deployment_running", "Requests that run, of all models and workers.", backlog.num_running),
            (
                "glmq_leases_overdue",
                "Running requests whose lease has ended: nobody renews them.",
                backlog.num_overdue,
            ),
            ("glmq_conversations", "Conversations that are kept.", backlog.num_conversations),
            (
                "glmq_dead_letters",
                "Requests that failed at too many attempts and wait for somebody to look.",
                backlog.num_dead,
            ),
            ("glmq_redis_memory_used_bytes", "Memory that Redis uses.", backlog.memory_used_bytes),
            (
                "glmq_redis_memory_max_bytes",
                "Memory that Redis may use; 0: no limit.",
                backlog.memory_max_bytes,
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=("namespace",))
            gauge.add_metric((self._namespace,), value)
            yield gauge
        rejected = CounterMetricFamily(
            "glmq_admission_rejected",
            "Submissions refused at the door or expired in the queue, by reason.",
            labels=("model_name", "reason"),
        )
        for reason in sorted({*REJECTIONS, *backlog.rejected}):
            rejected.add_metric((model, reason), backlog.rejected.get(reason, 0))
        yield rejected
        tickets = GaugeMetricFamily(
            "celery_queue_length", "Tickets in the Celery queue.", labels=("queue_name",)
        )
        tickets.add_metric((self._queue_name,), num_tickets)
        yield tickets

    def _gpu_metrics(self, read: Callable[[], GpuReading | None]) -> Iterator[Metric]:
        reading = read()
        if reading is None:
            return
        for name, text, value in (
            ("glmq_gpu_memory_used_bytes", "GPU memory in use, by all processes.", reading.memory_used_bytes),
            ("glmq_gpu_memory_total_bytes", "GPU memory.", reading.memory_total_bytes),
            (
                "glmq_gpu_utilization_ratio",
                "Share of the last moment in which a kernel ran, 1 is all.",
                reading.utilization,
            ),
            ("glmq_gpu_temperature_celsius", "Temperature of the GPU.", reading.temperature_celsius),
            ("glmq_gpu_power_watts", "Power that the GPU draws.", reading.power_watts),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(name, text, labels=(*_IDENTITY, "gpu"))
                gauge.add_metric((*self._identity, reading.name), value)
                yield gauge

    # --- how they are made --------------------------------------------------------------------------------------------

    def _task(self, running: RunningRequest) -> tuple[str, str, str]:
        name = TICKET_TASK if running.ticket is None else running.ticket.task_name
        return name, self._hostname, self._queue_name

    def _forget_tenant(self, tenant: str) -> None:
        self._requests.remove_by_labels({"tenant": tenant})
        self._tenant_tokens.remove_by_labels({"tenant": tenant})

    def _forget_adapter(self, adapter: str) -> None:
        self._adapter_requests.remove_by_labels({"adapter": adapter})

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _IDENTITY, registry=self.registry).labels(*self._identity)

    def _counters(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_IDENTITY, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, _IDENTITY, buckets=buckets, registry=self.registry).labels(
            *self._identity
        )

    def _task_counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("name", "hostname", "queue_name", *labels), registry=self.registry)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=_IDENTITY)
        gauge.add_metric(self._identity, value)
        return gauge


class WeightedHistogram(Collector):
    """A histogram that takes the same value many times at once; the one of prometheus_client takes one at a time."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], labels: Mapping[str, str]) -> None:
        self._name = name
        self._text = text
        self._bounds = (*bounds, float("inf"))
        self._labels = labels
        self._lock = threading.Lock()
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, times: int) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        metric = HistogramMetricFamily(self._name, self._text, labels=tuple(self._labels))
        buckets = [
            (floatToGoString(bound), number)  # type: ignore[no-untyped-call]
            for bound, number in zip(self._bounds, accumulate(counts), strict=True)
        ]
        metric.add_metric(tuple(self._labels.values()), buckets, total)
        yield metric


class BusiestNames:
    """Gives the names that occur most a label of their own, and `other` to the rest.

    Names without a label are counted too (space-saving, so that the memory is bounded); one that has become much busier than
    the idlest label takes its place. Counts fade, so that last month's tenants do not keep theirs.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._labelled: dict[str, float] = {}
        self._others: dict[str, float] = {}
        self._num_seen = 0
        self._lock = threading.Lock()

    def label(self, name: str, *, forget: Callable[[str], None]) -> str:
        """The label of this name. `forget` is told of one that has lost its label: its series go."""
        with self._lock:
            self._fade()
            if name in self._labelled or len(self._labelled) < self._limit:
                self._labelled[name] = self._labelled.get(name, 0) + 1
                return name
            number = self._others.pop(name, 0)
            if not number and len(self._others) >= _TRACKED_PER_LABEL * self._limit:
                number = self._others.pop(min(self._others, key=self._others.__getitem__))
            number += 1
            idlest = min(self._labelled, key=self._labelled.__getitem__)
            if number <= 2 * self._labelled[idlest]:
                self._others[name] = number
                return OTHER
            self._others[idlest] = self._labelled.pop(idlest)
            self._labelled[name] = number
        forget(idlest)
        return name

    def _fade(self) -> None:
        self._num_seen += 1
        if self._num_seen % _FADE_EVERY == 0:
            for numbers in (self._labelled, self._others):
                for name in numbers:
                    numbers[name] /= 2


class _Watched(Collector):
    """Metrics that are made when somebody scrapes."""

    def __init__(self, metrics: Callable[[], Iterable[Metric]]) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        # Registering must not read: what is watched is not complete yet.
        return []

    def collect(self) -> Iterable[Metric]:
        return self._metrics()
