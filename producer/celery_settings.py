"""The Celery settings that producers and workers must share, in one place: how tickets travel.

The values were exercised against Celery 5.7 on Redis. Knows nothing about tasks or pools.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from producer.ledger.sentinel import SCHEMES, SentinelURL

TICKET_TASK: Final = "glmq.next"
"""The task of a ticket: there is work for this model. It has no arguments; the work is in the ledger."""
CHAT_TASK: Final = "glmq.chat"
SUMMARIZE_TASK: Final = "glmq.summarize"


def broker_key_prefix(namespace: str) -> str:
    """What Celery's own Redis keys begin with. A service that speaks only Celery must set the same prefix:
    `broker_transport_options={"global_keyprefix": "glmq:"}`."""
    return f"{namespace}:"


def celery_settings(redis_url: str, namespace: str) -> dict[str, Any]:
    """The configuration of a Celery app that sends or takes tickets of this deployment."""
    broker_url, own_options, transport_options = _broker(redis_url)
    return {
        **own_options,
        "broker_url": broker_url,
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_serializer": "json",
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        # Never late: on 5.7 a lost connection with late-acked work in flight ends the worker. The ledger's leases are what recovers.
        "task_acks_late": False,
        # So there are none to cancel. Celery 6 will have this as its default, and warns until then.
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        "task_create_missing_queues": True,
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        "worker_send_task_events": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A server whose disk is full answers a BRPOP with an error; without this the worker would end instead of trying again.
        "broker_channel_error_retry": True,
        "broker_transport_options": {
            "global_keyprefix": broker_key_prefix(namespace),
            "visibility_timeout": 30,
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 10,
            "socket_keepalive": True,
            "socket_connect_timeout": 5,
            "socket_timeout": 30,
            "health_check_interval": 10,
            **transport_options,
        },
    }


def _broker(redis_url: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The URL as Celery wants it, settings for it, and options of its transport."""
    if redis_url.startswith(SCHEMES):
        sentinel = SentinelURL.parse(redis_url)
        tls = {"broker_use_ssl": _for_celery(sentinel.ssl)} if sentinel.is_tls else {}
        return sentinel.broker_url, tls, sentinel.broker_options
    if redis_url.startswith("rediss://"):
        url, _, query = redis_url.partition("?")
        pairs = parse_qsl(query)
        # Celery speaks TLS only if it is told how.
        tls = {
            "broker_use_ssl": _for_celery({name: value for name, value in pairs if name.startswith("ssl_")})
        }
        rest = urlencode([(name, value) for name, value in pairs if not name.startswith("ssl_")])
        return f"{url}?{rest}" if rest else url, tls, {}
    return redis_url, {}, {}


def _for_celery(options: dict[str, Any]) -> dict[str, Any]:
    """redis-py's TLS options. Certificates are checked unless somebody said otherwise."""
    options = {"ssl_cert_reqs": "required", **options}
    if isinstance(checks := options.get("ssl_check_hostname"), str):
        options["ssl_check_hostname"] = checks.lower() not in ("false", "0", "no")
    return options
