"""What holds of a deployment's keys at every moment, whoever did what before: checked on a reading of Redis alone, without the model."""

from __future__ import annotations

from producer.ledger.calls import FINAL_STATES
from tests.producer.ledger.model_check.server import Snapshot, decoded, place_of

PRIORITY_SPAN = 5e14
"""Of the queue's scores, which order by priority, then by age."""


def check_invariants(snapshot: Snapshot) -> None:
    """Raise AssertionError at what cannot be true of a reading of all keys."""
    check_places(snapshot)
    for request_id in snapshot.requests:
        check_stream(snapshot, request_id)
        check_lifetime(snapshot, request_id)
    check_counts(snapshot)
    check_documents(snapshot)
    check_conversations(snapshot)


def check_places(snapshot: Snapshot) -> None:
    """Each live request is in exactly one place: in its queue, with one worker and one lease, or waiting for its pieces."""
    for name, queue in snapshot.sorted_sets.items():
        if not name.startswith("queue:"):
            continue
        for request_id, score in queue.items():
            fields = snapshot.requests.get(request_id, {})
            assert fields.get("state") == "queued", f"{request_id} is in a queue: {fields}"
            assert name == f"queue:{fields['model']}"
            assert score // PRIORITY_SPAN == int(fields["priority"])
    running = {}
    for request_id, fields in snapshot.requests.items():
        match fields["state"]:
            case "queued":
                assert request_id in snapshot.members(f"queue:{fields['model']}"), (
                    f"{request_id} is queued, and in no queue"
                )
                assert not fields.get("worker")
            case "running":
                assert fields["worker"], f"{request_id} runs without a worker"
                assert int(fields["attempt"]) > 0
                running[request_id] = fields["worker"]
            case "waiting":
                assert int(fields["left"]) > 0, f"{request_id} waits for nothing"
                assert not fields.get("worker")
            case state:
                assert state in FINAL_STATES
    assert running.keys() == snapshot.members("leases").keys(), "a request has a lease exactly while it runs"
    for name, members in snapshot.sets.items():
        worker = name.removeprefix("running:")
        assert members == {request_id for request_id, owner in running.items() if owner == worker}, name
    for request_id, worker in running.items():
        assert request_id in snapshot.sets.get(f"running:{worker}", set())


def check_counts(snapshot: Snapshot) -> None:
    """What is kept of the queue and of tenants beside the requests is what counting them gives."""
    queued = {
        request_id: fields for request_id, fields in snapshot.requests.items() if fields["state"] == "queued"
    }
    running = [fields for fields in snapshot.requests.values() if fields["state"] == "running"]
    for name, members in snapshot.sorted_sets.items():
        if name.startswith("queued:"):
            _, priority, rest = name.split(":", 2)
            model, tenant = rest.split("|")
            of = (priority, model, tenant)
            ids = [
                request_id
                for request_id, fields in queued.items()
                if (fields["priority"], fields["model"], fields["tenant"]) == of
            ]
            assert members == {
                request_id: snapshot.members(f"queue:{model}")[request_id] - int(priority) * PRIORITY_SPAN
                for request_id in ids
            }, name
    assert snapshot.members("deadlines") == {
        request_id: int(fields["deadline"]) for request_id, fields in queued.items() if "deadline" in fields
    }
    for request_id, fields in queued.items():
        name = f"queued:{fields['priority']}:{fields['model']}|{fields['tenant']}"
        assert request_id in snapshot.members(name), f"{request_id} is not in {name}"
    for name, load in snapshot.hashes.items():
        if name.startswith("load:"):
            own = [f for f in queued.values() if f["model"] == name.removeprefix("load:")]
            tokens = {number: int(load.get(f"tokens:{number}", 0)) for number in range(10)}
            assert tokens == {
                number: sum(int(f["tokens"]) for f in own if int(f["priority"]) == number)
                for number in range(10)
            }
    for tenant in {fields["tenant"] for fields in (*queued.values(), *running)}:
        assert any(name.endswith(f"|{tenant}") for name in snapshot.hashes), f"nothing is known of {tenant}"
    for name, usage in snapshot.hashes.items():
        if not name.startswith("usage:"):
            continue
        model, tenant = name.removeprefix("usage:").split("|")
        waits = [f for f in queued.values() if (f["model"], f["tenant"]) == (model, tenant)]
        runs = [f for f in running if (f["model"], f["tenant"]) == (model, tenant)]
        counts = {
            "queued": len(waits),
            "running": len(runs),
            "queued_tokens": sum(int(f["tokens"]) for f in waits),
        }
        assert {field: int(usage.get(field, 0)) for field in counts} == counts, name
        assert float(usage.get("time", 0)) >= 0
        assert "held" not in usage or runs, f"{tenant} is held, and nothing of it runs that could free it"
        assert (name in snapshot.expiries) == (not waits and not runs), f"{name}: {usage}"
        priorities = {f["priority"] for f in waits} if "held" not in usage else set()
        shares = {member for member in snapshot.members(f"shares:{model}") if member.endswith(f"|{tenant}")}
        assert shares == {f"{priority}|{tenant}" for priority in priorities}
    for fields in snapshot.requests.values():
        assert ("charged" in fields) <= (fields["state"] in ("running", "queued"))
        assert fields["state"] != "running" or "charged" in fields


