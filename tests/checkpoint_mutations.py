"""Damages checkpoints and adapters in every way it can think of, and loads them: `python -m tests.checkpoint_mutations`.

Each case is known by its number, which decides everything. A case ends well when it loads, or when it is refused with this
project's error. Run as a program it prints a line a case, so that whoever started it knows the case that it died of.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

SECONDS_PER_CASE = 20
MEMORY_BYTES = 3 << 30
"""Beyond what the process has once everything is imported."""

NOT_A_NUMBER = struct.pack("<f", float("nan"))

Mutation = Callable[[random.Random, bytes], bytes]

# --- damage ----------------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 127, 128, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, float("nan"),
    float("inf"), "", "F16", "F32", "I8", "float16", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\0", "\ud800", [], {},
    [0], [[]], [0, 2**62], [2**40, 2**40], [-1, -1], {"a": {}}, [[[[[[[[1]]]]]]]],
)  # fmt: skip
TEXTS = (
    "ﬁ ﬂ ½ ㎏ ① Ⅳ ｶﾞ 　 \u00a0 ﷺ 한 \u1112\u1161\u11ab Ａ１ … ％ ™ ª",
    "".join(map(chr, range(0x2100, 0x2200))),
    "".join(map(chr, range(0xFF00, 0xFFF0))),
    "".join(map(chr, range(0x3300, 0x3400))),
    "".join(map(chr, range(0xA0, 0x180))) + "\U0001d400\U0002f800\U0001f600",
)
"""Characters that the normalizer has rules for."""
HOSTILE_PICKLES = (
    b"cos\nsystem\nX\x0e\0\0\0touch IT-RAN-42\x85R0",
    b"c__builtin__\nexec\nX\x18\0\0\0open('IT-RAN-42', 'w')   \x85R0",
    b"cbuiltins\ngetattr\n0",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x0ftouch IT-RAN-42\x85R0",
    b"ctorch\nload\nX\x04\0\0\0evil\x85R0",
    b"ctorch.hub\nload\nX\x04\0\0\0evil\x85R0",
)


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_bits_near_the_start(rng: random.Random, data: bytes) -> bytes:
    """Where headers are."""
    near = min(len(data), rng.choice((16, 256, 4096)))
    return flip_bits(rng, data[:near]) + data[near:]


def flip_bits_near_the_end(rng: random.Random, data: bytes) -> bytes:
    """Where an archive has its directory."""
    near = min(len(data), rng.choice((32, 256, 4096)))
    return data[:-near] + flip_bits(rng, data[-near:])


def overwrite_number(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "little", "big")))
    limit = max(1, min(len(data) - size, rng.choice((64, 1024, len(data)))))
    start = rng.choice((rng.randrange(limit), max(0, len(data) - size - rng.randrange(limit))))
    return data[:start] + value + data[start + size :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), rng.randrange(min(64, len(data))), len(data) - 1))]


def cut_out(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 8, 100, 1000)) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice((1, 2, 8, 100, 1000))) + data[start:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return (
        data[:start] + data[start : start + rng.choice((4, 50, 500))] * rng.choice((2, 3, 20)) + data[start:]
    )


def swap(rng: random.Random, data: bytes) -> bytes:
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    size = min(rng.choice((4, 50, 500)), second - first)
    return (
        data[:first]
        + data[second : second + size]
        + data[first + size : second]
        + data[first : first + size]
        + data[second + size :]
    )


def replace_all(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"", b"\0", b"null", b"PK\x03\x04", bytes(4096), rng.randbytes(4096), b"{" * 4096))


ANY_FILE: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits_near_the_start,
    flip_bits_near_the_end,
    overwrite_number,
    overwrite_number,
    truncate,
    cut_out,
    insert,
    repeat,
    swap,
    replace_all,
)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Other values, other keys, keys twice: still JSON, mostly."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holders = list(_containers(document))
        holder, key = rng.choice(holders)
        action = rng.randrange(6)
        if action <= 2:
            holder[key] = rng.choice(JSON_VALUES)
        elif action == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, -8, 8, 1000))
        elif action == 4 and isinstance(holder, dict):
            holder[rng.choice(("", "w", key + "x", key.upper()))] = holder.pop(key)
        else:
            del holder[key]
        if not document:
            break
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    if rng.randrange(8) == 0 and text.startswith(b"{"):
        text = b'{"hidden_size": 1, "r": 1, "__metadata__": {}, ' + text[1:]
    return text


def _containers(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a document."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += _containers(inner)
    return found


def change_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, of a right length or not."""
    (length,) = struct.unpack("<Q", data[:8])
    header = change_json(rng, data[8 : 8 + length])
    claimed = len(header) if rng.randrange(6) else rng.choice(NUMBERS)
    return struct.pack("<Q", claimed % 2**64) + header + data[8 + length :]


