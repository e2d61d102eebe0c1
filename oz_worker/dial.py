"""From a URL to a connected, encrypted, non-blocking socket, under one absolute deadline and always interruptible.

The steps are look-up, connect, proxy, TLS. Each waits in `Pulse.poll`, so that a stop is prompt in every one of them;
each failure is a `DialError` that says which step it was and where. `oz_worker.link.refusals` puts it into words.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import select
import socket
import ssl
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence, Union
from urllib.parse import parse_qsl, quote, urlsplit

from oz_worker import __version__, proxy, reply
from oz_worker.errors import ConfigurationError, OzWorkerError
from oz_worker.proxy import Proxy, bracketed
from oz_worker.pulse import Pulse
from oz_worker.reply import Reply
from oz_worker.resolver import Question, Resolver
from oz_worker.timing import Deadline
from oz_worker.trust import Trust

logger = logging.getLogger(__name__)

USER_AGENT = f"oz-worker/{__version__}"
ADDRESSES = 16
"""So many addresses of a name are tried; a round-robin name with more is served by its first ones."""
ADDRESS_SECONDS = 3.0
"""How long an address may stay silent while others are left; the last one has all the time that remains."""
CERTIFICATES = "the certificate authorities"

Look = Callable[[str, int], Sequence[Any]]
"""Like `socket.getaddrinfo` for a TCP connection."""


class Step(enum.Enum):
    """Where a dial failed."""

    KEY = "the API key"
    TRUST = "the certificate authorities"
    PROXY_SETTING = "the proxy's address"
    LOOK_UP = "the look-up"
    CONNECT = "connecting"
    PROXY = "the proxy"
    TLS = "TLS"
    HANDSHAKE = "the WebSocket handshake"


class DialError(OzWorkerError):
    """A dial failed at *step*. `place` is host:port of whom we talked to; `reply` what it said in HTTP, if it did;
    `variable` the one that named it, "" when it is no proxy."""

    def __init__(
        self, step: Step, place: str, cause: BaseException, said: Reply | None = None, *, variable: str = ""
    ) -> None:
        super().__init__(f"{step.value} failed at {place}: {cause}")
        self.step = step
        self.place = place
        self.cause = cause
        self.reply = said
        self.variable = variable


class Target(NamedTuple):
    """A WebSocket URL taken apart. `resource` is path and query, percent-encoded."""

    secure: bool
    host: str
    port: int
    resource: str

    @property
    def origin(self) -> str:
        """scheme://host:port, always with the port: what reports are kept for."""
        return f"{'wss' if self.secure else 'ws'}://{bracketed(self.host, self.port)}"

    @property
    def place(self) -> str:
        """host:port."""
        return bracketed(self.host, self.port)

    @property
    def variable(self) -> str:
        """What a `Proxy` has a name for: no variable leads straight to the server."""
        return ""

    @property
    def url(self) -> str:
        """The whole, as it is dialled."""
        return self.origin + self.resource


Hop = Union[Proxy, Target]
"""Whom a socket is connected to."""


