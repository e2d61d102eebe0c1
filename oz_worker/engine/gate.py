"""Whether a new task is let in just now, and why not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, Mapping

from oz_worker import vitals
from oz_worker.engine.disk import DiskGuard, most_by_descriptors
from oz_worker.engine.instance import Instance
from oz_worker.engine.registry import Registry
from oz_worker.model import Refusal

logger = logging.getLogger(__name__)

DISK = f"{Refusal.DISK.label}: "
"""So a sentence about a disk begins."""
OF_PLACE = (Refusal.DISK, Refusal.BACKEND)
"""Refusals that somebody has to mend something for."""
MOST_THREADS = 1000
"""Tasks at once when the operator sets no limit: each costs a parked thread."""


@dataclass(frozen=True)
class Limits:
    """What the engine is told (the keys of the configuration of the same names)."""

    max_concurrent_tasks: int
    stop_grace: float
    task_timeout: float
    cleanup: bool
    keep_failed: float
    most_tasks: int  # accepted in this process's life; 0 = no limit
    one_shot: bool
    min_free_disk: int
    min_free_inodes: int
    disk_paths: tuple[Path, ...]
    endpoint: str = ""
    backend: str = ""


class Gate:
    """Safe from any thread; `accepted` is counted on the store's thread, on which assignments are decided."""

    def __init__(self, limits: Limits, registry: Registry, primary: Instance) -> None:
        self._limits = limits
        self._registry = registry
        self._primary = primary
        self._closed_for: Refusal | None = None  # set by the main thread
        self.accepted = 0  # new tasks of this process
        self.disk = DiskGuard(limits.disk_paths, min_free=limits.min_free_disk, min_inodes=limits.min_free_inodes)
        wanted = limits.max_concurrent_tasks if limits.max_concurrent_tasks > 0 else MOST_THREADS
        self.most = most_by_descriptors(wanted)
        if limits.max_concurrent_tasks > self.most:
            logger.warning(
                "max_concurrent_tasks is %d, but the limit of open files carries %d tasks at once; raise that"
                " (ulimit -n, LimitNOFILE=)",
                wanted,
                self.most,
            )

    def close(self, refusal: Refusal | None) -> None:
        """Refuse every new task from now on, saying *refusal*; None opens it again."""
        self._closed_for = refusal

    @property
    def open(self) -> bool:
        """Whether nobody has closed it."""
        return self._closed_for is None

    def obstacles(self) -> Iterator[tuple[Refusal, str]]:
        """All that is in the way of a new task just now, with a sentence where there is more to say. Looks at disks."""
        limits = self._limits
        taken, alive = self._registry.counts()
        if (closed_for := self._closed_for) is not None:
            yield closed_for, ""
        if limits.most_tasks and self.accepted >= limits.most_tasks:
            yield Refusal.ONE_SHOT if limits.one_shot else Refusal.DRAINING, ""
        if taken >= self.most or alive >= self.most + MOST_THREADS:
            yield Refusal.AT_CAPACITY, f"{taken} tasks of at most {self.most}"
        if trouble := self.disk.trouble():
            yield Refusal.DISK, trouble
        if trouble := self._primary.backend.unavailable():
            yield Refusal.BACKEND, trouble

    def refusal(self) -> tuple[Refusal | None, str]:
        """The first of them, which the server is told; later ones are not even looked at."""
        return next(self.obstacles(), (None, ""))

    def troubles(self) -> list[str]:
        """What is wrong with this worker or its place, a sentence each. That all slots are taken is the work, no fault.

        Looks at disks.
        """
        found = vitals.troubles()
        found += [f"{refusal.label}: {why}" for refusal, why in self.obstacles() if refusal in OF_PLACE]
        if database := self._primary.store.trouble:
            found.append(f"the state database cannot be written: {database}")
        return found

    def full(self) -> str:
        """How many tasks there are when there is room for no more, "" while there is."""
        return next((why for refusal, why in self.obstacles() if refusal is Refusal.AT_CAPACITY), "")


def starting(why: str) -> str:
    """The whole of the list below before there is anything to ask. *why*: what the start waits for, "" when nothing."""
    return f"starting: {why or 'the state and the backend are being opened'}"


def why_not_ready(step: str, link: Mapping[str, str], troubles: Iterable[str]) -> list[str]:
    """Why no task is taken, a sentence each: the one list of `/readyz`, which asks, and of `status --explain`, which
    reads what was written. *step* is how far a stop has come, *link* the fact of the link, *troubles* the gate's.
    """
    found = []
    if step != "running":
        found.append(f"stopping ({step}): no new tasks are taken")
    if (state := link.get("state", "unknown")) != "connected":
        why = f": {link['why']}" if link.get("why") else ""
        found.append(f"not connected to the server ({state}){why}")
    return [*found, *troubles]