def change_archive(rng: random.Random, data: bytes) -> bytes:
    """A `.bin` with other records and right checksums, so that the damage gets past the archive's own checks."""
    out = BytesIO()
    compression = zipfile.ZIP_DEFLATED if rng.randrange(12) == 0 else zipfile.ZIP_STORED
    with zipfile.ZipFile(BytesIO(data)) as archive, zipfile.ZipFile(out, "w", compression) as changed:
        names = archive.namelist()
        victim = rng.choice(names)
        target = next(name for name in names if name.endswith("/data.pkl"))
        for name in names:
            content = archive.read(name)
            if name == target and rng.randrange(4):
                content = change_pickle(rng, content)
            elif name == victim:
                if rng.randrange(4) == 0:
                    continue
                content = rng.choice(ANY_FILE)(rng, content or b"\0")
                if rng.randrange(4) == 0:
                    name = rng.choice(("archive/../x", "/abs", "data.pkl", names[0], name + "0"))  # noqa: PLW2901
            changed.writestr(name, content)
    return out.getvalue()


def change_pickle(rng: random.Random, data: bytes) -> bytes:
    action = rng.randrange(5)
    if action == 0:  # something to be executed, where an instruction may stand
        start = rng.choice((2, len(data) - 1))
        return data[:start] + rng.choice(HOSTILE_PICKLES) + data[start:]
    if action == 1:  # another number for one of the small ones
        places = [index for index, byte in enumerate(data[:-2]) if byte in b"KM"]
        start = rng.choice(places or [0])
        return data[: start + 1] + bytes((rng.choice((0, 1, 255)),)) + data[start + 2 :]
    if action == 2:  # an instruction for another
        out = bytearray(data)
        out[rng.randrange(len(out))] = rng.choice(
            b"0123RbcCdeghijKJMoOpPqQrstuUVXZ]a})(.\x85\x86\x87\x88\x89\x8a\x8b\x93\x95"
        )
        return bytes(out)
    return rng.choice((flip_bits, overwrite_number, cut_out, insert, repeat, swap))(rng, data)


def change_proto(rng: random.Random, data: bytes) -> bytes:
    """A sentencepiece model with damage inside one field: its message stays whole, so that sentencepiece reads it."""
    from workers.models.pieces import _fields

    fields = [(number, start, end) for number, _, start, end in _fields(data, 0, len(data))]
    # The normalizer's rules are one field among hundreds of pieces.
    _, start, end = rng.choice([rng.choice(fields), next(field for field in fields if field[0] == 3)])
    inner = [(first, last) for _, _, first, last in _fields(data, start, end) if last > first]
    first, last = rng.choice([rng.choice(inner), max(inner, key=lambda span: span[1] - span[0])])
    value = bytearray(data[first:last])
    for _ in range(rng.choice((1, 1, 4, 32))):
        size = min(len(value), rng.choice((1, 1, 4)))
        place = rng.randrange(len(value) - size + 1)
        near_start = rng.randrange(min(len(value) - size + 1, 2048))
        place = rng.choice((place, near_start))
        number_there = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        value[place : place + size] = rng.choice((number_there, rng.randbytes(size), NOT_A_NUMBER[:size]))
    return data[:first] + bytes(value) + data[last:]


# --- what is damaged -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Victim:
    """A file of a folder, and how it is loaded afterwards."""

    folder: str
    file: str
    mutations: tuple[Mutation, ...]
    load: Callable[[Path], None]


def load_checkpoint(folder: Path) -> None:
    from workers.models.config import ModelConfig
    from workers.models.loader import load_model
    from workers.models.tokenizer import Tokenizer

    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config=config)
    tokenizer = Tokenizer.from_folder(folder, config)
    _run(model, tokenizer)


def load_tokenizer(folder: Path) -> None:
    from workers.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.build_prompt("你好，Ａ① can't  \n\t<n> 🙂e\u0301", [("a", "b")])
    for text in TEXTS:
        tokenizer.encode(text)
    tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.first_id, min(tokenizer.end_id, tokenizer.first_id + 50)))


def load_adapter(folder: Path) -> None:
    from workers.models.config import ModelConfig
    from workers.models.loader import load_model

    load_model(folder.parent / "safetensors", config=_config(ModelConfig, folder), adapter=folder)


def _config(kind: Any, folder: Path) -> Any:
    return kind.from_folder(folder.parent / "safetensors")


def _run(model: Any, tokenizer: Any) -> None:
    """What loads must also run: one prompt through the network."""
    import torch

    from workers.models.prefill import pack_sequences

    ids = tokenizer.build_prompt("你好")
    if len(ids) > model.config.max_sequence_length:
        return  # an engine refuses what does not fit
    with torch.inference_mode():
        model.float()(pack_sequences([ids], [tokenizer.layout(ids)]))