def check_stream(snapshot: Snapshot, request_id: str) -> None:
    """No token index is missing or there twice, events are where the contract says, and the last one says what the others said."""
    fields = snapshot.requests[request_id]
    stream = snapshot.streams.get(request_id, [])
    places = [entry.place for entry in stream]
    assert places == sorted(set(places)), f"{request_id}: {places}"
    count, attempt, texts, final = 0, 0, [], None
    for place, event in ((entry.place, decoded(entry.event)) for entry in stream):
        assert final is None, f"{request_id} goes on after its end"
        if event["type"] == "token":
            assert event["index"] - len(event["ids"]) == count, f"{request_id} jumps from {count} to {event}"
            assert len(event["ids"]) == len(event["texts"])
            assert attempt > 0, f"{request_id}: a token before any Started"
            count = event["index"]
            assert place == (count, 0)
            texts += event["texts"]
            continue
        assert place[0] == count
        if event["type"] == "started":
            assert event["attempt"] > attempt, f"{request_id}: attempt {event['attempt']} after {attempt}"
            attempt = event["attempt"]
        elif event["type"] != "progress":
            final = event
    assert count == int(fields["count"])
    assert attempt == int(fields.get("started", 0)) <= int(fields["attempt"])
    # A dead letter that was queued again has lost its end from the stream.
    assert place_of(fields["last"]) >= (places[-1] if places else (0, 0))
    assert (final is not None) == (fields["state"] in FINAL_STATES), (
        f"{request_id}: {fields['state']}, {final}"
    )
    if final is not None and final["type"] == "finished":
        assert final["text"] == "".join(texts), f"{request_id} ends with another text than it has"
        assert (final["reason"] == "cancelled") == (fields["state"] == "cancelled")
    elif final is not None:
        assert fields["state"] in ("failed", "dead")


def check_lifetime(snapshot: Snapshot, request_id: str) -> None:
    """What is live does not expire; what has ended does, and a piece not before its document has ended."""
    fields = snapshot.requests[request_id]
    document = snapshot.requests.get(fields.get("document", ""), {})
    is_kept = (
        fields["state"] not in FINAL_STATES
        or document.get("state", "done") not in FINAL_STATES
        or request_id in snapshot.members("dead")
    )
    assert fields["state"] == "dead" or request_id not in snapshot.members("dead")
    expires = snapshot.expiries.get(f"request:{request_id}")
    assert (expires is None) == is_kept, f"{request_id} is {fields['state']} and expires at {expires}"
    assert snapshot.expiries.get(f"events:{request_id}") == (
        expires if request_id in snapshot.streams else None
    )


def check_documents(snapshot: Snapshot) -> None:
    """A document waits exactly for those of its last level's pieces that have not ended, and has counted the others once."""
    for request_id, fields in snapshot.requests.items():
        if fields["state"] in FINAL_STATES or not fields.get("levels"):
            continue
        levels = [int(total) for total in fields["levels"].split(",")]
        ids = [
            f"{request_id}.{level}.{number}"
            for level, total in enumerate(levels, 1)
            for number in range(1, total + 1)
        ]
        done = [piece for piece in ids if snapshot.requests[piece]["state"] == "done"]
        left = len(ids) - len(done)
        assert int(fields["left"]) == left
        assert (fields["state"] == "waiting") == (left > 0)
        assert left == sum(snapshot.requests[piece]["state"] not in FINAL_STATES for piece in ids)
        assert int(fields.get("pieces", 0)) == len(done) + sum(
            int(snapshot.requests[piece].get("pieces", 0)) for piece in done
        )
        assert int(fields.get("piece_completion_tokens", 0)) == sum(
            int(snapshot.requests[piece]["count"])
            + int(snapshot.requests[piece].get("piece_completion_tokens", 0))
            for piece in done
        )


def check_conversations(snapshot: Snapshot) -> None:
    """A conversation is busy with a live request only, has each turn once, and does not expire while it is busy."""
    for name, fields in snapshot.conversations.items():
        turns = [turn["request_id"] for turn in snapshot.turns.get(name, [])]
        assert len(turns) == len(set(turns)), f"{name} has a turn twice: {turns}"
        assert int(fields.get("covered", 0)) <= len(turns)
        expires = snapshot.expiries.get(f"conversation:{name}")
        assert snapshot.expiries.get(f"turns:{name}") == (expires if turns else None)
        if (busy := fields.get("busy")) is not None:
            assert snapshot.requests[busy]["state"] not in FINAL_STATES, f"{name} is busy with {busy}"
            assert snapshot.requests[busy]["conversation"] == name
            assert expires is None
        else:
            assert turns, f"{name} has neither turns nor an answer in progress"
            assert expires is not None
        if (folding := fields.get("folding")) is not None:
            assert snapshot.requests[folding]["state"] not in FINAL_STATES
        listed = snapshot.members("conversations")[name]
        assert listed == (float("inf") if expires is None else expires)
        for turn in snapshot.turns.get(name, []):
            request = snapshot.requests.get(turn["request_id"])
            if request is not None:
                assert request["state"] == "done"
                final = decoded(snapshot.streams[turn["request_id"]][-1].event)
                assert turn["answer"] == final["text"]
    for name in snapshot.turns:
        assert name in snapshot.conversations, f"turns of {name}, which does not exist"
