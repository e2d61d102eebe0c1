"""A WebSocket server made of a plain socket: each connection runs a script that may break every rule there is.

    with RawServer(script, tls=None) as server:      # script(peer) runs on a thread for each accepted connection
        ... server.url ...

A script is a function of one `Peer`; its connection is closed when it returns. What a script raises, other than the
end of its connection, fails the test when the server is left. Its codec is its own: it shares nothing with the worker.
"""

from __future__ import annotations

import base64
import hashlib
import os
import queue
import socket
import ssl
import struct
import threading
import time
from types import TracebackType
from typing import Callable

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
PATIENCE = 20.0
"""Seconds after which a script that waits for the worker has waited too long."""

Script = Callable[["Peer"], None]


class Gone(Exception):
    """The worker's side of the connection ended."""


class Peer:
    """One accepted connection, seen from the server. Used by its script's thread alone."""

    def __init__(self, server: RawServer, sock: socket.socket, number: int) -> None:
        self.server = server
        self.sock = sock
        self.number = number
        """0 for the server's first connection."""
        self.request = b""
        self._ahead = b""

    # -- raw bytes

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Gone from error

    def drip(self, data: bytes, pause: float) -> None:
        """One byte after the other with *pause* seconds between them."""
        for index in range(len(data)):
            self.send(data[index : index + 1])
            self.server.leaving.wait(pause)

    def read(self, size: int) -> bytes:
        while len(self._ahead) < size:
            self._ahead += self._more()
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def _more(self) -> bytes:
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone from error
        if not data:
            raise Gone
        return data

    # -- HTTP

    def read_head(self) -> bytes:
        """The request up to its empty line."""
        while b"\r\n\r\n" not in self._ahead:
            self._ahead += self._more()
        head, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        self.request = head
        return head

    def header(self, name: str) -> str:
        """A header of the request, "" when it is missing."""
        for line in self.request.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.strip().lower() == name.lower():
                return value.strip()
        return ""

    def acceptance(self) -> bytes:
        """The 101 reply to the request that was read."""
        key = self.header("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
        ).encode()

    def accept(self) -> None:
        """The whole handshake."""
        self.read_head()
        self.send(self.acceptance())

    def refuse(self, status: str, *headers: str, body: bytes = b"") -> None:
        """Read the request, answer with *status* and hang up."""
        self.read_head()
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode() + body)

    # -- frames

    def frame(
        self, opcode: int, data: bytes = b"", *, fin: bool = True, rsv: int = 0, length: int | None = None
    ) -> None:
        self.send(encode(opcode, data, fin=fin, rsv=rsv, length=length))

    def text(self, text: str) -> None:
        self.frame(TEXT, text.encode())

    def read_frame(self) -> tuple[int, bytes]:
        """The worker's next frame, unmasked; it must be masked and whole."""
        first, second = self.read(2)
        assert first & 0xF0 == 0x80, f"a split or reserved frame: {first:#x}"
        assert second & 0x80, "the worker must mask its frames"
        size = second & 0x7F
        if size == 126:
            size = struct.unpack("!H", self.read(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", self.read(8))[0]
        mask, data = self.read(4), self.read(size)
        return first & 0xF, bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))

    def read_text(self) -> str:
        """The next text message; pings before it are answered."""
        while True:
            opcode, data = self.read_frame()
            if opcode == TEXT:
                return data.decode()
            if opcode == PING:
                self.frame(PONG, data)
            elif opcode == CLOSE:
                raise Gone

    def serve(self) -> None:
        """Be a good server: echo pings, note texts, answer a close, until the worker is gone."""
        while True:
            opcode, data = self.read_frame()
            if opcode == TEXT:
                self.server.texts.put(data.decode())
            elif opcode == PING:
                self.frame(PONG, data)
            elif opcode == CLOSE:
                self.server.closes.put(struct.unpack("!H", data[:2])[0] if len(data) > 1 else 1005)
                self.frame(CLOSE, data[:2])
                return

    def read_close(self) -> int:
        """The code of the close frame that comes, whatever comes before it."""
        while True:
            opcode, data = self.read_frame()
            if opcode == CLOSE:
                return int(struct.unpack("!H", data[:2])[0])

    # -- ends

    def reset(self) -> None:
        """End with a TCP RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.close(self.sock)

    def hold(self) -> None:
        """Keep the socket, read nothing, say nothing, until the server is left."""
        self.server.leaving.wait(PATIENCE * 3)

    def until_gone(self) -> None:
        """Read and forget until the worker hangs up."""
        try:
            while True:
                self._more()
        except Gone:
            pass


def encode(opcode: int, data: bytes = b"", *, fin: bool = True, rsv: int = 0, length: int | None = None) -> bytes:
    """A server's frame; *length* may lie."""
    size = len(data) if length is None else length
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    if size < 126:
        return bytes([first, size]) + data
    if size < 65536:
        return bytes([first, 126]) + struct.pack("!H", size) + data
    return bytes([first, 127]) + struct.pack("!Q", size) + data


class RawServer:
    """Listens on loopback; see the module."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None, backlog: int = 64) -> None:
        self._script = script
        self._tls = tls
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._open: set[socket.socket] = set()
        self.leaving = threading.Event()
        self.connections: queue.Queue[float] = queue.Queue()
        """The monotonic moment of each accepted connection."""
        self.texts: queue.Queue[str] = queue.Queue()
        self.closes: queue.Queue[int] = queue.Queue()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.port: int = self._listener.getsockname()[1]
        self.place = f"127.0.0.1:{self.port}"
        self.url = f"{'wss' if tls else 'ws'}://{self.place}/ws"

    def __enter__(self) -> RawServer:
        self._acceptor = threading.Thread(target=self._accept, name="raw server", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leaving.set()
        # A blocked accept is woken by shutdown, a blocked read of a script by that of its socket.
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in list(self._open):
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass
        self._acceptor.join(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()
        if error is None and self._errors:
            raise self._errors[0]

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections.put(time.monotonic())
            thread = threading.Thread(target=self._run, args=(sock, number), name=f"peer {number}", daemon=True)
            self._threads.append(thread)
            thread.start()
            number += 1

    def _run(self, sock: socket.socket, number: int) -> None:
        sock.settimeout(PATIENCE)
        self._open.add(sock)
        try:
            if self._tls is not None:
                plain = sock
                sock = self._tls.wrap_socket(sock, server_side=True)
                self._open.add(sock)
                self._open.discard(plain)
            self._script(Peer(self, sock, number))
        except (Gone, OSError):
            pass  # the worker hung up, or its handshake failed: what the script waited for is the test's business
        except BaseException as error:  # handed to the test
            self._errors.append(error)
        finally:
            self._open.discard(sock)
            sock.close()


def refused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def silent_listener() -> tuple[socket.socket, int]:
    """A listener whose backlog is full: connecting to it hangs like a firewall that drops."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        fillers.append(filler)
    _KEPT.append(fillers)
    return listener, int(listener.getsockname()[1])


_KEPT: list[list[socket.socket]] = []


def random_text(size: int) -> str:
    return base64.b64encode(os.urandom(size)).decode()
