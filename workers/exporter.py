"""Serves a worker's metrics (`/metrics`) and its health (`/health`) over HTTP, from a thread of its own. Knows no metric by name."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import CollectorRegistry

logger = logging.getLogger(__name__)

PORTS_TO_TRY: Final = 64
"""From the default port on, when that one is taken by another worker of this machine."""


class PortTaken(OSError):
    """Somebody else listens there."""


class Exporter:
    """An HTTP server that answers at `address`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        health: Callable[[], tuple[bool, str]],
        *,
        host: str,
        port: int,
        num_ports: int = 1,
    ) -> None:
        """health: whether all is well, and the worker's state in one word. Raises PortTaken when none of `num_ports` ports
        from `port` on is free, OSError when the host is not this machine's."""
        app = _app(registry, health)
        self._server = _serve_on_first_free(app, host, port, num_ports)
        self.port = self._server.server_port
        self.address = f"{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def _app(registry: CollectorRegistry, health: Callable[[], tuple[bool, str]]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/health":
            is_well, state = health()
            body = json.dumps({"state": state, "is_well": is_well}).encode()
            start_response(
                "200 OK" if is_well else "503 Service Unavailable", [("Content-Type", "application/json")]
            )
            return [body]
        if path in ("/metrics", "/"):
            # Always the plain text format: asked for OpenMetrics, prometheus_client 0.26 turns the colon of vLLM's names into
            # an underscore.
            body = generate_latest(registry)
            headers = [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)]
            if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
                body = gzip.compress(body, compresslevel=1)
                headers.append(("Content-Encoding", "gzip"))
            start_response("200 OK", headers)
            return [body]
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"There are /metrics and /health here.\n"]

    return app


def _serve_on_first_free(app: WSGIApplication, host: str, port: int, num_ports: int) -> WSGIServer:
    last = min(port + num_ports - 1, 65_535)
    for candidate in range(port, last + 1):
        try:
            return make_server(host, candidate, app, _Server6 if ":" in host else _Server, _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise PortTaken(errno.EADDRINUSE, f"no port from {port} to {last} is free")


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 16

    def server_bind(self) -> None:
        # Not the base class' one: it asks the name service for this machine's name, which can take seconds.
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10
    """Seconds that a client may take to say what it wants."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class' name)
        logger.debug(format, *args)
