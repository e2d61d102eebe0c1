"""What stands in an engine: counted before and after a test, so that nothing is left behind."""

from __future__ import annotations

import time
from typing import NamedTuple

from oz_worker.process import HELPER
from tests.engines.client import Client
from tests.rig import SAFETY, living_environments


class Census(NamedTuple):
    """The ids or names of everything that a worker could leave in an engine, and of its processes that talk to it."""

    containers: frozenset[str]
    volumes: frozenset[str]
    networks: frozenset[str]
    dangling_images: frozenset[str]
    helpers: frozenset[str]
    """Pids of living processes that carry OZ_WORKER_HELPER and mean this engine."""


def census(engine: Client) -> Census:
    """Count now."""
    marks = (f"{HELPER}=".encode(), engine.mark.encode())
    return Census(
        *engine.standing(),
        frozenset(str(pid) for pid, environ in living_environments() if all(mark in environ for mark in marks)),
    )


def differences(before: Census, after: Census) -> list[str]:
    """One line for each kind of thing of which there is now more or less."""
    lines = []
    for kind, old, new in zip(Census._fields, before, after, strict=True):
        if old != new:
            lines.append(f"{kind}: {len(old)} before, {len(new)} after; more: {[*new - old]}; gone: {[*old - new]}")
    return lines


def audit_engine(before: Census, after: Census) -> None:
    """The second count is the first."""
    assert differences(before, after) == []


def audit_back_to(engine: Client, before: Census) -> None:
    """The engine comes back to *before*; waited for, because engines remove some things after they have answered."""
    limit = time.monotonic() + SAFETY
    while (after := census(engine)) != before and time.monotonic() < limit:
        time.sleep(0.1)
    audit_engine(before, after)
