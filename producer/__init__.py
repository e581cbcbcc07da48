"""Submit chat and summary requests to glmq, stream their answers. No torch here.

>>> from producer import Client
>>> with Client() as client:
...     for event in client.chat("新冠肺炎怎么预防").stream():
...         print(event)
"""

from producer.client import AsyncClient, AsyncSubmission, Client, Submission
from producer.contract import (
    ChatRequest,
    Event,
    Failed,
    Finished,
    GlmqError,
    IdempotencyConflict,
    InvalidRequest,
    InvalidSetting,
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
    UnknownRequest,
    Usage,
)
from producer.settings import Settings

__all__ = [
    "AsyncClient",
    "AsyncSubmission",
    "ChatRequest",
    "Client",
    "Event",
    "Failed",
    "Finished",
    "GlmqError",
    "IdempotencyConflict",
    "InvalidRequest",
    "InvalidSetting",
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
    "UnknownRequest",
    "Usage",
]