VICTIMS = (
    Victim("safetensors", "model.safetensors", (*ANY_FILE, *[change_header] * 8), load_checkpoint),
    Victim("safetensors", "config.json", (*ANY_FILE[:4], *[change_json] * 8), load_checkpoint),
    Victim("safetensors", "ice_text.model", (*ANY_FILE, *[change_proto] * 16), load_tokenizer),
    Victim("bin", "pytorch_model.bin", (*ANY_FILE, *[change_archive] * 12), load_checkpoint),
    Victim("sharded", "model.safetensors.index.json", (*ANY_FILE[:4], *[change_json] * 8), load_checkpoint),
    Victim("sharded", "model-00002-of-00002.safetensors", (*ANY_FILE, *[change_header] * 8), load_checkpoint),
    Victim("int4", "model.safetensors", (*ANY_FILE, *[change_header] * 8), load_checkpoint),
    Victim("int4", "config.json", (*ANY_FILE[:4], *[change_json] * 8), load_checkpoint),
    Victim("second", "model.safetensors", (*ANY_FILE, *[change_header] * 8), load_checkpoint),
    Victim("second", "config.json", (*ANY_FILE[:4], *[change_json] * 8), load_checkpoint),
    Victim("second", "tokenizer.model", (*ANY_FILE, *[change_proto] * 16), load_tokenizer),
    Victim("adapter", "adapter_model.safetensors", (*ANY_FILE, *[change_header] * 8), load_adapter),
    Victim("adapter", "adapter_config.json", (*ANY_FILE[:4], *[change_json] * 8), load_adapter),
    Victim("adapter_bin", "adapter_model.bin", (*ANY_FILE, *[change_archive] * 12), load_adapter),
)


def write_folders(root: Path) -> None:
    """The sound checkpoints and adapters, one of each form."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.lora_adapter import write_adapter
    from tests.random_checkpoint import write_random_checkpoint, write_random_second_generation
    from workers.models.loader import load_model
    from workers.models.lora import linear_shapes
    from workers.models.quantized_checkpoint import write_quantized

    whole = root / "safetensors"
    write_random_checkpoint(whole, num_layers=2)
    state = load_file(whole / "model.safetensors")
    for name in ("bin", "sharded"):
        (root / name).mkdir()
        for file in ("config.json", "ice_text.model"):
            shutil.copy(whole / file, root / name)
    torch.save(state, root / "bin" / "pytorch_model.bin")
    weight_map = {}
    for number, keys in ((1, sorted(state)[::2]), (2, sorted(state)[1::2])):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, root / "sharded" / file)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    write_quantized(whole, root / "int4", 4)
    write_random_second_generation(root / "second")
    shapes = linear_shapes(load_model(whole))
    write_adapter(root / "adapter", shapes, rank_pattern={"query_key_value": 4}, use_rslora=True)
    write_adapter(root / "adapter_bin", shapes, as_bin=True)


def run_case(root: Path, number: int, only: str = "") -> str:
    """Damages, loads and mends again. "loaded" or "refused: ..."; raises whatever else happened."""
    from workers.models.config import CheckpointError

    rng = random.Random(number)
    victim = rng.choice([victim for victim in VICTIMS if only in victim.file])
    path = root / victim.folder / victim.file
    sound = path.read_bytes()
    data = sound
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = rng.choice(victim.mutations)(rng, data)
        except Exception:  # noqa: BLE001  (the second damage may find nothing left to be done)
            break
        if not data:
            break
    path.write_bytes(data)
    try:
        victim.load(root / victim.folder)
    except CheckpointError as error:
        return f"refused: {victim.file}: {str(error)[:100]!r}"
    finally:
        path.write_bytes(sound)
    return f"loaded: {victim.file}"


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", default="", metavar="TEXT", help="files whose names contain this")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    # A damaged value may overflow: that harms no one.
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="glmq-mutations-") as folder:
        root = Path(folder)
        os.chdir(root)
        write_folders(root)
        for victim in VICTIMS:
            victim.load(root / victim.folder)
        files = _files(root)
        _limit_memory()
        sys.addaudithook(_forbid)
        for number in range(options.first, options.first + options.count):
            faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
            print(f"case {number}", end=" ", flush=True)
            started = time.monotonic()
            outcome = run_case(root, number, options.only)
            print(f"{time.monotonic() - started:.3f} s {outcome}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        if _files(root) != files:
            raise AssertionError(f"files appeared: {_files(root) - files}")


def _files(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def _limit_memory() -> None:
    """An allocation that a file's claims alone would cause fails here, and with an error that is not ours."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "exec",
)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Whatever code in a file could do would pass here."""
    if event in FORBIDDEN and not (event == "exec" and _is_a_modules_code(arguments)):
        os.write(2, f"FORBIDDEN: {event} {arguments!r}\n".encode())
        os._exit(3)


def _is_a_modules_code(arguments: tuple[Any, ...]) -> bool:
    """Modules that are imported late run as code, too; a file's own code has no file of the installation."""
    name = getattr(arguments[0], "co_filename", "")
    return name.startswith((sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "<frozen"))


if __name__ == "__main__":
    main()
