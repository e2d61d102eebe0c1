"""The loop that renews the connection: dial, session, wait, for as long as the daemon wants it."""

from __future__ import annotations

import logging
import os
import random
import time
from typing import Callable, Iterator, Mapping

from oz_worker.dial import USER_AGENT, DialError, Dialler, Look, Step, target
from oz_worker.link import refusals
from oz_worker.link.acks import Origin
from oz_worker.link.session import LOOK_SECONDS, Around, Limits, Over, Session
from oz_worker.link.traffic import Directive, Phase, Traffic
from oz_worker.link.wire import Wire, upgrade
from oz_worker.pulse import Pulse
from oz_worker.redact import Secret
from oz_worker.resolver import Resolver
from oz_worker.settings import LinkOptions
from oz_worker.threads import Waker
from oz_worker.timing import Deadline, backoff
from oz_worker.trust import Trust

logger = logging.getLogger(__name__)

CAPABILITIES = {"X-Warp-Worker-Capabilities": "execution-scoped-cancellation-v1"}
LIMITS = Limits()
REFUSED_MOST = 300.0
"""The longest wait between two dials to a server that says no."""


class Left(Exception):
    """The loop is over: raised out of every wait, caught by `run`."""


def seconds_asleep() -> float:
    """How long this machine has been suspended since it booted; 0 where that cannot be asked."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


class Link:
    """Owns the one connection of the worker. `run` belongs to the main thread, and nothing else may touch the socket.

    The daemon stops it through *traffic*: `waker.wake()` leads to `traffic.on_wake()`, whose directive says RUN,
    FLUSH or LEAVE, wherever the loop waits. *key* is called on the resolver thread at each dial and returns the key;
    OSError and ValueError from it count as a failed dial; *of_key* says where it comes from to whoever reads that the
    server does not want it. *look* replaces `getaddrinfo`, *asleep* the suspend clock.
    """

    def __init__(
        self,
        url: str,
        *,
        worker_id: str,
        key: Callable[[], Secret],
        options: LinkOptions,
        waker: Waker,
        traffic: Traffic,
        ca_file: str = "",
        of_key: str = "",
        headers: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
        look: Look | None = None,
        environ: Mapping[str, str] | None = None,
        asleep: Callable[[], float] = seconds_asleep,
        limits: Limits = LIMITS,
    ) -> None:
        self._target = target(url, {"worker_id": worker_id})  # ConfigurationError when it is no WebSocket URL
        self._key = key
        self._of_key = of_key
        self._options = options
        self._traffic = traffic
        self._headers = {"User-Agent": USER_AGENT, **CAPABILITIES, **(headers or {})}
        self._rng = rng or random.Random()
        self._asleep = asleep
        self._pulse = Pulse(waker, self._on_wake)
        self._resolver = Resolver(waker)
        self._dialler = Dialler(
            self._resolver,
            self._pulse,
            trust=Trust(ca_file, environ),
            dead_after=options.dead_after,
            look=look,
            environ=environ,
        )
        self._directive = Directive()
        self._connected = False
        self._around = Around(options, limits, self._pulse, traffic, lambda: self._directive, Origin(), asleep)
        self._limits = limits
        self._delays = self._ordinary()
        self._refusals: Iterator[float] | None = None
        self.refusal: refusals.Refusal | None = None
        """Why the last dial failed; None when it did not."""

    @property
    def origin(self) -> Origin:
        """What is remembered of the server: when it was heard last, among others."""
        return self._around.origin

    # -- what the daemon wants

    def _on_wake(self) -> float:
        """Ask the daemon; raise Left when there is nothing left to do; when to ask again."""
        self._directive = directive = self._traffic.on_wake()
        if directive.phase is Phase.LEAVE:
            raise Left
        if directive.phase is Phase.RUN or self._connected:
            return directive.call_again
        if time.monotonic() >= directive.until or not self._traffic.unfinished():
            raise Left
        return min(directive.call_again, directive.until)

    @property
    def _flushing(self) -> bool:
        return self._directive.phase is Phase.FLUSH

    # -- the loop

    def run(self) -> None:
        """Stay connected until the daemon says FLUSH (everything delivered, or its time is up) or LEAVE."""
        try:
            self._pulse.beat()
            while True:
                self._turn()
        except Left:
            logger.debug("the link is down for good")

    def _turn(self) -> None:
        """One dial, the session behind it, and the wait after it."""
        flushing = self._flushing
        try:
            wire, session = self._dial()
        except DialError as error:
            self._failed(error, last=flushing)
            return
        began = time.monotonic()
        over = self._converse(wire, session)
        if over is None:
            raise Left
        if session.healthy or time.monotonic() - began >= self._options.healthy_after:
            self._delays = self._ordinary()
        self._pulse.beat()
        delay = 0.0 if over.at_once else max(self._limits.pause, next(self._delays))
        self._wait(delay, through_flush=flushing)

    def _failed(self, error: DialError, *, last: bool) -> None:
        refusal = refusals.explain(error)
        if refusal.of_key and self._of_key:
            refusal = refusal._replace(cure=f"{refusal.cure}; {self._of_key}")
        self.refusal = refusal
        logger.debug("dial failed at %s: %s", error.step.value, refusal.sentence)
        delay = max(refusal.delay, next(self._slow() if refusal.refused else self._delays))
        if not refusal.refused:
            self._refusals = None
        self._traffic.dial_failed(refusal.sentence, refusal.refused, 0.0 if last else delay)
        self._pulse.beat()
        if last:
            raise Left  # one dial at once is what rule 17 promises, and it has been made
        self._wait(delay)

    def _ordinary(self) -> Iterator[float]:
        return backoff(self._options.backoff_min, self._options.backoff_max, self._rng)

    def _slow(self) -> Iterator[float]:
        if self._refusals is None:
            first = self._options.refused_backoff
            self._refusals = backoff(first, max(first, REFUSED_MOST), self._rng)
        return self._refusals

    def _wait(self, delay: float, *, through_flush: bool = False) -> None:
        """Sleep for *delay* seconds. FLUSH ends it at once, for one last dial, and so does a machine that slept."""
        until, asleep = time.monotonic() + delay, self._asleep()
        while time.monotonic() < until and (through_flush or not self._flushing):
            self._pulse.poll(min(until, time.monotonic() + LOOK_SECONDS))
            if self._asleep() - asleep > self._options.dead_after:
                return

    # -- one connection

    def _dial(self) -> tuple[Wire, Session]:
        deadline = Deadline(self._options.dial_timeout)
        self._dialler.prepare(self._target)
        question = self._resolver.ask("the API key", self._key)
        try:
            key = self._resolver.wait("the API key", question, self._pulse, deadline.at)
        except (OSError, ValueError) as error:
            raise DialError(Step.KEY, getattr(error, "filename", None) or "", error) from None
        wire = Wire(self._dialler.open(self._target, deadline), self._pulse)
        try:
            headers = {**self._headers, "Authorization": f"Bearer {key.reveal()}"}
            connected = upgrade(wire, self._target, headers, deadline)
        except BaseException:
            wire.close()
            raise
        connection = os.urandom(8).hex()
        session = Session(
            connected,
            wire,
            connection=connection,
            around=self._around,
        )
        self._connected = True
        self._refusals = self.refusal = None
        try:
            self._traffic.opened(connection, self._target.origin)
        except BaseException:
            self._connected = False
            wire.close()
            raise
        return wire, session

    def _converse(self, wire: Wire, session: Session) -> Over | None:
        """Run *session* to its end; None when everything was flushed. `traffic.closed` follows in every case."""
        why = "the worker leaves"
        try:
            session.run()
            why = "the worker stops"
            return None
        except Over as over:
            why = str(over)
            session.finish()
            return over
        finally:
            wire.close()
            self._connected = False
            self._traffic.closed(why)
