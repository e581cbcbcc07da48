"""The dashboards as code: `python ops/grafana/dashboards.py` writes dashboards/users.json and dashboards/fleet.json.

Grafana reads the JSON files (provisioning/), which are committed; a test holds them against this file. What a whole deployment has (its queue,
Redis) is told by each worker alike, so such panels take the maximum over the workers; what a worker does is summed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
MODEL = 'model_name=~"$model"'
WORKER = 'model_name=~"$model",instance=~"$instance"'
RATE = "$__rate_interval"
WIDTH = 24


@dataclass(frozen=True)
class Panel:
    """One picture: (expression, legend) pairs, the unit of its axis, and what it means to whoever looks."""

    title: str
    targets: list[tuple[str, str]]
    unit: str = "short"
    text: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    thresholds: tuple[float, float] | None = None
    """Yellow from, red from."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: list[Panel]


def quantiles(metric: str, by: str = "le", labels: str = MODEL) -> list[tuple[str, str]]:
    """Median, 95th and 99th percentile of a histogram."""
    return [
        (f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{{labels}}}[{RATE}])))", name)
        for share, name in ((0.5, "median"), (0.95, "p95"), (0.99, "p99"))
    ]


def of_queue(metric: str) -> str:
    """A figure of a model's queue, by priority, that every worker of the model tells alike."""
    return f"max by (model_name, priority) ({metric}{{{MODEL}}})"


def of_deployment(metric: str) -> str:
    """A figure that every worker of a deployment tells alike."""
    return f"max by (namespace) ({metric})"


def rate(metric: str, by: str, labels: str = MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{RATE}]))"


QUEUED = f"sum({of_queue('glmq_queue_length')})"
OLDEST = f"max({of_queue('glmq_queue_oldest_seconds')})"

