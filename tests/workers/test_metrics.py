"""What a worker counts, under which names, with how many labels, and what that costs."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from producer.contract import Failed, Finished, Usage
from producer.contract.latencies import LATENCY_BOUNDS, decode_counts, encode_counts, quantile
from producer.ledger import Ledger, calls
from producer.ledger.calls import Backlog
from tests.workers.conftest import MODEL, wait_for
from workers.backlog import BacklogReader
from workers.engine.messages import Refused
from workers.exporter import Exporter, PortTaken
from workers.gpu import Gpu, GpuReading, selected
from workers.metrics import MAX_TENANTS, OTHER, BusiestNames, Metrics, WeightedHistogram, WorkerState
from workers.recent import RecentLatencies
from workers.running import RunningRequest

NewBench = Callable[..., Any]


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """(name, label values without model and engine ...) → value, as a scrape sees them."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = [
                value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "engine")
            ]
            found[(sample.name, *labels)] = sample.value
    return found


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model=MODEL, engine="3", queue_name="glmq.chatglm-6b")


def running(
    tenant: str = "default", *, prompt_len: int = 10, num_tokens: int = 5, **fields: Any
) -> RunningRequest:
    """A request that is answered, half a second a token."""
    now = time.monotonic()
    request = RunningRequest("r", 1, None, 0.25, tenant=tenant, kind="chat", prompt_len=prompt_len, **fields)
    request.age_seconds = 0.25
    request.claimed = now - 4
    for number in range(num_tokens):
        request.add(65, "A", now - 2 + number / 2)
    return request


# --- counting ---------------------------------------------------------------------------------------------------------


def test_an_answer_counts_as_its_reader_sees_it(metrics: Metrics) -> None:
    metrics.on_claim(running())
    metrics.on_end(running(num_tokens=5), Finished(reason="stop", text="AAAAA"))

    seen = samples(metrics)
    assert seen["vllm:request_success_total", "stop"] == 1
    assert seen["vllm:request_success_total", "error"] == 0
    assert seen["glmq_requests_total", "chat", "stop", "default"] == 1
    assert seen["glmq_answer_tokens_total", "default"] == 5
    assert seen[("vllm:e2e_request_latency_seconds_sum",)] == pytest.approx(4.25, abs=0.1)
    assert seen[("vllm:request_queue_time_seconds_sum",)] == 0.25
    assert seen[("vllm:request_prefill_time_seconds_sum",)] == pytest.approx(2, abs=0.1)
    assert seen[("vllm:request_decode_time_seconds_sum",)] == pytest.approx(2)
    assert seen[("vllm:request_time_per_output_token_seconds_sum",)] == pytest.approx(0.5)


def test_a_failure_counts_by_its_code_and_has_no_latency(metrics: Metrics) -> None:
    metrics.on_end(running(), Failed(code="context_exceeded", message="too long"))

    seen = samples(metrics)
    assert seen["glmq_request_failures_total", "context_exceeded"] == 1
    assert seen["vllm:request_success_total", "error"] == 1
    assert seen[("vllm:e2e_request_latency_seconds_count",)] == 0


def test_what_can_be_alerted_on_is_there_before_it_happens(metrics: Metrics) -> None:
    """A counter that appears with its first event has no increase."""
    backlog = Backlog((0,) * 10, (0.0,) * 10, 0, 0, 0, 0, 1, 0, {"another": 2})
    metrics.watch_backlog(lambda: (backlog, 0))

    seen = samples(metrics)
    for key in (
        ("glmq_request_failures_total", "internal_error"),
        ("vllm:request_success_total", "error"),
        ("glmq_admission_rejected_total", "queue_full"),
        ("glmq_leases_lost_total",),
        ("glmq_fenced_writes_total",),
        ("glmq_engine_restarts_total",),
        ("glmq_takeovers_total",),
        ("vllm:num_preemptions_total",),
    ):
        assert seen[key] == 0
    assert seen["glmq_admission_rejected_total", "another"] == 2


