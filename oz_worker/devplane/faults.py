"""Bad behaviour of a control plane, on order: what networks, proxies and broken servers do to a worker."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Callable, Mapping

from oz_worker.devplane.port import Port, Refusal

if TYPE_CHECKING:
    from oz_worker.devplane.connection import Connection
    from oz_worker.devplane.wire import Frame


class Faults:
    """The part of `ControlPlane` that misbehaves. Every method takes the plane's lock itself.

    `pongs` says how pings are answered: `echo` (right), `none`, `empty` (without payload) or `wrong` (another one).
    """

    lock: threading.Condition
    connections: list[Connection]
    port: Port

    def __init__(self) -> None:
        self.pongs = "echo"
        self.refusal: Refusal | None = None
        self.cuts: list[tuple[Callable[[Frame], bool], bool]] = []

    def cut(self, how: str = "reset", *, code: int = 1001) -> None:
        """End every open connection: `reset` (RST), `eof` (FIN without a close frame), `close` (close frame)."""
        with self.lock:
            for connection in self.connections:
                if connection.closed_at is None:
                    connection.cut(how, code)

    def cut_on(self, wanted: Callable[[Frame], bool], *, unread: bool = False) -> None:
        """Reset the connection at the next frame that is *wanted*, before any pong; *unread*: as if it never came."""
        with self.lock:
            self.cuts.append((wanted, unread))

    def stall(self) -> None:
        """Stop reading and writing without closing (half-open), on open connections; new ones are fine."""
        with self.lock:
            for connection in self.connections:
                connection.stalled = connection.closed_at is None
                connection.wake()

    def resume(self) -> None:
        """End of `stall` and `slow_down`."""
        with self.lock:
            for connection in self.connections:
                connection.stalled, connection.drip = False, 0.0
                if connection.closed_at is None:
                    connection.wake()

    def slow_down(self, seconds: float = 0.01) -> None:
        """Write one byte and read sixteen every so many *seconds* on the open connections."""
        with self.lock:
            for connection in self.connections:
                connection.drip = seconds
                if connection.closed_at is None:
                    connection.wake()

    def refuse(
        self,
        status: int = 503,
        *,
        headers: Mapping[str, str] | None = None,
        body: str = "",
        times: int | None = None,
        raw: bytes | None = None,
        silent: bool = False,
    ) -> None:
        """Answer the next handshakes (*times* of them, None: until `accept`) with *status*.

        *raw*: with these bytes instead; *silent*: with nothing at all, the socket left open.
        """
        with self.lock:
            self.refusal = Refusal(status, dict(headers or {}), body, times, raw, silent)

    def accept(self) -> None:
        """End of `refuse`."""
        with self.lock:
            self.refusal = None

    def down(self) -> None:
        """Stop listening and reset what is connected: dialling gets "connection refused" until `up`."""
        self.port.unlisten()
        self.cut()

    def up(self) -> None:
        """Listen again, on the same port."""
        self.port.listen()