USERS = [
    Row(
        "Now",
        [
            Panel(
                "Requests per second",
                [(f"sum(rate(vllm:request_success_total{{{MODEL}}}[{RATE}]))", "")],
                "reqps",
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                "First token, p95",
                quantiles("vllm:time_to_first_token_seconds")[1:2],
                "s",
                kind="stat",
                width=4,
                height=4,
                thresholds=(2, 10),
            ),
            Panel(
                "Between tokens, p95",
                quantiles("vllm:inter_token_latency_seconds")[1:2],
                "s",
                kind="stat",
                width=4,
                height=4,
                thresholds=(0.2, 0.5),
            ),
            Panel("Waiting", [(QUEUED, "")], kind="stat", width=4, height=4, thresholds=(50, 200)),
            Panel("Longest wait", [(OLDEST, "")], "s", kind="stat", width=4, height=4, thresholds=(10, 60)),
            Panel(
                "Failed",
                [
                    (
                        f'sum(rate(vllm:request_success_total{{{MODEL},finished_reason="error"}}[{RATE}])) / sum(rate(vllm:request_success_total{{{MODEL}}}[{RATE}]))',
                        "",
                    )
                ],
                "percentunit",
                kind="stat",
                width=4,
                height=4,
                thresholds=(0.01, 0.05),
            ),
        ],
    ),
    Row(
        "Requests",
        [
            Panel(
                "Requests by how they end",
                [(rate("glmq_requests_total", "outcome"), "{{outcome}}")],
                "reqps",
                "stop and length are answers; cancelled was the user's wish.",
                stacked=True,
            ),
            Panel(
                "Requests by kind",
                [(rate("glmq_requests_total", "kind"), "{{kind}}")],
                "reqps",
                "fold is the summary of a conversation's older turns, made in the background.",
                stacked=True,
            ),
            Panel(
                "Tokens per second",
                [
                    (f"sum(rate(vllm:generation_tokens_total{{{MODEL}}}[{RATE}]))", "answers"),
                    (f"sum(rate(vllm:prompt_tokens_total{{{MODEL}}}[{RATE}]))", "prompts"),
                ],
                "short",
            ),
        ],
    ),
    Row(
        "Waiting",
        [
            Panel(
                "Requests in the queue, by priority",
                [(f"sum by (priority) ({of_queue('glmq_queue_length')})", "priority {{priority}}")],
                text="0 is the most urgent.",
                stacked=True,
            ),
            Panel(
                "Longest wait, by priority",
                [(f"max by (priority) ({of_queue('glmq_queue_oldest_seconds')})", "priority {{priority}}")],
                "s",
            ),
            Panel(
                "Time in the queue",
                quantiles("vllm:request_queue_time_seconds"),
                "s",
                "From submit to the first claim.",
            ),
        ],
    ),
    Row(
        "Speed",
        [
            Panel(
                "First token",
                quantiles("vllm:time_to_first_token_seconds"),
                "s",
                "From submit, waiting included.",
            ),
            Panel("Between tokens", quantiles("vllm:inter_token_latency_seconds"), "s"),
            Panel(
                "Whole request", quantiles("vllm:e2e_request_latency_seconds"), "s", "From submit to the end."
            ),
        ],
    ),
    Row(
        "Errors",
        [
            Panel(
                "Failures by code",
                [(rate("glmq_request_failures_total", "code"), "{{code}}")],
                "reqps",
                "internal_error and deadline_exceeded are the operator's; the others say what the caller did.",
                stacked=True,
            ),
            Panel(
                "Refused at the door, or expired in the queue",
                [
                    (
                        f"sum by (reason) (max by (model_name, reason) (rate(glmq_admission_rejected_total{{{MODEL}}}[{RATE}])))",
                        "{{reason}}",
                    )
                ],
                "reqps",
                stacked=True,
            ),
            Panel(
                "Plain Celery tasks that were no requests",
                [(rate("glmq_tasks_refused_total", "reason"), "{{reason}}")],
                "reqps",
            ),
        ],
    ),
    Row(
        "Who and what",
        [
            Panel(
                "Answer tokens per second, by tenant",
                [(rate("glmq_answer_tokens_total", "tenant"), "{{tenant}}")],
                text="The busiest tenants; all others together are `other`.",
                stacked=True,
            ),
            Panel(
                "Tokens of a request",
                [
                    *quantiles("vllm:request_prompt_tokens")[:2],
                    *quantiles("vllm:request_generation_tokens")[:2],
                ],
                text="Prompt (first two) and answer (last two).",
            ),
            Panel(
                "Requests by adapter",
                [(rate("glmq_adapter_requests_total", "adapter"), "{{adapter}}")],
                "reqps",
            ),
        ],
    ),
    Row(
        "Conversations",
        [
            Panel("Conversations that are kept", [(of_deployment("glmq_conversations"), "{{namespace}}")]),
            Panel(
                "Turns that a prompt lacked, p90",
                [
                    (
                        f"histogram_quantile(0.9, sum by (le) (rate(glmq_left_out_turns_bucket{{{MODEL}}}[{RATE}])))",
                        "turns",
                    )
                ],
                text="They are in the archive, and not yet in the summary: folding lags.",
            ),
            Panel(
                "Summaries made",
                [
                    (
                        f'sum by (outcome) (rate(glmq_requests_total{{{MODEL},kind="fold"}}[{RATE}]))',
                        "{{outcome}}",
                    )
                ],
                "reqps",
            ),
        ],
    ),
]

