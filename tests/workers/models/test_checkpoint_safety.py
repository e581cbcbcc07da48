"""Weight files, indexes and configs made to harm whoever loads them: each is refused by name, and nothing of it runs."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workers.models.config import CheckpointError, ModelConfig, read_json
from workers.models.loader import load_model, weight_files
from workers.models.state_pickle import StatePickleError, read_state
from workers.models.tokenizer import Tokenizer
from workers.models.weight_file import TensorEntry, read_directory

TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write_safetensors(path: Path, header: object, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: object) -> dict[str, Any]:
    return {**TENSOR, **changes}


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_a_sound_file_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {"b": torch.ones(2, 3), "a": torch.ones(4, dtype=torch.float16)}, path, metadata={"format": "pt"}
    )
    assert read_directory(path) == {
        "b": TensorEntry("float32", (2, 3), 24),
        "a": TensorEntry("float16", (4,), 8),
    }


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"w": entry(data_offsets=[0, 2**62])}, r"w has \d+ bytes, but its shape"),
        ({"w": entry(shape=[2**40, 2**40], data_offsets=[0, 24])}, "w has 24 bytes, but its shape"),
        ({"w": entry(shape=[2**62, 4])}, "w has 24 bytes"),
        ({"w": entry(data_offsets=[-8, 16])}, "data_offsets"),
        ({"w": entry(data_offsets=[24, 0])}, "-24 bytes"),
        ({"w": entry(data_offsets=[0])}, "data_offsets"),
        ({"w": entry(shape=[2.0, 3])}, "the shape"),
        ({"w": entry(shape=[True, 6])}, "the shape"),
        ({"w": entry(shape=[1] * 9 + [6])}, "the shape"),
        ({"w": entry(shape="23")}, "the shape"),
        ({"w": entry(dtype="F1024")}, "unknown dtype 'F1024'"),
        ({"w": entry(dtype=["F32"])}, "unknown dtype"),
        ({"w": {"dtype": "F32", "shape": [2, 3]}}, "exactly dtype, shape and data_offsets"),
        ({"w": 7}, "exactly dtype, shape and data_offsets"),
        ({"w": TENSOR, "v": TENSOR}, "overlaps another tensor"),
        ({"w": TENSOR, "v": entry(data_offsets=[16, 40])}, "overlaps another tensor"),
        ({"w": entry(data_offsets=[24, 48])}, "leaves 24 bytes unused"),
        (
            {"w": TENSOR, "v": entry(data_offsets=[24, 48])},
            "truncated: its tensors need 48 bytes, and it has 24",
        ),
        ({}, "24 bytes at its end belong to no tensor"),
        ([], "not a JSON object"),
        (b'{"w": 1, "w": 2}', "'w' comes twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"w": "\xff"}', "not valid JSON"),
        (b'{"w": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, problem: str) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_directory(path)
    assert caught.value.path == str(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"w": TENSOR}, length=length)
    with pytest.raises(CheckpointError, match="truncated"):
        read_directory(path)


def test_an_enormous_header_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 33))
        file.truncate((1 << 33) + 100)  # sparse: it takes no space
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="its header has 8589934592 bytes"):
        read_directory(path)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("content", [b"", b"\0", b"\x08\0\0\0\0\0\0\0{}"])
def test_a_file_of_a_few_bytes_is_truncated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated"):
        read_directory(path)


# --- .bin ------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of this function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def write_bin(path: Path, data: bytes, **records: bytes) -> Path:
    """An archive as torch.save writes it, around this pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in records.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def tensor_pickle(shape: object, stride: object, *, offset: int = 0, numel: int = 6, key: str = "0") -> bytes:
    """The pickle of {"w": tensor} with whatever it is to claim."""
    return _StatePickler.dumps({"w": _Rebuild(shape, stride, offset, numel, key)})


class _Rebuild:
    def __init__(self, *claims: Any) -> None:
        self.claims = claims


