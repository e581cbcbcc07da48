"""The tokenizers over sentencepiece: text to ids, ids to text, a conversation to a prompt (CHATGLM.md A8, A9, B6, B7).

Text of a user never produces a special token: only `build_prompt` adds them. Knows nothing about weights; needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from workers.models.config import CheckpointError, ModelConfig, read_bytes
from workers.models.frames import Part, content, flattened, frame, joined, without_forged_lines
from workers.models.layout import AnyLayout, CausalLayout, Layout
from workers.models.pieces import NEWLINE, PieceError, PieceModel, PieceType, white_space_of

MODEL_FILE: Final = "ice_text.model"
MAX_MODEL_BYTES: Final = 64 << 20

UNKNOWN_TEXT: Final = " ⁇ "
"""What sentencepiece writes for its unknown piece."""
REPLACEMENT: Final = "\ufffd"
"""For each byte that belongs to no character."""

TRAINING_TIME: Final = "[[训练时间]]"
TRAINING_TIME_TEXT: Final = "2023年"
"""What the model card's chat puts in its place."""
MARKS: Final = frozenset(",!:;?")
"""ASCII marks that become full-width beside a Chinese character."""
_SPACE_MARK: Final = "▁"
_FULL_WIDTH: Final = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_MARKS_BESIDE_CJK: Final = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class Tokenizer:
    """The tokenizer of one checkpoint: ChatGLM-6B's, or a subclass that differs where its model does.

    All ids here are the network's. They are the model file's, shifted by `first_id`: 0, but 20000 in the first release
    of ChatGLM-6B, which kept that many ids for images.
    """

    model_file = MODEL_FILE
    cleans_up_spaces = True
    """`decode` applies `clean_up_spaces`."""
    widens_marks = True
    """`process_response` applies `widen_marks`."""

    def __init__(self, pieces: PieceModel, special_ids: dict[str, int] | None = None) -> None:
        """`special_ids` is what config.json says about them. Raises ValueError when the pieces do not agree."""
        claimed = special_ids or {}
        self._pieces = pieces
        self.first_id = claimed["bos"] - _piece_id(pieces, "<sop>") if "bos" in claimed else 0
        if self.first_id < 0:
            raise ValueError(
                f"bos_token_id is {claimed['bos']}, but <sop> is piece {_piece_id(pieces, '<sop>')}"
            )
        self.bos_id = self._special("<sop>", "bos", claimed)
        self.eos_id = self._special("<eop>", "eos", claimed)
        self.mask_id = self._special("[MASK]", "mask", claimed)
        self.gmask_id = self._special("[gMASK]", "gmask", claimed)
        self.pad_id = self.removed_id = self.first_id + _piece_id(pieces, "<pad>")
        self.surfaces = tuple(_surface(piece.text, piece.type) for piece in pieces.pieces)
        """What each piece adds to a text, by piece id; "" for a byte piece, whose value is in `byte_values`."""
        self.byte_values = _byte_values(pieces)
        """The byte of each byte piece, by piece id; -1 for other pieces."""
        self._set_space_rules()

    def _set_space_rules(self) -> None:
        pieces = self._pieces
        self.starts_with_space = frozenset(
            index
            for index, piece in enumerate(pieces.pieces)
            if piece.text.startswith(_SPACE_MARK) and piece.type not in (PieceType.CONTROL, PieceType.UNKNOWN)
        )
        """Piece ids whose first space is dropped at the start of a text."""
        self.strips_first_space = pieces.adds_dummy_prefix or pieces.removes_extra_spaces
        self.strips_all_first_spaces = pieces.removes_extra_spaces

    @classmethod
    def from_folder(cls, folder: Path | str, config: ModelConfig | None = None) -> Tokenizer:
        """The tokenizer of the checkpoint in this folder.

        Raises CheckpointError, which names the file.
        """
        config = config or ModelConfig.from_folder(folder)
        tokenizer_type = ChatGLM2Tokenizer if config.model_type == "chatglm2" else Tokenizer
        path = Path(folder) / tokenizer_type.model_file
        remedy = "It is the sentencepiece model that comes with the checkpoint: download it"
        model_proto = read_bytes(path, remedy, MAX_MODEL_BYTES)
        try:
            tokenizer = tokenizer_type(PieceModel(model_proto), config.special_ids)
        except PieceError as error:
            raise CheckpointError(path, str(error), "Download it again") from error
        except ValueError as error:
            raise CheckpointError(
                path, f"it does not belong to config.json: {error}", "Take both files from the same release"
            ) from error
        if tokenizer.end_id > config.vocab_size:
            raise CheckpointError(
                path,
                f"it has pieces up to id {tokenizer.end_id - 1}, but config.json has vocab_size {config.vocab_size}",
                "Take both files from the same release",
            )
        return tokenizer

    def _special(self, piece: str, name: str, claimed: dict[str, int]) -> int:
        id_ = self.first_id + _piece_id(self._pieces, piece)
        if claimed.get(name, id_) != id_:
            raise ValueError(f"{name}_token_id is {claimed[name]}, but {piece} has id {id_}")
        return id_

    @property
    def end_id(self) -> int:
        """Ids from `first_id` up to this one can be decoded; the embedding has more rows."""
        return self.first_id + len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of this text alone: no special token, whatever it contains."""
        ids = self._pieces.encode(text)
        return [id_ + self.first_id for id_ in ids] if self.first_id else ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of this text, then [gMASK] and <sop>, after which the model answers."""
        return self._as_prompt(self.encode(text))

    def _as_prompt(self, ids: list[int]) -> list[int]:
        return [*ids, self.gmask_id, self.bos_id]

    def encode_framed_prompt(self, parts: Sequence[Part], labels: re.Pattern[str]) -> list[int]:
        """Ids of a prompt in which no content can make a line that begins with one of the frames' labels.

        Where no content tries, they are the ids of the joined text.
        """
        ids = without_forged_lines(
            self.encode(joined(parts)),
            parts,
            labels,
            newline_id=self._newline_id,
            space_id=self._space_id,
            text_of=self.decode,
        )
        return self._as_prompt(self.encode(joined(tuple(flattened(parts)))) if ids is None else ids)

    @cached_property
    def _newline_id(self) -> int:
        """-1: a text's newlines leave no id of their own."""
        pieces = self._pieces
        ids = [pieces.id_of(NEWLINE), *(index for index, byte in enumerate(self.byte_values) if byte == 0x0A)]
        return self.first_id + next((id_ for id_ in ids if id_ is not None), -1 - self.first_id)

    @cached_property
    def _space_id(self) -> int:
        return self.first_id + _piece_id(self._pieces, _SPACE_MARK)

    def build_prompt(self, query: str, history: Iterable[tuple[str, str]] = ()) -> list[int]:
        """Ids of the prompt for `query` after these turns (question, answer), oldest first."""
        return self.encode_framed_prompt(chat_parts(query, tuple(history)), ROUND_LABELS)

    def layout(self, prompt_ids: Sequence[int]) -> AnyLayout:
        """Where the parts of this prompt lie. Raises ValueError when the model cannot run it."""
        return Layout.of_prompt(prompt_ids, bos_id=self.bos_id, gmask_id=self.gmask_id, mask_id=self.mask_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. Raises ValueError for an id that no piece has.

        Control tokens leave nothing, an unknown piece leaves " ⁇ ", a byte outside a character U+FFFD; then
        `clean_up_spaces`.
        """
        joiner = PieceJoiner(self)
        text = "".join([joiner.add(id_) for id_ in ids]) + joiner.finish()
        return clean_up_spaces(text) if self.cleans_up_spaces else text

    def process_response(self, text: str) -> str:
        """The model card's clean-up of a decoded answer."""
        return process_response(text) if self.widens_marks else trim_response(text)


class ChatGLM2Tokenizer(Tokenizer):
    """ChatGLM2-6B's: special tokens are no pieces but ids after the last one, and they come first in a prompt."""

    model_file = "tokenizer.model"
    cleans_up_spaces = False
    widens_marks = False

    def __init__(self, pieces: PieceModel, special_ids: dict[str, int] | None = None) -> None:
        self._pieces = pieces
        self.first_id = 0
        self.mask_id, self.gmask_id, self.smask_id, self.bos_id, self.eop_id = range(
            len(pieces), len(pieces) + len(_ADDED)
        )
        self.eos_id = self._special("</s>", "eos", special_ids or {})
        self.pad_id, self.removed_id = 0, -1  # the unknown piece's, which is decoded as that
        # Control and unknown pieces, and the added ids, leave nothing at all.
        self.surfaces = (
            *("" if kind is PieceType.UNKNOWN else _surface(text, kind) for text, kind in pieces.pieces),
            *("" for _ in _ADDED),
        )
        self.byte_values = (*_byte_values(pieces), *(-1 for _ in _ADDED))
        self._set_space_rules()

    @property
    def end_id(self) -> int:
        return len(self.surfaces)

    def _as_prompt(self, ids: list[int]) -> list[int]:
        """[gMASK] and sop come first."""
        return [self.gmask_id, self.bos_id, *ids]

    def build_prompt(self, query: str, history: Iterable[tuple[str, str]] = ()) -> list[int]:
        return self.encode_framed_prompt(rounds_parts(query, tuple(history)), ROUND_LABELS)

    def layout(self, prompt_ids: Sequence[int]) -> AnyLayout:
        """Raises ValueError for an empty prompt."""
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        return CausalLayout()


_ADDED: Final = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class PieceJoiner:
    """Ids to text one by one, as sentencepiece joins pieces; bytes are held back until they make a character."""

    __slots__ = (
        "_byte_values",
        "_bytes",
        "_first_id",
        "_is_at_start",
        "_removed_id",
        "_surfaces",
        "_tokenizer",
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._surfaces = tokenizer.surfaces
        self._byte_values = tokenizer.byte_values
        self._first_id = tokenizer.first_id
        self._removed_id = tokenizer.removed_id
        self._bytes = b""
        self._is_at_start = tokenizer.strips_first_space

    def add(self, id_: int) -> str:
        """The text that has become certain with this id. Raises ValueError for an id that no piece has."""
        piece = id_ - self._first_id
        if not 0 <= piece < len(self._surfaces):
            raise ValueError(f"id {id_} is no token of this model")
        if id_ == self._removed_id:
            return ""  # removed before anything is joined: bytes on its two sides can make one character
        byte = self._byte_values[piece]
        if byte >= 0:
            self._is_at_start = False
            text, self._bytes = split_utf8(self._bytes + bytes((byte,)))
            return text
        text = self._surfaces[piece]
        if self._is_at_start and text:
            # The space that stands before the first word is no part of the text.
            if piece in self._tokenizer.starts_with_space:
                text = text.removeprefix(" ")
            self._is_at_start = self._tokenizer.strips_all_first_spaces and not text
        if self._bytes:
            text = REPLACEMENT * len(self._bytes) + text
            self._bytes = b""
        return text

    def finish(self) -> str:
        """What is still held back, once no more ids come."""
        text = REPLACEMENT * len(self._bytes)
        self._bytes = b""
        return text


def split_utf8(data: bytes) -> tuple[str, bytes]:
    """(text that is certain, bytes at the end that may still become a character).

    Each byte that can belong to no character becomes one U+FFFD, as in sentencepiece.
    """
    out = []
    while data:
        length = _sequence_len(data[0])
        try:
            out.append(data[:length].decode("utf-8"))
        except UnicodeDecodeError as error:
            if length and len(data) < length and error.reason == "unexpected end of data":
                break
            out.append(REPLACEMENT)
            length = 1
        data = data[length:]
    return "".join(out), data


def _sequence_len(lead: int) -> int:
    """Bytes of the character that begins with this byte; 1 for a byte that begins none."""
    if lead < 0xC0:
        return 1
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


# --- the model card's chat -------------------------------------------------------------------------------------------


ROUND_LABELS: Final = re.compile(r"\[\s*Round\b|问\s*[:：]|答\s*[:：]", re.IGNORECASE)
"""How the lines of a round begin."""


def chat_parts(query: str, history: Sequence[tuple[str, str]]) -> list[Part]:
    """The text of a prompt: the query itself, or all turns in ChatGLM's rounds."""
    if not history:
        # Without rounds there is nothing to forge: as the model card's chat has it.
        return [frame(query)]
    parts = []
    for index, (question, answer) in enumerate(history):
        parts += [
            frame(f"[Round {index}]\n问："),
            content(question),
            frame("\n答："),
            content(answer),
            frame("\n"),
        ]
    return [*parts, frame(f"[Round {len(history)}]\n问："), content(query), frame("\n答：")]


def rounds_parts(query: str, history: Sequence[tuple[str, str]]) -> list[Part]:
    """The text of a ChatGLM2-6B prompt: rounds count from 1, and the first question has one too."""
    parts = []
    for index, (question, answer) in enumerate(history, 1):
        parts += [
            frame(f"[Round {index}]\n\n问："),
            content(question),
            frame("\n\n答："),
            content(answer),
            frame("\n\n"),
        ]
    return [*parts, frame(f"[Round {len(history) + 1}]\n\n问："), content(query), frame("\n\n答：")]


def chat_text(query: str, history: Sequence[tuple[str, str]]) -> str:
    """`chat_parts` as one text."""
    return joined(chat_parts(query, history))


def rounds_text(query: str, history: Sequence[tuple[str, str]]) -> str:
    """`rounds_parts` as one text."""
    return joined(rounds_parts(query, history))


def clean_up_spaces(text: str) -> str:
    """transformers' `clean_up_tokenization`, which ChatGLM-6B's tokenizer applies to what it decodes."""
    for before, after in _CLEAN_UP:
        text = text.replace(before, after)
    return text


# The order matters: " ' " may leave a space before what is a contraction then.
_CLEAN_UP: Final = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def is_cjk(character: str) -> bool:
    """Whether it is one of the Chinese characters that widen a mark beside them. False for ""."""
    return "\u4e00" <= character <= "\u9fff"


def widen_marks(text: str) -> str:
    """ASCII marks beside a Chinese character become full-width ones."""
    return _MARKS_BESIDE_CJK.sub(lambda match: _FULL_WIDTH[match[0]], text)


def trim_response(text: str) -> str:
    """ChatGLM2-6B's clean-up of a decoded answer."""
    return text.strip().replace(TRAINING_TIME, TRAINING_TIME_TEXT)


def process_response(text: str) -> str:
    """ChatGLM-6B's clean-up of a decoded answer."""
    return widen_marks(trim_response(text))


def _surface(text: str, kind: PieceType) -> str:
    if kind in (PieceType.CONTROL, PieceType.BYTE):
        return ""
    if kind is PieceType.UNKNOWN:
        return UNKNOWN_TEXT
    if kind is PieceType.USER_DEFINED and (white_space := white_space_of(text)) is not None:
        return white_space
    return text.replace(_SPACE_MARK, " ")


def _byte_values(pieces: PieceModel) -> tuple[int, ...]:
    return tuple(int(text[3:-1], 16) if kind is PieceType.BYTE else -1 for text, kind in pieces.pieces)


def _piece_id(pieces: PieceModel, text: str) -> int:
    piece_id = pieces.id_of(text)
    if piece_id is None:
        raise ValueError(f"the model file has no piece {text}")
    return piece_id
