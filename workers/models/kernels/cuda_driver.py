"""CUDA kernels without a compiler on the machine: NVRTC, which comes with torch, builds them, the driver runs them.

Builds are kept on disk, so only the first start on a machine waits for them. Knows nothing about what a kernel computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

SOURCE_FOLDER: Final = Path(__file__).parent / "cuda"

_STRUCT_CODES: Final = {"p": "P", "i": "i", "l": "q", "f": "f", "m": "128s"}
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE, _PARAM_END = 1, 2, 0
_PROGRAMMATIC_STREAM_SERIALIZATION: Final = 6
_MAX_DYNAMIC_SHARED_SIZE_BYTES: Final = 8
_UNASKED_SHARED_BYTES: Final = 40 * 1024
"""A block may have 48 KiB, static and dynamic together, without being allowed to."""


class CudaUnavailableError(RuntimeError):
    """Kernels cannot be built or loaded here; the message says why. Callers fall back to PyTorch."""


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaUnavailableError(f"the CUDA driver cannot be loaded ({error})") from error


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The run-time compiler in torch's dependencies, else in the library path."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    packaged = (
        path
        for folder in sys.path
        for layout in (f"nvidia/cu{major}/lib", "nvidia/cuda_nvrtc/lib")
        if (path := Path(folder) / layout / name).is_file()
    )
    for candidate in (*map(str, packaged), name):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(candidate)
    raise CudaUnavailableError(
        f"{name} is not there: it comes with the package nvidia-cuda-nvrtc, which torch installs"
    )


def check() -> None:
    """Raises CudaUnavailableError when kernels cannot be built or run here."""
    _driver()
    _nvrtc()


def _check(code: int, action: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{action}: CUDA error {code} ({(text.value or b'unknown').decode()})")


def _check_nvrtc(code: int, action: str) -> None:
    if code:
        nvrtc = _nvrtc()
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CudaUnavailableError(f"{action}: {nvrtc.nvrtcGetErrorString(code).decode()}")


def architecture(capability: tuple[int, int]) -> str:
    """The name that NVRTC has for a device of this compute capability: sm_90a for a Hopper GPU."""
    major, minor = capability
    return "sm_90a" if capability == (9, 0) else f"sm_{major}{minor}"


def cache_folder() -> Path:
    """Where builds are kept: `$XDG_CACHE_HOME/glmq/kernels`, `~/.cache/glmq/kernels` without that variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glmq" / "kernels"


@functools.cache
def _sources() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCE_FOLDER.glob("*.cu*"))}


def compile_source(source: str, defines: dict[str, int | str], arch: str) -> bytes:
    """The cubin of `cuda/<source>` with these macros for this architecture. Needs no GPU.

    Raises CudaUnavailableError with the compiler's log.
    """
    nvrtc = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    _check_nvrtc(nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1])), "nvrtcVersion")
    headers = {name: text for name, text in _sources().items() if name.endswith(".cuh")}
    text = (
        "".join(f"#define {name} {value}\n" for name, value in sorted(defines.items())) + _sources()[source]
    )
    identity = repr((text, headers, arch, version[0].value, version[1].value))
    path = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()

    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    bodies = (ctypes.c_char_p * len(headers))(*(body.encode() for body in headers.values()))
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), source.encode(), len(headers), bodies, names
        ),
        source,
    )
    try:
        options = [f"--gpu-architecture={arch}", "--std=c++17", "--use_fast_math"]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        if code:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaUnavailableError(f"{source} does not compile for {arch}: {log.value.decode()}")
        size = ctypes.c_size_t()
        _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), source)
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, cubin), source)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    # A read-only home is no reason to fail: the next start compiles again.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin.raw)
        Path(file.name).replace(path)
    return cubin.raw