def test_a_step_of_many_sequences_is_observed_once_for_all_that_ran_together(metrics: Metrics) -> None:
    now = time.monotonic()

    metrics.on_step(now, [], {now - 0.03: 200, now - 0.06: 3}, num_sequences=203)

    seen = samples(metrics)
    assert seen[("vllm:inter_token_latency_seconds_count",)] == 203
    assert seen["vllm:inter_token_latency_seconds_bucket", "0.05"] == 200
    assert seen["vllm:inter_token_latency_seconds_bucket", "0.075"] == 203
    assert seen[("vllm:inter_token_latency_seconds_sum",)] == pytest.approx(200 * 0.03 + 3 * 0.06)
    assert seen[("glmq_step_sequences_sum",)] == 203
    assert seen[("vllm:generation_tokens_total",)] == 203


def test_a_prefill_counts_its_prompt_and_its_first_token(metrics: Metrics) -> None:
    request = running(prompt_len=40, num_tokens=1)

    metrics.on_step(request.claimed + 1, [request], {}, num_sequences=1)

    seen = samples(metrics)
    assert seen[("vllm:prompt_tokens_total",)] == 40
    assert seen[("vllm:iteration_tokens_total_sum",)] == 41
    # 0.25 s in the queue, 1 s with the worker.
    assert seen[("vllm:time_to_first_token_seconds_sum",)] == pytest.approx(1.25)


def test_a_continuation_has_no_first_token_again_but_its_prefill(metrics: Metrics) -> None:
    request = running(prompt_len=40, num_tokens=8, num_emitted_before=7)
    request.attempt = 2

    metrics.on_claim(request)
    metrics.on_step(request.claimed + 1, [request], {}, num_sequences=1)
    metrics.on_end(request, Finished(reason="length", text=""))

    seen = samples(metrics)
    assert seen[("vllm:time_to_first_token_seconds_count",)] == 0
    assert seen[("vllm:iteration_tokens_total_sum",)] == 48
    assert seen[("glmq_takeovers_total",)] == 1
    assert seen["glmq_answer_tokens_total", "default"] == 1


def test_what_is_done_in_the_background_is_nobody_s_latency(metrics: Metrics) -> None:
    fold = running(num_tokens=1)
    fold.kind = "fold"

    metrics.on_step(time.monotonic(), [fold], {}, num_sequences=1)
    metrics.on_end(fold, Finished(reason="stop", text="A"))

    seen = samples(metrics)
    assert seen["glmq_requests_total", "fold", "stop", "default"] == 1
    assert seen[("vllm:time_to_first_token_seconds_count",)] == 0
    assert seen[("vllm:e2e_request_latency_seconds_count",)] == 0
    assert seen[("vllm:generation_tokens_total",)] == 1


def test_turns_that_a_prompt_lacked_are_counted_for_conversations_alone(metrics: Metrics) -> None:
    metrics.on_end(running(), Finished(reason="stop", text="A"))
    usage = Usage(summary_turns=2, recent_turns=3, left_out_turns=4)
    metrics.on_end(running(), Finished(reason="stop", text="A", usage=usage))

    seen = samples(metrics)
    assert seen[("glmq_left_out_turns_count",)] == 1
    assert seen[("glmq_left_out_turns_sum",)] == 4


def test_no_series_says_when_it_was_created(metrics: Metrics) -> None:
    metrics.on_end(running(), Finished(reason="stop", text="A"))

    assert not [key for key in samples(metrics) if key[0].endswith("_created")]


# --- as the worker's parts use it -------------------------------------------------------------------------------------


def test_a_publisher_tells_steps_flushes_and_ends(bench: Any) -> None:
    request_id = bench.submit("hello", tenant="clinic")
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "good", "stop")
    bench.ended(request_id)
    wait_for(lambda: bench.gone)

    seen = samples(bench.metrics)
    assert seen["glmq_requests_total", "chat", "stop", "clinic"] == 1
    assert seen[("vllm:prompt_tokens_total",)] == 5
    assert seen[("vllm:generation_tokens_total",)] == 4
    assert seen[("vllm:inter_token_latency_seconds_count",)] == 3
    assert seen[("vllm:time_to_first_token_seconds_count",)] == 1
    assert seen[("glmq_flush_tokens_sum",)] == 4
    assert seen[("glmq_flush_seconds_count",)] >= 1
    assert seen[("glmq_claims_total",)] == 1
    assert seen["celery_task_succeeded_total", bench.metrics._hostname, "glmq.next", ""] == 1


