"""Where state lives when nobody says (design 5)."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Mapping, Sequence

from oz_worker import slots
from oz_worker.errors import NotUsable

_SYSTEM_BASE = "/var/lib/oz/state"
SERVICE_STATE = "/var/lib/oz-worker/state"
"""Where the shipped system service keeps its state (`StateDirectory=` in deploy/oz-agent-worker.service)."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def worker_directory(worker_id: str) -> str:
    """*worker_id* as one component of a path: others become `_`, and 8 hex digits tell such ids apart."""
    safe = _UNSAFE.sub("_", worker_id)
    if safe == worker_id and safe.strip(".") and len(safe) <= 128:
        return safe
    digest = hashlib.sha256(worker_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{safe[:100]}_{digest[:8]}" if safe.strip(".") else f"_{digest[:8]}"


def user_base(environ: Mapping[str, str]) -> str:
    """Where a user other than root keeps state, by the XDG rules (which say to ignore a relative path)."""
    base = environ.get("XDG_STATE_HOME", "")
    home = environ.get("HOME") or os.path.expanduser("~")
    return os.path.join(base if base.startswith("/") else os.path.join(home, ".local", "state"), "oz-worker")


def state_base(environ: Mapping[str, str]) -> str:
    """The directory that holds one state directory for each worker id of this user."""
    return _SYSTEM_BASE if os.geteuid() == 0 else user_base(environ)


def systemd_state_dir(environ: Mapping[str, str]) -> str:
    """`$STATE_DIRECTORY`, the first of them when a unit has several; "" when there is none."""
    return environ.get("STATE_DIRECTORY", "").split(":")[0]


def default_state_dir(worker_id: str, environ: Mapping[str, str]) -> str:
    """Where *worker_id* keeps its state unless the configuration names another place."""
    return systemd_state_dir(environ) or os.path.join(state_base(environ), worker_directory(worker_id))


def known_state_dirs(environ: Mapping[str, str]) -> Sequence[str]:
    """Every state directory of this user at the default places, and the one of the shipped system service where it may
    be seen: for commands that were not told a worker. One that may be seen only in part, which is said where it is
    read, does not stand in the way of this user's own."""
    if found := systemd_state_dir(environ):
        return [found]
    own = directories_below(state_base(environ))
    if not os.access(SERVICE_STATE, os.R_OK | os.X_OK) or (own and not _open_to_us(SERVICE_STATE)):
        return own
    return [*own, SERVICE_STATE]


def _open_to_us(state_dir: str) -> bool:
    """Whether every instance in *state_dir* can be asked who holds it."""
    try:
        return all(os.access(path / "lock", os.R_OK | os.W_OK) for path in slots.instances(Path(state_dir)))
    except NotUsable:
        return False


def directories_below(base: str) -> Sequence[str]:
    """The directories in *base*, sorted; none when it is absent or closed: no worker has run here as this user."""
    try:
        return sorted(entry.path for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
