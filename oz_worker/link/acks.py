"""Which frames the peer has read: by pong (design 12, rule 14) or, where pongs prove nothing, by writing (rule 15).

Frames are counted from 1 in the order in which they were taken. Pure: times are handed in.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from typing import Iterable

PINGS = 64
"""Unanswered pings that are remembered; older ones would only acknowledge what newer ones do as well."""
STRIKES = 2
"""After so many connections without a matching pong a server is used without pings."""


class Barrier:
    """Pings whose payload only this connection and this moment know, and what each of them proves when it returns."""

    def __init__(self, connection: str) -> None:
        self._connection = connection
        self._frames = 0
        self._open: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self.matched = False
        """Whether any pong has matched on this connection."""

    def count(self) -> int:
        """Count one more frame of any kind sent on this connection; its number."""
        self._frames += 1
        return self._frames

    def ping(self, sent: int, now: float) -> bytes:
        """The payload of a ping that stands behind the first *sent* taken frames."""
        payload = f"{self._connection}:{self.count()}".encode("ascii")
        self._open[payload] = (sent, now)
        if len(self._open) > PINGS:
            self._open.popitem(last=False)
        return payload

    def pong(self, payload: bytes) -> int | None:
        """The number of frames that this pong proves to have been read; None unless it equals an outstanding ping.

        Everything asked before it counts as answered: a peer may answer the newest ping only (RFC 6455, 5.5.3).
        """
        if payload not in self._open:
            return None
        self.matched = True
        while True:
            key, (sent, _) = self._open.popitem(last=False)
            if key == payload:
                return sent

    @property
    def covers(self) -> int:
        """How many frames the newest outstanding ping stands behind; -1 when none is outstanding."""
        return next(reversed(self._open.values()))[0] if self._open else -1

    @property
    def oldest(self) -> float | None:
        """When the oldest outstanding ping was sent."""
        return next(iter(self._open.values()))[1] if self._open else None


def talks_past(asked: float, last_frame: float, now: float, dead_after: float) -> bool:
    """Whether a peer that has answered no ping since *asked* goes on talking, so that its line cannot be to blame.

    A frame soon after the ping was on its way already when the line broke: it proves nothing.
    """
    return last_frame >= asked + dead_after / 4 and now >= asked + dead_after


class Written:
    """Frames by the moment they were written."""

    def __init__(self, seconds: float, blind_seconds: float) -> None:
        self._seconds = seconds
        self._blind_seconds = blind_seconds
        self._batches: deque[tuple[int, float]] = deque()

    def add(self, sent: int, now: float) -> None:
        """The first *sent* frames have been written by *now*."""
        self._batches.append((sent, now))

    def due(self, blind: bool) -> float | None:
        """When the oldest batch may count as read."""
        if not self._batches:
            return None
        return self._batches[0][1] + (self._blind_seconds if blind else self._seconds)

    def read(self, now: float, blind: bool) -> int | None:
        """How many frames count as read at *now*, given that the kernel's queue is empty or cannot be asked."""
        count = None
        while (due := self.due(blind)) is not None and due <= now:
            count = self._batches.popleft()[0]
        return count


class Origin:
    """What is remembered about one server across connections. Main thread only where not said."""

    def __init__(self) -> None:
        self.strikes = 0
        self.heard_at: float | None = None
        """When the last frame came, monotonic; this and the next are read by any thread."""
        self.answered_at: float | None = None
        """When the last matching pong came."""
        self._sent: Counter[bytes] = Counter()

    @property
    def mute(self) -> bool:
        """Whether this server is used without pings, and therefore without `dead_after`."""
        return self.strikes >= STRIKES

    def strike(self) -> bool:
        """Count a connection without a matching pong; whether that was the verdict."""
        self.strikes += 1
        return self.mute

    def ended(self, texts: Iterable[bytes]) -> int:
        """A connection ended with the frames of these digests written and not counted as read, in their order.

        Returns how many of the first ones have been sent on two connections now: they count as read, for nothing
        better than that will ever be known (rule 15).
        """
        previous, self._sent = self._sent, Counter(texts)
        count = 0
        for digest in texts:
            if not previous[digest]:
                break
            count += 1
        return count


def digest(text: str) -> bytes:
    """What `Origin` remembers of a frame instead of its text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
