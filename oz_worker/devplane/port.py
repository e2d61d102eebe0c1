"""The control plane's port: accepts, tells a WebSocket from a request by its head, and hands it on.

Owner of every thread and socket below it. Wakers: the acceptor polls a `Waker`; threads inside a blocking read or
write are woken by shutting their socket down; connections by `Connection.cut`.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Mapping, NamedTuple
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from oz_worker.devplane.connection import Connection, Protocol
from oz_worker.threads import Waker

if TYPE_CHECKING:
    from oz_worker.devplane.server import ControlPlane

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
JOIN_SECONDS = 10.0
CAPABILITY = "execution-scoped-cancellation-v1"


class Refusal(NamedTuple):
    """How handshakes are answered instead of 101; see `ControlPlane.refuse`."""

    status: int
    headers: Mapping[str, str]
    body: str
    times: int | None
    raw: bytes | None
    silent: bool


class Port:
    """Listens on loopback and serves each socket on a thread of its own."""

    WEB_SOCKET_PATH = "/api/v1/selfhosted/worker/ws"

    def __init__(self, plane: ControlPlane, *, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.tls = tls
        self._plane = plane
        self._host = host
        self._number = port
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener: socket.socket | None = None
        self._waker = Waker()
        self._acceptor: threading.Thread | None = None
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = threading.Event()  # set once, under the lock

    @property
    def address(self) -> str:
        """host:port for URLs."""
        return f"[{self._host}]:{self._number}" if ":" in self._host else f"{self._host}:{self._number}"

    def open(self) -> None:
        """Listen and start accepting. Raises OSError when the port cannot be had."""
        self.listen()
        self._acceptor = threading.Thread(target=self._accept, name="plane-accept", daemon=True)
        self._acceptor.start()

    def listen(self) -> None:
        """Open the listening socket, on the port of last time; no effect when it is open."""
        with self._plane.lock:
            if self._listener is not None:
                return
            listener = socket.socket(self._family)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self._host, self._number))
                listener.listen(128)
            except OSError:
                listener.close()
                raise
            listener.setblocking(False)
            self._number = listener.getsockname()[1]
            self._listener = listener
            self._waker.wake()

    def unlisten(self) -> None:
        """Close the listening socket; dialling is refused by the kernel from here on."""
        with self._plane.lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                # A poll in the acceptor keeps a closed listener alive, and with it the backlog, until it returns.
                _shut(listener)
                listener.close()
            self._waker.wake()

    def close(self) -> None:
        """End every thread and socket, bounded."""
        self.unlisten()
        with self._plane.lock:
            self._closing.set()
            self._waker.wake()
            self._plane.cut("eof")
            for sock in self._sockets:
                _shut(sock)
            threads = list(self._threads)
        if self._acceptor is not None:
            self._acceptor.join(JOIN_SECONDS)
            self._acceptor = None
        self._waker.close()
        ends = time.monotonic() + JOIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def threads(self) -> list[str]:
        """Names of the threads that still run; empty after `close`."""
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _accept(self) -> None:
        while True:
            with self._plane.lock:
                if self._closing.is_set():
                    return
                listener = self._listener
                poller = select.poll()
                poller.register(self._waker.fileno(), select.POLLIN)
                if listener is not None:
                    poller.register(listener, select.POLLIN)
            poller.poll()
            self._waker.drain()
            try:
                sock = listener.accept()[0] if listener is not None else None
            except OSError:
                continue  # woken for another reason, closed meanwhile, or the peer has already left
            if sock is not None:
                self._start(sock)

    def _start(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=self._serve, args=(sock,), name="plane-socket", daemon=True)
        with self._plane.lock:
            if self._closing.is_set():
                sock.close()
                return
            self._sockets.add(sock)
            self._threads = {other for other in self._threads if other.is_alive()} | {thread}
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        """One socket, from the first byte to the last. Whatever the peer does ends here, without a word."""
        plain = sock
        try:
            sock.settimeout(HEAD_SECONDS)
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True)
                with self._plane.lock:
                    self._sockets.discard(plain)
                    self._sockets.add(sock)
                    if self._closing.is_set():
                        return
            head = _read_head(sock)
            if b"\r\nupgrade: websocket" in head.lower():
                self._web_socket(sock, head)
            elif head:
                from oz_worker.devplane.api import serve  # not before it is needed: it brings http.server with it

                serve(self._plane, sock, head)
        except OSError:
            pass  # the peer left, was too slow or spoke no TLS: nothing was promised to it
        finally:
            with self._plane.lock:
                self._sockets -= {sock, plain}
            sock.close()

    def _web_socket(self, sock: socket.socket, head: bytes) -> None:
        protocol = Protocol(lambda: self._plane.pongs)
        protocol.receive_data(head)
        requests = [event for event in protocol.events_received() if isinstance(event, Request)]
        with self._plane.lock:
            if self._closing.is_set():
                return
            refusal = self._plane.refusal
            if refusal is not None:
                if refusal.times is not None:
                    left = refusal.times - 1
                    self._plane.refusal = refusal._replace(times=left) if left > 0 else None
                self._plane.handshake_refused(0 if refusal.silent or refusal.raw is not None else refusal.status)
        if refusal is not None:
            _refuse(sock, refusal)
            return
        if not requests:
            sock.sendall(b"".join(protocol.data_to_send()))
            return
        connection = self._shake_hands(sock, protocol, requests[0])
        if connection is not None:
            with self._plane.lock:
                self._sockets.discard(sock)  # from here on it ends by `cut`
                if self._closing.is_set():
                    connection.cut("eof")
            connection.run()

    def _shake_hands(self, sock: socket.socket, protocol: Protocol, request: Request) -> Connection | None:
        """Accept or refuse; under one hold of the lock, so that numbers and order of connections agree."""
        url = urlsplit(request.path)
        worker_ids = parse_qs(url.query).get("worker_id", [])
        with self._plane.lock:
            response: Response
            if url.path != self.WEB_SOCKET_PATH:
                response = protocol.reject(404, f"there is nothing at {url.path}\n")
            elif request.headers.get_all("Authorization") != [f"Bearer {self._plane.key}"]:
                response = protocol.reject(401, "the API key is missing or wrong\n")
            elif len(worker_ids) != 1:
                response = protocol.reject(400, "the query needs exactly one worker_id\n")
            else:
                response = protocol.accept(request)
            protocol.send_response(response)
            if response.status_code == 101:
                connection = Connection(self._plane, sock, len(self._plane.connections) + 1, protocol)
                connection.worker_id = worker_ids[0]
                connection.headers = {name.lower(): value for name, value in request.headers.raw_items()}
                if CAPABILITY not in connection.headers.get("x-warp-worker-capabilities", ""):
                    self._plane.violation(f"connection {connection.number}: the handshake does not offer {CAPABILITY}")
                self._plane.connection_opened(connection)
                return connection
            self._plane.handshake_refused(response.status_code)
        sock.sendall(b"".join(protocol.data_to_send()))
        return None


def _read_head(sock: socket.socket) -> bytes:
    """What arrives up to the end of the request's head, and maybe beyond; b"" for a peer that says nothing."""
    head = bytearray()
    while b"\r\n\r\n" not in head:
        data = sock.recv(HEAD_BYTES)
        if not data or len(head) + len(data) > 2 * HEAD_BYTES:
            return b""
        head += data
    return bytes(head)


def _refuse(sock: socket.socket, refusal: Refusal) -> None:
    if refusal.silent:
        while sock.recv(HEAD_BYTES):
            pass
        return
    if refusal.raw is not None:
        sock.sendall(refusal.raw)
    else:
        body = refusal.body.encode()
        headers = Headers({"Connection": "close", "Content-Length": str(len(body)), **refusal.headers})
        sock.sendall(Response(refusal.status, "Refused", headers, body).serialize())
    sock.shutdown(socket.SHUT_WR)


def _shut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the plain method, see connection._half_close
    except OSError:
        pass  # not connected any more
