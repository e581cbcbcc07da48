"""The pickle in a `.bin` file, read without unpickling it: which tensors are there, and where their values lie.

torch.save writes a table of names and tensors with few of pickle's instructions. Only those are followed here, on plain
values: nothing is imported or called, and a pickle that wants anything else is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_STORAGES: Final = {
    "torch HalfStorage": ("float16", 2),
    "torch BFloat16Storage": ("bfloat16", 2),
    "torch FloatStorage": ("float32", 4),
    "torch DoubleStorage": ("float64", 8),
    "torch CharStorage": ("int8", 1),
    "torch ByteStorage": ("uint8", 1),
    "torch BoolStorage": ("bool", 1),
    "torch ShortStorage": ("int16", 2),
    "torch IntStorage": ("int32", 4),
    "torch LongStorage": ("int64", 8),
}
_ORDERED_DICT: Final = "collections OrderedDict"
_TENSOR: Final = "torch._utils _rebuild_tensor_v2"
_PARAMETER: Final = "torch._utils _rebuild_parameter"
_GLOBALS: Final = {*_STORAGES, _ORDERED_DICT, _TENSOR, _PARAMETER}


class StatePickleError(ValueError):
    """The pickle is malformed, or it is more than a table of tensors."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it: a view of a storage. Sizes, offset and strides are not negative."""

    storage_key: str
    storage_nbytes: int
    dtype: str
    item_size: int
    """Bytes of one value."""
    offset: int
    """In values, as are the strides."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_state(data: bytes) -> dict[str, PickledTensor]:
    """The tensors of a state dict by name; entries that are no tensors are left out.

    Raises StatePickleError.
    """
    try:
        state = _Reader().run(data)
    except StatePickleError:
        raise
    # pickletools and the stack machine stumble over malformed data in many ways.
    except Exception as error:
        raise StatePickleError(f"the pickle is malformed ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise StatePickleError("it holds no table of tensors")
    return {name: value for name, value in state.items() if isinstance(value, PickledTensor)}


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    num_values: int
    dtype: str
    item_size: int


class _Mark:
    """Where a run of values begins on the stack."""


class _Reader:
    """pickle's stack machine, reduced to what state dicts are written with."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, argument)
            else:
                raise StatePickleError(f"it uses pickle's {opcode.name}, which no table of tensors needs")
        raise StatePickleError("the pickle has no end")

    def _skip(self, _: object) -> None:
        pass

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _global(self, name: str) -> None:
        if name not in _GLOBALS:
            raise StatePickleError(f"it wants to use {name.replace(' ', '.')[:80]!r}")
        self._stack.append(_Global(name))

    def _since_mark(self) -> list[Any]:
        values = []
        while not isinstance(value := self._stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def _tuple(self, _: object) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple_of(self, length: int) -> None:
        values = self._stack[-length:]
        if len(values) < length:
            raise StatePickleError("the pickle is malformed (its stack is empty)")
        self._stack[-length:] = [tuple(values)]

    def _append(self, _: object) -> None:
        value = self._stack.pop()
        self._list().append(value)

    def _appends(self, _: object) -> None:
        values = self._since_mark()
        self._list().extend(values)

    def _list(self) -> list[Any]:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise StatePickleError("the pickle is malformed (it appends to what is no list)")
        return target

    def _set_item(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_pairs([key, value])

    def _set_items(self, _: object) -> None:
        self._set_pairs(self._since_mark())

    def _set_pairs(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise StatePickleError("the pickle is malformed (it sets items of what is no table)")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Text only: the hash of a nested tuple can take forever.
            if not isinstance(key, str):
                raise StatePickleError(f"it has a key of type {type(key).__name__}, where names are expected")
            if key in target:
                raise StatePickleError(f"it has two entries {key[:80]!r}")
            target[key] = value

    def _build(self, _: object) -> None:
        """Attributes of an object, such as a state dict's `_metadata`: of no use here."""
        state = self._stack.pop()
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict):
            raise StatePickleError("it sets the state of what is no table")

    def _persistent(self, _: object) -> None:
        saved = self._stack.pop()
        match saved:
            case ("storage", _Global(name), str(key), str(), int(num_values)) if name in _STORAGES:
                if num_values < 0:
                    raise StatePickleError(f"it has a storage of {num_values} values")
                self._stack.append(_Storage(key, num_values, *_STORAGES[name]))
            case _:
                raise StatePickleError("it refers to something other than a storage of values")

    def _reduce(self, _: object) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        match function, arguments:
            case _Global("collections OrderedDict"), ():
                self._stack.append({})
            case _Global("torch._utils _rebuild_tensor_v2"), (
                _Storage() as storage,
                int(offset),
                tuple(shape),
                tuple(stride),
                bool(),
                *rest,
            ) if len(rest) <= 2:
                self._stack.append(_tensor(storage, offset, shape, stride))
            case _Global("torch._utils _rebuild_parameter"), (PickledTensor() as tensor, bool(), _):
                self._stack.append(tensor)
            case _:
                raise StatePickleError("it calls something that builds no tensor")


def _tensor(
    storage: _Storage, offset: int, shape: tuple[object, ...], stride: tuple[object, ...]
) -> PickledTensor:
    sizes = tuple(value for value in (*shape, *stride, offset) if type(value) is int and value >= 0)
    if len(sizes) != 2 * len(shape) + 1 or len(shape) != len(stride):
        raise StatePickleError("it has a tensor whose shape or strides are not sizes")
    return PickledTensor(
        storage.key,
        storage.num_values * storage.item_size,
        storage.dtype,
        storage.item_size,
        offset,
        sizes[: len(shape)],
        sizes[len(shape) : -1],
    )


_LITERALS: Final = {
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
}
_CONSTANTS: Final[dict[str, Callable[[], object]]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_INSTRUCTIONS: Final[dict[str, Callable[[_Reader, Any], None]]] = {
    "PROTO": _Reader._skip,
    "BINPUT": _Reader._put,
    "LONG_BINPUT": _Reader._put,
    "BINGET": _Reader._get,
    "LONG_BINGET": _Reader._get,
    "GLOBAL": _Reader._global,
    "TUPLE": _Reader._tuple,
    "TUPLE1": lambda reader, _: reader._tuple_of(1),
    "TUPLE2": lambda reader, _: reader._tuple_of(2),
    "TUPLE3": lambda reader, _: reader._tuple_of(3),
    "APPEND": _Reader._append,
    "APPENDS": _Reader._appends,
    "SETITEM": _Reader._set_item,
    "SETITEMS": _Reader._set_items,
    "BUILD": _Reader._build,
    "BINPERSID": _Reader._persistent,
    "REDUCE": _Reader._reduce,
}
