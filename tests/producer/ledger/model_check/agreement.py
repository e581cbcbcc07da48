"""Whether Redis has what the model says: request by request, conversation by conversation, key by key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.producer.ledger.model_check.invariants import PRIORITY_SPAN
from tests.producer.ledger.model_check.model import Model
from tests.producer.ledger.model_check.server import Snapshot, decoded, place_of
from tests.producer.ledger.model_check.state import Entry, ModelRequest, Written

MODEL = "m"
"""The only one that is served."""
LASTING = ("rejected:", "workers", "worker:", "idempotency:", "load:", "tenants")
"""What may be there when nothing else is any more."""


def check_requests(model: Model, snapshot: Snapshot, ids: Iterable[str]) -> None:
    """These requests are as the model has them, or gone as they are there."""
    for request_id in ids:
        request = model.requests.get(request_id)
        fields = snapshot.requests.get(request_id)
        if request is None:
            assert fields is None, f"{request_id} should be gone"
            assert request_id not in snapshot.streams
            continue
        assert fields is not None, f"{request_id} is gone"
        check_request(request, snapshot, fields)


def check_request(request: ModelRequest, snapshot: Snapshot, fields: dict[str, str]) -> None:
    expected = {
        "request": request.body,
        "digest": request.digest,
        "state": request.state,
        "model": request.model,
        "tenant": request.tenant,
        "priority": request.priority,
        "attempt": request.attempt,
        "count": len(request.tokens),
        "retention": request.retention,
        "submitted": request.submitted,
        "deadline": request.deadline,
        "claimed": request.claimed,
        "ended": request.ended,
        "started": request.started,
        "conversation": request.conversation,
        "memory": request.memory,
        "document": request.document,
        "cancel": 1 if request.is_cancel_asked else None,
        "retried": request.retried,
        "tokens": request.estimate or None,
        "charged": request.charged,
        "last": f"{request.last[0]}-{request.last[1]}",
        "levels": ",".join(map(str, request.levels)) or None,
        "left": request.left if request.levels else None,
    }
    found = {name: fields.get(name) for name in expected}
    assert found == {name: None if value is None else str(value) for name, value in expected.items()}
    if request.is_live:
        assert fields.get("worker", "") == request.worker
    losses: Any = decoded(fields["losses"]) if "losses" in fields else []
    assert [
        (each["attempt"], each["worker"], each["tokens"], each["what"]) for each in losses
    ] == request.losses
    assert int(fields.get("failures", 0)) == request.failures
    assert (fields.get("readers") or "") == ",".join(request.readers)
    check_entries(
        request.id, request.stream, [(e.place, e.event) for e in snapshot.streams.get(request.id, [])]
    )
    assert snapshot.members("leases").get(request.id) == request.lease
    assert snapshot.expiries.get(f"request:{request.id}") == request.expires
    score = snapshot.members(f"queue:{request.model}").get(request.id)
    assert score == (request.score if request.state == "queued" else None)


def check_entries(request_id: str, expected: list[Entry], found: list[tuple[tuple[int, int], str]]) -> None:
    assert [entry.place for entry in expected] == [place for place, _ in found], request_id
    for entry, (_, event) in zip(expected, found, strict=True):
        check_event(entry.event, event)


def check_event(expected: Written, found: str) -> None:
    """Word for word if a worker wrote it; what the model knows of it if a script did."""
    if isinstance(expected, str):
        assert found == expected
    else:
        assert contains(decoded(found), expected), f"{found} is not {expected}"


def contains(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            name in found and contains(found[name], value) for name, value in expected.items()
        )
    return bool(found == expected)


def check_places(model: Model, snapshot: Snapshot) -> None:
    """Leases, workers' sets and queues, each as a whole."""
    running = model.in_state("running")
    assert snapshot.members("leases") == {request.id: request.lease for request in running}
    workers = {request.worker for request in running} | {
        name.removeprefix("running:") for name in snapshot.sets
    }
    for worker in workers:
        claimed = {request.id for request in running if request.worker == worker}
        assert snapshot.sets.get(f"running:{worker}", set()) == claimed
    queue = model.order.queue()
    assert snapshot.members(f"queue:{MODEL}") == {request.id: request.score for request in queue}
    assert snapshot.members(f"shares:{MODEL}") == {
        f"{priority}|{tenant}": priority * PRIORITY_SPAN + time
        for (priority, tenant), time in model.order.shares().items()
    }