def target(url: str, query: Mapping[str, str] | None = None) -> Target:
    """*url* with *query* added; its own query stays, byte for byte. ConfigurationError when it cannot be dialled."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        host, port, parts = "", None, urlsplit("")
    if parts.scheme not in ("ws", "wss") or not host:
        raise ConfigurationError([f"web_socket_url {url!r} is not a WebSocket URL; write it like wss://host/path"])
    secure = parts.scheme == "wss"
    added = dict(query or {})
    kept = [item for item in parts.query.split("&") if item and not _names(item, added)]
    kept += [f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in added.items()]
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    resource = path + ("?" + quote("&".join(kept), safe="/%:@!$&'()*+,;=~?") if kept else "")
    return Target(secure, host, port or (443 if secure else 80), resource)


def _names(item: str, names: Mapping[str, str]) -> bool:
    return any(name in names for name, _ in parse_qsl(item, keep_blank_values=True))


class Dialler:
    """Opens sockets to servers, through the proxy that the environment names. For the main thread alone.

    *look* is `socket.getaddrinfo` or something that behaves like it; it runs on the resolver thread.
    """

    def __init__(
        self,
        resolver: Resolver,
        pulse: Pulse,
        *,
        trust: Trust,
        dead_after: float,
        look: Look | None = None,
        environ: Mapping[str, str] | None = None,
        address_seconds: float = ADDRESS_SECONDS,
    ) -> None:
        self._resolver = resolver
        self._pulse = pulse
        self._trust = trust
        self._dead_after = dead_after
        self._address_seconds = address_seconds
        self._look: Look = look or _getaddrinfo
        self._environ = os.environ if environ is None else environ
        self._certificates: Question[ssl.SSLContext] | None = None

    def prepare(self, where: Target) -> None:
        """Begin what needs no answer from anybody else: the certificates are read while the key and the name are."""
        self._certificates = self._resolver.ask(CERTIFICATES, self._trust.context) if where.secure else None

    def open(self, where: Target, deadline: Deadline) -> socket.socket:
        """A connected, non-blocking socket to *where*, TLS done. DialError says what failed, at which step."""
        if self._certificates is None:
            self.prepare(where)
        sock = self.reach(where, deadline)
        try:
            return self._encrypt(sock, where, deadline) if where.secure else sock
        except BaseException:
            sock.close()
            raise

    def reach(self, where: Target, deadline: Deadline) -> socket.socket:
        """The first half of `open`: a socket whose other end is *where*, through the proxy if there is one; no TLS."""
        via = self.via(where)
        way = f"through the proxy {via.place}, which {via.variable} names" if via else "straight, without a proxy"
        logger.debug("dialling %s %s", where.place, way)
        hop = via or where
        sock = self._connect(hop, self.addresses(hop, deadline), deadline)
        try:
            if via:
                self._tunnel(sock, via, where, deadline)
                logger.debug("the proxy %s opened the way to %s", via.place, where.place)
            return sock
        except BaseException:
            sock.close()
            raise

    def via(self, where: Target) -> Proxy | None:
        """The proxy that leads to *where*, None for the straight way. DialError for one that cannot be used."""
        try:
            return proxy.choose(where.secure, where.host, where.port, self._environ)
        except ValueError as error:
            raise DialError(Step.PROXY_SETTING, where.place, error) from None

    def addresses(self, hop: Hop, deadline: Deadline) -> Sequence[Any]:
        """What `getaddrinfo` says of *hop*, in the order in which it is tried. DialError when that is nothing."""
        subject = f"the name {hop.place}"
        question = self._resolver.ask(subject, lambda: self._look(hop.host, hop.port))
        try:
            found = self._resolver.wait(subject, question, self._pulse, deadline.at)
        except (OSError, UnicodeError) as error:
            raise DialError(Step.LOOK_UP, hop.place, error, variable=hop.variable) from None
        if not found:
            none = OSError("the name has no address")
            raise DialError(Step.LOOK_UP, hop.place, none, variable=hop.variable)
        return interleaved(found)[:ADDRESSES]

    def _connect(self, hop: Hop, addresses: Sequence[Any], deadline: Deadline) -> socket.socket:
        """The first address that answers; DialError with every address's own failure when none does."""
        failures = []
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            last = index == len(addresses) - 1
            until = deadline.at if last else min(deadline.at, time.monotonic() + self._address_seconds)
            began = time.monotonic()
            try:
                sock = self._connect_one(socket.socket(family, kind, protocol), address, until)
            except OSError as error:
                failures.append((str(address[0]), error))
                logger.debug("%s does not answer at %s: %s", hop.place, address[0], error.strerror or error)
                continue
            logger.debug("%s answers at %s after %.3f s", hop.place, address[0], time.monotonic() - began)
            return sock
        raise DialError(Step.CONNECT, hop.place, _combined(failures), variable=hop.variable)

    def _connect_one(self, sock: socket.socket, address: Any, until: float) -> socket.socket:
        try:
            sock.setblocking(False)
            self._tune(sock)
            code = sock.connect_ex(address)
            if code in (errno.EINPROGRESS, errno.EALREADY, errno.EINTR):
                self.ready(sock, select.POLLOUT, until)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            return sock
        except BaseException:
            sock.close()
            raise

    def _tune(self, sock: socket.socket) -> None:
        """No delay for small frames; the kernel's own liveness is the second line behind our pings."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        seconds = max(1, int(self._dead_after / 2))
        for name, value in (("TCP_KEEPIDLE", seconds), ("TCP_KEEPINTVL", max(1, seconds // 4)), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Keepalive is suspended while data is in flight: without this an unread send lives for 940 s.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1000, int(self._dead_after * 1000)))

    def ready(self, sock: socket.socket, events: int, until: float) -> None:
        """Wait for *events* on *sock*; TimeoutError at the monotonic moment *until*."""
        while not self._pulse.poll(until, sock.fileno(), events):
            if time.monotonic() >= until:
                raise TimeoutError("no answer in time")

    def _tunnel(self, sock: socket.socket, via: Proxy, where: Target, deadline: Deadline) -> None:
        try:
            self._write(sock, proxy.connect_request(via, where.host, where.port, USER_AGENT), deadline)
            data = self._head(sock, deadline)
        except OSError as error:
            raise DialError(Step.PROXY, via.place, error, variable=via.variable) from None
        said = reply.parse(data)
        if said is None:
            raise DialError(Step.PROXY, via.place, ValueError("it does not speak HTTP"), variable=via.variable)
        if said.status // 100 != 2:
            refused = ValueError(f"status {said.status}")
            raise DialError(Step.PROXY, via.place, refused, said, variable=via.variable)
        if said.body:
            # Neither TLS nor WebSocket servers speak first: these bytes are nobody's, and TLS could not read them.
            early = ValueError("it sent data into the tunnel by itself")
            raise DialError(Step.PROXY, via.place, early, variable=via.variable)

    def _write(self, sock: socket.socket, data: bytes, deadline: Deadline) -> None:
        while data:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                self.ready(sock, select.POLLOUT, deadline.at)

    def _head(self, sock: socket.socket, deadline: Deadline) -> bytes:
        """What the proxy says up to the end of its headers, and what came with it."""
        data = b""
        while b"\r\n\r\n" not in data:
            self.ready(sock, select.POLLIN, deadline.at)
            try:
                more = sock.recv(4096)
            except BlockingIOError:
                continue
            data += more
            if not more:
                if reply.parse(data):
                    return data
                raise ConnectionAbortedError("it closed the connection instead of answering")
            if len(data) > proxy.REPLY_BYTES:
                raise ConnectionAbortedError(f"its answer is longer than {proxy.REPLY_BYTES} bytes")
        return data

    def _encrypt(self, sock: socket.socket, where: Target, deadline: Deadline) -> ssl.SSLSocket:
        try:
            question = self._certificates or self._resolver.ask(CERTIFICATES, self._trust.context)
            self._certificates = None
            context = self._resolver.wait(CERTIFICATES, question, self._pulse, deadline.at)
        except OSError as error:
            raise DialError(Step.TRUST, getattr(error, "origin", "the disk"), error) from None
        try:
            tls = context.wrap_socket(sock, server_hostname=where.host, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            raise DialError(Step.TLS, where.place, error) from None
        try:
            self._shake_hands(tls, deadline)
        except OSError as error:
            tls.close()
            raise DialError(Step.TLS, where.place, error) from None
        except BaseException:
            tls.close()
            raise
        logger.debug("TLS with %s: %s, %s", where.place, tls.version(), (tls.cipher() or ("no cipher",))[0])
        return tls

    def _shake_hands(self, tls: ssl.SSLSocket, deadline: Deadline) -> None:
        while True:
            try:
                tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.ready(tls, select.POLLIN, deadline.at)
            except ssl.SSLWantWriteError:
                self.ready(tls, select.POLLOUT, deadline.at)
            # A peer that drips its handshake never lets `ready` time out by itself.
            if deadline.passed():
                raise TimeoutError("no answer in time")


def interleaved(found: Sequence[Any]) -> list[Any]:
    """The addresses in the system's order of preference, but with the two families taking turns: a broken IPv6 costs
    one address's patience and not that of all of them. Doubles are dropped."""
    unique = list({entry[4]: entry for entry in found}.values())
    if not unique:
        return []
    first = [entry for entry in unique if entry[0] == unique[0][0]]
    other = [entry for entry in unique if entry[0] != unique[0][0]]
    mixed: list[Any] = []
    for index in range(max(len(first), len(other))):
        mixed += first[index : index + 1] + other[index : index + 1]
    return mixed


def _combined(failures: Sequence[tuple[str, OSError]]) -> OSError:
    """One error for all addresses: the only one as it is, else the last one's number and everybody's text."""
    if len(failures) == 1:
        return failures[0][1]
    text = "; ".join(f"{address}: {error.strerror or error}" for address, error in failures)
    last = failures[-1][1]
    return type(last)(last.errno or errno.ETIMEDOUT, text)


def _getaddrinfo(host: str, port: int) -> Sequence[Any]:
    return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, socket.IPPROTO_TCP)
