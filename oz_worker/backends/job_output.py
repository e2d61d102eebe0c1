"""What the containers of a Job's pod print: kept by the cluster, fetched at the end, bounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from oz_worker.backends.base import Unit
from oz_worker.backends.job_board import Board
from oz_worker.backends.job_object import UNIT, job_name
from oz_worker.backends.job_template import TASK
from oz_worker.backends.output import end_with_notice
from oz_worker.backends.turns import Turns
from oz_worker.cluster import Cluster, ClusterDown, ClusterError, Object
from oz_worker.timing import Deadline

_TAIL_LINES = (200, 20, 2)
"""How many lines to ask for: fewer ones when they are so long that the end is cut off."""
_TAIL_BYTES = 1 << 20
_FETCHED_LINES = 200_000
_OTHERS_BYTES = 64 << 10
_MOST_CONTAINERS = 8
_AT_ONCE = 4
_TAIL_SECONDS = 10.0
"""The report waits for the tail, so not for long."""


class _Source(NamedTuple):
    """A container that has begun to run."""

    pod: str
    container: str


class JobOutput:
    """Reads the containers' logs. Safe from any thread; blocks in the program."""

    def __init__(self, cluster: Cluster, board: Board, limit: int) -> None:
        self._cluster = cluster
        self._board = board
        self._limit = limit
        self._turns = Turns(_AT_ONCE, ClusterDown)

    def where(self, unit: Unit) -> str:
        """The command that shows it while it runs."""
        return self._cluster.command("logs", "--follow", f"job/{job_name(unit.key)}", f"--container={TASK}")

    def tail(self, unit: Unit, limit: int) -> bytes:
        """The end of what each container printed, the agent's last; b"" when there is none, or nobody can say."""
        deadline = Deadline(_TAIL_SECONDS)
        try:
            with self._turns.taken(wait=deadline.left()):
                sources = self._sources(unit, deadline)
                share = limit // max(1, len(sources))
                printed = [(source, self._end_of(source, share, deadline)) for source in sources]
        except ClusterError:
            return b""
        return b"".join(_with_names([(source, text) for source, text in printed if text]))[-limit:]

    def _end_of(self, source: _Source, limit: int, deadline: Deadline) -> bytes:
        text = b""
        for lines in _TAIL_LINES:
            left = max(1.0, deadline.left())
            text = self._cluster.logs(*source, lines=lines, limit=_TAIL_BYTES, timeout=left)
            if len(text) < _TAIL_BYTES:
                break
        if len(text) <= limit:
            return text
        return text[-limit:].partition(b"\n")[2] if limit else b""  # whole lines: no secret is torn

    def collect(self, unit: Unit, place: Path) -> str:
        """Write it all, cut at the limit, to *place*. One sentence when that is not possible."""
        try:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            with self._turns.taken(), open(place, "w+b", opener=_private) as file:
                for source in self._sources(unit, Deadline(self._cluster.timeout)):
                    self._copy(source, file.fileno())
                end_with_notice(file.fileno(), self._limit)
        except (ClusterError, OSError) as error:
            return f"the output of unit {unit.name} was not kept: {error}"
        return ""

    def _copy(self, source: _Source, into: int) -> None:
        limit = self._limit or 1 << 40
        if source.container != TASK:
            text = self._cluster.logs(*source, lines=_FETCHED_LINES, limit=min(limit, _OTHERS_BYTES))
            if text:
                os.write(into, b"".join(_with_names([(source, text)], always=True)))
            return
        if os.lseek(into, 0, os.SEEK_CUR):
            os.write(into, _heading(source))
        self._cluster.logs(*source, lines=_FETCHED_LINES, limit=limit, into=into)

    def _sources(self, unit: Unit, deadline: Deadline) -> list[_Source]:
        """The containers of the unit's newest pod that have begun, the agent's last."""
        card = self._board.card(unit.name)
        newest = _newest(card.pods.values()) if card is not None else None
        if newest is None or (unit.facts is not None and not _is_over(newest)):  # the watch of pods may lag behind
            asked = self._cluster.find("pods", f"{UNIT}={unit.name}", timeout=max(1.0, deadline.left()))
            newest = _newest(asked.items)
        if newest is None:
            return []
        found = [_Source(str(newest["metadata"]["name"]), name) for name in _begun(newest)]
        agent = [source for source in found if source.container == TASK]
        others = [source for source in found if source.container != TASK]
        return [*others[-_MOST_CONTAINERS:], *agent]


def _newest(pods: Iterable[Object]) -> Object | None:
    return max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)


def _is_over(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _begun(pod: Object) -> Iterator[str]:
    status = pod.get("status") or {}
    for kind in ("initContainerStatuses", "containerStatuses"):
        for one in status.get(kind) or ():
            states = {**(one.get("lastState") or {}), **(one.get("state") or {})}
            if "running" in states or "terminated" in states:
                yield str(one.get("name"))


def _with_names(printed: list[tuple[_Source, bytes]], *, always: bool = False) -> Iterable[bytes]:
    """With a heading for each container, unless there is only the agent's."""
    alone = not always and [source.container for source, _ in printed] == [TASK]
    for source, text in printed:
        yield text if alone else _heading(source) + text + (b"" if text.endswith(b"\n") else b"\n")


def _heading(source: _Source) -> bytes:
    return f"--- container {source.container} ---\n".encode()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
