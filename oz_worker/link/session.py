"""One WebSocket from its handshake to its end. A new connection gets a new object: nothing stale can act on it."""

from __future__ import annotations

import logging
import math
import struct
import time
from collections import deque
from typing import Callable, NamedTuple

import websocket

from oz_worker.link import message as m
from oz_worker.link.acks import Barrier, Origin, Written, digest, talks_past
from oz_worker.link.traffic import Directive, Phase, Traffic
from oz_worker.link.wire import TooBig, Wire
from oz_worker.pulse import Pulse
from oz_worker.settings import LinkOptions

logger = logging.getLogger(__name__)

BATCH = 64
WINDOW = 1024
"""Frames that may be unacknowledged: it bounds what is sent twice after a break."""
SLICE_SECONDS = 0.05
"""Absolute end of one `recv_frame` (design 12, rule 19); what has come of a frame is kept for the next one."""
LOOK_SECONDS = 5.0
"""The longest wait: after a suspend nothing else would end it, because monotonic timers slept too."""


class Limits(NamedTuple):
    """Seconds that nobody configures."""

    message: float = 30.0
    """From a message's first byte to its last."""
    closing: float = 1.0
    """For a close frame, and for the peer's end after it."""
    barrier: float = 0.1
    """A ping waits so long for more frames to stand behind."""
    written: float = 5.0
    """A written frame counts as read after this, once the peer's kernel has taken everything (rule 15)."""
    written_blind: float = 30.0
    """The same where the kernel cannot be asked."""
    pause: float = 0.5
    """The shortest wait after a session: a server that accepts and drops must not be stormed."""


class Around(NamedTuple):
    """What all sessions of a link share."""

    options: LinkOptions
    limits: Limits
    pulse: Pulse
    traffic: Traffic
    directive: Callable[[], Directive]
    """The daemon's last word."""
    origin: Origin
    asleep: Callable[[], float]
    """Seconds for which this machine has been suspended."""


class Over(Exception):
    """The connection is over; `str()` is the sentence for people."""

    def __init__(self, why: str, *, at_once: bool = False) -> None:
        super().__init__(why)
        self.at_once = at_once


