"""Texts that a model is measured on, as prompts and what follows them. Knows nothing about models.

The built-in sample is our own writing, half of it Chinese: questions and answers, some with an earlier turn, and prose.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from workers.models.tokenizer import Tokenizer

BUILT_IN: Final = Path(__file__).with_name("sample.jsonl")
MAX_SAMPLE_BYTES: Final = 64 << 20


class SampleError(ValueError):
    """A sample cannot be used. The message names the file, the line and what to do."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a model is to find likely: `answer`, after this query and these earlier turns. Without a query it is prose."""

    answer: str
    query: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Sequence:
    """A passage in tokens. The first `prompt_len` are given; each of the others is measured."""

    ids: list[int]
    prompt_len: int

    @property
    def num_targets(self) -> int:
        return len(self.ids) - self.prompt_len


def read_passages(path: Path = BUILT_IN) -> list[Passage]:
    """The passages in this file: a line of JSON each (.jsonl: answer, and if wanted query and history), or plain text.

    Raises SampleError.
    """
    try:
        if path.stat().st_size > MAX_SAMPLE_BYTES:
            raise SampleError(f"{path}: it has more than {MAX_SAMPLE_BYTES} bytes. Give a part of it")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SampleError(f"{path}: it cannot be read ({error}). Give a text file") from error
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}: it is not UTF-8 ({error}). Convert it") from error
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        passages = [_passage(path, number, line) for number, line in lines if line.strip()]
    else:
        passages = [Passage(text)] if text.strip() else []
    if not passages:
        raise SampleError(
            f"{path}: it has no text. Give a text file, or leave --text out for the built-in sample"
        )
    return passages


def _passage(path: Path, number: int, line: str) -> Passage:
    try:
        fields: dict[str, Any] = json.loads(line)
        return Passage(
            _text(fields["answer"]),
            _text(fields.get("query", "")),
            tuple((_text(question), _text(answer)) for question, answer in fields.get("history", [])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SampleError(
            f"{path}: line {number} is no passage ({type(error).__name__}: {error}). "
            'It must be like {"query": "...", "answer": "...", "history": [["...", "..."]]}; only answer is needed'
        ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def sequences_of(
    passages: Iterable[Passage], tokenizer: Tokenizer, *, max_len: int, max_targets: int
) -> list[Sequence]:
    """The passages in tokens, up to `max_targets` measured ones. Prose longer than `max_len` becomes several sequences; an
    answer that is too long is cut."""
    sequences: list[Sequence] = []
    num_left = max_targets
    for passage in passages:
        for sequence in _sequences(passage, tokenizer, max_len):
            if num_left <= 0:
                return sequences
            kept = Sequence(sequence.ids[: sequence.prompt_len + num_left], sequence.prompt_len)
            sequences.append(kept)
            num_left -= kept.num_targets
    return sequences


def _sequences(passage: Passage, tokenizer: Tokenizer, max_len: int) -> Iterator[Sequence]:
    answer = tokenizer.encode(passage.answer)
    if passage.query:
        prompt = tokenizer.build_prompt(passage.query, passage.history)
        ids = [*prompt, *answer, tokenizer.eos_id][:max_len]
        if len(ids) > len(prompt):
            yield Sequence(ids, len(prompt))
        return
    prompt = tokenizer.encode_prompt("")
    room = max_len - len(prompt)
    for start in range(0, len(answer), room):
        yield Sequence([*prompt, *answer[start : start + room]], len(prompt))
