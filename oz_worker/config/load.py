"""Defaults < file < environment < flags, in one place; the rules that hold between keys; frozen settings out.

What may surprise, all of it on purpose: `--max-concurrent-tasks 0` overrides the file (the existing worker could
not); a flag with an empty value counts as not given; `Settings.api_key_file` is set only when the key really came from
it, so that the link may read it anew at each dial.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from typing import Any, Mapping, NamedTuple, Union
from urllib.parse import urlsplit

from oz_worker.config import key, kinds, paths, schema
from oz_worker.config.nodes import Items, Scalar, parse, plain_type
from oz_worker.config.reading import Reading, Wrong, absolute
from oz_worker.config.schema import Given
from oz_worker.config.variables import from_flags
from oz_worker.errors import ConfigurationError
from oz_worker.model import mount_point
from oz_worker.settings import (
    CommandOptions,
    DirectOptions,
    DockerOptions,
    ExitAfter,
    KubernetesOptions,
    LinkOptions,
    Settings,
)

DEFAULT, SYSTEMD = "default", "$STATE_DIRECTORY"
_OPTIONS: Mapping[str, type[Union[DirectOptions, CommandOptions, DockerOptions, KubernetesOptions]]] = {
    "docker": DockerOptions,
    "kubernetes": KubernetesOptions,
    "direct": DirectOptions,
    "command": CommandOptions,
}
_SHUTDOWN = {
    "docker": ("cancel", "drain", "preserve"),
    "direct": ("cancel", "drain", "preserve"),
    "kubernetes": ("preserve",),
    "command": ("preserve",),
}
"""What `on_shutdown` may be for each backend; the first one is the default."""

_BACKEND_FLAGS = {"target_dir": "direct", "engine": "docker", "volumes": "docker"}
_LARGEST_BACKOFF = 300.0


class Loaded(NamedTuple):
    """Settings; warnings, one sentence each; where each dotted name's value came from (absent: `DEFAULT`)."""

    settings: Settings
    warnings: tuple[str, ...]
    origins: Mapping[str, str]


def load(arguments: argparse.Namespace, environ: Mapping[str, str], reading: Reading | None = None) -> Loaded:
    """The whole configuration. ConfigurationError with every mistake; *reading* then still holds the warnings."""
    reading = reading or Reading(environ)
    in_file = read_file(getattr(arguments, "config_file", None) or "", reading)
    found = in_file or {}
    _add_flags(found, arguments, reading)
    backend = _choose_backend(found, arguments, reading)
    _add_task_flags(found, backend, arguments, reading)
    api_key = key.find(
        getattr(arguments, "api_key", None) or "",
        getattr(arguments, "api_key_file", None) or "",
        *found.get("api_key_file", Given("", "")),
        reading,
    )
    if in_file is not None:  # of a file that cannot be read nobody knows what it lacks
        _check(found, backend, reading)
        if not api_key.origin and "api_key_file" not in reading.wrong:
            cure = "set WARP_API_KEY, or name a file that holds it with --api-key-file or `api_key_file`"
            reading.problem("", f"no API key: {cure}")
    if reading.problems:
        raise ConfigurationError(reading.problems)
    found["api_key"] = Given(api_key.secret, api_key.origin)
    found["api_key_file"] = Given(api_key.file, api_key.origin if api_key.file else DEFAULT)
    _derive(found, backend, environ)
    if getattr(arguments, "config_file", None) and found["state_dir"].origin == SYSTEMD:
        cure = f"write `state_dir: {found['state_dir'].value}` into the file"
        reading.warn(
            "", f"state_dir is from {SYSTEMD} alone: `status`, `drain`, `logs`, `check` look elsewhere; {cure}"
        )
    return Loaded(
        _build(found, backend), tuple(reading.warnings), {name: given.origin for name, given in found.items()}
    )


def read_file(path: str, reading: Reading) -> dict[str, Given] | None:
    """What the file at *path* says, by dotted name; nothing for no file, None when it cannot be read.

    Mistakes are noted in *reading*.
    """
    if not path:
        return {}
    try:
        with open(absolute(path, reading.environ), "rb") as source:
            data = source.read(2 * 1024 * 1024)  # beyond the limit of nodes.parse, which says so
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        reading.problem(path, f"cannot be read ({cause}); check --config-file and the file's permissions")
        return None
    tree = parse(data, path, reading)
    return schema.read(tree, reading) if tree is not None else None


