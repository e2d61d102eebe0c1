"""One thread that learns of the end of every child, however many there are.

Owner: the backend that made the Watcher. Stop: `close`, once. The thread blocks only in `epoll`, woken by a pidfd (a
process ended), by the waker (`close`, a new timer) or by its next timer. Where the system has no pidfd, each child of
ours costs one thread that blocks in `waitid` until it ends, and processes of others are looked at twice a second; so
is everything for which no descriptor or no thread is left.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from typing import Callable, NamedTuple

from oz_worker import threads, vitals
from oz_worker.process import LINUX, Child, Identity, awaited, open_pidfd, read_stat, reap_stranger
from oz_worker.unreadable import Unreadable

logger = logging.getLogger(__name__)

_LOOK = 0.5
_ORPHANS = 5.0


class Watcher:
    """Calls back when a process ends, and now and then. Safe from any thread; the lock guards all maps.

    Callbacks run on the watcher's thread, outside the lock, and must not block. A child of ours is left unreaped:
    its owner reaps it when nothing needs its group any more.
    """

    def __init__(self, on_death: Callable[[str, BaseException], None] = lambda name, error: None) -> None:
        self._on_death = on_death
        self._lock = threading.Lock()
        self._ends: dict[int, Callable[[], None]] = {}  # pidfd -> what to do when it ends
        self._looked_at: list[_Look] = []  # where there is no pidfd
        self._timers: list[_Timer] = []
        self._stopping = False
        self._waker = threads.Waker()
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll:
            self._epoll.register(self._waker.fileno(), select.EPOLLIN)
        self._thread: threading.Thread | None = None
        self._orphans: set[int] = set()

    def start(self) -> None:
        """Start the thread."""
        self.every(_ORPHANS, self._reap_orphans)
        self._thread = threads.start("watcher", self._watch, self._on_death)

    def close(self, timeout: float = 2.0) -> None:
        """Stop the thread; processes are left alone."""
        with self._lock:
            self._stopping = True
        self._waker.wake()
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return  # it still uses the descriptors
        with self._lock:
            for descriptor in self._ends:
                os.close(descriptor)
            self._ends.clear()
        if self._epoll:
            self._epoll.close()
        self._waker.close()

    def watch_child(self, child: Child, on_exit: Callable[[int], None]) -> None:
        """Call *on_exit(code)* once when our *child* ends."""

        def ended() -> None:
            code = child.poll()
            on_exit(255 if code is None else code)

        if self._register(child.pid, ended):
            return
        if not hasattr(os, "pidfd_open"):
            try:
                threading.Thread(target=self._wait, args=(child, ended), name=f"wait-{child.pid}", daemon=True).start()
                return
            except RuntimeError:
                pass  # no thread is left
        self._look_at(lambda: child.poll() is None, ended)

    def watch_process(self, identity: Identity, on_exit: Callable[[], None]) -> None:
        """Call *on_exit()* once when a process that is not our child ends; at once, from here, if it is gone.

        Raises Unreadable when nobody can say whether it is.
        """
        if not identity.alive():
            on_exit()
        elif not self._register(identity.pid, on_exit, identity):
            self._look_at(identity.alive, on_exit)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call *callback* once, in about *seconds*."""
        with self._lock:
            self._timers.append(_Timer(seconds, callback, once=True))
        self._waker.wake()

    def _look_at(self, alive: Callable[[], bool], ended: Callable[[], None]) -> None:
        with self._lock:
            self._looked_at.append(_Look(alive, ended))
        self._waker.wake()

    def every(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call *callback* about every *seconds*."""
        with self._lock:
            self._timers.append(_Timer(seconds, callback))
        self._waker.wake()

    def _register(self, pid: int, ended: Callable[[], None], identity: Identity | None = None) -> bool:
        """Watch by pidfd; False where that is not possible."""
        descriptor = open_pidfd(pid)
        if descriptor < 0 or self._epoll is None:
            return False
        try:
            gone = identity is not None and not identity.alive()  # after the open: it may name a stranger
            if not gone:
                with self._lock:
                    self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLONESHOT)
                    self._ends[descriptor] = ended
                return True
        except (OSError, Unreadable):  # the system's limit of watches, or nobody can say: it is looked at again
            pass
        os.close(descriptor)
        return False

    @staticmethod
    def _wait(child: Child, ended: Callable[[], None]) -> None:
        if hasattr(os, "waitid"):
            try:
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                pass  # Child.poll says what is known
        else:
            while child.poll() is None:
                time.sleep(0.05)
        ended()

    @vitals.essential("watcher")
    def _watch(self) -> None:
        while True:
            pause = vitals.wait(self._pause())
            if self._epoll:
                ready = [descriptor for descriptor, _ in self._epoll.poll(pause)]
            else:
                ready = select.select([self._waker.fileno()], [], [], pause)[0]
            if self._waker.fileno() in ready:
                self._waker.drain()
            with self._lock:
                if self._stopping:
                    return
            for descriptor in ready:
                self._end(descriptor)
            self._run_due()

    def _pause(self) -> float | None:
        with self._lock:
            due = [timer.due for timer in self._timers]
            longest = _LOOK if self._looked_at else float("inf")
        pause = min([longest, *(moment - time.monotonic() for moment in due)])
        return None if pause == float("inf") else max(0.0, pause)

    def _end(self, descriptor: int) -> None:
        with self._lock:
            ended = self._ends.pop(descriptor, None)
            if ended is None:
                return
            if self._epoll:
                self._epoll.unregister(descriptor)
        os.close(descriptor)
        _guarded(ended)

    def _run_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [timer for timer in self._timers if timer.due <= now]
            for timer in due:
                timer.due = now + timer.seconds
            self._timers = [timer for timer in self._timers if not (timer.once and timer in due)]
            looked_at = list(self._looked_at)
        for timer in due:
            _guarded(timer.callback)
        for look in looked_at:
            if look.over():
                with self._lock:
                    self._looked_at.remove(look)
                _guarded(look.ended)

    def _reap_orphans(self) -> None:
        self._orphans = reap_orphans(self._orphans)


class _Look(NamedTuple):
    """A process that is looked at, and what to do when it has ended."""

    alive: Callable[[], bool]
    ended: Callable[[], None]

    def over(self) -> bool:
        """Whether it has ended for certain."""
        try:
            return not self.alive()
        except Unreadable:
            return False


class _Timer:
    """A callback and the monotonic time of its next call."""

    __slots__ = ("callback", "due", "once", "seconds")

    def __init__(self, seconds: float, callback: Callable[[], None], *, once: bool = False) -> None:
        self.seconds = seconds
        self.once = once
        self.callback = callback
        self.due = time.monotonic() + seconds


def _guarded(callback: Callable[[], None]) -> None:
    """One callback's mistake must not end the watch over all the others."""
    try:
        callback()
    except Exception:  # foreign code on a thread that everybody needs
        logger.exception("a callback of the watcher failed")


def become_subreaper() -> bool:
    """Have orphans of our tasks re-parented to us while we live, so that a sweep finds them. Linux only."""
    if not LINUX:
        return False
    import ctypes

    set_child_subreaper = 36
    try:
        return int(ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0)) == 0
    except (OSError, AttributeError):
        return False


def reap_orphans(seen: set[int]) -> set[int]:
    """Reap zombies that were re-parented to us; *seen* are those of the last call, the answer is for the next one.

    Reaped are only zombies of another session that nobody here started, found twice: never `waitpid(-1)`, which
    would steal the exit codes of children that someone waits for.
    """
    own_session = os.getsid(0)
    found: set[int] = set()
    for pid in _children():
        try:
            stat = read_stat(pid)
        except Unreadable:
            continue
        if stat is None or not stat.dead or stat.parent != os.getpid() or stat.session == own_session or awaited(pid):
            continue
        if pid in seen:
            reap_stranger(pid)
        else:
            found.add(pid)
    return found


def _children() -> list[int]:
    """Pids whose parent our main thread is: the kernel gives orphans to the first thread that lives."""
    pid = os.getpid()
    try:
        with open(f"/proc/self/task/{pid}/children", "rb", buffering=0) as file:
            return [int(child) for child in file.read().split()]
    except (OSError, ValueError):
        return []  # a kernel without that file: zombies wait for our own end
