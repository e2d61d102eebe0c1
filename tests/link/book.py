"""The other side of the link in tests: an outbox in memory, and a running link around it."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from types import TracebackType
from typing import Any, Callable, Sequence

from oz_worker.link.loop import Link
from oz_worker.link.session import Limits
from oz_worker.link.traffic import Directive, Phase
from oz_worker.redact import Secret
from oz_worker.settings import LinkOptions
from oz_worker.threads import Waker
from tests.audit import guard

PATIENCE = 20.0
KEY = "wk-4711-not-to-be-seen"


class Book:
    """A `Traffic` with an outbox: frames stay until acknowledged and are handed out anew on each connection.

    `post` and `order` may be called from any thread; everything else happens on the link's.
    """

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._lock = threading.Lock()  # guards _rows and _taken
        self._rows: list[str] = []
        self._taken = 0
        self._done = 0
        self._directive = Directive()
        self._tick = 0.0
        self._ticks = threading.Semaphore(0)
        self.wakes = 0
        self.events: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.got: queue.Queue[str] = queue.Queue()
        self.known = True
        self.connection = ""
        self.on_text: Callable[[str], None] = lambda text: None
        self.pauses: list[float] = []
        """Seconds between the end of each connection and the beginning of the next, by the link's own thread."""
        self._ended_at = 0.0

    def post(self, *texts: str) -> None:
        with self._lock:
            self._rows += texts
        self._waker.wake()

    def order(self, phase: Phase, seconds: float = math.inf, call_again: float = math.inf) -> None:
        self._directive = Directive(phase, time.monotonic() + seconds, call_again)
        self._waker.wake()

    def tick(self, seconds: float) -> None:
        """From now on ask for a call each *seconds*."""
        self._tick = seconds
        self._waker.wake()

    def ticked(self, times: int) -> bool:
        """Whether so many calls came by themselves."""
        return all(self._ticks.acquire(timeout=PATIENCE) for _ in range(times))

    @property
    def taken_all(self) -> bool:
        with self._lock:
            return self._taken == len(self._rows)

    @property
    def left(self) -> list[str]:
        with self._lock:
            return list(self._rows)

    def expect(self, kind: str) -> tuple[Any, ...]:
        """The next event of *kind*; others before it are skipped."""
        end = time.monotonic() + PATIENCE
        while True:
            event = self.events.get(timeout=max(0.01, end - time.monotonic()))
            if event[0] == kind:
                return event

    # -- Traffic

    def on_wake(self) -> Directive:
        self.wakes += 1
        if self._tick:
            self._ticks.release()
            return self._directive._replace(call_again=time.monotonic() + self._tick)
        return self._directive

    def opened(self, connection: str, origin: str) -> None:
        with self._lock:
            self._taken = self._done = 0
        self.connection = connection
        if self._ended_at:
            self.pauses.append(time.monotonic() - self._ended_at)
        self.events.put(("opened", connection, origin))

    def take(self, limit: int) -> Sequence[str]:
        with self._lock:
            frames = self._rows[self._taken : self._taken + limit]
            self._taken += len(frames)
            return frames

    def acknowledged(self, count: int) -> None:
        with self._lock:
            new = count - self._done
            assert 0 < new <= self._taken, "an acknowledgement of what was never taken"
            self._done = count
            del self._rows[:new]
            self._taken -= new
        self.events.put(("acknowledged", count))

    def unfinished(self) -> bool:
        with self._lock:
            return bool(self._rows)

    def received(self, text: str) -> bool:
        self.on_text(text)
        self.got.put(text)
        return self.known

    def closed(self, why: str) -> None:
        self._ended_at = time.monotonic()
        self.events.put(("closed", why))

    def dial_failed(self, sentence: str, refused: bool, delay: float) -> None:
        self.events.put(("failed", sentence, refused, delay))


FAST = LinkOptions(
    ping_interval=0.5, dead_after=30.0, write_timeout=5.0, dial_timeout=10.0, backoff_min=0.01, backoff_max=0.05,
    healthy_after=10.0, refused_backoff=0.02,
)  # fmt: skip


class Running:
    """A link on a thread that stands for the daemon's main thread. Leaving ends it, and proves that it does."""

    def __init__(self, url: str, *, ca_file: str = "", options: LinkOptions = FAST, **more: Any) -> None:
        self.waker = Waker()
        self.book = Book(self.waker)
        more.setdefault("limits", Limits(pause=0.0))
        more.setdefault("rng", random.Random(7))
        more.setdefault("environ", {})
        more.setdefault("key", lambda: Secret(KEY))
        guard().keep(None, KEY)
        self.link = Link(
            url, worker_id="w 1", options=options, waker=self.waker, traffic=self.book, ca_file=ca_file, **more
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def _run(self) -> None:
        try:
            self.link.run()
        except BaseException as error:  # handed to the test
            self._error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.leave()
            return
        self.book.order(Phase.LEAVE)
        self._thread.join(PATIENCE)
        self.waker.close()

    def leave(self) -> None:
        self.book.order(Phase.LEAVE)
        self.ended()

    def heard(self) -> None:
        """Wake the link and wait for its answer."""
        wakes, end = self.book.wakes, time.monotonic() + PATIENCE
        self.waker.wake()
        while self.book.wakes == wakes:
            assert time.monotonic() < end, "the link does not hear its waker"
            time.sleep(0.002)

    def flush(self, seconds: float = PATIENCE) -> None:
        self.book.order(Phase.FLUSH, seconds)

    def ended(self, seconds: float = PATIENCE) -> None:
        """Wait for `run` to return."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the link did not return"
        self.waker.close()
        if self._error is not None:
            raise self._error