def from_flag(flag: str, kind: kinds.Kind, text: str, reading: Reading) -> Any:
    """The value of a flag's *text*, None when it is wrong, which is noted."""
    try:
        kind_of_text = plain_type(text)
        return kind(Scalar(flag, text, "str" if kind_of_text == "null" else kind_of_text), reading)
    except Wrong as error:
        reading.problem(flag, str(error))
        return None


def _add_flags(found: dict[str, Given], arguments: argparse.Namespace, reading: Reading) -> None:
    dotted = {name: kind for name, kind in schema.TOP.items() if name != "api_key_file"}
    dotted |= {f"exit_after.{name}": kind for name, kind in schema.EXIT_AFTER.items()}
    for name, kind in dotted.items():
        attribute = name.replace(".", "_")
        given = getattr(arguments, attribute, None)
        flag = "--" + attribute.replace("_", "-")
        if given is True:
            found[name] = Given(True, flag)
        elif given:
            value = from_flag(flag, kind, given, reading)
            if value is not None:
                found[name] = Given(value, flag)
            else:
                reading.wrong.add(name)
    if getattr(arguments, "collect_task_logs", None):
        reading.warn("--collect-task-logs", schema.IGNORED["", "collect_task_logs"])
    if getattr(arguments, "no_cleanup", False):
        found["cleanup"] = Given(False, "--no-cleanup")


def _choose_backend(found: dict[str, Given], arguments: argparse.Namespace, reading: Reading) -> str:
    """`--backend`, else the file's section, else docker. *found* keeps only what is said of the chosen one."""
    text = getattr(arguments, "backend", None) or ""
    in_file = found.get("backend", Given("", ""))
    chosen = from_flag("--backend", kinds.choice(*schema.BACKENDS), text, reading) if text else ""
    if chosen and in_file.value and chosen != in_file.value:
        reading.warn(
            "--backend", f"{chosen} is used with its defaults; the {in_file.value} section at {in_file.origin} is not"
        )
    if chosen:
        found["backend"] = Given(chosen, "--backend")
    backend: str = chosen or in_file.value or "docker"
    return backend


def _add_task_flags(found: dict[str, Given], backend: str, arguments: argparse.Namespace, reading: Reading) -> None:
    """Flags that belong to a backend's section: `--target-dir`, `--engine`, `-v`, `-e`."""
    for name, owner in _BACKEND_FLAGS.items():
        given = getattr(arguments, name, None)
        flag = "-v" if name == "volumes" else "--" + name.replace("_", "-")
        if not given:
            continue
        if owner != backend:
            reading.warn(flag, f"is only for the {owner} backend and is ignored; the backend is {backend}")
        elif name == "volumes":
            node = Items(flag, tuple(Scalar(flag, text) for text in given))
            _join(found, "backend.docker.volumes", schema.DOCKER[name](node, reading), flag)
        else:
            value = from_flag(flag, schema.BACKENDS[owner][name], given, reading)
            if value is not None:
                found[f"backend.{owner}.{name}"] = Given(value, flag)
    variables = from_flags(getattr(arguments, "env", None) or (), reading)
    if variables:
        _join(found, f"backend.{backend}.environment", variables, "-e")


def _join(found: dict[str, Given], name: str, more: Any, flag: str) -> None:
    """The file's entries, then the flags'; a variable of the flags wins over the file's."""
    earlier = found.get(name)
    if earlier is None:
        found[name] = Given(more, flag)
    else:
        joined = {**earlier.value, **more} if isinstance(more, dict) else earlier.value + more
        found[name] = Given(joined, f"{earlier.origin} and {flag}")


def _check(found: Mapping[str, Given], backend: str, reading: Reading) -> None:
    """The rules that hold between keys."""
    if not found.get("worker_id", Given("", "")).value and "worker_id" not in reading.wrong:
        reading.problem(
            "", "no worker id: give --worker-id, or `worker_id` in the file; runs are routed to it by that name"
        )
    _check_link(found, reading)
    _check_addresses(found, reading)
    shutdown = found.get("on_shutdown")
    if shutdown and shutdown.value not in _SHUTDOWN[backend]:
        reading.problem(
            shutdown.origin,
            f"on_shutdown {shutdown.value!r} is not possible with the {backend} backend, whose tasks live on without "
            "the worker; write preserve or leave it out",
        )
    dispatch = "backend.command.dispatch_command"
    if backend == "command" and not found.get(dispatch, Given("", "")).value.strip() and dispatch not in reading.wrong:
        reading.problem(
            found.get("backend", Given("", "")).origin,
            "the command backend needs `dispatch_command` in backend.command: the command that takes a task",
        )
    if backend == "docker":
        _check_mounts(found.get("backend.docker.volumes", Given((), "")), reading)


