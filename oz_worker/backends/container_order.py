"""The command line that makes a task's container, from its spec and the options. Pure: it starts nothing."""

from __future__ import annotations

import posixpath
from typing import Iterable, Iterator, Mapping, NamedTuple, Sequence

from oz_worker.backends.base import Unit
from oz_worker.backends.container_env import Transport, transport
from oz_worker.containers import labelled
from oz_worker.model import InstanceShape, TaskSpec, mount_point
from oz_worker.settings import MIB, DockerOptions

ENTRYPOINT = "/agent/entrypoint.sh"
WORKSPACE = "/workspace"
_LOG_FILES = 2
_BOUNDED_LOGS = {"json-file": True, "local": True, "k8s-file": False}
"""Log drivers whose size can be bounded, and whether they take a number of files."""


class Order(NamedTuple):
    """One `run`: its arguments, what goes to its stdin, what joins its environment."""

    arguments: tuple[str, ...]
    transport: Transport


def container_name(unit: Unit) -> str:
    """The name of a unit's container (names.md, Labels)."""
    return f"oz-{unit.name}"


def order(
    options: DockerOptions,
    unit: Unit,
    spec: TaskSpec,
    *,
    image: str,
    sidecar_mounts: Sequence[str],
    labels: Mapping[str, str],
    log_driver: str,
    log_max: int,
) -> Order:
    """How to run *spec*. Raises ValueError with one sentence that names what cannot be given to a container.

    The entrypoint is set outright: the one of the image may be anything, also no shell (oz.md 26.4, 29). `--pull never`
    because the image is here already, and a pull by `run` would have neither policy nor limits.
    """
    mounts = [*sidecar_mounts, *options.volumes]
    places = _places(mounts)
    if options.engine == "podman" and not any(posixpath.commonpath((place, WORKSPACE)) == place for place in places):
        mounts.append(WORKSPACE)  # podman does not make a working directory that the image lacks
    environment = transport({**spec.environment, **options.environment}, podman=options.engine == "podman")
    arguments = [
        *("run", "--detach", "--name", container_name(unit), "--pull", "never"),
        *labelled({**labels, **_identity(unit), "role": "task"}),
        *("--workdir", WORKSPACE, "--entrypoint", ENTRYPOINT),
        *_each("--volume", mounts),
        *_chosen(options, spec.shape),
        *_log_options(log_driver, log_max),
        *environment.arguments(),
        image,
        *spec.argv,
    ]
    return Order(tuple(arguments), environment)


def _identity(unit: Unit) -> dict[str, str]:
    return {"task": unit.key.task_id, "execution": unit.key.execution_id, "unit": unit.name}


def _chosen(options: DockerOptions, shape: InstanceShape) -> Iterator[str]:
    """What the options and the instance shape say; the shape wins over the defaults of the configuration."""
    memory = f"{shape.memory_gb}g" if shape.memory_gb else options.memory.replace(" ", "")
    pairs = {
        "--platform": options.platform,
        "--network": options.network,
        "--user": options.user,
        "--cpus": str(shape.vcpus) if shape.vcpus else options.cpus,
        "--memory": memory,
        "--memory-swap": memory,
        "--pids-limit": str(options.pids_limit) if options.pids_limit else "",
    }
    for flag, value in pairs.items():
        if value:
            yield from (flag, value)
    yield from _each("--add-host", (host.replace("=", ":", 1) for host in options.extra_hosts))
    yield from _each("--security-opt", options.security_opt)


def _log_options(driver: str, log_max: int) -> Iterator[str]:
    """Bound what the engine keeps of the output by `task_log_max`, where its log driver can."""
    if not log_max or driver not in _BOUNDED_LOGS:
        return
    files = _LOG_FILES if _BOUNDED_LOGS[driver] else 1
    size = max(1, log_max // files // MIB)
    yield from ("--log-opt", f"max-size={size}m")
    if files > 1:
        yield from ("--log-opt", f"max-file={files}")


def _each(flag: str, values: Iterable[str]) -> Iterator[str]:
    for value in values:
        yield from (flag, value)


def _places(mounts: Sequence[str]) -> dict[str, str]:
    """The mount at each place. Raises ValueError for two at one: the engine's own message would not say which."""
    seen: dict[str, str] = {}
    for mount in mounts:
        place = mount_point(mount)
        if place in seen:
            raise ValueError(f"{mount} and {seen[place]} are mounted at the same place {place}; remove one of them")
        seen[place] = mount
    return seen
