"""Submit chat and summary requests to glmq, stream their answers. No torch here.

The clients are imported when they are first asked for: who needs the contract alone does not wait for Celery.

>>> from producer import Client
>>> with Client() as client:
...     for event in client.chat("新冠肺炎怎么预防").stream():
...         print(event)
"""

from typing import TYPE_CHECKING, Any

from producer.contract import (
    ChatRequest,
    ConversationBusy,
    Event,
    Failed,
    Finished,
    GlmqError,
    IdempotencyConflict,
    InvalidRequest,
    InvalidSetting,
    Progress,
    RedisUnavailable,
    RequestCancelled,
    RequestFailed,
    SamplingParams,
    Started,
    StreamGone,
    SummaryRequest,
    Timings,
    Token,
    Turn,
    UnknownConversation,
    UnknownRequest,
    Usage,
)
from producer.settings import Settings

if TYPE_CHECKING:
    from producer.client import AsyncClient, AsyncSubmission, Client, Submission

__all__ = [
    "AsyncClient",
    "AsyncSubmission",
    "ChatRequest",
    "Client",
    "ConversationBusy",
    "Event",
    "Failed",
    "Finished",
    "GlmqError",
    "IdempotencyConflict",
    "InvalidRequest",
    "InvalidSetting",
    "Progress",
    "RedisUnavailable",
    "RequestCancelled",
    "RequestFailed",
    "SamplingParams",
    "Settings",
    "Started",
    "StreamGone",
    "Submission",
    "SummaryRequest",
    "Timings",
    "Token",
    "Turn",
    "UnknownConversation",
    "UnknownRequest",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "AsyncSubmission", "Client", "Submission"):
        from producer import client  # noqa: PLC0415

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
