"""Was anything lost, doubled or changed? Each stream against its undisturbed answer, and against what the server keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from producer.contract import (
    ChatRequest,
    Event,
    Failed,
    Finished,
    Request,
    SummaryRequest,
    Token,
    Turn,
    decode_event,
    decode_request,
)
from producer.contract.conversation import ArchivedTurn, PromptMemory
from producer.contract.keys import Keys, conversation_name
from tests.chaos.readers import Stream
from tests.chaos.undisturbed import Answer, Difference, Undisturbed
from workers.memory import history
from workers.prompts import Prompt


@dataclass
class Verdict:
    """What is wrong with one stream; nothing, if everything is empty."""

    stream: Stream
    lost: list[str] = field(default_factory=list)
    """No end, a hole, an end that should not be."""
    duplicated: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_differing(self) -> bool:
        return bool(self.differences)

    @property
    def is_beyond_noise(self) -> bool:
        return any(not difference.is_noise for difference in self.differences)


class Kept:
    """What the server keeps of requests: the truth, whatever readers were told."""

    def __init__(self, connection: Any, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    def events(self, request_id: str) -> list[Event]:
        entries = self._connection.xrange(self._keys.events(request_id))
        return [decode_event(fields["event"]) for _, fields in entries]

    def field(self, request_id: str, name: str) -> str | None:
        value: str | None = self._connection.hget(self._keys.request(request_id), name)
        return value

    def turns(self, conversation_id: str) -> list[Turn]:
        key = self._keys.turns(conversation_name("default", conversation_id))
        return [ArchivedTurn.model_validate_json(turn).turn for turn in self._connection.lrange(key, 0, -1)]

    def request(self, request_id: str) -> Request:
        return decode_request(self.field(request_id, "request") or "")


def judge(streams: Sequence[Stream], kept: Kept, undisturbed: Undisturbed) -> list[Verdict]:
    """A verdict on each."""
    verdicts = [_judge_form(stream, kept) for stream in streams]
    plain: list[tuple[Verdict, Prompt]] = []
    talks: dict[str, list[Turn]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: verdict.stream.submitted):
        request = verdict.stream.request
        end = verdict.stream.end
        if not isinstance(end, Finished):
            continue
        if isinstance(request, ChatRequest) and request.conversation_id is not None:
            turns = talks.setdefault(request.conversation_id, [])
            memory = PromptMemory.model_validate_json(kept.field(verdict.stream.request_id, "memory") or "{}")
            if memory.num_turns != len(turns):
                verdict.lost.append(f"it knew of {memory.num_turns} turns, {len(turns)} were answered before")
            plain.append((verdict, undisturbed.prompts.chat(request, history(memory, turns[memory.first :]))))
            if end.reason != "cancelled":
                turns.append(Turn(request.query, end.text))
        elif isinstance(request, SummaryRequest) and undisturbed.pieces_of(request):
            plain += _judge_document(verdict, request, kept, undisturbed)
        else:
            plain.append((verdict, undisturbed.prompts.build(request)))
    answers = undisturbed.answer_prompts(
        [(prompt, verdict.stream.request.sampling.stop) for verdict, prompt in plain]
    )
    for (verdict, prompt), answer in zip(plain, answers, strict=True):
        _compare(verdict, verdict.stream.token_ids, prompt, answer, undisturbed)
    _judge_archives(verdicts, talks, kept)
    return verdicts


def _judge_form(stream: Stream, kept: Kept) -> Verdict:
    """Everything that can be said without knowing the answer."""
    verdict = Verdict(stream)
    _judge_events(verdict, [heard.event for heard in stream.heard], "the reader")
    try:
        stored = kept.events(stream.request_id)
    except Exception as error:  # noqa: BLE001 what is kept cannot even be read
        verdict.lost.append(f"what the server keeps cannot be read: {error}")
        return verdict
    _judge_events(verdict, stored, "the server's stream")
    state, end = kept.field(stream.request_id, "state"), stream.end
    if stream.error is not None:
        verdict.lost.append(f"the reader got {type(stream.error).__name__}: {stream.error}")
    elif end is None:
        verdict.lost.append(f"no end; its state is {state}")
    elif stored and stored[-1] != end:
        verdict.lost.append(f"the reader's end is not the server's: {end} {stored[-1]}")
    if isinstance(end, Failed) and end.code not in stream.may_fail:
        verdict.lost.append(f"failed: {end.code}: {end.message}")
    if isinstance(end, Finished):
        if end.reason == "cancelled" and not stream.may_be_cancelled:
            verdict.lost.append("cancelled by nobody")
        said = "".join(heard.event.text for heard in stream.heard if isinstance(heard.event, Token))
        if end.text != said:
            verdict.lost.append("the finished text is not that of the tokens")
        if end.usage.completion_tokens != stream.num_tokens:
            verdict.lost.append(
                f"usage says {end.usage.completion_tokens} tokens, the reader has {stream.num_tokens}"
            )
    return verdict


def _judge_events(verdict: Verdict, events: Sequence[Event], where: str) -> None:
    index, num_ends = 0, 0
    for event in events:
        if num_ends:
            verdict.duplicated.append(f"{where}: {event.type} after the end")
        if isinstance(event, Token):
            before = event.index - len(event.ids)
            if before > index:
                verdict.lost.append(f"{where}: tokens {index + 1} to {before} are missing")
            elif before < index:
                verdict.duplicated.append(f"{where}: tokens {before + 1} to {index} come twice")
            index = max(event.index, index)
        num_ends += isinstance(event, Finished | Failed)


def _compare(
    verdict: Verdict, actual: Sequence[int], prompt: Prompt, expected: Answer, undisturbed: Undisturbed
) -> None:
    end, stop = verdict.stream.end, verdict.stream.request.sampling.stop
    is_cut = isinstance(end, Finished) and end.reason == "cancelled"
    if is_cut:
        # What there is of it is the beginning of the answer.
        expected = Answer(expected.ids[: len(actual)], expected.texts[: len(actual)], "cancelled")
    verdict.differences += undisturbed.differences(prompt, stop, actual, expected)
    if verdict.differences or is_cut or not isinstance(end, Finished):
        return
    # The ids are the same, so the bytes must be.
    if end.text != expected.text:
        verdict.lost.append("the ids are the undisturbed answer's, but the text is another")
    if end.reason != expected.reason:
        verdict.lost.append(f"it ended with {end.reason}, the undisturbed answer with {expected.reason}")


def _judge_document(
    verdict: Verdict, request: SummaryRequest, kept: Kept, undisturbed: Undisturbed
) -> list[tuple[Verdict, Prompt]]:
    """Its pieces, each a stream of its own; and the prompt of its last summary, which is made of theirs."""
    document = verdict.stream.request_id
    units: list[str] | None = None
    levels = [int(number) for number in (kept.field(document, "levels") or "").split(",") if number]
    for level, number in enumerate(levels, start=1):
        if undisturbed.pieces_of(request, units) != [
            piece.text
            for place in range(1, number + 1)
            if isinstance(piece := kept.request(f"{document}.{level}.{place}"), SummaryRequest)
        ]:
            verdict.lost.append(f"the pieces of level {level} are not those of an undisturbed run")
        units = []
        for place in range(1, number + 1):
            piece_id = f"{document}.{level}.{place}"
            events = kept.events(piece_id)
            stream = Stream(kept.request(piece_id), piece_id, verdict.stream.submitted)
            _judge_events(verdict, events, f"piece {level}.{place}")
            end = events[-1] if events else None
            if not isinstance(end, Finished):
                verdict.lost.append(f"piece {level}.{place} has no answer")
                continue
            prompt = undisturbed.prompts.build(stream.request)
            [answer] = undisturbed.answer_prompts([(prompt, stream.request.sampling.stop)])
            ids = [id_ for event in events if isinstance(event, Token) for id_ in event.ids]
            verdict.differences += undisturbed.differences(prompt, stream.request.sampling.stop, ids, answer)
            if end.text.strip():
                units.append(f"{end.text.strip()}\n")
    if units is None:
        verdict.lost.append("a document without pieces")
        return []
    return [(verdict, undisturbed.prompts.build(request.model_copy(update={"text": "".join(units)})))]


def _judge_archives(verdicts: Sequence[Verdict], talks: dict[str, list[Turn]], kept: Kept) -> None:
    """Each turn exactly once, in order, word for word."""
    for conversation_id, turns in talks.items():
        [last, *_] = [
            verdict
            for verdict in reversed(verdicts)
            if getattr(verdict.stream.request, "conversation_id", None) == conversation_id
        ]
        archived = kept.turns(conversation_id)
        if len(archived) > len(turns):
            last.duplicated.append(
                f"the archive of {conversation_id} has {len(archived)} turns, {len(turns)} were answered"
            )
        elif archived != turns:
            last.lost.append(f"the archive of {conversation_id} is not what its readers saw")
