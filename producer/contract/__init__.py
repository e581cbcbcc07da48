"""The vocabulary that producers and workers share: requests, events, errors, keys.

Pure: pydantic and the standard library, no I/O. It imports nothing else of this project.
"""

from producer.contract.errors import (
    ConversationBusy,
    GlmqError,
    IdempotencyConflict,
    InvalidRequest,
    InvalidSetting,
    RedisUnavailable,
    RequestCancelled,
    RequestFailed,
    StreamGone,
    UnknownConversation,
    UnknownRequest,
)
from producer.contract.events import (
    Event,
    Failed,
    Finished,
    Progress,
    Started,
    Timings,
    Token,
    Usage,
    decode_event,
    encode_event,
)
from producer.contract.requests import (
    ChatRequest,
    FoldRequest,
    Request,
    SamplingParams,
    SummaryRequest,
    Turn,
    decode_request,
    encode_request,
)

__all__ = [
    "ChatRequest",
    "ConversationBusy",
    "Event",
    "Failed",
    "Finished",
    "FoldRequest",
    "GlmqError",
    "IdempotencyConflict",
    "InvalidRequest",
    "InvalidSetting",
    "Progress",
    "RedisUnavailable",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "SamplingParams",
    "Started",
    "StreamGone",
    "SummaryRequest",
    "Timings",
    "Token",
    "Turn",
    "UnknownConversation",
    "UnknownRequest",
    "Usage",
    "decode_event",
    "decode_request",
    "encode_event",
    "encode_request",
]
