"""What the commands beside `run` need from flags and file: which state directories, which instance, what to try."""

from __future__ import annotations

import argparse
from typing import Any, Mapping, NamedTuple, Sequence

from oz_worker.config import kinds, paths, schema
from oz_worker.config.load import from_flag, read_file
from oz_worker.config.reading import Reading, absolute
from oz_worker.errors import ConfigurationError

SCENARIOS = ("half-open", "cut", "refuse", "garbage", "slow")


class Place(NamedTuple):
    """Where to look for workers: directories, and an instance ("" for any)."""

    state_dirs: Sequence[str]
    instance_id: str


def place(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Place:
    """The workers that `status`, `drain` and `logs` are about: flags, else the file, else all of this user.

    Needs no API key and minds no mistake in the file as long as the file says where the state lives.
    """
    reading = Reading(environ)
    found = read_file(arguments.config_file or "", reading) or {}

    def value(name: str) -> str:
        text = getattr(arguments, name)
        flag = "--" + name.replace("_", "-")
        given = from_flag(flag, schema.TOP[name], text, wrong) if text else None
        return given or (found[name].value if name in found else "")

    wrong = Reading(environ)
    state_dir, worker_id, instance_id = value("state_dir"), value("worker_id"), value("instance_id")
    if wrong.problems or (reading.problems and not state_dir and not worker_id):
        raise ConfigurationError(wrong.problems or reading.problems)
    if state_dir:
        directories: Sequence[str] = [state_dir]
    elif worker_id:
        directories = [absolute(paths.default_state_dir(worker_id, environ), environ)]
    else:
        directories = paths.known_state_dirs(environ)
    return Place(directories, instance_id)


def dev_values(arguments: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any]:
    """The keyword arguments of `DevOptions`. ConfigurationError with every mistake."""
    reading = Reading(environ)

    def value(name: str, kind: kinds.Kind, default: Any) -> Any:
        text = getattr(arguments, name)
        return default if text is None else from_flag("--" + name.replace("_", "-"), kind, text, reading)

    values = {
        "backend": value("backend", kinds.choice(*schema.BACKENDS), "direct"),
        "engine": value("engine", schema.DOCKER["engine"], ""),
        "count": value("count", kinds.whole(1, 100_000), 1),
        "cancel_after": value("cancel_after", kinds.duration, None),
        "serve": arguments.serve,
        "listen": value("listen", kinds.listen, "127.0.0.1:0"),
        "scenario": value("scenario", kinds.choice(*SCENARIOS), ""),
        "oz_path": value("oz_path", kinds.program, ""),
        "keep": arguments.keep,
        "script": arguments.script,
    }
    if reading.problems:
        raise ConfigurationError(reading.problems)
    return values


def waiting_time(text: str | None, environ: Mapping[str, str]) -> float:
    """Seconds of `drain --wait`; 0.0 when it is not given."""
    reading = Reading(environ)
    seconds = from_flag("--wait", kinds.duration, text, reading) if text else 0.0
    if reading.problems:
        raise ConfigurationError(reading.problems)
    return float(seconds)
