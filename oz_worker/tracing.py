"""The seam for traces: what happens to one assignment. The classes here record nothing; `oz_worker.observe` may.

One span for an assignment, from the moment it is decided to the end of the task's thread. What is no assignment of its
own gets none: a redelivery belongs to the one it repeats, a cancel of something unknown or handed over to nobody.

A task that is taken up after a restart gets its span from the process that sees its end: it begins when the task was
accepted, says `task.reattached`, and has the events of this process only. The process before it exported nothing of
it, because a span leaves when it ends. So every assignment has one span, also over a kill -9 of the worker. Its title
is missing then: what a task is about is not stored.
"""

from __future__ import annotations


class Span:
    """One assignment. Safe from any thread; returns at once; raises nothing."""

    __slots__ = ()

    def event(self, name: str, **attributes: str | int) -> None:
        """Something happened to it just now. Attributes are words of closed sets and numbers, never free text."""

    def end(self) -> None:
        """Nothing more happens to it. Repeats change nothing."""


class Tracer:
    """Begins spans. Safe from any thread; returns at once; raises nothing."""

    def begin(
        self,
        task_id: str,
        execution_id: str = "",
        *,
        title: str = "",
        accepted_at: float = 0.0,
        reattached: bool = False,
    ) -> Span:
        """The span of an assignment. *accepted_at* is a time as of `time.time`, 0 for now."""
        return NO_SPAN


NO_SPAN = Span()
NO_TRACER = Tracer()
"""The default: one shared span that does nothing."""
