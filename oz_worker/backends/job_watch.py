"""One watch of Jobs and one of their pods for a whole worker, and the lists that they go on from (design 12, rule 24).

List, act, watch, resume: the server says by bookmarks how far a watch has come, so that a clean end costs nothing. On
anything else - a version that is too old, an error, no line for too long - everything is listed again, and a list
decides. Where RBAC lacks the verb `watch`, lists alone do it, less promptly. No child process for each Job.
"""

from __future__ import annotations

import logging
import os
import random
import select
import subprocess
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

from oz_worker import errand, threads, vitals
from oz_worker.backends.job_seen import pruned
from oz_worker.backends.lines import Lines
from oz_worker.cluster import Cluster, ClusterError, Forbidden, event_of, refusal
from oz_worker.process import HELPER, Child, Request, SpawnError, spawn
from oz_worker.threads import Waker
from oz_worker.timing import Deadline, backoff

logger = logging.getLogger(__name__)

KINDS = ("pods", "jobs")
"""In this order: a Job follows from its pods, so what they tell is read first."""
SILENT_SECONDS = 150.0
"""Without a line for so long, bookmarks included, a watch is dead: the server sends one about every minute."""
POLL_SECONDS, IDLE_POLL_SECONDS = 5.0, 60.0
"""How often to list where watching is not allowed: while anything is followed, and while nothing is."""
TRY_AGAIN_SECONDS = 600.0
"""How often to see whether watching is allowed by now."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
SETTLED_SECONDS = 5.0
"""A watch that lived so long was none of a series of failures."""
_SOON = 0.5
"""At least so long between two lists that somebody asked for."""
_LONGEST_LINE = 8 << 20
_EXIT_SECONDS, _KILLED = 2.0, 137
"""A program that has closed its output has so long to end."""


class Ears(NamedTuple):
    """Who hears what, on the watch's thread: quick, never blocking for long.

    `listed(kind, things, began)`: all things of a kind that exist; the list was begun at that monotonic time.
    `changed(kind, type, thing)`: one was ADDED, MODIFIED or DELETED. `due()`: do what time asks for; the monotonic time
    to be called again. `busy()`: whether anything is followed. `silent(seconds, error)`: the cluster has not
    answered, or refused to, for so long. `answers()`: it does.
    """

    listed: Callable[[str, list[dict[str, Any]], float], None]
    changed: Callable[[str, str, dict[str, Any]], None]
    due: Callable[[], float]
    busy: Callable[[], bool]
    silent: Callable[[float, Exception], None]
    answers: Callable[[], None]


class _Stream:
    """One kind of thing: how far we have come, and the child that tells of more. The watch's thread only."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.version = ""  # go on from here; "" means: list
        self.child: Child | None = None
        self.lines: Lines | None = None
        self.polling_until = 0.0  # monotonic: watching is not allowed, which may be mended until then
        self.trouble: Exception | None = None
        self.next_at = 0.0  # monotonic: not before then; while a child runs, when its silence means that it is dead
        self.began = 0.0
        self.heard = 0.0  # monotonic: the last line, or list; streams that end cleanly and say nothing do not count
        self.pauses = _pauses()

    def end(self) -> None:
        """End the child, if there is one."""
        child, self.child, self.lines = self.child, None, None
        if child is not None:
            errand.end(child)

    def ended(self) -> tuple[int, bytes]:
        """The exit code and the last words of the child, whose stream has ended."""
        assert self.child is not None
        limit = Deadline(_EXIT_SECONDS)
        while (code := self.child.poll()) is None and not limit.passed():
            time.sleep(0.002)
        words = _rest_of(self.child.stderr)
        self.end()
        return _KILLED if code is None else code, words


