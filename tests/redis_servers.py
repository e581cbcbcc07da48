"""Servers beyond the embedded one: a master with a replica under a Sentinel, and TLS in front of a server that has none."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from producer.embedded import find_binary


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Servers:
    """`master` and `replica` by their ports; after a failover they have changed places."""

    url: str
    processes: dict[int, subprocess.Popen[bytes]]
    sentinel_port: int

    @property
    def master_port(self) -> int:
        with redis.Redis(port=self.sentinel_port, decode_responses=True) as sentinel:
            return int(sentinel.execute_command("SENTINEL", "get-master-addr-by-name", "glmq")[1])

    def kill_master(self) -> None:
        self.processes[self.master_port].kill()


@contextlib.contextmanager
def under_sentinel(folder: Path) -> Iterator[Servers]:
    """Two servers with append-only files and a Sentinel that waits for half a second before it acts."""
    binary = str(find_binary().path)
    ports = [free_port(), free_port()]
    sentinel_port = free_port()
    processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(port: int, *options: str) -> None:
        own = folder / str(port)
        own.mkdir()
        log = own / "log"
        processes[port] = subprocess.Popen(
            [binary, *options, "--logfile", str(log)],
            cwd=own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    try:
        for port in ports:
            leads = [] if port == ports[0] else ["--replicaof", "127.0.0.1", str(ports[0])]
            server = [
                "--bind",
                "127.0.0.1",
                "--appendonly",
                "yes",
                "--save",
                "",
                "--repl-diskless-sync-delay",
                "0",
            ]
            start(port, "--port", str(port), *server, *leads)
        _wait_for(lambda: _replicates(ports[1]))
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {sentinel_port}\nbind 127.0.0.1\nsentinel monitor glmq 127.0.0.1 {ports[0]} 1\n"
            "sentinel down-after-milliseconds glmq 500\nsentinel failover-timeout glmq 3000\n"
        )
        start(sentinel_port, str(config), "--sentinel")
        _wait_for(lambda: _knows_replica(sentinel_port))
        yield Servers(f"sentinel://127.0.0.1:{sentinel_port}/glmq", processes, sentinel_port)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():  # type: ignore[operator]
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _replicates(port: int) -> bool:
    with redis.Redis(port=port, decode_responses=True) as connection:
        return connection.info("replication")["master_link_status"] == "up"  # type: ignore[index]


def _knows_replica(port: int) -> bool:
    with redis.Redis(port=port, decode_responses=True) as sentinel:
        return len(sentinel.execute_command("SENTINEL", "replicas", "glmq")) == 1


def self_signed(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) for 127.0.0.1, by the openssl command."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=glmq"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return certificate, key


@contextlib.contextmanager
def behind_tls(port: int, certificate: Path, key: Path) -> Iterator[int]:
    """The port of a listener that takes TLS off and passes the rest on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listener]

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listener.accept()
                try:
                    client = context.wrap_socket(plain, server_side=True)
                except (ssl.SSLError, OSError):
                    plain.close()
                    continue
                server = socket.create_connection(("127.0.0.1", port))
                open_sockets.extend([client, server])
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pass_on, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        for each in open_sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