class Session:
    """Sends what `traffic` hands out, hears what the peer says, and knows what the peer has read.

    For the main thread alone; every wait is `Pulse.poll`. `run` returns when everything was delivered in FLUSH and
    raises Over in every other case; the caller closes the wire.
    """

    def __init__(self, socket: websocket.WebSocket, wire: Wire, *, connection: str, around: Around) -> None:
        now = time.monotonic()
        self._socket = socket
        self._wire = wire
        self._around = around
        self._options, self._limits = around.options, around.limits
        self._pulse, self._traffic, self._origin = around.pulse, around.traffic, around.origin
        self._barrier = Barrier(connection)
        self._written = Written(self._limits.written, self._limits.written_blind)
        self._assembly = m.Assembly()
        self._unread: deque[bytes] = deque()  # digests of the frames sent and not acknowledged
        self._sent = self._acked = 0
        self._next_ping = now + self._options.ping_interval
        self._barrier_due = math.inf
        self._last_frame = now
        self._mark = wire.consumed  # at the last boundary between messages
        self._began = math.inf  # when the first byte behind the mark came
        self._binary = 0
        self._blind = False
        self._more = False  # the last batch was full: there may be more to send at once
        self.healthy = False
        self._slept = around.asleep()
        wire.budget = m.BUDGET

    # -- the loop

    def run(self) -> None:
        """Work until everything is flushed (returns) or the connection ends (raises Over)."""
        while True:
            self._send_new()
            self._send_ping()
            if self._flushed():
                return
            until = 0.0 if self._more or self._wire.ready() else self._until()
            readable = self._pulse.poll(until, self._wire.fileno()) or self._wire.ready()
            self._count_written()  # here, where the kernel's queue has had time: right after a pong it is never empty
            if readable:
                self._receive()
            else:
                self._judge_silence()
            self._judge_clock()
            self._judge_pongs()

    @property
    def _by_write(self) -> bool:
        return self._origin.mute or self._options.acknowledgement == "write"

    def _until(self) -> float:
        """The next moment at which something must be done without being asked."""
        now = time.monotonic()
        moments = [now + LOOK_SECONDS, self._barrier_due, self._began + self._limits.message]
        if not self._origin.mute:
            moments += [self._next_ping, self._wire.last_rx + self._options.dead_after]
        if self._by_write and (due := self._written.due(self._blind)) is not None:
            moments.append(max(due, now + SLICE_SECONDS))
        directive = self._around.directive()
        if directive.phase is Phase.FLUSH:
            moments.append(directive.until)
        return min(moments)

    # -- out

    def _send_new(self) -> None:
        limit = min(BATCH, WINDOW - (self._sent - self._acked))
        frames = self._traffic.take(limit) if limit > 0 else ()
        self._more = 0 < limit == len(frames)
        for frame in frames:
            self._send(frame.encode("utf-8", "replace"), m.TEXT)
            self._unread.append(digest(frame))
            self._sent += 1
        if not frames:
            return
        now = time.monotonic()
        self._written.add(self._sent, now)
        self._barrier_due = min(self._barrier_due, now + self._limits.barrier)

    def _send_ping(self) -> None:
        """The barrier behind new frames, one at a time; and the ping that keeps the line alive."""
        if self._origin.mute:
            self._barrier_due = math.inf
            return
        now = time.monotonic()
        wanted = not self._by_write and self._sent > self._acked >= self._barrier.covers
        hurry = self._around.directive().phase is Phase.FLUSH
        barrier = wanted and (hurry or now >= self._barrier_due)
        if not barrier and now < self._next_ping:
            if now >= self._barrier_due:
                self._barrier_due = math.inf  # again when the outstanding one is answered
            return
        self._send(self._barrier.ping(self._sent, now), m.PING)
        self._next_ping = now + self._options.ping_interval
        self._barrier_due = math.inf

    def _send(self, data: bytes, opcode: int, seconds: float | None = None) -> None:
        """Send one frame. After any failure part of it may be on the line: the connection is over."""
        limit = self._options.write_timeout if seconds is None else seconds
        self._wire.write_by = time.monotonic() + limit
        try:
            self._socket.send(data, opcode)
        except websocket.WebSocketTimeoutException:
            raise Over(f"the server stopped reading: a frame was not taken within {limit:g} s") from None
        except (OSError, websocket.WebSocketException) as error:
            raise Over(f"sending failed: {_brief(error)}") from None
        finally:
            self._wire.write_by = math.inf
        if opcode != m.PING:  # a ping has been counted already: its number is its payload
            self._barrier.count()

    # -- in

    def _receive(self) -> None:
        """Take what has come of the next frame, at most for one slice, and act on it when it is whole."""
        try:
            frame = self._recv_frame()
            if frame is not None:
                self._last_frame = self._origin.heard_at = time.monotonic()
                self._act(frame.opcode, bool(frame.fin), _bytes(frame.data))
            self._watch_message()
        except m.Violation as error:
            self._fail(error.code, f"the server broke the WebSocket protocol: {error}")
        except TooBig:
            self._fail(m.TOO_BIG, f"the server sent a message of more than {m.MESSAGE_BYTES} bytes")

    def _recv_frame(self) -> websocket.ABNF | None:
        self._wire.read_by = time.monotonic() + SLICE_SECONDS
        try:
            frame: websocket.ABNF = self._socket.recv_frame()  # type: ignore[no-untyped-call]
            return frame
        except websocket.WebSocketTimeoutException:
            return None
        except (websocket.WebSocketProtocolException, websocket.WebSocketPayloadException) as error:
            raise m.Violation(m.PROTOCOL_ERROR, str(error)) from None
        except websocket.WebSocketConnectionClosedException:
            whole = self._wire.consumed == self._mark
            raise Over(
                "the server closed the connection without a word" if whole else "the connection was cut inside a frame"
            ) from None
        except (OSError, websocket.WebSocketException) as error:
            raise Over(f"the connection broke: {_brief(error)}") from None
        finally:
            self._wire.read_by = math.inf

    def _watch_message(self) -> None:
        """A message is whole within 30 s of its first byte; budget and clock run for each message anew."""
        inside = self._assembly.open or self._wire.consumed > self._mark
        if not inside:
            self._began = math.inf
            return
        self._began = min(self._began, time.monotonic())
        if time.monotonic() >= self._began + self._limits.message:
            raise m.Violation(m.POLICY, f"a message was not whole within {self._limits.message:g} s")

    def _boundary(self) -> None:
        self._mark = self._wire.consumed
        self._began = math.inf
        self._wire.budget = m.BUDGET

    def _act(self, opcode: int, fin: bool, data: bytes) -> None:
        if opcode in (m.TEXT, m.BINARY, m.CONTINUATION):
            whole = self._assembly.add(opcode, fin, data)
            if whole is not None:
                self._boundary()
                self._message(m.text(whole.data) if whole.opcode == m.TEXT else whole.data)
            return
        m.check_control(fin, data)
        if not self._assembly.open:
            self._boundary()
        if opcode == m.PING:
            self._send(data, m.PONG)
        elif opcode == m.PONG:
            self._pong(data)
        else:
            self._peer_closes(data)

    def _message(self, content: str | bytes) -> None:
        """A whole message came. The conformance test replaces this with an echo."""
        if isinstance(content, str):
            self.healthy = self._traffic.received(content) or self.healthy
            return
        self._binary += 1
        if self._binary == 1:
            logger.warning("ignored a binary message of %d bytes: this protocol is text", len(content))

    def _pong(self, payload: bytes) -> None:
        count = self._barrier.pong(payload)
        if count is None:
            return
        self._origin.answered_at = time.monotonic()
        self._origin.strikes = 0 if not self._origin.mute else self._origin.strikes
        if self._by_write:
            return
        self._acknowledge(count)
        if self._sent > self._acked:
            self._barrier_due = time.monotonic() + self._limits.barrier

    def _acknowledge(self, count: int) -> None:
        if count <= self._acked:
            return
        for _ in range(count - self._acked):
            self._unread.popleft()
        self._acked = count
        self._traffic.acknowledged(count)

    def _peer_closes(self, data: bytes) -> None:
        code, reason = m.closing(data)
        self._say_goodbye(data[:2])
        text = "".join(c if c.isprintable() else "?" for c in reason)
        raise Over(f"the server closed the connection (code {code}{', ' + text if text else ''})")

    # -- ends

    def _fail(self, code: int, why: str) -> None:
        self._say_goodbye(struct.pack("!H", code))
        raise Over(why)

    def _say_goodbye(self, payload: bytes) -> None:
        """Send a close frame and let the peer end the TCP connection, as RFC 6455 wants it; at most a second."""
        end = time.monotonic() + self._limits.closing
        try:
            self._send(payload, m.CLOSE, self._limits.closing)
            self._wire.read_by = end
            self._wire.budget = m.BUDGET
            while self._wire.recv(65536):
                pass
        except (Over, OSError, TooBig):
            pass  # it is over either way
        finally:
            self._wire.read_by = math.inf

    def _flushed(self) -> bool:
        """In FLUSH: close once everything has been read by the peer, or when there is no time left."""
        directive = self._around.directive()
        if directive.phase is not Phase.FLUSH:
            return False
        if not self._traffic.unfinished():
            # The pongs have proved that the peer has read everything: there is nothing to wait for.
            try:
                self._send(struct.pack("!H", m.NORMAL), m.CLOSE, self._limits.closing / 4)
            except Over:
                pass
            return True
        if time.monotonic() < directive.until:
            return False
        self._say_goodbye(struct.pack("!H", m.NORMAL))
        raise Over("stopped before the server had confirmed everything")

    def finish(self) -> None:
        """After the end: frames that have been written on two connections now count as read (rule 15)."""
        count = self._origin.ended(self._unread)
        if count and self._by_write:
            self._acknowledge(self._acked + count)

    # -- judgements

    def _judge_silence(self) -> None:
        """Only after `poll` found nothing to read: bytes that waited in the kernel while we slept are life."""
        age = time.monotonic() - self._wire.last_rx
        if not self._origin.mute and age >= self._options.dead_after:
            raise Over(f"nothing came from the server for {age:.0f} s: the connection is dead")
        if time.monotonic() >= self._began + self._limits.message:
            self._fail(m.POLICY, f"the server did not make a message whole within {self._limits.message:g} s")

    def _judge_clock(self) -> None:
        slept = self._around.asleep() - self._slept
        if slept > self._options.dead_after:
            raise Over(f"this machine slept for {slept:.0f} s: the connection cannot be trusted", at_once=True)

    def _judge_pongs(self) -> None:
        """A peer that talks on while it answers no ping of ours: strike one ends the connection, strike two is the
        verdict (rule 15). A line that merely broke does not talk on."""
        asked = self._barrier.oldest
        if asked is None or self._barrier.matched or self._origin.mute:
            return
        if not talks_past(asked, self._last_frame, time.monotonic(), self._options.dead_after):
            return
        if not self._origin.strike():
            raise Over("the server talks but does not answer pings with their payload; trying once more")
        logger.warning(
            "the server does not answer pings with their payload: reports count as delivered once written, and one "
            "lost on the way would not be noticed; let its operator make it echo pings (RFC 6455, 5.5.3)"
        )

    def _count_written(self) -> None:
        if not self._by_write:
            return
        due = self._written.due(self._blind)
        if due is None or due > time.monotonic():
            return
        try:
            unsent = self._wire.unsent()
        except OSError:
            unsent = None
        self._blind = unsent is None
        if not unsent:
            count = self._written.read(time.monotonic(), self._blind)
            if count is not None:
                self._acknowledge(count)


def _bytes(data: bytes | str) -> bytes:
    """websocket-client types payloads as either; received ones are bytes, but an empty one may be ""."""
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


def _brief(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
