"""Everything of OpenTelemetry's SDK happens on threads of its own; here is the one that feeds it.

Importing the SDK takes a quarter of a second, reading certificates may take for ever, recording takes 20 times as long
as counting: nothing of it happens on the main thread or on a task's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import threading
import time
from typing import Callable, Generic, Protocol, TypeVar

from oz_worker import threads
from oz_worker.observe.otlp_target import Unusable
from oz_worker.observe.outage import SPOKEN

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
LOOK_SECONDS = 5.0
Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)


class Sdk(Protocol[ItemIn]):
    """What was built with the SDK. Used by its thread alone but for `silence`."""

    def take(self, item: ItemIn) -> None:
        """Record one thing."""

    def look(self) -> None:
        """Called every few seconds."""

    def close(self) -> None:
        """Deliver what is left; may block for long, then nobody waits any more."""

    def silence(self) -> None:
        """Nobody waits any more: say nothing of what is lost now."""


class OtelThread(Generic[Item]):
    """Thread *name*: blocks in *build* (imports, files), in its queue (woken by `post` and `finish`) and in `close`.

    Owned by the daemon. `post` is safe from any thread and never blocks: beyond 10,000 waiting things the newest are
    dropped and counted. Without the SDK, or with settings that cannot be used, everything posted is dropped.
    """

    def __init__(self, name: str, build: Callable[[], Sdk[Item] | None], warn: Callable[[str], None]) -> None:
        self._name = name
        self._build = build
        self._warn = warn
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._dropped = 0  # about: counted without a lock
        self._dead = False
        self._sdk: Sdk[Item] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. Raises nothing."""
        try:
            self._thread = threads.start(self._name, self._run, lambda _name, _error: None)
        except RuntimeError as error:  # the limit of threads: the work matters more
            self._dead = True
            logger.warning("%s: no thread could be started (%s); the worker runs without it", self._name, error)

    def post(self, item: Item) -> None:
        """Have *item* recorded."""
        if self._dead:
            return
        if self._queue.qsize() >= MOST_WAITING:
            self._dropped += 1
        else:
            self._queue.put(item)

    def finish(self) -> None:
        """Nothing more comes: deliver and end. Returns at once."""
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the end, at most *seconds*; then it is left behind, silently."""
        if self._thread is not None:
            self._thread.join(seconds)
        if self._sdk is not None:
            self._sdk.silence()
        if self._dropped:
            logger.warning("%s: %d things were not recorded, there were too many at once", self._name, self._dropped)

    def _run(self) -> None:
        self._sdk = sdk = self._built()
        if sdk is None:
            self._dead = True
            return
        logger.debug("%s is ready to deliver", self._name)
        next_look = 0.0
        while True:
            if time.monotonic() >= next_look:
                sdk.look()
                next_look = time.monotonic() + LOOK_SECONDS
            with contextlib.suppress(queue.Empty):
                if (item := self._queue.get(timeout=LOOK_SECONDS)) is None:
                    break
                self._take(sdk, item)
        sdk.close()

    def _take(self, sdk: Sdk[Item], item: Item) -> None:
        try:
            sdk.take(item)
        except Exception as error:  # foreign code: one thing is lost, the next may do
            logger.debug("%s: %s: %s", self._name, type(error).__name__, error)

    def _built(self) -> Sdk[Item] | None:
        """None after one line that says why not."""
        SPOKEN.setting_up(True)
        try:
            return self._build()
        except Unusable as error:
            why = str(error)
        except ImportError as error:  # the exporter's package is missing, say, because only the SDK was installed
            why = f"{self._name} cannot start ({error}); install the extra as a whole (pip install 'oz-worker[otel]')"
        except Exception as error:  # foreign code, which checks the rest of the settings
            why = f"{self._name} cannot start ({type(error).__name__}: {error}); correct the variable that sets it"
        finally:
            SPOKEN.setting_up(False)
        self._warn(f"{why}; the worker runs without this exporter")
        return None


def installed() -> bool:
    """Whether the SDK is there; if so, what it logs is ours to say from now on. Imports the name space only."""
    try:
        found = importlib.util.find_spec("opentelemetry.sdk") is not None
    except ImportError:
        found = False
    if found:
        SPOKEN.install()
    return found