FLEET = [
    Row(
        "Now",
        [
            Panel(
                "Workers ready",
                [(f'sum(glmq_worker_state{{{WORKER},state="ready"}})', "")],
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                "Tokens per second",
                [(f"sum(rate(vllm:generation_tokens_total{{{WORKER}}}[{RATE}]))", "")],
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                "Slots in use",
                [(f"sum(glmq_requests_claimed{{{WORKER}}}) / sum(glmq_slots{{{WORKER}}})", "")],
                "percentunit",
                kind="stat",
                width=4,
                height=4,
            ),
            Panel("Waiting", [(QUEUED, "")], kind="stat", width=4, height=4, thresholds=(50, 200)),
            Panel(
                "Engine restarts, 24 h",
                [(f"sum(increase(glmq_engine_restarts_total{{{WORKER}}}[24h]))", "")],
                kind="stat",
                width=4,
                height=4,
                thresholds=(1, 3),
            ),
            Panel(
                "Dead letters",
                [(f"max({of_deployment('glmq_dead_letters')})", "")],
                kind="stat",
                width=4,
                height=4,
                thresholds=(1, 10),
            ),
        ],
    ),
    Row(
        "Throughput",
        [
            Panel(
                "Answer tokens per second",
                [(rate("vllm:generation_tokens_total", "instance", WORKER), "{{instance}}")],
                stacked=True,
            ),
            Panel(
                "Prompt tokens per second",
                [(rate("vllm:prompt_tokens_total", "instance", WORKER), "{{instance}}")],
                stacked=True,
            ),
            Panel(
                "Requests per second",
                [(rate("vllm:request_success_total", "instance", WORKER), "{{instance}}")],
                "reqps",
                stacked=True,
            ),
        ],
    ),
    Row(
        "Engine",
        [
            Panel(
                "Batch (mean sequences of a step)",
                [
                    (
                        f"sum by (instance) (rate(glmq_step_sequences_sum{{{WORKER}}}[{RATE}])) / sum by (instance) (rate(glmq_step_sequences_count{{{WORKER}}}[{RATE}]))",
                        "{{instance}}",
                    )
                ],
            ),
            Panel(
                "Sequences",
                [
                    (f"vllm:num_requests_running{{{WORKER}}}", "{{instance}} running"),
                    (f"vllm:num_requests_waiting{{{WORKER}}}", "{{instance}} waiting"),
                ],
            ),
            Panel(
                "KV cache in use",
                [(f"vllm:kv_cache_usage_perc{{{WORKER}}}", "{{instance}}")],
                "percentunit",
                maximum=1,
                thresholds=(0.9, 0.98),
            ),
            Panel(
                "Preemptions per second",
                [(rate("vllm:num_preemptions_total", "instance", WORKER), "{{instance}}")],
                text="Sequences that lost their place in the KV cache and are computed again.",
            ),
            Panel(
                "Between tokens, p95",
                [
                    (
                        f"histogram_quantile(0.95, sum by (instance, le) (rate(vllm:inter_token_latency_seconds_bucket{{{WORKER}}}[{RATE}])))",
                        "{{instance}}",
                    )
                ],
                "s",
            ),
            Panel(
                "Prefill, p95",
                [
                    (
                        f"histogram_quantile(0.95, sum by (instance, le) (rate(vllm:request_prefill_time_seconds_bucket{{{WORKER}}}[{RATE}])))",
                        "{{instance}}",
                    )
                ],
                "s",
                "From the claim to the first token.",
            ),
        ],
    ),
    Row(
        "State",
        [
            Panel(
                "State",
                [
                    (
                        f"max by (instance, state) (glmq_worker_state{{{WORKER}}}) == 1",
                        "{{instance}} {{state}}",
                    )
                ],
                text="loading, ready or draining; two at a time for one worker cannot be.",
            ),
            Panel(
                "Engine restarts",
                [
                    (
                        f"sum by (instance) (increase(glmq_engine_restarts_total{{{WORKER}}}[1h]))",
                        "{{instance}}",
                    )
                ],
                text="In the last hour.",
            ),
            Panel(
                "Slots",
                [
                    (f"glmq_requests_claimed{{{WORKER}}}", "{{instance}} in use"),
                    (f"glmq_slots{{{WORKER}}}", "{{instance}} slots"),
                ],
            ),
        ],
    ),
    Row(
        "Leases and takeovers",
        [
            Panel(
                "Takeovers, releases, reaped and lost leases per minute",
                [
                    (f"60 * sum(rate({metric}{{{WORKER}}}[{RATE}]))", name)
                    for metric, name in (
                        ("glmq_takeovers_total", "takeovers"),
                        ("glmq_requests_released_total", "released"),
                        ("glmq_leases_reaped_total", "reaped"),
                        ("glmq_leases_lost_total", "lost"),
                        ("glmq_fenced_writes_total", "fenced writes"),
                    )
                ],
            ),
            Panel(
                "Since the leases were renewed",
                [(f"glmq_renewal_age_seconds{{{WORKER}}}", "{{instance}}")],
                "s",
            ),
            Panel(
                "Overdue leases and dead letters",
                [
                    (of_deployment("glmq_leases_overdue"), "overdue"),
                    (of_deployment("glmq_dead_letters"), "dead"),
                ],
            ),
        ],
    ),
    Row(
        "Publishing and Redis",
        [
            Panel(
                "One flush of new tokens, p99",
                [
                    (
                        f"histogram_quantile(0.99, sum by (instance, le) (rate(glmq_flush_seconds_bucket{{{WORKER}}}[{RATE}])))",
                        "{{instance}}",
                    )
                ],
                "s",
            ),
            Panel(
                "Tokens that Redis does not have yet",
                [(f"glmq_unpublished_tokens{{{WORKER}}}", "{{instance}}")],
            ),
            Panel(
                "Memory of Redis",
                [
                    (of_deployment("glmq_redis_memory_used_bytes"), "used"),
                    (f"{of_deployment('glmq_redis_memory_max_bytes')} > 0", "allowed"),
                ],
                "bytes",
            ),
            Panel("Redis answers", [(f"glmq_redis_up{{{WORKER}}}", "{{instance}}")], maximum=1),
            Panel(
                "Tickets in the Celery queue",
                [('max by (queue_name) (celery_queue_length{instance=~"$instance"})', "{{queue_name}}")],
            ),
            Panel(
                "Tickets taken, requests begun, answered",
                [
                    (f'sum(rate({metric}{{instance=~"$instance"}}[{RATE}]))', name)
                    for metric, name in (
                        ("celery_task_received_total", "tickets"),
                        ("celery_task_started_total", "begun"),
                        ("celery_task_succeeded_total", "answered"),
                    )
                ],
                "reqps",
            ),
        ],
    ),
    Row(
        "GPU",
        [
            Panel(
                "Memory",
                [
                    (f"glmq_gpu_memory_used_bytes{{{WORKER}}}", "{{instance}} {{gpu}}"),
                    (f"glmq_gpu_memory_total_bytes{{{WORKER}}}", "{{instance}} all"),
                ],
                "bytes",
                width=6,
            ),
            Panel(
                "Utilization",
                [(f"glmq_gpu_utilization_ratio{{{WORKER}}}", "{{instance}}")],
                "percentunit",
                "Share of the time in which a kernel ran.",
                width=6,
                maximum=1,
            ),
            Panel(
                "Temperature",
                [(f"glmq_gpu_temperature_celsius{{{WORKER}}}", "{{instance}}")],
                "celsius",
                width=6,
                thresholds=(80, 88),
            ),
            Panel("Power", [(f"glmq_gpu_power_watts{{{WORKER}}}", "{{instance}}")], "watt", width=6),
        ],
    ),
    Row(
        "Processes",
        [
            Panel(
                "CPU",
                [
                    (
                        'rate(process_cpu_seconds_total{job="glmq",instance=~"$instance"}[' + RATE + "])",
                        "{{instance}} worker",
                    ),
                    (
                        'rate(glmq_engine_process_cpu_seconds_total{instance=~"$instance"}[' + RATE + "])",
                        "{{instance}} engine",
                    ),
                ],
                "percentunit",
                "1 is one core.",
            ),
            Panel(
                "Memory",
                [
                    (
                        'process_resident_memory_bytes{job="glmq",instance=~"$instance"}',
                        "{{instance}} worker",
                    ),
                    (
                        'glmq_engine_process_resident_memory_bytes{instance=~"$instance"}',
                        "{{instance}} engine",
                    ),
                ],
                "bytes",
            ),
            Panel(
                "Adapters in memory, and how long the model took to load",
                [
                    (f"glmq_adapters_loaded{{{WORKER}}}", "{{instance}} adapters"),
                    (f"glmq_engine_load_seconds{{{WORKER}}}", "{{instance}} seconds"),
                ],
            ),
        ],
    ),
]


