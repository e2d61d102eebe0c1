"""What the link needs from the rest of the worker: callables, so that it knows no dialect and no engine."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple, Protocol, Sequence


class Phase(enum.Enum):
    """What the daemon wants of the link."""

    RUN = "run"  # dial, redial, stay connected
    FLUSH = "flush"  # deliver what is left until `until`, then close and return
    LEAVE = "leave"  # return now, from wherever the link is, without a close handshake


class Directive(NamedTuple):
    """The daemon's answer to each wake-up. Times are monotonic.

    `until`: in FLUSH the moment to give up. `call_again`: the daemon wants `on_wake` called by then at the latest,
    whatever happens (its timers live on the same thread).
    """

    phase: Phase = Phase.RUN
    until: float = math.inf
    call_again: float = math.inf


class Traffic(Protocol):
    """The other side of the link. Every method is called on the main thread and returns without blocking on I/O.

    The frames of one connection are counted from 1 in the order in which `take` handed them out.
    """

    def on_wake(self) -> Directive:
        """Called after each wake-up, and whenever `call_again` is reached, in every state of the link (DNS, connect,
        TLS, handshake, idle, blocked write, backoff). Handles signals and timers; says what to do now."""

    def opened(self, connection: str, origin: str) -> None:
        """A connection (16 hex digits) to *origin* (scheme://host:port) is up; counting restarts, everything that is
        unacknowledged and meant for this origin is to be handed out by `take` again."""

    def take(self, limit: int) -> Sequence[str]:
        """The next frames to send on this connection, in order, at most *limit*; empty when there is nothing new."""

    def acknowledged(self, count: int) -> None:
        """The peer has read the first *count* frames taken on this connection."""

    def unfinished(self) -> bool:
        """Whether anything is unsent or unacknowledged (decides whether FLUSH waits and whether a barrier is due)."""

    def received(self, text: str) -> bool:
        """A text message came in. True if it is of a known type (which proves a healthy session)."""

    def closed(self, why: str) -> None:
        """The connection is over; *why* is one sentence for people. Always follows `opened`."""

    def dial_failed(self, sentence: str, refused: bool, delay: float) -> None:
        """A dial failed; *sentence* names the cause and the cure, next try in *delay* seconds. `refused`: the server
        said no (400/401/403/404), which `exit_on_refusal` turns into an end: then the next `on_wake` says LEAVE."""
