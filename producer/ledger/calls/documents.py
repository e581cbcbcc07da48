"""A text that is too long for the context: it is split, and waits for its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from producer.contract.events import Event, decode_event
from producer.contract.requests import SummaryRequest
from producer.ledger.calls.call import Call, with_estimate


class Split(NamedTuple):
    """What has become of a split."""

    outcome: Literal["waiting", "fenced", "cancel_asked", "id_taken"]
    taken_id: str = ""


_SPLIT_OUTCOMES: Final[dict[int, Literal["waiting", "fenced", "cancel_asked", "id_taken"]]] = {
    1: "waiting",
    0: "waiting",
    -1: "fenced",
    -2: "cancel_asked",
    -3: "id_taken",
}


def split(
    request_id: str,
    attempt: int,
    *,
    level: int,
    priority: int,
    pieces: Sequence[SummaryRequest],
    worker: str = "",
) -> Call[Split]:
    """Queue the pieces of a running request; it waits for them without a worker, and is queued again when all are done.

    level: 1 for pieces of the text itself, 2 for pieces of their summaries, and so on; no level can be queued twice. A piece's id is
    `<request id>.<level>.<number from 1>`; model, tenant, deadline and retention are the request's.
    """
    return Call(
        "split",
        [
            request_id,
            attempt,
            level,
            priority,
            worker,
            *(part for piece in pieces for part in with_estimate(piece)),
        ],
        lambda answer: Split(_SPLIT_OUTCOMES[answer[0]], *answer[1:]),
    )


def pieces(request_id: str, *, level: int, number: int) -> Call[list[Event | None]]:
    """The last event of each piece of a level; None where there is none."""
    return Call(
        "pieces",
        [request_id, level, number],
        lambda answer: [None if event is None else decode_event(event) for event in answer],
    )
