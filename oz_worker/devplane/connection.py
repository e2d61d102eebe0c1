"""One WebSocket of the control plane: a thread that owns the socket, and the Sans-I/O protocol behind it.

Owner: the connection's own thread reads, writes and closes the socket; nobody else touches it (one TLS socket in two
threads breaks in CPython). Waker: `wake()`, after anything below changed. The plane's lock guards the protocol object
and every attribute here; it is never held over I/O. What is queued under the lock leaves in that order, so "sent
after the acknowledgement" means the same to the rules and to the worker.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, Callable, Mapping

from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from oz_worker.threads import Waker

if TYPE_CHECKING:
    from oz_worker.devplane.rules import Ledger
    from oz_worker.devplane.server import ControlPlane

PIECE = 64 * 1024
LARGEST_MESSAGE = 1024 * 1024
CLOSE_SECONDS = 1.0

quiet = logging.getLogger("oz_worker.devplane.websocket")
quiet.setLevel(logging.WARNING)


class Protocol(ServerProtocol):
    """The server side of RFC 6455, with a say in how pings are answered: echo, none, empty or wrong."""

    def __init__(self, pongs: Callable[[], str]) -> None:
        super().__init__(max_size=LARGEST_MESSAGE, logger=quiet)
        self._pongs = pongs

    def send_frame(self, frame: Frame) -> None:
        """Queue *frame*; a pong as the plane wants it."""
        if frame.opcode is Opcode.PONG:
            how = self._pongs()
            if how == "none":
                return
            if how != "echo":
                frame = Frame(Opcode.PONG, b"" if how == "empty" else b"x" + frame.data[:124])
        super().send_frame(frame)


class Connection:
    """A worker's connection. Read its attributes only under the plane's lock (inside `wait_for` they are safe).

    `number` counts from 1; `closed_at` is None while it is up; `close_code` is what the worker's close frame said.
    """

    def __init__(self, plane: ControlPlane, sock: socket.socket, number: int, protocol: Protocol) -> None:
        self.number = number
        self.worker_id = ""
        self.headers: Mapping[str, str] = {}
        self.opened_at = time.monotonic()
        self.closed_at: float | None = None
        self.last_byte_at = self.opened_at
        self.close_code: int | None = None
        self.pings = 0
        self.unconfirmed: list[Ledger] = []
        self.stalled = False
        self.drip = 0.0
        self._plane = plane
        self._socket = sock
        self._protocol = protocol
        self._waker = Waker()
        self._out = bytearray()
        self._eof = False
        self._cut = ""
        self._parts: list[bytes] = []

    @property
    def open(self) -> bool:
        """Whether frames can still be sent."""
        return self.closed_at is None and not self._cut and self._protocol.state is State.OPEN

    # Called by anyone, under the plane's lock.

    def send_text(self, text: str) -> None:
        """Queue a text message; ignored once the connection is over."""
        if self.open:
            self._protocol.send_text(text.encode("utf-8", "surrogatepass"))
            self.wake()

    def send_binary(self, data: bytes) -> None:
        """Queue a binary message."""
        if self.open:
            self._protocol.send_binary(data)
            self.wake()

    def send_bytes(self, data: bytes) -> None:
        """Queue bytes as they are, no frame around them."""
        self._collect()
        self._out += data
        self.wake()

    def send_ping(self, data: bytes) -> None:
        """Queue a ping of the server's own."""
        if self.open:
            self._protocol.send_ping(data)
            self.wake()

    def cut(self, how: str, code: int = 1001) -> None:
        """End it: `reset` (RST), `eof` (FIN, no close frame) or `close` (a close frame with *code*)."""
        if how == "close":
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(code, "the control plane closes")
        else:
            self._cut = how
        self.stalled = False
        self.wake()

    def wake(self) -> None:
        """Make the thread look at its orders again."""
        self._waker.wake()

    # The connection's own thread.

    def run(self) -> None:
        """Serve until the connection is over. The socket is closed when this returns."""
        self._socket.setblocking(False)
        poller = select.poll()
        poller.register(self._waker.fileno(), select.POLLIN)
        ends_at = float("inf")
        try:
            while True:
                with self._plane.lock:
                    self._collect()
                    if self._cut:
                        return
                    stalled, drip, waiting = self.stalled, self.drip, bool(self._out)
                    if self._eof and not waiting:
                        ends_at = min(ends_at, time.monotonic() + CLOSE_SECONDS)
                        _half_close(self._socket)
                if time.monotonic() >= ends_at:
                    return
                self._wait(poller, stalled=stalled, drip=drip, writing=waiting, ends_at=ends_at)
                if not stalled and not (self._write() and self._read()):
                    return
        except OSError:
            return  # the peer is gone: closed() says so
        finally:
            with self._plane.lock:
                how = self._cut
                self.closed_at = time.monotonic()
                self._waker.close()
            _close(self._socket, reset=how == "reset")
            self._plane.connection_closed(self)

    def _wait(self, poller: select.poll, *, stalled: bool, drip: float, writing: bool, ends_at: float) -> None:
        if stalled:
            poller.register(self._socket, 0)
        elif drip:
            poller.register(self._socket, 0)
            time.sleep(drip)  # the pace of a slow peer is the point
        else:
            poller.register(self._socket, select.POLLIN | (select.POLLOUT if writing else 0))
        left = None if ends_at == float("inf") else max(0.0, ends_at - time.monotonic()) * 1000
        poller.poll(0 if drip else left)
        self._waker.drain()

    def _write(self) -> bool:
        with self._plane.lock:
            piece = bytes(self._out[: 1 if self.drip else PIECE])
        if piece:
            try:
                sent = self._socket.send(piece)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            with self._plane.lock:
                del self._out[:sent]
        return True

    def _read(self) -> bool:
        """Take in what has arrived; False at the end of the stream."""
        while True:
            try:
                data = self._socket.recv(16 if self.drip else PIECE)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            with self._plane.lock:
                if not data:
                    self._protocol.receive_eof()
                    return False
                self.last_byte_at = time.monotonic()
                self._protocol.receive_data(data)
                self._handle()
                if self._cut or self.stalled or self.drip:
                    return True

    def _handle(self) -> None:
        """Give every message and ping to the plane, in order. What follows a cut was never read."""
        for event in self._protocol.events_received():
            if self._cut:
                return
            if not isinstance(event, Frame):
                continue
            if event.opcode is Opcode.PING:
                self.pings += 1
                self._plane.ping_received(self)
            elif event.opcode is Opcode.CLOSE:
                received = self._protocol.close_rcvd
                self.close_code = received.code if received else None
            elif event.opcode is Opcode.BINARY:
                self._plane.violation(f"connection {self.number}: a binary message; all frames are text")
            elif event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._parts.append(bytes(event.data))
                if event.fin:
                    data, self._parts = b"".join(self._parts), []
                    self._plane.message_received(self, data)
        if self._protocol.parser_exc is not None and not self._eof:
            error = self._protocol.parser_exc
            if not isinstance(error, EOFError):
                self._plane.violation(f"connection {self.number}: the WebSocket protocol was broken: {error}")
        if not self._cut:
            self._collect()
            self._plane.batch_done(self)

    def _collect(self) -> None:
        """Move what the protocol wants to send into the queue of bytes."""
        for data in self._protocol.data_to_send():
            if data:
                self._out += data
            else:
                self._eof = True


def _half_close(sock: socket.socket) -> None:
    try:
        # The plain method: SSLSocket.shutdown() drops the TLS object, under which the next read would be plain text.
        socket.socket.shutdown(sock, socket.SHUT_WR)
    except OSError:
        pass  # gone already


def _close(sock: socket.socket, *, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