def test_a_refused_sequence_is_a_failure(bench: Any) -> None:
    request_id = bench.submit()
    bench.publisher.on_refused(Refused(bench.generation(request_id).sequence_id, "invalid_adapter", "broken"))
    bench.ended(request_id)
    wait_for(lambda: bench.gone)

    assert samples(bench.metrics)["glmq_request_failures_total", "invalid_adapter"] == 1


def test_a_write_that_another_attempt_has_fenced_is_counted(new_bench: NewBench) -> None:
    bench = new_bench()
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "mine")
    wait_for(lambda: "token" in bench.types(request_id))
    bench.ledger.run(calls.release(request_id, 1))
    bench.ledger.run(calls.claim(MODEL, "another", 60))

    bench.say(generation.sequence_id, "x")

    wait_for(lambda: samples(bench.metrics)[("glmq_fenced_writes_total",)] == 1)
    assert samples(bench.metrics)["vllm:request_success_total", "stop"] == 0


def test_a_plain_task_that_is_no_request_is_counted(bench: Any) -> None:
    bench.claims.take(bench.ticket("glmq.chat", task_id="t1", query=""))

    wait_for(lambda: samples(bench.metrics).get(("glmq_tasks_refused_total", "invalid_request")) == 1)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_more_tenants_than_labels_share_one(metrics: Metrics) -> None:
    for number in range(10 * MAX_TENANTS):
        metrics.on_end(running(f"tenant-{number}"), Finished(reason="stop", text="A"))

    tenants = {key[3]: value for key, value in samples(metrics).items() if key[0] == "glmq_requests_total"}
    assert len(tenants) == MAX_TENANTS + 1
    assert tenants[OTHER] == 9 * MAX_TENANTS
    assert sum(tenants.values()) == 10 * MAX_TENANTS


def test_a_tenant_that_becomes_busy_later_gets_the_label_of_an_idle_one(metrics: Metrics) -> None:
    for number in range(MAX_TENANTS):
        for _ in range(1 if number == 7 else 20):
            metrics.on_end(running(f"tenant-{number}"), Finished(reason="stop", text="A"))
    for _ in range(30):
        metrics.on_end(running("late"), Finished(reason="stop", text="A"))

    seen = samples(metrics)
    assert seen["glmq_requests_total", "chat", "stop", "late"] >= 25
    assert ("glmq_requests_total", "chat", "stop", "tenant-7") not in seen
    assert ("glmq_answer_tokens_total", "tenant-7") not in seen
    assert seen["glmq_requests_total", "chat", "stop", "tenant-8"] == 20


def test_a_flood_of_new_names_needs_no_memory_and_takes_no_label() -> None:
    names = BusiestNames(5)
    forgotten: list[str] = []
    for number in range(20_000):
        names.label(f"regular-{number % 5}", forget=forgotten.append)
        names.label(f"once-{number}", forget=forgotten.append)

    assert not [name for name in forgotten if name.startswith("regular")]
    assert names.label("regular-0", forget=forgotten.append) == "regular-0"
    assert names.label("once-again", forget=forgotten.append) == OTHER
    assert len(names._others) <= 51


# --- what is looked at when somebody scrapes ---------------------------------------------------------------------------


def test_a_scrape_shows_the_state_at_that_moment(metrics: Metrics) -> None:
    state = WorkerState(
        state="draining",
        slots=8,
        num_claimed=3,
        num_running=2,
        num_waiting=1,
        num_blocks=100,
        num_free_blocks=25,
        running_adapters=["law", "fitness"],
        info={"worker": "w", "device": "cuda"},
    )
    metrics.watch(lambda: state)

    seen = samples(metrics)
    assert seen["glmq_worker_state", "draining"] == 1
    assert seen["glmq_worker_state", "ready"] == 0
    assert seen[("vllm:kv_cache_usage_perc",)] == 0.75
    assert (seen[("vllm:num_requests_running",)], seen[("vllm:num_requests_waiting",)]) == (2, 1)
    assert any(key[:1] == ("vllm:lora_requests_info",) and "fitness,law" in key for key in seen)
    assert ("glmq_worker_info", "cuda", "w") in seen


