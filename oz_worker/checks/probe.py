"""One thing that is tried out, what came of it, and how a list of such things is worked through."""

from __future__ import annotations

import enum
import logging
import queue
import time
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

from oz_worker import threads
from oz_worker.errors import OzWorkerError
from oz_worker.timing import format_duration

logger = logging.getLogger(__name__)

FILE_SECONDS = 10.0
"""For looks at files: nothing else ends one at a network disk that is gone."""


class Outcome(enum.Enum):
    """How a probe went. Only FAILED makes `check` fail."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


class Finding(NamedTuple):
    """What a probe has found, in one sentence. `cure`: what to do; "" leaves it to the probe's own."""

    said: str
    outcome: Outcome = Outcome.OK
    cure: str = ""


class Probe(NamedTuple):
    """One test. `run` returns what it found; an OzWorkerError or OSError that it raises is a failure.

    It is skipped when one of `needs` (names of probes before it) failed or was skipped. `cure` is what to do when it
    does not go well. `limit`: it may hang, so it runs on a thread that is left behind after so many seconds; 0 for one
    that bounds itself and runs where `work` is called.
    """

    name: str
    run: Callable[[], Finding]
    cure: str = ""
    needs: Sequence[str] = ()
    limit: float = 0.0


class Result(NamedTuple):
    """What came of one probe. `seconds` is how long it took."""

    name: str
    outcome: Outcome
    seconds: float
    said: str
    cure: str


def work(probes: Iterable[Probe]) -> Iterator[Result]:
    """Try one after the other; the results as they come. Raises nothing of its own."""
    lost: set[str] = set()
    for probe in probes:
        because = [name for name in probe.needs if name in lost]
        began = time.monotonic()
        found = Finding(f"not tried, because of {because[0]}", Outcome.SKIPPED) if because else _try(probe)
        if found.outcome in (Outcome.FAILED, Outcome.SKIPPED):
            lost.add(probe.name)
        bad = found.outcome in (Outcome.FAILED, Outcome.WARNING)
        cure = (found.cure or probe.cure) if bad else ""
        yield Result(probe.name, found.outcome, time.monotonic() - began, found.said, cure)


def _try(probe: Probe) -> Finding:
    if not probe.limit:
        return _guarded(probe)
    answers: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    threads.start(f"check-{probe.name}", lambda: answers.put(_guarded(probe)), lambda _name, _error: None)
    try:
        return answers.get(timeout=probe.limit)
    except queue.Empty:
        return Finding(f"no answer within {format_duration(probe.limit)}", Outcome.FAILED)


def _guarded(probe: Probe) -> Finding:
    try:
        return probe.run()
    except (OzWorkerError, OSError) as error:
        return Finding(str(error), Outcome.FAILED)
    except Exception as error:  # whatever is wrong with one test, the others are still worth having
        logger.debug("the test %s broke", probe.name, exc_info=True)
        sentence = f"the test itself broke ({type(error).__name__}: {error}); this is a fault of oz_worker, report it"
        return Finding(sentence, Outcome.FAILED)