def check_pushes(model: Model, published: list[tuple[str, str]]) -> None:
    """The readers were sent the new entries, all of them, each with the one before it; workers hear of cancellations."""
    cancels, pushes = [], {}
    for channel, message in published:
        kind, _, name = channel.partition(":")
        if kind == "push":
            assert name not in pushes, "one message a script"
            pushes[name] = [line.split("\t") for line in message.split("\n")]
        elif message.startswith("cancel "):
            cancels.append((name, message.removeprefix("cancel ")))
    assert sorted(cancels) == sorted(model.cancels)
    assert pushes.keys() == model.pushes.keys()
    for reader, lines in pushes.items():
        expected = model.pushes[reader]
        found = [(request_id, place_of(previous), place_of(at)) for request_id, previous, at, _ in lines]
        assert found == [(request_id, previous, entry.place) for request_id, previous, entry in expected]
        for (_, _, entry), line in zip(expected, lines, strict=True):
            check_event(entry.event, line[3])


def check_all(model: Model, snapshot: Snapshot) -> None:
    """All keys of the deployment."""
    check_requests(model, snapshot, model.requests.keys() | snapshot.requests.keys())
    assert snapshot.conversations.keys() == model.conversations.keys()
    for name, conversation in model.conversations.items():
        fields = snapshot.conversations[name]
        turns = [
            (turn.get("query"), turn["answer"], turn["request_id"]) for turn in snapshot.turns.get(name, [])
        ]
        assert turns == conversation.turns
        assert (
            fields["id"],
            fields["tenant"],
            fields["model"],
            fields.get("busy"),
            fields.get("folding"),
            fields.get("folded"),
            int(fields.get("fold_failures", 0)),
            fields.get("summary", ""),
            int(fields.get("covered", 0)),
        ) == (
            conversation.id,
            conversation.tenant,
            conversation.model,
            conversation.busy,
            conversation.folding,
            conversation.folded,
            conversation.fold_failures,
            conversation.summary,
            conversation.covered,
        )
        expires = snapshot.expiries.get(f"conversation:{name}", float("inf"))
        assert expires == conversation.expires
    assert snapshot.members("conversations") == model.listed
    usage = {
        name.partition("|")[2]: fields
        for name, fields in snapshot.hashes.items()
        if name.startswith("usage:")
    }
    assert usage.keys() == model.order.usage.keys()
    for tenant, own in model.order.usage.items():
        assert float(usage[tenant].get("time", 0)) == own.time, f"{tenant}: {usage[tenant]}, not {own}"
        assert ("held" in usage[tenant]) == own.is_held
    dead = sorted(snapshot.members("dead").items(), key=lambda item: (item[1], item[0]), reverse=True)
    assert dead == [(request.id, request.ended) for request in model.dead_letters()]
    rejected = {
        (name.removeprefix("rejected:"), reason): int(number)
        for name, reasons in snapshot.hashes.items()
        if name.startswith("rejected:")
        for reason, number in reasons.items()
    }
    assert rejected == dict(model.rejected)
    assert {name for name in snapshot.strings if name.startswith("idempotency:")} == {
        f"idempotency:{tenant}:{key}" for tenant, key in model.idempotency
    }


def check_nothing_is_left(snapshot: Snapshot) -> None:
    """After everything has ended and expired."""
    names = [*snapshot.hashes, *snapshot.sets, *snapshot.sorted_sets, *snapshot.strings]
    names += [f"request:{each}" for each in (*snapshot.requests, *snapshot.streams)]
    names += [f"conversation:{each}" for each in (*snapshot.conversations, *snapshot.turns)]
    left = [name for name in names if not name.startswith(LASTING) and name != "conversations"]
    assert left == [], f"never deleted: {left}"
