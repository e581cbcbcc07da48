"""A sentencepiece model file taken apart: its pieces, and an encoder that text cannot trick.

sentencepiece finds user-defined pieces such as `<n>` in whatever text it is given, full-width spellings included. Here
they are renamed to escape sequences before the model is loaded. Knows nothing about chat or special ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

import sentencepiece


class PieceType(IntEnum):
    """sentencepiece_model.proto, ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


NEWLINE: Final = "<n>"
TAB: Final = "<|tab|>"
BLANK: Final = re.compile(r"<\|blank_(\d+)\|>")

# A piece is renamed to "\n" and one of these. Every "\n" of a text becomes such a pair before it is encoded, so no text
# can spell one, and no normalisation rule of sentencepiece produces "\n".
_FIRST_CODE: Final = 0x10F800


class PieceError(ValueError):
    """The file is not a sentencepiece model that can be used."""


class Piece(NamedTuple):
    text: str
    type: PieceType


class PieceModel:
    """The pieces of a model file, and text to piece ids. Ids count from 0, whatever the network's ids are."""

    def __init__(self, model_proto: bytes) -> None:
        try:
            self.pieces = tuple(_read_pieces(model_proto))
            self.adds_dummy_prefix, self.removes_extra_spaces = _space_rules(model_proto)
        except (IndexError, KeyError, ValueError) as error:
            raise PieceError(f"not a sentencepiece model ({error})") from error
        if not self.pieces:
            raise PieceError("not a sentencepiece model (it has no pieces)")
        self._ids = {piece.text: index for index, piece in enumerate(self.pieces)}
        white_space = {
            index: text
            for index, piece in enumerate(self.pieces)
            if piece.type is PieceType.USER_DEFINED and (text := white_space_of(piece.text)) is not None
        }
        codes = _unused_characters(self.pieces, len(self.pieces))
        renamed = {
            index: "\n" + next(codes)
            for index, piece in enumerate(self.pieces)
            if piece.type is PieceType.USER_DEFINED
        }
        self._has_escapes = bool(renamed)
        self._escapes = {text: renamed[index] for index, text in white_space.items()}
        # Only white space that a piece exists for is escaped; a "\n" without a piece must not start an escape.
        self._escapes.setdefault("\n", " ")
        blanks = sorted(len(text) for text in white_space.values() if text.isspace() and text[0] == " ")
        self._white_space = re.compile(
            "|".join(["\n", *(["\t"] if "\t" in self._escapes else []), *_runs(blanks)])
        )
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_rename(model_proto, renamed))
        except RuntimeError as error:
            raise PieceError(f"not a sentencepiece model ({error})") from error

    def __len__(self) -> int:
        return len(self.pieces)

    def id_of(self, piece: str) -> int | None:
        """The id of the piece with exactly this text."""
        return self._ids.get(piece)

    def encode(self, text: str) -> list[int]:
        """Piece ids of this text. Only normal and byte pieces, and the user-defined ones for white space."""
        # A lone surrogate cannot be written in UTF-8; sentencepiece would refuse the whole text.
        text = text.encode("utf-8", "replace").decode("utf-8")
        # Without user-defined pieces, as in ChatGLM2-6B's file, there is nothing that a text could spell.
        escaped = (
            self._white_space.sub(lambda match: self._escapes[match[0]], text) if self._has_escapes else text
        )
        ids: list[int] = self._processor.EncodeAsIds(escaped)
        return ids


def white_space_of(piece: str) -> str | None:
    """What a user-defined white-space piece of ChatGLM stands for; None for any other piece."""
    if piece == NEWLINE:
        return "\n"
    if piece == TAB:
        return "\t"
    if match := BLANK.fullmatch(piece):
        return " " * int(match[1])
    return None


def _runs(lengths: list[int]) -> list[str]:
    """Patterns for runs of spaces, longest first; adjacent lengths share one, because a regex prefers the longer."""
    patterns = []
    while lengths:
        last = first = lengths.pop()
        while lengths and lengths[-1] == first - 1:
            first = lengths.pop()
        patterns.append(f" {{{first},{last}}}")
    return patterns


