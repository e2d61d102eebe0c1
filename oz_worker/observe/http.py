"""A listener for short GET requests, for metrics and for health: one thread, one poll loop, no thread per connection.

What a scraper can do to it is bounded: at most `MOST_OPEN` connections are held at once and the rest waits in the
kernel's queue, a request's head has at most `HEAD_BYTES`, a connection lives for at most `SECONDS` from its first
moment to its last, `HURRY_SECONDS` while all places are taken, whatever dribbles in or is not read, and each is closed
after its one answer. One that only hangs costs a descriptor and some hundred bytes. GET and HEAD alone; a body that
comes along is thrown away.

To use it: `Listener("http-health", host, port, {"/healthz": answer})`, `open()` where the address must be proven
(raises OSError), `start(on_death)`, `stop(seconds)`. Each route is a callable that returns a `Reply`; it runs on the
listener's thread, one at a time, so it must return at once and take no lock that is held for long. One that has no
answer yet returns None and is called again every `AGAIN_SECONDS`, while others are served. One that raises answers
500. Nothing in here knows metrics or health.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import select
import socket
import threading
import time
from typing import Callable, Mapping, NamedTuple, Optional
from urllib.parse import urlsplit

from oz_worker import threads
from oz_worker.threads import OnDeath, Waker

logger = logging.getLogger(__name__)

MOST_OPEN = 200
SHARE = 16
"""One of so many of the descriptors that this process may have: the rest is for tasks."""
HEAD_BYTES = 8192
SECONDS = 5.0
HURRY_SECONDS = 1.0
BACKLOG = 1024
AGAIN_SECONDS = 0.02
_PAUSE = 0.5
"""Until the next try after `accept` failed, for instance because no descriptor is left: no loop at full speed."""

_REMEMBERED = 20
"""Troubles that are told, each once."""

TEXT = "text/plain; charset=utf-8"
_WORDS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Reply(NamedTuple):
    """What a route answers: a status of `_WORDS`, a body and its type."""

    status: int
    body: bytes
    content_type: str = TEXT


Route = Callable[[], Optional[Reply]]


def bound(host: str, port: int) -> socket.socket:
    """A socket that has that address and does not listen yet. Raises OSError.

    A name is looked up, which may take as long as the resolver does: call it where that hurts nobody. Of several
    addresses IPv4 comes first, as scrapers that are told `localhost` expect.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # part of it is empty or longer than 63 characters
        raise OSError(errno.EINVAL, "that is no name of a host") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


class _Connection:
    """One scraper: the bytes of its head, then the rest of its answer, then the wait for its end."""

    __slots__ = ("answer", "born", "head", "socket", "waits")

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.born = time.monotonic()
        self.head = bytearray()
        self.waits = False  # for its route: the head is whole, and there is no answer yet
        self.answer: memoryview | None = None  # what is still to be sent; empty when all is

    @property
    def events(self) -> int:
        return 0 if self.waits else select.POLLOUT if self.answer else select.POLLIN