class _StatePickler(pickle._Pickler):  # type: ignore[misc]  # the one in Python: its methods can be replaced
    @classmethod
    def dumps(cls, value: object) -> bytes:
        out = io.BytesIO()
        cls(out, protocol=2).dump(value)
        return out.getvalue()

    def persistent_id(self, value: object) -> object:
        if isinstance(value, tuple) and value[:1] == ("claimed",):
            _, numel, key = value
            return ("storage", torch.FloatStorage, key, "cpu", numel)
        return None

    def reducer_override(self, value: object) -> object:
        return NotImplemented

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Rebuild):
            shape, stride, offset, numel, key = value.claims
            rebuild = torch._utils._rebuild_tensor_v2
            arguments = (("claimed", numel, key), offset, shape, stride, False, collections.OrderedDict())
            self.save_reduce(rebuild, arguments)
        else:
            super().save(value, save_persistent_id)


def test_a_sound_bin_file_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    whole = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    state = collections.OrderedDict(w=whole, column=whole[:, 1], p=torch.nn.Parameter(torch.ones(2)), steps=7)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(state, path)
    assert read_directory(path) == {
        "w": TensorEntry("float16", (3, 4), 24),
        "column": TensorEntry("float16", (3,), 6),
        "p": TensorEntry("float32", (2,), 8),
    }


def test_the_claims_of_a_pickle_are_what_torch_would_read(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "pytorch_model.bin", tensor_pickle((2, 3), (3, 1)), _0=bytes(24))
    assert read_directory(path) == {"w": TensorEntry("float32", (2, 3), 24)}
    assert torch.load(path, weights_only=True)["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (tensor_pickle((2**40, 2**20), (0, 0)), "reaches beyond its 6 stored values"),
        (tensor_pickle((2, 3), (30, 1)), "reaches beyond"),
        (tensor_pickle((2, 3), (3, 1), offset=1), "reaches beyond"),
        (tensor_pickle((2, 3), (3, 1), offset=2**62), "reaches beyond"),
        (tensor_pickle((1,) * 9, (1,) * 9), "reaches beyond"),
        (tensor_pickle((2, 3), (3, 1), numel=2**40), "has 4398046511104 bytes, and it has 24"),
        (tensor_pickle((2, 3), (3, 1), key="1"), "the data of w is missing"),
        (tensor_pickle((2, 3), (3, 1), key="../version"), "the data of w is missing"),
        (tensor_pickle((-2, 3), (3, 1)), "not sizes"),
        (tensor_pickle((2, 3), (-3, 1)), "not sizes"),
        (tensor_pickle((2, 3), (1,)), "not sizes"),
        (tensor_pickle((2.0, 3), (3, 1)), "not sizes"),
        (tensor_pickle((2, 3), (3, 1), numel=-6), "a storage of -6 values"),
        (pickle.dumps([1, 2], 2), "no table of tensors"),
        (pickle.dumps({("a", "b"): 1}, 2), "a key of type tuple"),
        (pickle.dumps({"w": {1, 2}}, 2), "wants to use '__builtin__.set'"),
        (b"\x80\x02}q\x00.", None),
        (b"\x80\x02}X\x01\0\0\0wK\x01sX\x01\0\0\0wK\x02s.", "two entries 'w'"),
        (b"\x80\x02", "malformed"),
        (b"", "malformed"),
        (b"\x80\x02\x88a.", "malformed"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b"Q.", "something other than a storage"),
    ],
)
def test_a_pickle_that_lies_is_refused(tmp_path: Path, data: bytes, problem: str | None) -> None:
    path = write_bin(tmp_path / "pytorch_model.bin", data, _0=bytes(24))
    if problem is None:
        assert read_directory(path) == {}
        return
    with pytest.raises(CheckpointError, match=problem):
        read_directory(path)


def test_a_pickle_executes_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    for function, arguments in [
        (os.system, (f"touch {trace}",)),
        (exec, (f"open({str(trace)!r}, 'w')",)),
        (open, (str(trace), "w")),
        (getattr, ("text", "upper")),
    ]:
        for value in ({"w": Call(function, *arguments)}, Call(function, *arguments)):
            path = write_bin(tmp_path / "pytorch_model.bin", pickle.dumps(value, 2))
            with pytest.raises(CheckpointError, match="not weights alone: it wants to use"):
                read_directory(path)
    assert not trace.exists()