def test_without_redis_a_scrape_says_so_and_nothing_of_the_queue(metrics: Metrics) -> None:
    metrics.watch_backlog(lambda: None)

    seen = samples(metrics)
    assert seen[("glmq_redis_up",)] == 0
    assert not [key for key in seen if key[0] in ("glmq_queue_length", "celery_queue_length")]


def test_the_backlog_is_read_once_a_second_however_many_scrape(ledger: Ledger) -> None:
    reader = BacklogReader(ledger, ledger.keys.namespace, MODEL)
    first = reader.read()
    assert first is not None
    assert first[1] == 0

    ledger.connection.lpush(f"{ledger.keys.namespace}:{ledger.keys.celery_queue(MODEL)}", "a ticket")
    assert reader.read() == first
    time.sleep(1.05)
    again = reader.read()
    assert again is not None
    assert again[1] == 1


def test_a_backlog_without_a_server_is_none_and_comes_quickly(settings: Any) -> None:
    ledger = Ledger.at("redis://127.0.0.1:1/0", settings.keys, timeout_seconds=0.5, retries=0)
    begin = time.monotonic()
    assert BacklogReader(ledger, "glmq", MODEL).read() is None
    assert time.monotonic() - begin < 2
    ledger.close()


# --- the GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda", "", "0"),
        ("cuda:2", "", "2"),
        ("auto", "3", "3"),
        ("cuda:1", "4,GPU-77", "GPU-77"),
        ("cuda:0", "MIG-1", "MIG-1"),
    ],
)
def test_the_card_is_the_one_that_the_engine_gets(device: str, visible: str, expected: str) -> None:
    assert selected(device, {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_a_card_that_does_not_answer_a_question_is_shown_without_it(metrics: Metrics) -> None:
    class Nvml:
        """Stands for a driver that knows memory alone; real cards are in tests/gpu."""

        NVML_TEMPERATURE_GPU = 0
        NVMLError = ValueError

        def __getattr__(self, name: str) -> Any:
            def ask(*_: Any) -> Any:
                if name == "nvmlDeviceGetName":
                    return "H100"
                if name == "nvmlDeviceGetMemoryInfo":
                    return type("Memory", (), {"used": 3, "total": 80})
                raise ValueError("not supported")

            return ask

    gpu = Gpu(Nvml(), handle=None)
    metrics.watch_gpu(gpu.read)

    assert gpu.read() == GpuReading("H100", memory_used_bytes=3, memory_total_bytes=80)
    seen = samples(metrics)
    assert seen["glmq_gpu_memory_used_bytes", "H100"] == 3
    assert ("glmq_gpu_power_watts", "H100") not in seen


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exporter(metrics: Metrics) -> Iterator[Exporter]:
    exporter = Exporter(
        metrics.registry, lambda: (True, "ready"), host="127.0.0.1", port=19750, num_ports=200
    )
    yield exporter
    exporter.stop()


def get(address: str, **headers: str) -> tuple[int, bytes, str]:
    request = urllib.request.Request(f"http://{address}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Type"]


def test_names_keep_their_colon_whatever_format_is_asked_for(exporter: Exporter) -> None:
    """prometheus_client writes vllm_ for vllm: when Prometheus asks for OpenMetrics as it does."""
    accept = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    status, body, kind = get(f"{exporter.address}/metrics", Accept=accept)

    assert status == 200
    assert kind.startswith("text/plain")
    assert b"\nvllm:generation_tokens_total{" in body


def test_other_paths_are_not_found(exporter: Exporter) -> None:
    assert get(f"{exporter.address}/secrets")[0] == 404


def test_health_is_503_while_there_is_no_engine(metrics: Metrics) -> None:
    exporter = Exporter(
        metrics.registry, lambda: (False, "loading"), host="127.0.0.1", port=19750, num_ports=200
    )
    try:
        status, body, _ = get(f"{exporter.address}/health")
        assert (status, json.loads(body)) == (503, {"state": "loading", "is_well": False})
    finally:
        exporter.stop()


def test_the_next_worker_of_a_machine_takes_the_next_port(metrics: Metrics, exporter: Exporter) -> None:
    port = exporter.port
    second = Exporter(metrics.registry, lambda: (True, "ready"), host="127.0.0.1", port=port, num_ports=200)
    try:
        assert second.port > port
    finally:
        second.stop()
    with pytest.raises(PortTaken):
        Exporter(metrics.registry, lambda: (True, "ready"), host="127.0.0.1", port=port)


# --- latencies of the last minute -------------------------------------------------------------------------------------


def test_recent_latencies_of_several_workers_give_one_quantile() -> None:
    one, other = RecentLatencies(), RecentLatencies()
    one.count(0.02, times=90)
    other.count(1.9, times=10)

    counts = decode_counts([encode_counts(one.counts()), encode_counts(other.counts()), "not:a count"])
    assert sum(counts.values()) == 100
    median, high = quantile(counts, 0.5), quantile(counts, 0.95)
    assert median is not None
    assert high is not None
    assert 0.015 <= median <= 0.02
    assert 1.5 <= high <= 2.0


def test_quantiles_of_nothing_are_none_and_of_too_much_are_the_last_bound() -> None:
    assert quantile({}, 0.5) is None
    recent = RecentLatencies()
    recent.count(1e9)
    assert recent.counts() == {LATENCY_BOUNDS[-1]: 1}


def test_latencies_are_forgotten_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("workers.recent.time.monotonic", lambda: now[0])
    recent = RecentLatencies()
    recent.count(0.1)
    now[0] += 40
    recent.count(0.2)
    assert sum(recent.counts().values()) == 2
    now[0] += 30
    assert recent.counts() == {0.2: 1}


# --- cost -------------------------------------------------------------------------------------------------------------


def cpu_seconds_of(call: Callable[[], object], times: int) -> float:
    begin = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - begin) / times


def test_a_step_costs_the_same_for_one_sequence_and_for_a_thousand(metrics: Metrics) -> None:
    """At 50 steps a second, a bound of 1 ms a step would be 5 % of a core; it is some 20 µs."""
    small = cpu_seconds_of(lambda: metrics.on_step(1.03, [], {1.0: 1}, num_sequences=1), 2000)
    large = cpu_seconds_of(lambda: metrics.on_step(1.03, [], {1.0: 1000}, num_sequences=1000), 2000)

    assert large < 0.001
    assert large < 3 * small + 50e-6


def test_a_full_page_is_rendered_within_half_a_second_of_cpu(metrics: Metrics) -> None:
    """It holds the interpreter, and tokens wait meanwhile."""
    for number in range(100):
        for reason in ("stop", "length", "cancelled"):
            metrics.on_end(running(f"tenant-{number}"), Finished(reason=reason, text="A"))  # type: ignore[arg-type]
    metrics.watch(lambda: WorkerState(num_blocks=1))

    assert cpu_seconds_of(lambda: generate_latest(metrics.registry), 5) < 0.5
    assert len(generate_latest(metrics.registry)) < 200_000


def test_a_weighted_histogram_is_what_single_observations_would_be() -> None:
    weighted = WeightedHistogram("h", "", (1, 2), {"l": "x"})
    weighted.observe(1, 3)
    weighted.observe(1.5, 1)
    weighted.observe(9, 2)

    (family,) = weighted.collect()
    assert [(sample.name, sample.labels.get("le"), sample.value) for sample in family.samples] == [
        ("h_bucket", "1.0", 3),
        ("h_bucket", "2.0", 4),
        ("h_bucket", "+Inf", 6),
        ("h_count", None, 6),
        ("h_sum", None, 22.5),
    ]
