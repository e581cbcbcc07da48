"""What a weight file says it holds, checked before anything of that size is allocated. Needs no torch.

`read_directory` takes the header of a safetensors file, or the archive of a `.bin` file and the pickle in it, apart by
itself: nothing in the file is executed, and every size in it is held against the size of the file.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from workers.models.config import CheckpointError, unique_keys
from workers.models.state_pickle import PickledTensor, StatePickleError, read_state

# A 6B checkpoint's header has 60 kB; the format allows 100 MB, which would take seconds and gigabytes to parse.
MAX_HEADER_BYTES: Final = 16 << 20
MAX_DIMENSIONS: Final = 8

_SAFETENSORS_DTYPES: Final = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that a file holds. All its bytes are in the file."""

    dtype: str
    """torch's name for it: "float16"."""
    shape: tuple[int, ...]
    nbytes: int


def read_directory(path: Path) -> dict[str, TensorEntry]:
    """The tensors in this safetensors or `.bin` file, by name.

    Raises CheckpointError, which says what is wrong: the file is truncated, a tensor lies outside it or overlaps
    another one, it would execute something, or it is no such file at all.
    """
    size = regular_file_size(path)
    if path.suffix == ".safetensors":
        return _safetensors_directory(path, size)
    return _bin_directory(path, size)


def file_in_folder(folder: Path, name: str, named_by: Path) -> Path:
    """The file of this name in a checkpoint's folder. `named_by` is the file that names it, for messages.

    Raises CheckpointError when the name or a link leads out of the folder: what names it is data from elsewhere, and
    must not make us read any other file. The store of a download cache, `snapshots/<revision>` with links to
    `blobs/<hash>`, counts as the folder.
    """
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise CheckpointError(
            named_by, f"it names {_short(name)}, which is not a file of this folder", "Download it again"
        )
    path = folder / name
    inside = folder.resolve()
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(
            path, f"the file does not exist, but {named_by.name} names it", "Download it into the folder"
        ) from None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # such as a link to itself, or a name that is no text
        raise CheckpointError(path, f"the file cannot be read ({error})", "Download it again") from error
    store = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    if not target.is_relative_to(inside) and not target.is_relative_to(store):
        raise CheckpointError(
            path, "it is a link that leads out of the folder", "Copy the file itself into the folder"
        )
    regular_file_size(path)
    return path


