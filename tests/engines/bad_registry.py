"""A proxy in front of a registry that misbehaves on purpose, and counts what is asked of it."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests.engines.client import PATIENCE
from tests.engines.registry import Registry

_ASKED = re.compile(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/?]+)")
_STEP = 0.05
"""Seconds between two pieces of a trickling layer."""


class Fault(NamedTuple):
    """What is wrong, all at once; without arguments nothing is. A layer is every blob longer than *small* bytes."""

    status: int = 0
    """Answer with this status (500, 429, 401, 404, ...)"""
    only: str = ""
    """... but to one kind of request alone: `manifests` or `blobs`."""
    hang: str = ""
    """Never answer this kind of request: `manifests` or `blobs`."""
    cut_at: int = -1
    """Break the connection off after so many bytes of a layer."""
    stall_at: int = -1
    """Send so many bytes of a layer, then no more."""
    bytes_per_second: int = 0
    """Send layers no faster."""
    small: int = 4096


class Asked(NamedTuple):
    """One request for a manifest or a blob."""

    method: str
    repository: str
    kind: str
    reference: str
    """The tag or the digest."""


class BadRegistry:
    """Serves what *upstream*, a registry without TLS, serves, but for `fault`. Read only: publish to *upstream*.

    Threads: one accepts, one for each connection; all are daemons, and `close` ends the accepting one and the waits of
    the others. `asked` grows by appending alone; `fault` is replaced as a whole.
    """

    def __init__(self, upstream: Registry) -> None:
        self.asked: list[Asked] = []
        """Every request for a manifest or a blob so far."""
        self._upstream = upstream
        self._fault = Fault()
        self._changed = threading.Event()  # set when the fault with which a request began is over
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_STEP,), name="bad registry", daemon=True
        )
        self._thread.start()

    @property
    def fault(self) -> Fault:
        """What is wrong now. Whatever is set next ends the waits: hanging requests and stalled layers go on."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        over, self._changed, self._fault = self._changed, threading.Event(), fault
        over.set()

    def reference(self, repository: str) -> str:
        """How an engine names the image `repository:tag` of this registry."""
        return f"{self.address}/{repository}"

    def count(self, kind: str, method: str = "GET") -> int:
        """How often `manifests` or `blobs` have been asked for.

        A Docker pull by tag asks HEAD for its manifest once, and GET only for what the engine does not remember.
        """
        return sum((asked.kind, asked.method) == (kind, method) for asked in self.asked)

    def close(self) -> None:
        """End it, and every request that hangs. May be called twice."""
        self.fault = Fault()
        self._server.shutdown()
        self._thread.join(PATIENCE)
        self._server.server_close()


def _handler(registry: BadRegistry) -> type[BaseHTTPRequestHandler]:
    """The class of the proxy's requests, bound to *registry*."""

    class Handler(_Request):
        bad = registry

    return Handler


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bad: BadRegistry

    def do_GET(self) -> None:
        # The two belong together: a change in between would leave this request waiting for the next one.
        over, fault = self.bad._changed, self.bad._fault
        found = _ASKED.fullmatch(self.path)
        kind = ""
        if found:
            kind = found["kind"]
            self.bad.asked.append(Asked(self.command, found["repository"], kind, found["reference"]))
        if fault.hang and fault.hang == kind:
            over.wait()
        if fault.status and fault.only in ("", kind):
            self._refuse(fault.status)
        else:
            self._forward(kind, fault, over)

    do_HEAD = do_GET

    def _refuse(self, status: int) -> None:
        code = {401: "UNAUTHORIZED", 404: "NOT_FOUND", 429: "TOOMANYREQUESTS"}.get(status, "UNKNOWN")
        body = f'{{"errors":[{{"code":"{code}","message":"on purpose"}}]}}'.encode()
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="test"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _forward(self, kind: str, fault: Fault, over: threading.Event) -> None:
        upstream = http.client.HTTPConnection(self.bad._upstream.address, timeout=PATIENCE)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # each line of Accept: one alone means an old form of manifest
                upstream.putheader(name, value)
            upstream.endheaders()
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length", str(len(body))))
        self.end_headers()
        if kind == "blobs" and len(body) > fault.small:
            self._send_layer(body, fault, over)
        else:
            self.wfile.write(body)

    def _send_layer(self, body: bytes, fault: Fault, over: threading.Event) -> None:
        sent = 0
        if fault.cut_at >= 0:
            self.wfile.write(body[: fault.cut_at])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault.stall_at >= 0:
            sent = fault.stall_at
            self.wfile.write(body[:sent])
            over.wait()
        step = max(1, int(fault.bytes_per_second * _STEP))
        while fault.bytes_per_second and sent < len(body) and not over.wait(_STEP):
            self.wfile.write(body[sent : sent + step])
            sent += step
        self.wfile.write(body[sent:])

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # the engine went away: its right

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