def test_a_key_whose_hash_takes_forever_is_not_hashed() -> None:
    # t = (t, t), forty times: 2**40 steps for hash().
    bomb = b"\x80\x02}" + b"K\x01" + b"q\x01h\x01\x86" * 40 + b"K\x00s."
    started = time.monotonic()
    with pytest.raises(StatePickleError, match="key of type tuple"):
        read_state(bomb)
    assert time.monotonic() - started < 1


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle((2, 3), (3, 1)))
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed, which torch"):
        read_directory(path)


def test_records_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """The overlapping kind of zip bomb: many entries of the directory for one stretch of the file."""
    path = write_bin(tmp_path / "pytorch_model.bin", tensor_pickle((2, 3), (3, 1)), _0=bytes(1000))
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    *records, end = content[start:].split(b"PK\x05\x06")
    directory = records[0]
    forged = b"".join(
        directory.replace(b"archive/data/0", f"archive/data/{number}".encode()) for number in range(1, 10)
    )
    count = 3 * 10
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory + forged), start, 0)
    path.write_bytes(content[:start] + directory + forged + tail)
    with pytest.raises(CheckpointError, match=r"two records|claim"):
        read_directory(path)
    assert end


@pytest.mark.parametrize("cut", [1, 22, 100, 500])
def test_a_truncated_archive_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_bin(tmp_path / "pytorch_model.bin", tensor_pickle((2, 3), (3, 1)), _0=bytes(24))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_directory(path)


def test_an_archive_behind_something_else_or_before_it_is_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "pytorch_model.bin", tensor_pickle((2, 3), (3, 1)), _0=bytes(24))
    content = path.read_bytes()
    path.write_bytes(b"#!/bin/sh\n" + content)
    with pytest.raises(CheckpointError, match="no archive of torch"):
        read_directory(path)
    path.write_bytes(content + b"more")
    with pytest.raises(CheckpointError, match="no end record"):
        read_directory(path)


def test_a_bare_pickle_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6"):
        read_directory(path)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_checkpoint: Path, copy_of: Callable[[Path], Path]) -> Path:
    return copy_of(tiny_checkpoint)


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        load_model(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "a.safetensors").symlink_to("../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        load_model(folder)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(folder)
    load_model(tmp_path / "link")


def test_the_store_of_a_download_cache_is_followed(folder: Path, tmp_path: Path) -> None:
    store, snapshot = tmp_path / "models" / "blobs", tmp_path / "models" / "snapshots" / "abc"
    store.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(store / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    load_model(snapshot)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.safetensors", "a/b.safetensors", "..", "", "a\0b", "./x"]
)
def test_an_index_names_files_of_the_folder_alone(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["config.json", "ice_text.model", "weights.safetensors"])
def test_a_pipe_in_the_place_of_a_file_does_not_block(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "weights.safetensors"}}')
    (folder / name).unlink()
    os.mkfifo(folder / name)

    def load() -> None:
        Tokenizer.from_folder(folder)
        load_model(folder)

    with pytest.raises(CheckpointError, match="not a regular file"):
        load()


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / "a.safetensors").symlink_to("a.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        weight_files(folder)


def test_a_tokenizer_of_one_endless_number_is_refused_at_once(folder: Path) -> None:
    (folder / "ice_text.model").write_bytes(b"\xff" * 10_000_000)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        Tokenizer.from_folder(folder)
    assert time.monotonic() - started < 1


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("hidden_size", 2**40),
        ("vocab_size", 10**12),
        ("max_sequence_length", 10**12),
        ("num_attention_heads", 2**31),
        ("inner_hidden_size", 2**62),
        ("layernorm_epsilon", float("inf")),
        ("layernorm_epsilon", float("nan")),
        ("layernorm_epsilon", 10**400),
        ("torch_dtype", ["float16"]),
        ("torch_dtype", "x" * 10**6),
    ],
)
def test_a_size_that_would_exhaust_memory_is_named(folder: Path, field: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=field) as caught:
        ModelConfig.from_folder(folder)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a": 1, "a": 2}', b'{"a": ' + b"9" * 5000 + b"}", b"\xff{}"]
)
def test_json_that_would_break_its_reader_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path, "it is needed")


def test_an_enormous_json_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="more than 16777216 bytes"):
        read_json(path, "it is needed")