def regular_file_size(path: Path) -> int:
    """Bytes of this file. Raises CheckpointError when there is none, or when it is a pipe or a device, which would block."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise CheckpointError(path, "the file does not exist", "Download it into the folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"the file cannot be read ({error})", "Check its permissions") from error
    if not path.is_file():
        raise CheckpointError(path, "it is not a regular file", "Replace it by the checkpoint's own file")
    return size


# --- safetensors: 8 bytes of header length, a JSON header, the data --------------------------------------------------


def _safetensors_directory(path: Path, size: int) -> dict[str, TensorEntry]:
    header, header_len = _safetensors_header(path, size)
    data_size = size - 8 - header_len
    header.pop("__metadata__", None)
    spans = []
    entries = {}
    for name, fields in header.items():
        entry, begin = _safetensors_entry(path, name, fields)
        entries[name] = entry
        spans.append((begin, begin + entry.nbytes, name))
    end = 0
    for begin, next_end, name in sorted(spans):
        if begin != end:
            what = (
                "overlaps another tensor" if begin < end else f"leaves {begin - end} bytes unused before it"
            )
            _refuse(path, f"{name} {what} (its data_offsets begin at {begin}, not {end})")
        end = next_end
    if end > data_size:
        _refuse(path, f"it is truncated: its tensors need {end} bytes, and it has {data_size}")
    if end < data_size:
        _refuse(path, f"{data_size - end} bytes at its end belong to no tensor")
    return entries


def _safetensors_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        prefix = file.read(8)
        header_len = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_len > size - 8:
            _refuse(path, f"it is truncated: {size} bytes do not hold its header of {header_len} bytes")
        if header_len > MAX_HEADER_BYTES:
            _refuse(path, f"its header has {header_len} bytes, and {MAX_HEADER_BYTES} are the limit")
        text = file.read(header_len)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not valid JSON ({error})")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    return header, header_len


def _safetensors_entry(path: Path, name: str, fields: object) -> tuple[TensorEntry, int]:
    """The entry of this tensor, and where its bytes begin in the data."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{name} does not have exactly dtype, shape and data_offsets")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in _SAFETENSORS_DTYPES:
        _refuse(path, f"{name} has the unknown dtype {_short(fields['dtype'])}")
    dtype, item_size = _SAFETENSORS_DTYPES[fields["dtype"]]
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(path, f"{name} has the shape {_short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"{name} has the data_offsets {_short(offsets)}")
    begin, end = offsets
    nbytes = math.prod(shape) * item_size
    if end - begin != nbytes:
        _refuse(path, f"{name} has {end - begin} bytes, but its shape {shape} in {dtype} needs {nbytes}")
    return TensorEntry(dtype, tuple(shape), nbytes), begin


def _are_sizes(values: object) -> bool:
    """Whether it is a list of integers that can be sizes in a file."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


# --- .bin: a zip archive of torch.save -------------------------------------------------------------------------------


def _bin_directory(path: Path, size: int) -> dict[str, TensorEntry]:
    prefix, records = _bin_records(path, size)
    pickle_name = f"{prefix}data.pkl"
    if records[pickle_name] > MAX_HEADER_BYTES:
        _refuse(path, f"its pickle has {records[pickle_name]} bytes, and {MAX_HEADER_BYTES} are the limit")
    try:
        with zipfile.ZipFile(path) as archive:
            state = read_state(archive.read(pickle_name))
    except StatePickleError as error:
        raise CheckpointError(
            path,
            f"it is not weights alone: {error}",
            "Use the safetensors version, or save its state_dict anew",
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error
    entries = {}
    for name, tensor in state.items():
        stored = records.get(f"{prefix}data/{tensor.storage_key}")
        if stored is None:
            _refuse(path, f"the data of {name} is missing")
        if stored != tensor.storage_nbytes:
            _refuse(
                path, f"{name} says that its storage has {tensor.storage_nbytes} bytes, and it has {stored}"
            )
        entries[name] = _bin_entry(path, name, tensor)
    return entries


def _bin_entry(path: Path, name: str, tensor: PickledTensor) -> TensorEntry:
    shape, stride = tensor.shape, tensor.stride
    numel = math.prod(shape)
    num_stored = tensor.storage_nbytes // tensor.item_size
    reach = tensor.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # A stride of 0 makes many elements of one: nothing that was trained has it, and it makes a small file a huge tensor.
    if len(shape) > MAX_DIMENSIONS or numel > num_stored or (numel and reach >= num_stored):
        _refuse(path, f"{name} of shape {_short(list(shape))} reaches beyond its {num_stored} stored values")
    return TensorEntry(tensor.dtype, shape, numel * tensor.item_size)


def _bin_records(path: Path, size: int) -> tuple[str, dict[str, int]]:
    """(name of the archive's one folder with its slash, bytes of each record), all of them stored uncompressed."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        # The end record must be the file's last bytes: readers that search for another one would see another archive.
        file.seek(max(0, size - 22))
        tail = file.read(22)
    if not is_zip:
        raise CheckpointError(
            path,
            "it is no archive of torch.save",
            "It may be incomplete: download it again. A file from before torch 1.6 has to be saved anew",
        )
    if len(tail) < 22 or not tail.startswith(b"PK\x05\x06") or not tail.endswith(b"\0\0"):
        _refuse(path, "it is truncated: the archive has no end record")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:
        raise _unreadable(path, error) from error
    records: dict[str, int] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            _refuse(path, f"its record {_short(info.filename)} is compressed, which torch.save never does")
        if info.filename in records:
            _refuse(path, f"it has two records {_short(info.filename)}")
        records[info.filename] = info.file_size
    if sum(records.values()) > size:
        _refuse(path, f"its records claim {sum(records.values())} bytes, and it has {size}")
    return _archive_folder(path, records), records


def _archive_folder(path: Path, names: Iterable[str]) -> str:
    folders = {name.partition("/")[0] for name in names}
    pickles = [name for name in names if name.partition("/")[2] == "data.pkl"]
    if len(folders) != 1 or len(pickles) != 1:
        _refuse(path, "it is not an archive of torch.save: it has no data.pkl in its only folder")
    return f"{folders.pop()}/"


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(path, problem, "The file is incomplete or was tampered with: download it again")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """zipfile raises a dozen types for archives that are none."""
    return CheckpointError(
        path, f"the archive cannot be read ({type(error).__name__}: {error})", "Download it again"
    )


def _short(value: object) -> str:
    """A value from the file for a message: never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
