"""One thread on which the cluster's own parts run, one step after the other: nothing there needs a lock."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import threading
import time
import traceback
from collections import deque
from typing import Any, Callable

Step = Callable[[], None]


class Timer:
    """A step that is due later; `cancel` may be called at any time, also twice."""

    def __init__(self, step: Step) -> None:
        self.step: Step | None = step

    def cancel(self) -> None:
        self.step = None


class Loop:
    """Runs steps, in order, on a thread that ends with `close`.

    `call` and `later` may be called from any thread, `watch` and `forget` on the loop's own. What a step raises is kept
    in `mistakes`, for the end of the test: it is a defect of the cluster.
    """

    def __init__(self, name: str) -> None:
        self.mistakes: list[str] = []
        self._steps: deque[Step] = deque()
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards _steps and _due
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drained)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, step: Step) -> None:
        """Run *step* soon."""
        with self._lock:
            self._steps.append(step)
            if self._ended:
                return
            try:
                os.write(self._wakes, b".")
            except BlockingIOError:
                pass  # full of wake-ups that are not read yet

    def later(self, delay: float, step: Step) -> Timer:
        """Run *step* in *delay* seconds."""
        timer = Timer(step)
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + delay, next(self._numbers), timer))
        self.call(lambda: None)
        return timer

    def watch(self, fd: int, step: Step) -> None:
        """Run *step* whenever *fd* can be read."""
        self._selector.register(fd, selectors.EVENT_READ, step)

    def forget(self, fd: int) -> None:
        self._selector.unregister(fd)

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer to a *question* that is put on the loop's thread; None when the loop is ended."""
        answered = threading.Event()
        answers: list[Any] = []

        def answer() -> None:
            try:
                answers.append(question())
            finally:
                answered.set()

        self.call(answer)
        while not answered.wait(1):
            if not self._thread.is_alive():
                return None
        return answers[0] if answers else None

    def close(self) -> None:
        """End the thread. What is not done yet is left."""
        self.call(self._end)
        self._thread.join(30)
        self._selector.close()
        with self._lock:
            self._ended = True
            os.close(self._woken)
            os.close(self._wakes)

    def _end(self) -> None:
        raise SystemExit

    def _drained(self) -> None:
        os.read(self._woken, 4096)

    def _next_due(self) -> float | None:
        with self._lock:
            while self._due and self._due[0][2].step is None:
                heapq.heappop(self._due)
            if self._steps:
                return 0.0
            return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _ready(self) -> list[Step]:
        with self._lock:
            found = list(self._steps)
            self._steps.clear()
            while self._due and self._due[0][0] <= time.monotonic():
                step = heapq.heappop(self._due)[2].step
                if step is not None:
                    found.append(step)
        return found

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._next_due()):
                if self._do(key.data):
                    return
            for step in self._ready():
                if self._do(step):
                    return

    def _do(self, step: Step) -> bool:
        """Whether this step was the last."""
        try:
            step()
        except SystemExit:
            return True
        except Exception:
            self.mistakes.append(traceback.format_exc())
        return False
