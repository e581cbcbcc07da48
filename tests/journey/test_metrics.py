"""A real Prometheus scrapes a worker that works: every expression of every dashboard and alert gives data, and the figures are right."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery

from producer.celery_settings import celery_settings
from producer.client import Client
from producer.contract import Finished, IdempotencyConflict, RequestFailed, SamplingParams, Token
from producer.settings import Settings
from tests.journey.conftest import WorkerProcess
from tests.lora_adapter import write_adapter
from workers.models.config import ModelConfig

pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]

OPS = Path(__file__).parents[2] / "ops"
NO_GPU_HERE = re.compile("glmq_gpu_")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Done:
    """What was asked of the worker, and what it answered."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens: int = 0

    def add(self, finished: Finished, tenant: str = "default") -> None:
        self.outcomes[finished.reason] += 1
        self.tenants[tenant] += 1
        self.prompt_tokens += finished.usage.prompt_tokens
        self.tokens += finished.usage.completion_tokens


@dataclass
class Watched:
    """A worker, what it did, and the Prometheus that watches it."""

    worker: WorkerProcess
    metrics: str
    prometheus: str
    done: Done

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series that the expression has now."""
        try:
            result = self.ask("query", query=expression)["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from error
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        ((_, value),) = self.query(expression)
        return value


@pytest.fixture(scope="module")
def watched(
    redis_url: str,
    tiny_checkpoint: Path,
    prometheus_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    settings = Settings(redis_url=redis_url, namespace=f"watched-{uuid.uuid4().hex[:8]}", state_dir=folder)
    config = ModelConfig.from_folder(tiny_checkpoint)
    shapes = {
        f"transformer.layers.{index}.attention.query_key_value": (3 * config.hidden_size, config.hidden_size)
        for index in range(config.num_layers)
    }
    adapter = write_adapter(folder / "law", shapes)
    port, prometheus_port = free_port(), free_port()
    worker = WorkerProcess(
        settings,
        tiny_checkpoint,
        folder / "worker.log",
        ("--slots", "4", "--adapter", f"law={adapter}", "--metrics-port", str(port)),
    )
    prometheus = start_prometheus(prometheus_folder, folder, prometheus_port, port)
    try:
        worker.wait_for_log("ready: ")
        done = work(settings)
        worker.wait_for_log('"kind":"fold"')
        result = Watched(worker, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{prometheus_port}", done)
        wait_for_scrapes(result, since=time.time(), number=4)
        yield result
        assert prometheus.poll() is None
        assert worker.end() == 0, worker.log
    finally:
        for process in (prometheus, worker.process):
            process.kill()
            process.wait()


def start_prometheus(binaries: Path, folder: Path, port: int, worker_port: int) -> subprocess.Popen[bytes]:
    """With the configuration of the repository, but every second, and this worker as target."""
    config = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    (folder / "targets").mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_bytes((OPS / "prometheus" / "alerts.yml").read_bytes())
    targets = [{"targets": [f"127.0.0.1:{worker_port}"]}]
    (folder / "targets" / "workers.yml").write_text(yaml.safe_dump(targets))
    with (folder / "prometheus.log").open("wb") as log:
        return subprocess.Popen(
            [
                binaries / "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )


def work(settings: Settings) -> Done:
    """Something of everything that a dashboard shows."""
    done = Done()
    sampling = SamplingParams(seed=1, max_new_tokens=20, min_new_tokens=20)
    with Client(settings) as client:
        # With a pause, so that Prometheus sees figures before and after.
        for _ in range(2):
            chats = [(tenant, client.chat("你好", tenant=tenant, sampling=sampling)) for tenant in "aab"]
            for tenant, chat in chats:
                done.add(chat.result(60), tenant)
            time.sleep(2.5)
        done.add(client.chat("你好", adapter="law", sampling=sampling).result(60))
        done.add(client.summarize("一段文字。" * 5, sampling=sampling).result(60))
        # The long one is folded, in the background.
        for query in ("first", "second", "一段文字。" * 150):
            done.add(client.chat(query, conversation_id="talk", sampling=sampling).result(60))
        cancel_one(client, done)
        with pytest.raises(RequestFailed):
            client.chat("hello", adapter="unheard-of").result(60)
        done.outcomes["failed"] += 1
        done.tenants["default"] += 1
        client.chat("hello", idempotency_key="k", sampling=sampling).result(60)
        done.add(client.chat("hello", idempotency_key="k", sampling=sampling).result(60))
        with pytest.raises(IdempotencyConflict):
            client.chat("something else", idempotency_key="k")
        refuse_one_task(settings)
        time.sleep(2.5)
    return done


def cancel_one(client: Client, done: Done) -> None:
    chat = client.chat("hello", sampling=SamplingParams(seed=1, max_new_tokens=3000, min_new_tokens=3000))
    stream = chat.stream()
    next(event for event in stream if isinstance(event, Token))
    chat.cancel()
    *_, finished = stream
    assert isinstance(finished, Finished)
    done.add(finished)


def refuse_one_task(settings: Settings) -> None:
    """A service that speaks only Celery sends something that is no request."""
    app = Celery("service", set_as_current=False)
    app.conf.update(celery_settings(settings.redis_url or "", settings.namespace))
    task_id = uuid.uuid4().hex
    app.send_task(
        "glmq.chat", kwargs={"query": ""}, task_id=task_id, queue=settings.keys.celery_queue(settings.model)
    )
    app.close()
    with Client(settings) as client:
        deadline = time.monotonic() + 30
        while client.ledger.connection.exists(settings.keys.request(task_id)) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def wait_for_scrapes(watched: Watched, *, since: float, number: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            values = watched.ask("query", query="up{job='glmq'}[60s]")["result"]
            if values and sum(float(at) > since and up == "1" for at, up in values[0]["values"]) >= number:
                return
        except (OSError, urllib.error.URLError):
            pass
        assert time.monotonic() < deadline, "Prometheus does not scrape the worker"
        time.sleep(0.2)


def always(expression: str) -> str:
    """The expression with comparisons that tell 0 or 1 instead of dropping what is not so, because most alerts are silent."""
    parts = re.split(r'(\{[^}]*\}|"[^"]*")', expression)
    return "".join(
        part if index % 2 else re.sub(r"(==|!=|>=|<=|>|<)", r"\1 bool", part)
        for index, part in enumerate(parts)
    )


def test_every_expression_of_every_dashboard_gives_data(watched: Watched) -> None:
    empty, not_numbers = [], []
    paths = sorted((OPS / "grafana" / "dashboards").glob("*.json"))
    for path in paths:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "2m")
                expression = re.sub(r"\$(model|instance)\b", ".*", expression)
                # A server without a limit has none to show.
                shown = always(expression)
                values = watched.query(shown)
                if NO_GPU_HERE.search(expression):
                    assert values == []
                elif not values:
                    empty.append((path.name, panel["title"], expression))
                elif not any(math.isfinite(value) for _, value in values):
                    not_numbers.append((path.name, panel["title"], expression))
    assert paths
    assert empty == []
    assert not_numbers == []


def test_every_alert_is_evaluated_on_data_and_none_fires(watched: Watched) -> None:
    rules = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] == "err"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []

    without_data = [
        rule["name"]
        for rule in rules
        if not NO_GPU_HERE.search(rule["query"]) and not watched.query(always(rule["query"]))
    ]
    assert without_data == []


def test_the_figures_are_what_was_done(watched: Watched) -> None:
    done = watched.done

    outcomes = {
        labels["outcome"]: value
        for labels, value in watched.query('sum by (outcome) (glmq_requests_total{kind!="fold"})')
    }
    tenants = {
        labels["tenant"]: value
        for labels, value in watched.query('sum by (tenant) (glmq_requests_total{kind!="fold"})')
    }
    assert outcomes == dict(done.outcomes)
    assert tenants == dict(done.tenants)
    assert watched.value("vllm:prompt_tokens_total") >= done.prompt_tokens
    answer_tokens = watched.value("sum(glmq_answer_tokens_total)")
    assert answer_tokens >= done.tokens
    # The engine makes some more between a cancellation and hearing of it.
    assert answer_tokens <= watched.value("vllm:generation_tokens_total") < answer_tokens + 200
    assert watched.value("sum(celery_task_revoked_total)") == done.outcomes["cancelled"]
    assert watched.value('sum(celery_task_failed_total{exception="unknown_adapter"})') == 1
    assert watched.value('glmq_request_failures_total{code="unknown_adapter"}') == 1
    assert watched.value('glmq_adapter_requests_total{adapter="law"}') == 1
    assert watched.value('glmq_admission_rejected_total{reason="idempotency_conflict"}') == 1
    assert watched.value('glmq_tasks_refused_total{reason="invalid_request"}') == 1
    # The first request of a conversation has no turns before it.
    assert watched.value("glmq_left_out_turns_count") == 2
    first_tokens = watched.value("vllm:time_to_first_token_seconds_count")
    assert first_tokens == sum(done.outcomes[reason] for reason in ("stop", "length", "cancelled"))
    # Every token but the first of an answer has one before it.
    between = watched.value("vllm:inter_token_latency_seconds_count")
    assert abs(between - (watched.value("vllm:generation_tokens_total") - first_tokens)) < 200


def test_an_idle_worker_shows_that_it_is_idle(watched: Watched) -> None:
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "glmq_requests_claimed",
        "glmq_unpublished_tokens",
        "sum(glmq_queue_length)",
        "glmq_leases_overdue",
        "glmq_engine_stuck",
    ):
        assert watched.value(name) == 0, name
    assert watched.value("glmq_slots") == 4
    assert watched.value('glmq_worker_state{state="ready"}') == 1
    assert watched.value("glmq_redis_up") == 1
    assert watched.value("glmq_adapters_loaded") == 1


def test_health_is_for_whoever_restarts_containers(watched: Watched) -> None:
    with urllib.request.urlopen(f"{watched.metrics}/health", timeout=10) as answer:
        assert (answer.status, json.load(answer)) == (200, {"state": "ready", "is_well": True})


def test_a_scrape_is_small_and_quick(watched: Watched) -> None:
    """Prometheus waits 4 s, and the worker publishes tokens meanwhile."""
    sizes, begin = [], time.perf_counter()
    for _ in range(10):
        with urllib.request.urlopen(f"{watched.metrics}/metrics", timeout=10) as answer:
            sizes.append(len(answer.read()))
    assert (time.perf_counter() - begin) / 10 < 1
    assert max(sizes) < 200_000


def test_a_port_that_is_taken_stops_the_start_and_says_what_to_do(
    new_worker: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        worker = new_worker(ready=False, checkpoint=tiny_checkpoint, GLMQ_METRICS_PORT=str(port))
        assert worker.process.wait(60) == 1
    assert "cannot start: GLMQ_METRICS_PORT: " in worker.log
    assert "GLMQ_WORKER_INDEX" in worker.log
    assert "Traceback" not in worker.log
