"""Trains the demo checkpoint's `ice_text.model`: `python ops/demo_model/train_tokenizer.py [FOLDER]`.

A sentencepiece unigram model on the text of our own tasks, laid out as ChatGLM-6B's: text pieces first, then the control
pieces, tab and blanks, and the 256 bytes last (CHATGLM.md A8). The same text gives the same file.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ops.demo_model.tasks import mixture, questions, words  # noqa: E402

CHECKPOINT = ROOT / "workers" / "models" / "demo"
MODEL_FILE = "ice_text.model"

VOCAB_SIZE = 3584
"""Rows of the embedding, and pieces of the model file."""
CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
BLANKS = ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
NUM_BYTES = 256
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
"""sentencepiece_model.proto, ModelProto.SentencePiece.Type."""

NUM_EXAMPLES = 25_000
MAX_PIECE_LEN = 8
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    path.write_bytes(train())
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    print(f"{path}: {tokenizer.get_piece_size()} pieces, {path.stat().st_size} bytes")


def train() -> bytes:
    """The model file."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text("\n".join(_corpus()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=f"{folder}/ice_text",
            model_type="unigram",
            vocab_size=VOCAB_SIZE - len(CONTROLS) - len(BLANKS),
            max_sentencepiece_length=MAX_PIECE_LEN,
            character_coverage=1.0,
            user_defined_symbols=["<n>"],
            pad_id=3,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc",
            num_threads=1,
            minloglevel=1,
        )
        return lay_out((Path(folder) / "ice_text.model").read_bytes())


def _corpus() -> Iterator[str]:
    """Lines of examples, broken where a character is not ours: rare ones shall be spelled in bytes."""
    rng = random.Random(SEED)
    own = _own_characters()
    for _ in range(NUM_EXAMPLES):
        example = mixture.draw(rng)
        text = f"{example.prompt}\n{example.answer}"
        yield from filter(None, "".join(c if c in own else "\n" for c in text).splitlines())


def _own_characters() -> set[str]:
    """Every character of our questions, answers, values and reports."""
    found: set[str] = set("".join(map(chr, range(33, 127))))
    tasks = Path(questions.__file__).parent.glob("*.py")
    for path in (words.PATH, *questions.FOLDER.iterdir(), *tasks):
        found |= set(path.read_text(encoding="utf-8"))
    return found


# --- the model file --------------------------------------------------------------------------------------------------


def lay_out(model: bytes) -> bytes:
    """The model file with ChatGLM-6B's order of pieces."""
    pieces = [value for number, value in _fields(model) if number == 1 and isinstance(value, bytes)]
    rest = b"".join(_field(number, value) for number, value in _fields(model) if number != 1)
    kinds = [dict(_fields(piece)).get(3, NORMAL) for piece in pieces]
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind not in (NORMAL, BYTE)]
    normal = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == NORMAL]
    bytes_ = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == BYTE]
    if len(bytes_) != NUM_BYTES:
        raise ValueError(f"the model has {len(bytes_)} byte pieces, not {NUM_BYTES}")
    ordered = [
        *special,
        *normal,
        *(_piece(text, CONTROL) for text in CONTROLS),
        *(_piece(text, USER_DEFINED) for text in BLANKS),
        *bytes_,
    ]
    return b"".join(_field(1, piece) for piece in ordered) + rest


def _piece(text: str, kind: int) -> bytes:
    return _field(1, text.encode()) + _field(2, 0.0) + _field(3, kind)


Value = bytes | int | float


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field of a protocol buffer message: varints, 32-bit floats and bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: Value
            value, at = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            raise ValueError(f"a field of wire type {wire} is not expected in a sentencepiece model")
        yield number, value


def _field(number: int, value: Value) -> bytes:
    if isinstance(value, bytes):
        return _encoded(number << 3 | 2) + _encoded(len(value)) + value
    if isinstance(value, float):
        return _encoded(number << 3 | 5) + struct.pack("<f", value)
    return _encoded(number << 3) + _encoded(value)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


if __name__ == "__main__":
    main()
