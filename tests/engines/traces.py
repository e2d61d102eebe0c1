"""What an engine of ours leaves on the machine: nothing, once it is closed."""

from __future__ import annotations

from pathlib import Path

from tests.engines.holder import cgroups_of
from tests.rig import living_environments


def traces(place: Path) -> list[str]:
    """What is left of an engine on this machine."""
    found = [str(place)] if place.exists() else []
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(place) in line]
    found += [str(path) for path in cgroups_of(place.name)]
    found += [f"process {pid}" for pid, environ in living_environments() if str(place).encode() in environ]
    return found


def marked(mark: str) -> list[int]:
    """Living processes of the container that was started with the variable MARK=*mark*."""
    return [pid for pid, environ in living_environments() if f"MARK={mark}".encode() in environ]
