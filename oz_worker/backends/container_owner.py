"""Containers whose worker is gone for good: a worker in a container that was replaced, and took its state with it.

Such a worker's containers carry its own container as their `owner`. Where that one is absent or does not run, twice
30 s apart, any worker of the same id may take them over (design 12, rule 3). Which one does is decided by the engine:
it lets exactly one create the container `oz-adopt-<unit>-<n>`, which then says for ever whose the unit is.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Iterable, Mapping

from oz_worker.containers import Engine, labelled
from oz_worker.engine_words import Container, EngineError, NameTaken

logger = logging.getLogger(__name__)

ABSENT_SECONDS = 30.0
_ADOPTION = "oz-adopt-"
_OWN_FILES = re.compile(r"/([0-9a-f]{64})/[^ ]*(?:hostname|hosts|resolv\.conf) ")


class Orphans:
    """Which units of dead workers there are, and whose they have become.

    `adopt` is called by one thread at a time, which alone touches `_absent_since`; everything else holds no state.
    """

    def __init__(self, engine: Engine, labels: Mapping[str, str], absent_seconds: float | None = None) -> None:
        self._engine = engine
        self._labels = labels
        self._absent_since: dict[str, float] = {}  # by container id, monotonic
        self._adopted: set[str] = set()  # ids of what other instances made and this one holds; only ever added to
        self.absent_seconds = ABSENT_SECONDS if absent_seconds is None else absent_seconds

    def ours(self, containers: Iterable[Container]) -> list[Container]:
        """The tasks among *containers* that this instance made or adopted, without those that another adopted."""
        listed = list(containers)
        found = [one for one in _tasks(listed) if self._is_ours(_holder(one, listed))]
        self._adopted.update(one.id for one in found if not self._is_ours(one))
        return found

    def holds(self, container: Container, unit: str) -> bool:
        """Whether this is the container of *unit*, and this instance's to end and to remove. Safe from any thread."""
        return container.label("unit") == unit and (self._is_ours(container) or container.id in self._adopted)

    def adopt(self, listed: list[Container]) -> list[Container]:
        """Take over what has had no owner for long enough; what was won just now. Raises EngineError.

        Also what the engine gave to this instance before, though its answer was lost.
        """
        self._sweep(listed)
        now = time.monotonic()
        orphans = self._without_owner(listed)
        self._absent_since = {one.id: self._absent_since.get(one.id, now) for one in orphans}
        ripe = [one for one in orphans if now - self._absent_since[one.id] >= self.absent_seconds]
        known = set(self._adopted)  # from here on nothing raises: what is won is told
        won = [one for one in self.ours(listed) if not self._is_ours(one) and one.id not in known]
        return [*won, *(one for one in ripe if self._takes(one, listed))]

    def _takes(self, unit: Container, listed: list[Container]) -> bool:
        try:
            return self.take(unit, listed)
        except EngineError as error:
            logger.warning("%s, whose worker is gone, is taken over later: %s", unit.name, error)
            return False

    def has_owner(self, container: Container) -> bool:
        """Whether somebody who may live owns the unit: without an `owner` its instance is guarded by a lock."""
        return not container.label("owner") or container.label("owner") in self._alive({container.label("owner")})

    def _without_owner(self, listed: list[Container]) -> list[Container]:
        """Tasks of others whose holder names an owner that is absent or does not run."""
        holders = [(one, _holder(one, listed)) for one in _tasks(listed)]
        others = [(one, holder.label("owner")) for one, holder in holders if not self._is_ours(holder)]
        alive = self._alive({owner for _one, owner in others if owner})
        return [one for one, owner in others if owner and owner not in alive]

    def _is_ours(self, holder: Container) -> bool:
        return holder.label("instance") == self._labels["instance"]

    def _alive(self, owners: set[str]) -> set[str]:
        return {one.id for one in self._engine.inspect(*sorted(owners)) if one.lives} if owners else set()

    def take(self, unit: Container, listed: list[Container]) -> bool:
        """Whether this instance has won the unit: the engine creates a name once.

        Safe from any thread: of two that ask at once, for a start and for `adopt`, both are told so. Raises
        EngineError.
        """
        number = max((_number(mark) for mark in listed if _adopts(mark, unit)), default=0) + 1
        labels = {**self._labels, "role": "mark", "unit": unit.label("unit")}
        name = f"{_ADOPTION}{unit.label('unit')}-{number}"
        try:
            self._engine.call("create", "--pull", "never", "--name", name, *labelled(labels), unit.image, "true")
        except NameTaken:
            if not any(self._is_ours(mark) for mark in self._engine.inspect(name)):
                return False
        self._adopted.add(unit.id)
        logger.warning("took over the container %s, whose worker is gone", unit.name)
        return True

    def _sweep(self, listed: list[Container]) -> None:
        """Remove our marks of units that are gone; a mark is made after its unit, so a list shows both or neither."""
        units = {one.label("unit") for one in _tasks(listed)}
        for mark in listed:
            if mark.name.startswith(_ADOPTION) and self._is_ours(mark) and mark.label("unit") not in units:
                try:
                    self._engine.call("container", "rm", "--volumes", mark.name)
                except EngineError as error:
                    logger.debug("%s stays for now: %s", mark.name, error)


def own_container(engine: Engine) -> str:
    """The id of the container that this process lives in, as *engine* knows it; "" when it knows none."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = dict.fromkeys(_OWN_FILES.findall(mounts))
    try:
        return next((one.id for one in engine.inspect(*found) if one.lives), "") if found else ""
    except EngineError:
        return ""


def _tasks(listed: Iterable[Container]) -> list[Container]:
    return [one for one in listed if one.label("role") == "task"]


def _adopts(mark: Container, unit: Container) -> bool:
    return mark.name.startswith(_ADOPTION) and mark.label("unit") == unit.label("unit")


def _number(mark: Container) -> int:
    tail = mark.name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0


def _holder(unit: Container, listed: Iterable[Container]) -> Container:
    """Who says whose the unit is: the last adoption, else the unit itself."""
    return max((mark for mark in listed if _adopts(mark, unit)), key=_number, default=unit)
