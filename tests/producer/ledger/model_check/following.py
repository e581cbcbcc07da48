"""What readers do: follow requests by pushes, lose the connection, read the streams after gaps, leave."""

from __future__ import annotations

from typing import Any

from producer.ledger import calls
from producer.streams import StreamCursor
from tests.producer.ledger.model_check.actors import Operation, Reader
from tests.producer.ledger.model_check.agreement import check_entries
from tests.producer.ledger.model_check.deployment import READERS, Deployment, act, pick
from tests.producer.ledger.model_check.server import decoded, place_of


class Readers(Deployment):
    """Clients that want answers token by token."""

    @act(3, when=lambda self: self.model.requests)
    def follow(self, which: int, option: int, is_lost: bool) -> None:
        """Some requests, whether the reader follows them already or not."""
        known = list(self.model.requests)
        reader = self.readers[pick(option, READERS)]
        self.read(reader, [pick(which + i, known) for i in range(option // 2 % 3 + 1)])

    @act(2)
    def read_after_gaps(self, which: int, option: int, is_lost: bool) -> None:
        """A client reads the stream of what it follows as soon as it finds that a push is missing."""
        reader = self.readers[pick(which, READERS)]
        reader.hears_again()
        self.read(reader, [each for each, cursor in reader.cursors.items() if cursor.wants_read])

    @act(1, when=lambda self: any(reader.cursors for reader in self.readers.values()))
    def pushes_are_lost(self, which: int, option: int, is_lost: bool) -> None:
        """Its connection breaks: nothing more is heard."""
        self.readers[pick(which, READERS)].is_deaf = True

    @act(1, when=lambda self: any(reader.cursors for reader in self.readers.values()))
    def unfollow(self, which: int, option: int, is_lost: bool) -> None:
        followed = [(reader, each) for reader in self.readers.values() for each in reader.cursors]
        reader, request_id = pick(which, followed)
        reader.leave(request_id)
        self.perform(
            Operation(
                "unfollow",
                calls.unfollow(reader.name, request_id),
                lambda _: self.model.unfollow(reader.name, request_id),
            )
        )

    def read(self, reader: Reader, request_ids: list[str]) -> None:
        """The streams of these requests, from where the reader is."""
        request_ids = list(dict.fromkeys(request_ids))
        for request_id in request_ids:
            reader.cursors.setdefault(request_id, StreamCursor(request_id))
            reader.seen.setdefault(request_id, [])
        wanted = [(request_id, reader.cursors[request_id].position) for request_id in request_ids]

        def predict(answer: Any) -> Any:
            expected = self.model.follow(
                reader.name, [(request_id, place_of(position)) for request_id, position in wanted]
            )
            for (request_id, _), followed, right in zip(wanted, answer, expected, strict=True):
                if right is None:
                    assert followed is None
                    continue
                state, last, entries = right
                assert (followed.state, place_of(followed.last_id)) == (state, last)
                found = [(place_of(entry.id), entry.event) for entry in followed.entries]
                check_entries(request_id, entries, found)
            return answer

        answer = self.perform(Operation("follow", calls.follow(reader.name, wanted), predict))
        for request_id, followed in zip(request_ids, answer, strict=True):
            cursor = reader.cursors.get(request_id)
            if cursor is not None and not cursor.is_done:
                reader.seen[request_id] += cursor.read(followed)

    def check_readers(self) -> None:
        """All requests have ended: whoever follows one has had every event, in order, each once."""
        for reader in self.readers.values():
            reader.hears_again()
            # After a second without a push a reader looks: an `unfollow` of before may have come late, and taken it off.
            self.read(reader, [each for each, cursor in reader.cursors.items() if not cursor.is_done])
            for request_id, seen in reader.seen.items():
                assert reader.cursors[request_id].is_done, f"{reader.name} waits for the end of {request_id}"
                stream = self.server.snapshot([f"events:{request_id}"]).streams[request_id]
                assert [event.model_dump(mode="json") for event in seen] == [
                    type(event).model_validate(decoded(entry.event)).model_dump(mode="json")
                    for event, entry in zip(seen, stream, strict=True)
                ]
                self.tally["stream read to its end"] += 1
