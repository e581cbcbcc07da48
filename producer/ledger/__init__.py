"""The state of every request, in Redis. The only code that changes it.

Each transition is one Lua script (`*.lua`), each script one function in `calls`; `Ledger` and `AsyncLedger` run them:
`ledger.run(calls.claim(model, worker, lease_seconds=2.0))`.
"""

from producer.ledger import calls
from producer.ledger.calls import (
    Call,
    Claim,
    ConversationStatus,
    ConversationTurns,
    DeadLetter,
    Emission,
    EmitCode,
    Entry,
    Followed,
    Overview,
    Pieces,
    Recollected,
    Renewal,
    RequestStatus,
    State,
    Submitted,
    WorkerStatus,
)
from producer.ledger.ledger import AsyncLedger, Ledger, connect, connect_async

__all__ = [
    "AsyncLedger",
    "Call",
    "Claim",
    "ConversationStatus",
    "ConversationTurns",
    "DeadLetter",
    "Emission",
    "EmitCode",
    "Entry",
    "Followed",
    "Ledger",
    "Overview",
    "Pieces",
    "Recollected",
    "Renewal",
    "RequestStatus",
    "State",
    "Submitted",
    "WorkerStatus",
    "calls",
    "connect",
    "connect_async",
]
