"""What every backend promises to the engine, and what the engine promises to it."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Callable, Iterator, NamedTuple, Protocol, Sequence

from oz_worker.model import Cause, ExitFacts, Key, TaskSpec
from oz_worker.threads import Waker

PROOF_SECONDS = 30.0
"""After its grace a stop may look this long for proof that everything is gone (design 12, rule 11)."""


class Capabilities(NamedTuple):
    """What a backend can do, as data.

    `survives_worker`: units outlive the worker process. `fire_and_forget`: after `start` nothing is watched, the end
    is `ExitFacts(dispatched=True)`. `outlives_disk`: units are where a worker finds them whose disk is gone; so one
    that ended well is cleaned up only once its report is acknowledged (design 12, rule 1).
    """

    survives_worker: bool
    fire_and_forget: bool = False
    outlives_disk: bool = False


def _nothing() -> str:
    return ""


class Unit:
    """One attempt of a task outside this process, and the order to end it. Shared by engine and backend.

    The engine makes it and calls `order_stop` and `hurry` from any thread; the backend calls `ended` exactly once
    from any thread. One condition guards every field below it, and `wait` is the only place where a task's thread
    blocks: it is woken by `ended`, `order_stop` and `hurry`, which all notify under the condition.

    A unit that is `hurried` gets no grace any more, whatever is being ended of it: agent, hook or stragglers.
    """

    def __init__(self, name: str, instance: str, key: Key, spec: TaskSpec | None = None) -> None:
        self.name = name
        self.instance = instance
        self.key = key
        self.spec = spec  # None after a restart: secrets are never stored
        self.secrets: tuple[str, ...] | None = spec.secrets if spec else None  # None: no longer known
        self._changed = threading.Condition()
        self._facts: ExitFacts | None = None
        self._cause: Cause | None = None
        self._kill_at = 0.0
        self._hurried = False
        self._wake: Callable[[], None] | None = None
        self._does: Callable[[], str] = _nothing
        self.outside: Callable[[], str] = _nothing
        """What it waits for outside, as far as whoever watches it knows; set by its backend."""

    @property
    def facts(self) -> ExitFacts | None:
        """How the unit ended, None while it has not."""
        return self._facts

    @property
    def cause(self) -> Cause | None:
        """Why it has been ordered to stop, None while it has not."""
        return self._cause

    @property
    def kill_at(self) -> float:
        """Monotonic time at which TERM gives way to KILL; meaningful once `cause` is set."""
        return self._kill_at

    @property
    def hurried(self) -> bool:
        """Whether `hurry` was called: then KILL is due at once, with or without a stop order."""
        return self._hurried

    def ended(self, facts: ExitFacts) -> None:
        """Record the end. A second call changes nothing: an end is a fact."""
        with self._changed:
            if self._facts is None:
                self._facts = facts
            self._changed.notify_all()

    def order_stop(self, cause: Cause, grace: float) -> bool:
        """Order the end: TERM now, KILL after *grace* seconds. Only the first order counts; True if this was it."""
        with self._changed:
            if self._cause is not None:
                return False
            self._cause = cause
            self._kill_at = time.monotonic() + (0.0 if self._hurried else grace)
            self._changed.notify_all()
            if self._wake is not None:
                self._wake()
            return True

    def hurry(self) -> None:
        """KILL now instead of at the end of a grace, also of one that is given later. Orders no stop by itself."""
        with self._changed:
            now = time.monotonic()
            self._kill_at = min(self._kill_at, now) if self._cause else now
            self._hurried = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def wakes(self) -> Iterator[int]:
        """A descriptor that becomes readable at the stop order: for a wait of the unit's thread in `poll`."""
        waker = Waker()
        with self._changed:
            self._wake = waker.wake
            if self._cause is not None:
                waker.wake()
        try:
            yield waker.fileno()
        finally:
            with self._changed:
                self._wake = None
            waker.close()

    def waits_for(self) -> str:
        """What it waits for just now, in words for people; "" for nothing. From any thread, at any time."""
        return self._does() or self.outside()

    @contextlib.contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        """Meanwhile *what*, asked from any thread, says what the unit's own thread waits for.

        May be nested: where the inner one says "", the outer one counts.
        """
        before = self._does
        self._does = lambda: what() or before()
        try:
            yield
        finally:
            self._does = before

    def notify(self) -> None:
        """Make `wait` look at its predicate again. For backends whose own state is part of a predicate."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_end_or_stop(self, timeout: float | None = None) -> None:
        """Block until `facts` or `cause` is set, or *timeout* seconds passed."""
        with self._changed:
            self._changed.wait_for(lambda: self._facts is not None or self._cause is not None, timeout)

    def wait_until(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until *predicate* holds or *timeout* seconds passed; whether it holds.

        It is asked under the condition: state of the backend's own is set first and `notify` called then.
        """
        with self._changed:
            return self._changed.wait_for(predicate, timeout)

    def wait(self, timeout: float) -> None:
        """Block until anything changes or *timeout* seconds passed: for loops that look at their state again."""
        with self._changed:
            self._changed.wait(timeout)


