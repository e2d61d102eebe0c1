"""Work that several units wait for and that is done once: a pull, the filling of a volume."""

from __future__ import annotations

import contextlib
import threading
from typing import Callable, Generic, Hashable, Iterator, TypeVar

from oz_worker import threads
from oz_worker.backends.base import Unit
from oz_worker.errors import Stopped
from oz_worker.timing import Deadline

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Job(Generic[V]):
    """One run of the work. The owner's lock guards all fields but the waker, which guards itself."""

    def __init__(self) -> None:
        self.waiting: set[Unit] = set()
        self.waker = threads.Waker()
        self.done = False
        self.value: V | None = None
        self.error: Exception | None = None


class Shared(Generic[K, V]):
    """At most one run of *work(key, interrupt)* for each key at a time, on a thread `<name>` of its own.

    The thread is owned by the units that wait for it: it blocks in *work* only, and when the last of them has left,
    *interrupt* (a descriptor) becomes readable, by which *work* must end soon. A unit waits in its own condition,
    woken by the end of the work and by its stop order. The lock guards the jobs and the threads; it is never held while
    anything runs.
    """

    def __init__(self, name: str, work: Callable[[K, int], V], on_death: threads.OnDeath) -> None:
        self._name = name
        self._work = work
        self._on_death = on_death
        self._lock = threading.Lock()
        self._jobs: dict[K, _Job[V]] = {}
        self._threads: list[threading.Thread] = []

    def settle(self, seconds: float) -> None:
        """Wait at most so long for runs whose units have all left: they tidy up what they had begun."""
        deadline = Deadline(seconds)
        with self._lock:
            running = self._threads
        for thread in running:
            thread.join(deadline.left())

    def get(self, key: K, unit: Unit) -> V:
        """What *work* returns, from a run that did not end before this call. Raises what it raises, or Stopped."""
        with self.asked(key, unit) as answer:
            return answer()

    @contextlib.contextmanager
    def asked(self, key: K, unit: Unit) -> Iterator[Callable[[], V]]:
        """Let it be run from now on, for *unit* among others; the answer is `get`'s, and waited for when it is called.

        Who leaves without it wants it no more.
        """
        job = self._join(key, unit)
        try:
            yield lambda: self._await(job, unit)
        finally:
            self._leave(key, job, unit)

    def _join(self, key: K, unit: Unit) -> _Job[V]:
        with self._lock:
            job = self._jobs.get(key)
            fresh = job is None
            if job is None:
                job = self._jobs[key] = _Job()
            job.waiting.add(unit)
        if fresh:
            self._begin(key, job)
        return job

    def _await(self, job: _Job[V], unit: Unit) -> V:
        unit.wait_until(lambda: job.done or unit.cause is not None)
        with self._lock:
            done = job.done  # from now on: what an abandoned run still says is no answer
        if not done:
            raise Stopped(f"unit {unit.name} was stopped while it waited")
        if job.error is not None:
            raise job.error
        return job.value  # type: ignore[return-value]

    def _leave(self, key: K, job: _Job[V], unit: Unit) -> None:
        with self._lock:
            job.waiting.discard(unit)
            abandoned = not job.waiting and not job.done
            if abandoned and self._jobs.get(key) is job:
                del self._jobs[key]  # who comes from now on begins anew
        if abandoned:
            job.waker.wake()

    def _begin(self, key: K, job: _Job[V]) -> None:
        try:
            thread = threads.start(self._name, lambda: self._run(key, job), self._on_death)
        except RuntimeError:  # no thread is left: the first unit's own will do
            self._run(key, job)
            return
        with self._lock:
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]

    def _run(self, key: K, job: _Job[V]) -> None:
        try:
            job.value = self._work(key, job.waker.fileno())
        except Exception as error:  # raised again by everyone who waits
            job.error = error
        with self._lock:
            job.done = True
            if self._jobs.get(key) is job:
                del self._jobs[key]
            waiting = list(job.waiting)
        job.waker.close()
        for unit in waiting:
            unit.notify()