def _check_link(found: Mapping[str, Given], reading: Reading) -> None:
    def value(name: str) -> float:
        given = found.get(f"link.{name}")
        return float(given.value if given else getattr(LinkOptions, name))

    for less, more in (("ping_interval", "dead_after"), ("backoff_min", "backoff_max")):
        if value(less) > value(more) or (less == "ping_interval" and value(less) == value(more)):
            place = found.get(f"link.{more}") or found.get(f"link.{less}") or Given(None, "")
            reading.problem(place.origin, f"link.{less} must be shorter than link.{more}; change one of the two")


def _check_addresses(found: Mapping[str, Given], reading: Reading) -> None:
    """What is allowed and was probably not meant: a key in the clear, links that point at this machine."""
    socket_url = found.get("web_socket_url", Given(Settings.web_socket_url, DEFAULT))
    root = found.get("server_root_url", Given(Settings.server_root_url, DEFAULT))
    if not socket_url.value:
        reading.problem(socket_url.origin, "web_socket_url is empty; leave it out to use the production address")
        return
    if socket_url.value.startswith("ws://") and not _is_loopback(socket_url.value):
        reading.warn(socket_url.origin, "ws:// sends the API key unencrypted; use wss://")
    if root.value and _is_loopback(root.value) and not _is_loopback(socket_url.value):
        reading.warn(
            root.origin, "server_root_url is this machine while web_socket_url is not; tasks will not reach it"
        )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_mounts(volumes: Given, reading: Reading) -> None:
    seen: set[str] = set()
    for mount in volumes.value:
        point = mount_point(mount)
        if point in seen:
            reading.problem(volumes.origin, f"two volumes are mounted at {point}; keep one of them")
        seen.add(point)


def _derive(found: dict[str, Given], backend: str, environ: Mapping[str, str]) -> None:
    """Defaults that follow from other values."""

    def default(name: str, value: Any, origin: str) -> None:
        if name not in found or found[name].value == "":
            found[name] = Given(value, origin)

    backoff = found.get("link.refused_backoff")
    if backoff and backoff.value > _LARGEST_BACKOFF:
        found["link.refused_backoff"] = Given(_LARGEST_BACKOFF, f"{backoff.origin}, capped")
    worker_id = found["worker_id"].value
    default("backend", backend, DEFAULT)
    default("on_shutdown", _SHUTDOWN[backend][0], f"{DEFAULT} of the {backend} backend")
    if backend == "kubernetes":  # there one worker has one id, and its disk may be new with each pod
        digest = hashlib.sha256(worker_id.encode("utf-8")).hexdigest()
        default("instance_id", digest[:12], f"{DEFAULT}: a hash of the worker id")
    from_systemd = paths.systemd_state_dir(environ)
    place = absolute(paths.default_state_dir(worker_id, environ), environ)
    default("state_dir", place, SYSTEMD if from_systemd else DEFAULT)
    if found.get("one_shot", Given(False, "")).value:
        default("exit_on_refusal", True, f"{DEFAULT} of one_shot")
        default("flush_timeout", 60.0, f"{DEFAULT} of one_shot")


def _build(found: Mapping[str, Given], backend: str) -> Settings:
    """Frozen settings of checked values."""

    def below(prefix: str) -> dict[str, Any]:
        return {name[len(prefix) :]: given.value for name, given in found.items() if name.startswith(prefix)}

    top = {name: given.value for name, given in found.items() if "." not in name and name != "backend"}
    known = {field.name for field in dataclasses.fields(Settings)}
    return Settings(
        **{name: value for name, value in top.items() if name in known},
        backend=backend,
        options=_OPTIONS[backend](**below(f"backend.{backend}.")),
        link=LinkOptions(**below("link.")),
        exit_after=ExitAfter(**below("exit_after.")),
    )