def _unused_characters(pieces: tuple[Piece, ...], count: int) -> Iterator[str]:
    """Private-use characters that occur in no piece."""
    taken = {character for piece in pieces for character in piece.text if ord(character) >= _FIRST_CODE}
    code = _FIRST_CODE
    for _ in range(count):
        while chr(code) in taken:
            code += 1
        yield chr(code)
        code += 1


# --- the model file: protobuf's wire format, as far as it is needed --------------------------------------------------

_PIECES_FIELD: Final = 1
_NORMALIZER_FIELD: Final = 3
_DUMMY_PREFIX_FIELD: Final = 3
_EXTRA_SPACES_FIELD: Final = 4
_TEXT_FIELD: Final = 1
_TYPE_FIELD: Final = 3


def _read_pieces(data: bytes) -> Iterator[Piece]:
    types = {int(kind): kind for kind in PieceType}
    for number, _, start, end in _fields(data, 0, len(data)):
        if number != _PIECES_FIELD:
            continue
        text, kind = "", PieceType.NORMAL
        for inner, _, inner_start, inner_end in _fields(data, start, end):
            if inner == _TEXT_FIELD:
                text = data[inner_start:inner_end].decode("utf-8")
            elif inner == _TYPE_FIELD:
                kind = types[data[inner_start]]
        yield Piece(text, kind)


def _space_rules(data: bytes) -> tuple[bool, bool]:
    """(add_dummy_prefix, remove_extra_whitespaces) of the model's normalizer; both are true where it does not say."""
    rules = {_DUMMY_PREFIX_FIELD: 1, _EXTRA_SPACES_FIELD: 1}
    for number, _, start, end in _fields(data, 0, len(data)):
        if number == _NORMALIZER_FIELD:
            rules |= {
                inner: _varint(data, inner_start)[0]
                for inner, _, inner_start, _ in _fields(data, start, end)
                if inner in rules
            }
    return bool(rules[_DUMMY_PREFIX_FIELD]), bool(rules[_EXTRA_SPACES_FIELD])


def _rename(data: bytes, names: dict[int, str]) -> bytes:
    """The model file with other texts for these pieces."""
    out = bytearray()
    index, copied = -1, 0
    for number, field_start, start, end in _fields(data, 0, len(data)):
        index += number == _PIECES_FIELD
        if number != _PIECES_FIELD or index not in names:
            continue
        out += data[copied:field_start]
        copied = end
        name = names[index].encode("utf-8")
        piece = bytearray(_length_delimited(_TEXT_FIELD, name))
        for inner, inner_field, _, inner_end in _fields(data, start, end):
            if inner != _TEXT_FIELD:
                piece += data[inner_field:inner_end]
        out += _length_delimited(_PIECES_FIELD, bytes(piece))
    return bytes(out + data[copied:])


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, where the field starts, where its value starts, where it ends) of each field in a message."""
    while position < end:
        field_start = position
        key = data[position]
        if key < 0x80:  # spelled out for speed, as is the length below: a real model has 400,000 fields
            position += 1
        else:
            key, position = _varint(data, position)
        wire_type = key & 7
        value_start = position
        if wire_type == 2:
            length = data[position]
            if length < 0x80:
                value_start = position + 1
            else:
                length, value_start = _varint(data, position)
            position = value_start + length
        elif wire_type == 5:
            position += 4
        elif wire_type == 0:
            _, position = _varint(data, position)
        elif wire_type == 1:
            position += 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {field_start}")
        if position > end:
            raise ValueError(f"the file ends inside the field at byte {field_start}")
        yield key >> 3, field_start, value_start, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits before byte {position}")


def _length_delimited(number: int, value: bytes) -> bytes:
    out = bytearray([number << 3 | 2])
    length = len(value)
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out) + value