@dataclass(eq=False)
class Kernel:
    """One function of `cuda/<source>`, built with these macros on its first use.

    arguments: one letter each: p (pointer), i (int32), l (int64), f (float), m (tensor map). shared_bytes: dynamic shared
    memory.
    """

    source: str
    function: str
    arguments: str
    defines: dict[str, int | str]
    num_threads: int
    shared_bytes: int = 0
    _handles: dict[int, ctypes.c_void_p] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def build(self, device: torch.device | None = None) -> None:
        """Compiles, unless that was done before, so that `launch` need not."""
        compile_source(self.source, self.defines, architecture(torch.cuda.get_device_capability(device)))

    def _handle(self, device: int) -> ctypes.c_void_p:
        with self._lock:
            handle = self._handles.get(device)
            if handle is None:
                driver = _driver()
                cubin = compile_source(
                    self.source, self.defines, architecture(torch.cuda.get_device_capability(device))
                )
                torch.cuda.synchronize(device)  # torch's context of this device becomes the current one
                module, handle = ctypes.c_void_p(), ctypes.c_void_p()
                _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), self.source)
                name = self.function.encode()
                _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, name), self.function)
                if self.shared_bytes > _UNASKED_SHARED_BYTES:
                    code = driver.cuFuncSetAttribute(
                        handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared_bytes
                    )
                    _check(code, f"{self.shared_bytes} bytes of shared memory for {self.function}")
                self._handles[device] = handle
            return handle

    def load(self, device: torch.device) -> None:
        """Compiles and loads: must have happened before a CUDA graph is captured."""
        self._handle(device.index if device.index is not None else torch.cuda.current_device())

    def launch(
        self,
        grid: Sequence[int],
        *arguments: torch.Tensor | int | float | bytes | None,
        is_dependent: bool = False,
    ) -> None:
        """Puts one run into the current stream. Tensors pass their address; None passes a null pointer.

        is_dependent: may be set up before the stream's previous kernel has ended (the kernel itself waits for it). Only one
        thread may launch: what a launch needs is kept here and used again, because a prefill makes hundreds.
        """
        if _collected is not None:
            _collected.add(self)
            return
        device = torch.cuda.current_device()
        handle = self._handles.get(device) or self._handle(device)
        packed = self._packed
        packed.values.pack_into(
            packed.buffer,
            0,
            *[
                value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value
                for value in arguments
            ],
        )
        config = packed.config
        config.grid[: len(grid)] = grid
        config.stream = torch._C._cuda_getCurrentRawStream(device)
        config.num_attributes = is_dependent
        code = _driver().cuLaunchKernelEx(packed.config_pointer, handle, packed.parameters, packed.extra)
        if code:
            _check(code, f"launch of {self.function} with a grid of {tuple(grid)}")

    @functools.cached_property
    def _packed(self) -> _Packed:
        return _Packed(self.arguments, self.num_threads, self.shared_bytes)


class _Packed:
    """What a launch hands to the driver: the arguments in one buffer, as the kernel's parameters are laid out."""

    def __init__(self, arguments: str, num_threads: int, shared_bytes: int) -> None:
        codes = [_STRUCT_CODES[letter] for letter in arguments]
        self.values = struct.Struct("@" + "".join(codes))
        self.buffer = ctypes.create_string_buffer(self.values.size)
        self._size = ctypes.c_size_t(self.values.size)
        address = ctypes.addressof(self.buffer)
        self.parameters: ctypes.Array[ctypes.c_void_p] | None = None
        self.extra: ctypes.Array[ctypes.c_void_p] | None = None
        if "m" in arguments:
            # A tensor map is aligned to 64 bytes in the kernel's memory, not in its parameters' buffer: where that begins,
            # only the driver knows. So each parameter is given by its address.
            offsets = [
                struct.calcsize("@" + "".join(codes[:index]) + "0" + code[-1])
                for index, code in enumerate(codes)
            ]
            self.parameters = (ctypes.c_void_p * len(codes))(*(address + offset for offset in offsets))
        else:
            self.extra = (ctypes.c_void_p * 5)(
                _PARAM_BUFFER_POINTER,
                address,
                _PARAM_BUFFER_SIZE,
                ctypes.addressof(self._size),
                _PARAM_END,
            )
        self._attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self.config = _LaunchConfig(shared_bytes=shared_bytes, attributes=ctypes.pointer(self._attribute))
        self.config.grid[:] = (1, 1, 1)
        self.config.block[:] = (num_threads, 1, 1)
        self.config_pointer = ctypes.byref(self.config)


_FLOAT16: Final = 6
_SWIZZLE_128_BYTES: Final = 3
_PROMOTE_TO_256_BYTES: Final = 3
_TENSOR_MAP_BYTES: Final = 128
_TENSOR_MAP_ALIGNMENT: Final = 64


def row_tile_map(matrix: torch.Tensor, box_rows: int, box_columns: int) -> bytes:
    """The copy engine's description of an fp16 matrix [R, C], contiguous, that is copied in swizzled boxes of this size, of
    which 128 bytes are a row. Rows past the end read as zeros. Hopper.
    """
    rows, columns = matrix.shape
    room = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT)
    address = -(-ctypes.addressof(room) // _TENSOR_MAP_ALIGNMENT) * _TENSOR_MAP_ALIGNMENT
    # Innermost dimension first.
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        _FLOAT16,
        2,
        ctypes.c_void_p(matrix.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * 2),
        (ctypes.c_uint32 * 2)(box_columns, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128_BYTES,
        _PROMOTE_TO_256_BYTES,
        0,
    )
    _check(code, f"a tensor map of a {rows} x {columns} matrix")
    return ctypes.string_at(address, _TENSOR_MAP_BYTES)


def build_all(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compiles these together on all cores, then loads them."""
    chosen = list(kernels)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda kernel: kernel.build(device), chosen))
    for kernel in chosen:
        kernel.load(device)


_collected: set[Kernel] | None = None


@contextlib.contextmanager
def collect_launches() -> Iterator[set[Kernel]]:
    """Within it nothing is launched: the set receives the kernels that would have been, to be built together."""
    global _collected  # noqa: PLW0603  (a mode of this module, like torch's grad mode; only one thread launches)
    if _collected is not None:
        raise RuntimeError("launches are collected already")
    _collected = set()
    try:
        yield _collected
    finally:
        _collected = None