class JobWatch:
    """Thread `jobs`: owned by the backend, ended by `stop`; blocks in `poll` on both streams and two wakers, and in
    lists, each bounded by the cluster's timeout and ended by `stop`.

    `look` and `wake` may be called from any thread.
    """

    def __init__(
        self,
        cluster: Cluster,
        selector: str,
        ears: Ears,
        on_death: threads.OnDeath,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._cluster = cluster
        self._selector = selector
        self._ears = ears
        self._on_death = on_death
        self._patience = silent_seconds
        self._streams = [_Stream(kind) for kind in KINDS]
        self._waker = Waker()  # something is to be looked at
        self._leave = Waker()  # the thread is to end, also out of a list
        self._stopping = threading.Event()
        self._look = threading.Event()
        self._looked = 0.0  # this thread's only
        self._silent_since: float | None = None  # this thread's only
        self._warned = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threads.start("jobs", self._run, self._on_death)

    def stop(self, timeout: float) -> None:
        """End the thread and its children, waiting at most *timeout* seconds."""
        self._stopping.set()
        self._leave.wake()
        if self._thread is not None:
            self._thread.join(timeout)

    def look(self) -> None:
        """List everything again, soon."""
        self._look.set()
        self._waker.wake()

    def wake(self) -> None:
        """Ask `Ears.due` again: something of its own has changed."""
        self._waker.wake()

    # -- the thread

    @vitals.essential("jobs")
    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._begin_look()
                for stream in self._streams:
                    self._tend(stream)
                self._say_how_it_is()
                self._wait(self._ears.due())
        finally:
            for stream in self._streams:
                stream.end()
            self._waker.close()
            self._leave.close()

    def _begin_look(self) -> None:
        if not self._look.is_set() or time.monotonic() < self._looked + _SOON:
            return
        self._look.clear()
        self._looked = time.monotonic()
        for stream in self._streams:
            stream.end()
            stream.version, stream.next_at = "", 0.0

    def _tend(self, stream: _Stream) -> None:
        """Do what is due: list, watch, or give up a watch that says nothing any more."""
        if self._stopping.is_set() or time.monotonic() < stream.next_at:
            return
        if stream.child is not None:
            logger.info("the watch of %s has said nothing for %g s; listing anew", stream.kind, self._patience)
            stream.end()
            stream.version = ""
        began = time.monotonic()
        try:
            if not stream.version:
                self._list(stream)
            if time.monotonic() < stream.polling_until:
                stream.version = ""
                pause = POLL_SECONDS if self._ears.busy() else IDLE_POLL_SECONDS
                stream.next_at = time.monotonic() + pause
            elif not self._stopping.is_set():
                self._open(stream)
            if stream.trouble:
                self._is_back(stream)
        except (ClusterError, SpawnError) as error:
            if not self._stopping.is_set():
                self._failed(stream, error)
                self._silent_since = self._silent_since or began

    def _is_back(self, stream: _Stream) -> None:
        """It answers again: then the other one is asked at once, too."""
        stream.trouble, stream.pauses = None, _pauses()
        for other in self._streams:
            if other.trouble:
                other.next_at = 0.0

    def _failed(self, stream: _Stream, error: Exception) -> None:
        stream.trouble = error
        stream.version = ""
        stream.next_at = time.monotonic() + next(stream.pauses)

    def _list(self, stream: _Stream) -> None:
        began = time.monotonic()
        found = self._cluster.find(stream.kind, self._selector, interrupt=self._leave.fileno(), keep=pruned)
        stream.version, stream.heard = found.version, time.monotonic()
        self._ears.listed(stream.kind, found.items, began)

    def _open(self, stream: _Stream) -> None:
        words = self._cluster.watch(stream.kind, self._selector, stream.version)
        marked = {**self._cluster.environment, HELPER: self._cluster.instance}
        stream.child = spawn(Request(words, marked, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        os.set_blocking(stream.child.stderr, False)
        stream.lines = Lines(stream.child.stdout, _LONGEST_LINE)
        stream.began = time.monotonic()
        stream.next_at = stream.heard + self._patience

    def _say_how_it_is(self) -> None:
        """One of the two that fails is enough to make what we know of a Job half of it."""
        troubles = [stream.trouble for stream in self._streams if stream.trouble]
        if not troubles:
            self._silent_since = None
            self._ears.answers()
            return
        assert self._silent_since is not None
        self._ears.silent(time.monotonic() - self._silent_since, troubles[0])

    def _wait(self, due: float) -> None:
        """Until something comes, or is due, and act on what has come."""
        now = time.monotonic()
        if self._look.is_set():
            due = min(due, self._looked + _SOON)
        due = min(due, *(stream.next_at for stream in self._streams))
        poll = select.poll()
        for descriptor in (self._waker.fileno(), self._leave.fileno()):
            poll.register(descriptor, select.POLLIN)
        open_ones = [stream for stream in self._streams if stream.child is not None]
        for stream in open_ones:
            assert stream.child is not None
            poll.register(stream.child.stdout, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(vitals.wait(max(0.0, due - now)) * 1000 + 1)}
        if self._waker.fileno() in ready:
            self._waker.drain()
        for stream in open_ones:
            if stream.child is not None and stream.child.stdout in ready:
                self._hear(stream)

    def _hear(self, stream: _Stream) -> None:
        assert stream.lines is not None
        fresh = stream.lines.read()
        if fresh is None:
            self._over(stream)
            return
        for line in fresh:
            stream.heard = time.monotonic()
            stream.next_at = stream.heard + self._patience
            try:
                self._event(stream, line)
            except ClusterError as error:
                logger.info("the watch of %s: %s; listing anew", stream.kind, error)
                stream.end()
                self._again(stream, "")
                return

    def _event(self, stream: _Stream, line: bytes) -> None:
        """Act on one line. Raises ClusterError for one after which nothing of this watch can be believed."""
        if not line.strip():
            return
        event = event_of(line)
        if event.change != "BOOKMARK":
            self._ears.changed(stream.kind, event.change, event.thing)
        stream.version = event.version or stream.version

    def _over(self, stream: _Stream) -> None:
        """The child has ended. A clean end is the server's limit: go on from where it came to."""
        code, words = stream.ended()
        if code == 0:
            silent = time.monotonic() - stream.heard > self._patience
            self._again(stream, "" if silent else stream.version)
            return
        error = refusal(f"kubectl get {stream.kind}", code, words)
        if isinstance(error, Forbidden):
            self._poll_from_now_on(stream, error)
            return
        logger.info("the watch of %s ended (%s); listing anew", stream.kind, error)
        self._again(stream, "")

    def _again(self, stream: _Stream, version: str) -> None:
        now = time.monotonic()
        if now - stream.began > SETTLED_SECONDS:
            stream.pauses = _pauses()
        stream.version = version
        stream.next_at = now + next(stream.pauses)

    def _poll_from_now_on(self, stream: _Stream, error: ClusterError) -> None:
        if not self._warned:
            logger.warning(
                "%s; the Jobs are listed every %d s instead: grant the verb `watch` on jobs and pods, as in"
                " deploy/kubernetes/rbac.yaml",
                error,
                POLL_SECONDS,
            )
        self._warned = True
        stream.polling_until = time.monotonic() + TRY_AGAIN_SECONDS
        stream.version, stream.next_at = "", time.monotonic() + POLL_SECONDS


def _pauses() -> Iterator[float]:
    return backoff(FIRST_PAUSE, LONGEST_PAUSE, random.Random())


def _rest_of(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
