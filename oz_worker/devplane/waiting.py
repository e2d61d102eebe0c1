"""Waiting for what a worker does, and the verdict on it: the part of `ControlPlane` that tests call most."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Callable, TypeVar

if TYPE_CHECKING:
    from oz_worker.devplane.connection import Connection
    from oz_worker.devplane.tasks import Task
    from oz_worker.devplane.wire import Key

Seen = TypeVar("Seen")


class Waiting:
    """Blocks on the plane's condition. Every method takes the lock itself; none is called under it."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.connections: list[Connection] = []
        self.tasks: dict[Key, Task] = {}
        self.violations: list[str] = []

    def newest(self, after: int = 0) -> Connection | None:
        """The newest connection that is up and has a number over *after*. Requires holding the lock."""
        return next((c for c in reversed(self.connections) if c.open and c.number > after), None)

    def wait_for(
        self, predicate: Callable[[], Seen], timeout: float = 30.0, what: str = "", *, strict: bool = True
    ) -> Seen:
        """Block until *predicate*, run under the lock after every change, is true; returns its value.

        Raises TimeoutError with the state of all tasks, and, when *strict*, AssertionError as soon as a rule is broken.
        """
        with self.lock:
            self.lock.wait_for(lambda: (strict and self.violations) or predicate(), timeout)
            if strict:
                self.check()
            value = predicate()
            if not value:
                raise TimeoutError(f"after {timeout:g} s still waiting for {what or 'a condition'}; {self.summary()}")
            return value

    def wait_connected(self, timeout: float = 30.0, *, after: int = 0) -> Connection:
        """Block until a connection with a number over *after* is up; returns the newest."""
        connection = self.wait_for(lambda: self.newest(after), timeout, "a connection")
        assert connection is not None
        return connection

    def wait_ended(self, *tasks: Task, timeout: float = 30.0) -> None:
        """Block until each of *tasks* (none given: all) has its terminal report."""
        self._wait_all(lambda task: task.ended, tasks, timeout, "terminal reports")

    def wait_acknowledged(self, *tasks: Task, timeout: float = 30.0) -> None:
        """Block until each of *tasks* (none given: all) has an end whose pong went out."""
        self._wait_all(lambda task: task.acknowledged, tasks, timeout, "acknowledged reports")

    def _wait_all(self, done: Callable[[Task], bool], tasks: tuple[Task, ...], timeout: float, what: str) -> None:
        with self.lock:
            left = list(tasks or self.tasks.values())

        def over() -> bool:
            while left and done(left[-1]):  # each is looked at once when done, not all of them after every frame
                left.pop()
            return not left

        self.wait_for(over, timeout, what)

    def check(self) -> None:
        """Raise AssertionError when a worker broke a rule, with all of its faults."""
        with self.lock:
            if self.violations:
                raise AssertionError("the worker broke the protocol:\n  " + "\n  ".join(self.violations))

    def summary(self) -> str:
        """One line on connections and tasks, for messages."""
        with self.lock:
            up = [connection.number for connection in self.connections if connection.open]
            states = ", ".join(f"{task.key}: {task.state}" for task in list(self.tasks.values())[:20])
            return f"connections up: {up or 'none'} of {len(self.connections)}; tasks: {states or 'none'}"