class Listener:
    """See the module. `open`, `start` and `stop` are the owner's; `serve` is the body of the listener's thread.

    The thread blocks in `poll` alone and is woken by its Waker.
    """

    def __init__(self, name: str, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._name = name
        self._host = host
        self._port = port
        self._routes = routes
        self._socket: socket.socket | None = None
        self._waker: Waker | None = None  # made with the socket: an address that cannot be had leaves nothing open
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._open: dict[int, _Connection] = {}  # by descriptor, the oldest first
        self._most = _most_open()
        self._accept_from = 0.0
        self._said: set[str] = set()

    def open(self) -> tuple[str, int]:
        """Bind and listen; the address in use, with its port where 0 was asked for. Raises OSError. See `bound`."""
        listening = bound(self._host, self._port)
        try:
            listening.listen(BACKLOG)
            listening.setblocking(False)
        except BaseException:
            listening.close()
            raise
        self._socket, self._waker = listening, Waker()
        host, port = listening.getsockname()[:2]
        return str(host), int(port)

    def start(self, on_death: OnDeath) -> None:
        """Serve on a thread of its own. Requires `open`. *on_death* hears of an unexpected end."""
        self._thread = threads.start(self._name, self.serve, on_death)

    def stop(self, seconds: float) -> None:
        """End; what is being answered is cut. Waits for the thread at most *seconds*."""
        self._stopping = True
        if self._waker is not None:
            self._waker.wake()
        if self._thread is not None:
            self._thread.join(seconds)

    def serve(self) -> None:
        """Answer until `stop`. Requires `open`."""
        assert self._socket is not None, "open() comes first"
        assert self._waker is not None, "it is made with the socket"
        try:
            while not self._stopping:
                self._round(self._socket, self._waker)
        finally:
            self._socket.close()
            for connection in self._open.values():
                connection.socket.close()
            self._open.clear()
            self._waker.close()

    # -- one turn of the loop

    def _round(self, listening: socket.socket, waker: Waker) -> None:
        poll = select.poll()
        poll.register(waker.fileno(), select.POLLIN)
        for number, connection in self._open.items():
            poll.register(number, connection.events)
        now = time.monotonic()
        if len(self._open) < self._most and now >= self._accept_from:
            poll.register(listening.fileno(), select.POLLIN)
        for number, _ in poll.poll(self._patience(now)):
            if number == listening.fileno():
                self._accept(listening)
            elif (ready := self._open.get(number)) is not None and (ready.waits or not self._advance(ready)):
                self._drop(number)  # of one that waits nothing is told but that it has gone
        for number, waiting in list(self._open.items()):
            if waiting.waits and not self._advance(waiting):
                self._drop(number)
        waker.drain()
        self._drop_the_late()

    def _patience(self, now: float) -> float | None:
        """Milliseconds until something is due without being asked; None: nothing is."""
        moments = [self._accept_from] if now < self._accept_from else []
        if any(connection.waits for connection in self._open.values()):
            moments.append(now + AGAIN_SECONDS)
        if self._open:
            moments.append(next(iter(self._open.values())).born + self._limit())
        return max(0.0, min(moments) - now) * 1000 + 1 if moments else None

    def _limit(self) -> float:
        return SECONDS if len(self._open) < self._most else HURRY_SECONDS

    def _drop_the_late(self) -> None:
        born_before = time.monotonic() - self._limit()
        for number in [number for number, each in self._open.items() if each.born <= born_before]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        self._open.pop(number).socket.close()

    def _accept(self, listening: socket.socket) -> None:
        while len(self._open) < self._most:
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or no memory is left
                self._accept_from = time.monotonic() + _PAUSE
                self._say_once(f"accepting failed ({error.strerror}); trying on")
                return
            accepted.setblocking(False)
            self._open[accepted.fileno()] = _Connection(accepted)

    # -- one connection

    def _advance(self, connection: _Connection) -> bool:
        """Do what can be done without waiting; False when the connection is over."""
        try:
            if connection.answer is None:
                return self._ask(connection) if connection.waits else self._read(connection)
            if connection.answer:
                return self._write(connection)
            return bool(connection.socket.recv(65536))  # a close over unread bytes would destroy the answer on its way
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _read(self, connection: _Connection) -> bool:
        received = connection.socket.recv(HEAD_BYTES)
        if not received:
            return False
        connection.head += received
        if b"\r\n\r\n" in connection.head or b"\n\n" in connection.head:
            return self._ask(connection)
        if len(connection.head) >= HEAD_BYTES:
            connection.answer = memoryview(_message(Reply(431, b"The request's head is too long.\n")))
            return self._write(connection)
        return True

    def _ask(self, connection: _Connection) -> bool:
        answer = self._answer(bytes(connection.head))
        connection.waits = answer is None
        if answer is None:
            return True
        connection.answer = memoryview(answer)
        return self._write(connection)

    def _write(self, connection: _Connection) -> bool:
        assert connection.answer is not None
        connection.answer = connection.answer[connection.socket.send(connection.answer) :]
        if not connection.answer:
            connection.socket.shutdown(socket.SHUT_WR)
        return True

    def _answer(self, head: bytes) -> bytes | None:
        words = head.split(b"\n", 1)[0].decode("latin-1").split()
        if len(words) != 3:
            return _message(Reply(400, b"That is no HTTP request.\n"))
        method, target, version = words
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            return _message(Reply(505, b"HTTP/1.1 is spoken here.\n"))
        if method not in ("GET", "HEAD"):
            return _message(Reply(405, b"GET and HEAD are answered here.\n"))
        reply = self._reply(target)
        return None if reply is None else _message(reply, with_body=method == "GET")

    def _reply(self, target: str) -> Reply | None:
        with contextlib.suppress(ValueError):  # of a target like `//[`
            route = self._routes.get(urlsplit(target).path)
            if route is not None:
                return self._called(target, route)
        return Reply(404, f"Here are: {' '.join(self._routes)}\n".encode())

    def _called(self, target: str, route: Route) -> Reply | None:
        try:
            return route()
        except Exception as error:  # an observer's fault must not end the listener
            self._say_once(f"{urlsplit(target).path} failed: {type(error).__name__}: {error}")
            return Reply(500, b"The worker could not make this answer; its log says why.\n")

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said and len(self._said) < _REMEMBERED:
            self._said.add(sentence)
            logger.warning("%s: %s", self._name, sentence)


def _most_open() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if limit == resource.RLIM_INFINITY else max(4, min(MOST_OPEN, limit // SHARE))


def _message(reply: Reply, *, with_body: bool = True) -> bytes:
    lines = [
        f"HTTP/1.1 {reply.status} {_WORDS.get(reply.status, '')}",
        f"Content-Type: {reply.content_type}",
        f"Content-Length: {len(reply.body)}",
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if reply.status == 405:
        lines.append("Allow: GET, HEAD")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (reply.body if with_body else b"")