class Found(NamedTuple):
    """A unit that exists outside (a directory, a container, a Job), as `Backend.recover` lists it."""

    name: str
    key: Key


class Backend(Protocol):
    """How work is run. A backend never sees a wire message and never decides policy: it returns facts.

    Order, for one unit, always from one thread (the task's):
    `prepare -> start -> (wait for Unit.facts or Unit.cause) -> stop? -> teardown -> clean_up`.
    Different units run concurrently. After a restart: `recover` once, then `attach` for each unit that has a row or
    was found, then the same path from the wait on.

    * `prepare` and `start` raise `TaskFault` with facts, or `Stopped` as soon as the unit's cause is set, after
      ending (TERM, grace, KILL) whatever they had started. What they left is removed by `clean_up`, which must be
      safe after any of them failed half-way.
    * `start` returns once the unit runs and its identity is on disk: a crash before that proves that no agent ran,
      a crash after it is resolved by `attach`.
    * The end of a started or attached unit is delivered by `unit.ended(facts)` from any thread.
    * `stop` blocks its caller: TERM to everything that belongs to the unit, KILL at `unit.kill_at` (which `hurry` may
      move), until proof that it is gone, at most PROOF_SECONDS after the KILL; idempotent; returns the facts of the
      end, with `remains` filled in when the proof is missing. Safe when the unit has already ended.
    * `stragglers` returns once a naturally ended unit's left-over processes are ended (same TERM/KILL, own grace),
      with what remains.
    * `teardown` runs the operator's clean-up command, bounded, never raises for its failure but returns one sentence
      about it ("" = fine).
    * `clean_up` removes everything of the unit, or with `keep` only what must not stay (secrets); idempotent, never
      follows links, returns one sentence about what it could not remove ("" = all gone).
    * `tail` returns the last *limit* bytes of the unit's output, raw; b"" when there is none.
    * `collect` brings the output of an ended unit that lies elsewhere to `units/<unit>/output.log` of the instance,
      bounded, before `clean_up`; one sentence when it could not.
    """

    capabilities: Capabilities

    def open(self) -> None:
        """Check that work can be run; start watchers. Raises NotUsable with the cure."""

    def close(self) -> None:
        """Stop watchers, bounded. Units of a backend that `survives_worker` are left running."""

    def unavailable(self) -> str:
        """Why no work can be taken just now, in one sentence; "" when it can."""

    def prepare(self, unit: Unit) -> None:
        """Make what the unit needs before it starts (workspace, setup command, image)."""

    def start(self, unit: Unit) -> None:
        """Start the unit."""

    def attach(self, unit: Unit) -> None:
        """Take up a unit of an earlier process. Always leads to `unit.ended`, at once if it is over.

        Facts of a unit that never started its agent have `agent_started=False`; one whose end nobody recorded has
        reason AGENT_INVOCATION, no code, and says "killed or the host restarted".
        """

    def stop(self, unit: Unit) -> ExitFacts:
        """End the unit, see above."""

    def stragglers(self, unit: Unit) -> str:
        """End what a naturally ended unit left running, see above."""

    def teardown(self, unit: Unit) -> str:
        """Run the operator's teardown, see above."""

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        """Remove the unit, see above."""

    def tail(self, unit: Unit, limit: int) -> bytes:
        """The end of the unit's output."""

    def output_at(self, unit: Unit) -> str:
        """Where people find the output of a running unit: a path or a command."""

    def collect(self, unit: Unit) -> str:
        """Fetch the output, see above."""

    def recover(self) -> Sequence[Found]:
        """List the units of this instance that exist outside, after ending surviving helpers of a dead worker."""

    def units(self) -> Sequence[Found]:
        """List the units of this instance that exist outside, without touching anything. Safe at any time."""

    def look_after(self) -> Sequence[Found]:
        """Called once a minute: remove what is old; units taken over just now, whose worker is gone (rule 3)."""

    def cancel_dispatched(self, unit: Unit) -> str:
        """Cancel a unit that was handed over (`fire_and_forget`); one sentence on failure, "" when done."""
