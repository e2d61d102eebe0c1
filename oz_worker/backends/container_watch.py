"""One event stream for all containers of a worker, and the lists that make up for what a stream can miss.

List, act, stream, list again on any break (design 12, rule 21): the engine drops events for slow readers and forgets
them all when it restarts, so a list decides and the stream only makes it prompt. No child process for each container.
"""

from __future__ import annotations

import logging
import random
import select
import signal
import subprocess
import threading
import time
from typing import Callable, Iterable, NamedTuple, Optional

from oz_worker import threads, vitals
from oz_worker.backends.lines import Lines
from oz_worker.containers import LOOK_TIMEOUT, Engine
from oz_worker.engine_words import Container, EngineDown, EngineError, Event
from oz_worker.process import HELPER, Child, Request, SpawnError, spawn
from oz_worker.threads import Waker
from oz_worker.timing import backoff

logger = logging.getLogger(__name__)

SOON_SECONDS = 1.0
"""A second list so long after the stream began: ends between list and subscription were lost without it [M]."""
LOOK_SECONDS, IDLE_LOOK_SECONDS = 30.0, 300.0
"""How often to list while anything runs, and while nothing does."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
_LONGEST_LINE = 4 << 20


class Ears(NamedTuple):
    """Who hears what, on the watch's thread: quick, never blocking.

    `ended(container)`: a followed one is over. `vanished(name, code)`: a followed one is gone altogether, with the
    exit code that an event still told of. `listed(containers)`: everything of this worker, of every instance.
    `made(name)`, `removed(name)`: any container of this worker was created, or removed. `silent(seconds, why)`: the
    engine has not answered for so long. `answers()`: it does.
    """

    ended: Callable[[Container], None]
    vanished: Callable[[str, Optional[int]], None]
    listed: Callable[[list[Container]], None]
    made: Callable[[str], None]
    removed: Callable[[str], None]
    silent: Callable[[float, str], None]
    answers: Callable[[], None]


class Watch:
    """Thread `containers`: owned by the backend, ended by `stop`; blocks in `poll` on the stream and the waker, and in
    the engine's calls, each bounded by the engine's timeout.

    The lock guards `_followed` and `_due`, so that no wish for a look is overwritten by a later one of somebody else.
    A name is judged only by a list that began after it was followed.
    """

    def __init__(self, engine: Engine, label: str, ears: Ears, on_death: threads.OnDeath) -> None:
        self._engine = engine
        self._label = label
        self._ears = ears
        self._on_death = on_death
        self._waker = Waker()
        self._lock = threading.Lock()
        self._followed: dict[
            str, bool
        ] = {}  # by name: whether it is known to exist, so that its absence means something
        self._codes: dict[str, int] = {}  # exit codes that events told of; this thread's only
        self._stopping = False
        self._due = 0.0  # monotonic time of the next list
        self._silent_since: float | None = None  # this thread's only: when the first call went unanswered
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threads.start("containers", self._run, self._on_death)

    def stop(self, timeout: float) -> None:
        """End the thread and its child, waiting at most *timeout* seconds."""
        self._stopping = True
        self._waker.wake()
        if self._thread is not None:
            self._thread.join(timeout)

    def follow(self, name: str, *, exists: bool) -> None:
        """Hear of the end of a container that *exists*, or is about to: then its absence is no end yet."""
        with self._lock:
            self._followed[name] = exists
            self._due = min(self._due, time.monotonic() + LOOK_SECONDS)
        self._waker.wake()

    def drop(self, name: str) -> None:
        """Hear no more of it."""
        with self._lock:
            self._followed.pop(name, None)

    def look(self) -> None:
        """List now."""
        self._list_in(0)
        self._waker.wake()

    # -- the thread

    def _list_in(self, seconds: float) -> None:
        with self._lock:
            self._due = time.monotonic() + seconds

    @vitals.essential("containers")
    def _run(self) -> None:
        pauses = backoff(FIRST_PAUSE, LONGEST_PAUSE, random.Random())
        try:
            while not self._stopping:
                try:
                    self._listen()
                    pauses = backoff(FIRST_PAUSE, LONGEST_PAUSE, random.Random())
                except (EngineError, SpawnError) as error:
                    self._silent_since = self._silent_since or time.monotonic()
                    self._ears.silent(time.monotonic() - self._silent_since, str(error))
                if not self._stopping:
                    self._wait(next(pauses))
        finally:
            self._waker.close()

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._waker.fileno(), select.POLLIN)
        poll.poll(vitals.wait(seconds) * 1000)
        self._waker.drain()

    def _listen(self) -> None:
        """One stream from its beginning to its end. Raises EngineError when the engine does not answer."""
        since = self._engine.clock()
        self._list()
        child = spawn(
            Request(
                self._engine.events(since, self._label),
                {**self._engine.environment, HELPER: self._engine.instance},
                stdout=subprocess.PIPE,
            )
        )
        try:
            self._list_in(SOON_SECONDS)
            self._stream(child)
        finally:
            child.signal_group(signal.SIGKILL)
            child.close_pipes()
            self._reap(child)

    @staticmethod
    def _reap(child: Child) -> None:
        limit = time.monotonic() + 5
        while not child.reap() and time.monotonic() < limit:
            time.sleep(0.005)

    def _stream(self, child: Child) -> None:
        lines = Lines(child.stdout, _LONGEST_LINE)
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        poll.register(self._waker.fileno(), select.POLLIN)
        while not self._stopping:
            if time.monotonic() >= self._due:
                self._list_in(LOOK_SECONDS if self._followed else IDLE_LOOK_SECONDS)
                self._list()
            pause = vitals.wait(max(0.0, self._due - time.monotonic()))
            ready = {descriptor for descriptor, _ in poll.poll(pause * 1000 + 1)}
            if self._waker.fileno() in ready:
                self._waker.drain()
            if child.stdout in ready:
                fresh = lines.read()
                if fresh is None:
                    logger.info("the stream of the engine's events ended; listing anew")
                    return
                self._act(filter(None, map(self._engine.event, fresh)))

    def _list(self) -> None:
        with self._lock:
            judged = dict(self._followed)
        found = self._engine.overview(f"label={self._label}")
        self._silent_since = None
        self._ears.answers()
        self._ears.listed(found)
        present = {container.name: container for container in found}
        for name, exists in judged.items():
            container = present.get(name)
            if container is None and exists:
                self._vanished(name)
            elif container is not None:
                self._judge(container)

    def _act(self, events: Iterable[Event]) -> None:
        """What the stream told of at once is looked up at once, by one call."""
        died: dict[str, None] = {}
        removed: list[str] = []
        for event in events:
            if event.action == "die":
                if event.code is not None:
                    self._codes[event.name] = event.code
                died[event.name] = None
            elif event.action == "destroy":
                removed.append(event.name)
            elif event.action == "create":
                self._ears.made(event.name)
        with self._lock:
            wanted = [name for name in dict.fromkeys([*died, *removed]) if name in self._followed]
            existed = {name for name in removed if self._followed.get(name, False)}
        for name in removed:
            if name not in wanted:
                self._codes.pop(name, None)
            self._ears.removed(name)
        if wanted:
            self._look_up(wanted, existed)

    def _look_up(self, wanted: list[str], existed: set[str]) -> None:
        try:
            present = self._engine.inspect(*wanted, timeout=LOOK_TIMEOUT)
        except EngineDown as error:
            logger.info("listing, because what ended could not be looked at: %s", error)
            self._list_in(0)
            return
        for container in present:
            self._judge(container)
        # An event may be old: of a container before the one that bears the name now.
        for name in existed - {container.name for container in present}:
            self._vanished(name)

    def _judge(self, container: Container) -> None:
        if container.lives or container.fresh:
            return
        self.drop(container.name)
        self._codes.pop(container.name, None)
        self._ears.ended(container)

    def _vanished(self, name: str) -> None:
        self.drop(name)
        self._ears.vanished(name, self._codes.pop(name, None))
