"""What an agent in a container prints: kept by the engine, fetched at the end, bounded."""

from __future__ import annotations

import os

from oz_worker.backends.base import Unit
from oz_worker.backends.container_order import container_name
from oz_worker.backends.container_traces import Traces
from oz_worker.backends.output import keep_end
from oz_worker.backends.turns import Turns
from oz_worker.containers import Engine
from oz_worker.engine_words import EngineError

_TAIL_LINES = 200
_FETCHED_LINES = 200_000
_AT_ONCE = 8
_TAIL_SECONDS = 10.0
"""The report waits for the tail, so not for long."""


class ContainerOutput:
    """Reads by the engine's `logs`. Safe from any thread; blocks in the engine's program."""

    def __init__(self, engine: Engine, traces: Traces, limit: int) -> None:
        self._engine = engine
        self._traces = traces
        self._limit = limit
        self._turns = Turns(_AT_ONCE)

    def where(self, unit: Unit) -> str:
        """The command that shows it while it runs."""
        return f"{self._engine.kind} logs -f {container_name(unit)}"

    def tail(self, unit: Unit, limit: int) -> bytes:
        """The end of it; b"" when there is none, or the engine cannot say."""
        try:
            with self._turns.taken():
                return self._engine.logs(container_name(unit), lines=_TAIL_LINES, limit=1 << 20, timeout=_TAIL_SECONDS)[
                    -limit:
                ]
        except EngineError:
            return b""

    def collect(self, unit: Unit) -> str:
        """Write the whole of it, cut at the limit, to the unit's directory. One sentence when it cannot."""
        place = self._traces.directory(unit).output
        try:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            with self._turns.taken(), open(place, "wb", opener=_private) as file:
                self._engine.logs(container_name(unit), lines=_FETCHED_LINES, into=file.fileno())
            keep_end(place, self._limit)
        except (EngineError, OSError) as error:
            return f"the output of unit {unit.name} was not kept: {error}"
        return ""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
