"""The socket as websocket-client sees it, and the handshake over it.

websocket-client's own timeouts are per system call and its sizes are unbounded; here everything is absolute: a moment
by which the present read or write must be over, and a number of bytes the peer may still send.
"""

from __future__ import annotations

import errno
import fcntl
import math
import select
import socket
import ssl
import struct
import sys
import time
from typing import Mapping

import websocket

from oz_worker import reply
from oz_worker.dial import DialError, Step, Target
from oz_worker.pulse import Pulse
from oz_worker.timing import Deadline

HANDSHAKE_BYTES = 64 * 1024
REFUSAL_SECONDS = 2.0
"""How long the body of a refusal may take: the status says enough."""
CHUNK = 64 * 1024


class TooBig(Exception):
    """The peer sent more than its byte budget. Not an OSError, which websocket-client would interpret."""


class Wire:
    """Non-blocking underneath, blocking to its caller, deaf to nobody (design 12, rule 18). Main thread only.

    `recv` and `send` wait for socket and waker together and raise TimeoutError at `read_by` and `write_by` (monotonic),
    never EAGAIN or SSLWant, which websocket-client would answer with a selector of its own that cannot see the waker.
    """

    def __init__(self, sock: socket.socket, pulse: Pulse) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._pulse = pulse
        self._timeout: float | None = None
        self._buffer = b""
        self._at = 0
        self.read_by = math.inf
        self.write_by = math.inf
        self.budget = HANDSHAKE_BYTES
        self.consumed = 0
        """Bytes handed to websocket-client since the beginning."""
        self.last_rx = time.monotonic()
        """When the last bytes came, whatever they were: the measure of liveness."""
        self.seen: bytearray | None = None
        """During the handshake everything that came, so that a refusal can be read however it ends."""

    @property
    def _closed(self) -> bool:
        """websocket-client's `shutdown` looks at this attribute of sockets."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._sock.fileno()

    def gettimeout(self) -> float | None:
        """What was set, without effect."""
        return self._timeout

    def settimeout(self, seconds: float | None) -> None:
        """Kept for websocket-client; the absolute moments rule."""
        self._timeout = seconds

    def shutdown(self, how: int) -> None:
        """The plain socket's: `SSLSocket.shutdown` would make later sends leave in clear text."""
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        """Close the descriptor."""
        self._sock.close()

    def ready(self) -> bool:
        """Whether bytes are here that `poll` cannot see: read ahead, or decrypted inside OpenSSL."""
        return self._at < len(self._buffer) or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0)

    def recv(self, size: int) -> bytes:
        """At most *size* bytes, b"" at the end of the stream."""
        if self._at >= len(self._buffer):
            self._buffer, self._at = self._fill(), 0
        data = self._buffer[self._at : self._at + size]
        self._at += len(data)
        self.consumed += len(data)
        self.budget -= len(data)
        if self.budget < 0:
            raise TooBig("the peer sends more than it may")
        return data

    def _fill(self) -> bytes:
        """Read ahead: the library asks for one or two bytes at a time."""
        if self.seen is not None and _is_refusal(self.seen):
            self.read_by = min(self.read_by, time.monotonic() + REFUSAL_SECONDS)
        while True:
            if time.monotonic() >= self.read_by:
                raise TimeoutError("nothing to read in time")
            try:
                data = self._sock.recv(CHUNK)
                break
            except (BlockingIOError, ssl.SSLWantReadError):
                self._pulse.poll(self.read_by, self.fileno(), select.POLLIN)
            except ssl.SSLWantWriteError:
                self._pulse.poll(self.read_by, self.fileno(), select.POLLOUT)
            except TimeoutError as error:
                raise _given_up(error) from None
        if data:
            self.last_rx = time.monotonic()
        if self.seen is not None:
            self.seen += data
        return data

    def send(self, data: bytes) -> int:
        """Write some of *data*; how many bytes went."""
        while True:
            try:
                return self._sock.send(data)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._pulse.poll(self.write_by, self.fileno(), select.POLLOUT)
            except ssl.SSLWantReadError:
                self._pulse.poll(self.write_by, self.fileno(), select.POLLIN)
            except TimeoutError as error:
                raise _given_up(error) from None
            if time.monotonic() >= self.write_by:
                raise TimeoutError("the peer does not read")

    def unsent(self) -> int | None:
        """Bytes in the kernel that the peer's kernel has not acknowledged; None where that cannot be asked."""
        if sys.platform != "linux":
            return None
        import termios

        answer = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        return int(struct.unpack("i", answer)[0])


def _given_up(error: TimeoutError) -> OSError:
    """The kernel's ETIMEDOUT is the end of the connection, not of our patience: keep the two apart."""
    return ConnectionAbortedError(errno.ETIMEDOUT, f"the kernel gave up on the connection ({error.strerror})")


def _is_refusal(seen: bytearray) -> bool:
    return b"\r\n\r\n" in seen and not seen.startswith((b"HTTP/1.1 101", b"HTTP/1.0 101"))


def upgrade(wire: Wire, where: Target, headers: Mapping[str, str], deadline: Deadline) -> websocket.WebSocket:
    """The WebSocket handshake over *wire*; DialError with the server's reply when it says anything but yes.

    Redirects are never followed: they would carry the key to another server.
    """
    wire.read_by = wire.write_by = deadline.at
    wire.budget = HANDSHAKE_BYTES
    wire.seen = bytearray()
    try:
        if any(c in value for value in headers.values() for c in "\r\n\0"):
            raise ValueError("a header with a line break in it")  # the library would send it as it is
        connected = websocket.create_connection(
            where.url,
            timeout=max(0.001, deadline.left()),
            socket=wire,
            host=where.place if where.port != (443 if where.secure else 80) else where.place.rpartition(":")[0],
            header=[f"{name}: {value}" for name, value in headers.items()],
            suppress_origin=True,
            redirect_limit=0,
            enable_multithread=False,
            skip_utf8_validation=True,
        )
    except (OSError, ValueError, TooBig, websocket.WebSocketException) as error:
        raise DialError(Step.HANDSHAKE, where.place, error, reply.parse(bytes(wire.seen))) from None
    finally:
        wire.seen = None
    wire.read_by = wire.write_by = math.inf
    return connected
