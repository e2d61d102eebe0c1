"""Files and directories: the key's file, the state directory and who is in it, room on the disks."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from oz_worker import backends, portions, rows, slots
from oz_worker.checks.probe import FILE_SECONDS, Finding, Outcome, Probe
from oz_worker.engine.disk import DiskGuard
from oz_worker.engine.instance import misfit
from oz_worker.errors import NotUsable
from oz_worker.link.key import KeySource
from oz_worker.redact import Secret
from oz_worker.settings import Settings
from oz_worker.store import peek


class Beside(NamedTuple):
    """A worker that runs with our state directory: its instance and process, and what it last said of its link."""

    instance: str
    pid: int
    worker_id: str
    link: Mapping[str, Any]


def probes(settings: Settings, environ: Mapping[str, str], origin: str) -> list[Probe]:
    """*origin* is where the key came from."""
    return [
        Probe(
            "key",
            lambda: _key(settings, origin),
            cure="write the worker's key, alone, into a file that only the worker's user can read (chmod 600)",
            limit=FILE_SECONDS,
        ),
        Probe(
            "state",
            lambda: _state(Path(settings.state_dir)),
            cure="make it as the user who runs the worker, on a disk of this machine, or set state_dir",
            limit=FILE_SECONDS,
        ),
        Probe(
            "instance",
            lambda: _instance(settings, environ),
            cure="stop that worker first, or give this one an instance_id of its own",
            needs=("state",),
            limit=FILE_SECONDS,
        ),
        Probe(
            "log",
            lambda: _log(settings.log_file),
            cure="name a file that the worker's user may write, or leave log_file out for stderr",
            limit=FILE_SECONDS,
        ),
        Probe(
            "disk",
            lambda: _disk(settings),
            cure="free space there, or lower min_free_disk and min_free_inodes: until then every task is rejected",
            limit=FILE_SECONDS,
        ),
    ]


def _key(settings: Settings, origin: str) -> Finding:
    try:
        key_source(settings)()
        if not settings.api_key_file:
            return Finding(f"from {origin}")
        mode = os.stat(settings.api_key_file).st_mode
    except OSError as error:
        raise NotUsable(f"the key file {settings.api_key_file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise NotUsable(str(error)) from error
    if mode & stat.S_IROTH:
        text = f"every user of this machine can read the key file {settings.api_key_file}"
        return Finding(text, Outcome.WARNING, f"chmod 600 {settings.api_key_file}")
    return Finding(f"from {settings.api_key_file}, which is read anew at each dial")


def key_source(settings: Settings) -> KeySource:
    """The key as the worker gets it at each dial."""
    return KeySource(Secret("") if settings.api_key_file else settings.api_key, settings.api_key_file)


def _state(path: Path) -> Finding:
    if os.path.lexists(path):
        slots.prepare(path)
        return Finding(f"{path} can be written")
    try:
        can_be_made(path)
    except OSError as error:
        raise slots.unusable(path, error) from error
    return Finding(f"{path} will be made")


def can_be_made(path: Path) -> None:
    """Raise OSError where a directory that is missing cannot be made: one of another name is, and removed again."""
    with tempfile.TemporaryDirectory(prefix=".oz-worker-check-", dir=nearest(path)):
        pass


def nearest(path: Path) -> Path:
    """*path*, or the first directory above it that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def running(settings: Settings) -> list[Beside]:
    """The workers that run with our state directory. Raises NotUsable for a lock that cannot be read."""
    found = []
    for path in slots.instances(Path(settings.state_dir)):
        try:
            holder = slots.holder(path)
        except (OSError, ValueError, KeyError) as error:
            raise NotUsable(f"{path}/lock cannot be read ({error}); check as the user who runs the worker") from error
        if holder is not None:
            facts = {name: json.loads(text) for name, text in (peek(path / "state.db", rows.facts) or {}).items()}
            worker_id = facts.get("worker", {}).get("worker_id", settings.worker_id)
            found.append(Beside(path.name, holder.pid, worker_id, facts.get("link", {})))
    return found


def _instance(settings: Settings, environ: Mapping[str, str]) -> Finding:
    beside, pinned = running(settings), settings.instance_id
    for worker in beside:
        if worker.instance == pinned:
            return Finding(f"the instance {pinned} is held by process {worker.pid}", Outcome.WARNING)
    if pinned:
        here = backends.endpoint(settings, environ)
        path = Path(settings.state_dir) / pinned
        if why := misfit(path, worker_id=settings.worker_id, backend=settings.backend, uid=os.getuid(), endpoint=here):
            return Finding(f"the instance {pinned} cannot be used: {why}", Outcome.FAILED, "choose another instance_id")
    also = "; ".join(f"process {worker.pid} holds {worker.instance}" for worker in beside)
    return Finding(also or "no worker runs here")


def _log(path: str) -> Finding:
    """Whether a worker could open it. One that is missing is not made."""
    if not path:
        return Finding("to stderr")
    try:
        if os.path.exists(path):
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
        else:
            with tempfile.TemporaryDirectory(prefix=".oz-worker-check-", dir=os.path.dirname(path) or "."):
                pass
    except OSError as error:
        raise NotUsable(f"log_file {path} cannot be opened ({error.strerror})") from error
    return Finding(f"{path} can be written")


def _disk(settings: Settings) -> Finding:
    places = tuple(
        dict.fromkeys(nearest(path) for path in portions.limits(settings, Path(settings.state_dir), "").disk_paths)
    )
    guard = DiskGuard(places, min_free=settings.min_free_disk, min_inodes=settings.min_free_inodes)
    if trouble := guard.trouble():
        return Finding(trouble, Outcome.FAILED)
    free = min(fs.f_bavail * fs.f_frsize for fs in map(os.statvfs, places)) // 2**20
    return Finding(f"at least {free} MiB free in {' and '.join(map(str, places))}")
