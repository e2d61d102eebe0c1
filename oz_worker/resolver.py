"""Blocking questions (names, key and CA files) on threads of their own: nothing may hold the main thread."""

from __future__ import annotations

import logging
import time
from typing import Any, Callable, Generic, TypeVar

from oz_worker import threads
from oz_worker.pulse import Pulse
from oz_worker.threads import Waker

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Question(Generic[Answer]):
    """One question under way. The resolver thread writes `answer` or `error`, then `done`; the main thread reads."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.done = False
        self.late = False
        """Somebody waited in vain: the answer is used when it comes."""

    def result(self) -> Answer:
        """The answer, or the exception that it ended in. Only after `done`."""
        if self.error is not None:
            raise self.error
        return self.answer  # type: ignore[return-value]  # done without an error means answered


class Resolver:
    """One question at a time for each subject. `ask` and `wait` belong to the main thread.

    A thread that is late is left behind: nothing can end a `getaddrinfo` or a read from a dead NFS server. Whoever
    asks about the same subject again joins it, so at most one thread per subject hangs, and its answer is used when
    it comes; a late failure is not, for it tells of the past. The threads are daemons and hold nothing; each ends by
    waking the main thread.
    """

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._open: dict[str, Question[Any]] = {}

    def ask(self, subject: str, work: Callable[[], Answer]) -> Question[Answer]:
        """Start *work* on a thread, or join the question about *subject* that is still unanswered."""
        question: Question[Answer] | None = self._open.get(subject)
        if question is None or (question.done and (question.error is not None or not question.late)):
            question = self._open[subject] = Question()
            self._start(question, work)
        return question

    def wait(self, subject: str, question: Question[Answer], pulse: Pulse, until: float) -> Answer:
        """The answer; TimeoutError at the monotonic moment *until*, anything that the work raised otherwise."""
        while not question.done:
            if time.monotonic() >= until:
                question.late = True
                raise TimeoutError(f"no answer about {subject} in time")
            pulse.poll(until)
        self._open.pop(subject, None)
        return question.result()

    def _start(self, question: Question[Answer], work: Callable[[], Answer]) -> None:
        def body() -> None:
            try:
                question.answer = work()
            except Exception as error:  # handed to the main thread, which names it
                question.error = error
            question.done = True
            self._waker.wake()

        def died(name: str, error: BaseException) -> None:
            question.error = RuntimeError(f"the thread {name} died: {error!r}")
            question.done = True
            self._waker.wake()

        threads.start("resolver", body, died)