def dashboard(uid: str, title: str, rows: list[Row], variables: list[dict[str, Any]]) -> dict[str, Any]:
    """Grafana's JSON: rows below each other, panels from left to right."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + panel.height
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            panels.append(_panel(len(panels) + 1, panel, place))
            x += panel.width
        y += row.panels[-1].height
    return {
        "uid": uid,
        "title": title,
        "tags": ["glmq"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables},
        "links": [{"type": "dashboards", "tags": ["glmq"], "title": "glmq", "asDropdown": False}],
        "panels": panels,
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.thresholds is not None:
        steps += [
            {"color": "yellow", "value": panel.thresholds[0]},
            {"color": "red", "value": panel.thresholds[1]},
        ]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": {
            "fillOpacity": 20 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        },
    }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if panel.kind == "stat":
        defaults.pop("custom")
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (expression, legend) in enumerate(panel.targets)
        ],
    }


def variable(name: str, query: str) -> dict[str, Any]:
    """A choice of label values, all of them at first."""
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboards() -> dict[str, dict[str, Any]]:
    """By file name."""
    model = variable("model", "label_values(glmq_slots, model_name)")
    instance = variable("instance", 'label_values(glmq_slots{model_name=~"$model"}, instance)')
    return {
        "users.json": dashboard("glmq-users", "glmq: users", USERS, [model]),
        "fleet.json": dashboard("glmq-fleet", "glmq: fleet", FLEET, [model, instance]),
    }


def as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, content in dashboards().items():
        (FOLDER / name).write_text(as_text(content), encoding="utf-8")
