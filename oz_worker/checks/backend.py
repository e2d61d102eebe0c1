"""The backend: its programs, its engine or cluster, its directories. What fails here fails at the start of a worker."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Callable, Mapping

from oz_worker import clusters, engines, errand
from oz_worker.backends.direct import check_directories, find_oz
from oz_worker.backends.environ import inherited, worker_environment
from oz_worker.backends.preflight import Preflight
from oz_worker.backends.workspace import WorkspaceRoot
from oz_worker.checks import programs
from oz_worker.checks.places import can_be_made
from oz_worker.checks.probe import FILE_SECONDS, Finding, Outcome, Probe
from oz_worker.cluster import Cluster
from oz_worker.containers import Engine
from oz_worker.errors import NotUsable
from oz_worker.process import SpawnError
from oz_worker.settings import CommandOptions, DirectOptions, DockerOptions, KubernetesOptions, Settings

OLDEST = {"docker": (20, 10), "podman": (4, 0), "kubectl": (1, 20)}
"""The oldest programs with which this worker is known to work."""
ENGINE_SECONDS = 20.0
_PLAIN = re.compile(r"[\w./+@%:-]+")
_INSTALL = "install {} for this machine, or name one that runs with {}"


def probes(settings: Settings, environ: Mapping[str, str], stack: contextlib.ExitStack) -> list[Probe]:
    """The probes of the backend that is chosen. What they need for their time is given back by *stack*."""
    options = settings.options
    if isinstance(options, DirectOptions):
        return _direct(options, environ)
    if isinstance(options, DockerOptions):
        return _docker(options, environ)
    if isinstance(options, KubernetesOptions):
        return _kubernetes(settings, options, environ, stack)
    return _command(options, environ)


def _of_age(name: str, key: str, program: str, argv: list[str], environment: Mapping[str, str]) -> Finding:
    tried = programs.ask([program, *argv], environment)
    said = programs.described(program, tried)
    oldest = OLDEST[name]
    if tried.late:
        return Finding(said, Outcome.FAILED, f"see what `{name} {' '.join(argv)}` waits for")
    if tried.version and tried.version < oldest:
        older = f"{said} is older than {'.'.join(map(str, oldest))}, the oldest that is known to work"
        return Finding(older, Outcome.WARNING, f"upgrade it, or name a newer one with {key}")
    return Finding(said)


# -- direct


def _direct(options: DirectOptions, environ: Mapping[str, str]) -> list[Probe]:
    return [
        Probe(
            "agent", lambda: _agent(options, environ), cure="install the Oz CLI for this machine, or correct oz_path"
        ),
        Probe(
            "workspace",
            lambda: _workspace(options),
            cure="make it as the user who runs the worker, or choose another path",
            limit=FILE_SECONDS,
        ),
    ]


def _agent(options: DirectOptions, environ: Mapping[str, str]) -> Finding:
    program = find_oz(options, environ)
    environment = {**inherited(environ, options.inherit_environment), **options.environment}
    tried = programs.ask([program, "--version"], environment)
    said = programs.described(program, tried)
    return Finding(said, Outcome.WARNING, f"see what `{program} --version` waits for") if tried.late else Finding(said)


def _workspace(options: DirectOptions) -> Finding:
    check_directories(options)
    if options.target_dir:
        return Finding(f"tasks work in {os.path.abspath(options.target_dir)}")
    root = WorkspaceRoot(options.workspace_root, "")
    if os.path.lexists(root.path):
        if why := root.unavailable():
            raise NotUsable(why)
        return Finding(f"{root.path} can be written")
    try:
        can_be_made(Path(root.path))
    except OSError as error:
        raise NotUsable(f"workspace_root {root.path} cannot be made: {error.strerror}") from error
    return Finding(f"{root.path} will be made")


# -- docker


def _docker(options: DockerOptions, environ: Mapping[str, str]) -> list[Probe]:
    kind, key = options.engine, "backend.docker.engine_path"
    environment = engines.environment_for(kind, worker_environment(environ))

    def program() -> Finding:
        path = engines.find_program(kind, options.engine_path, environ)
        return _of_age(kind, key, path, ["--version"], environment)

    def engine() -> Finding:
        path = engines.find_program(kind, options.engine_path, environ)
        timeout = min(options.command_timeout or ENGINE_SECONDS, ENGINE_SECONDS)
        facts = engines.opened(
            Engine(kind, path, environment=environment, instance=programs.instance(), timeout=timeout)
        )
        where = engines.endpoint_of(kind, environ)
        said = f"{kind} {facts.version}, {facts.system}/{facts.architecture}, {where}"
        if options.platform and options.platform.split("/")[1] != facts.architecture:
            foreign = f"{said}; backend.docker.platform is {options.platform}, which it runs only by emulation"
            return Finding(foreign, Outcome.WARNING, f"try `{kind} run --rm --platform {options.platform} IMAGE`")
        return Finding(said)

    return [
        Probe("program", program, cure=_INSTALL.format(kind, key)),
        Probe("engine", engine, cure=f"`{kind} info` as the user who runs the worker has to work", needs=("program",)),
    ]


# -- kubernetes


def _kubernetes(
    settings: Settings, options: KubernetesOptions, environ: Mapping[str, str], stack: contextlib.ExitStack
) -> list[Probe]:
    """Cluster, permissions and image, as the start of a worker tries them, and beside one that runs."""
    environment = worker_environment(environ)
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oz-worker-check-")))
    where, key = clusters.endpoint_of(options, environment), "backend.kubernetes.kubectl_path"

    def cluster() -> Cluster:
        return clusters.cluster_for(options, environment, instance=programs.instance(), instance_dir=place)

    def program() -> Finding:
        path = clusters.find_program(options.kubectl_path, environment)
        return _of_age("kubectl", key, path, ["version", "--client"], environment)

    def answers() -> Finding:
        return Finding(f"Kubernetes {clusters.version_of(cluster(), where)}, {where}")

    def preflight() -> Preflight:
        return Preflight(cluster(), options, worker_id=settings.worker_id, instance=programs.instance())

    def permissions() -> Finding:
        lacking = preflight().permissions()
        return Finding("; ".join(lacking), Outcome.WARNING) if lacking else Finding("all that is needed")

    def image() -> Finding:
        kind = "mounted as a volume" if options.use_image_volumes else "run as root in an init container"
        tried = preflight()
        try:
            slow = tried.run()
        except (KeyboardInterrupt, SystemExit):  # told to stop, perhaps before the answer that the Job exists
            tried.tidy()
            raise
        return Finding(slow, Outcome.WARNING) if slow else Finding(f"{options.preflight_image} was pulled and {kind}")

    return [
        Probe("program", program, cure=_INSTALL.format("kubectl", key)),
        Probe(
            "cluster",
            answers,
            cure="`kubectl version` as the user who runs the worker, with the same kubeconfig and context, has to work",
            needs=("program",),
        ),
        Probe("permissions", permissions, cure="apply deploy/kubernetes/rbac.yaml", needs=("cluster",)),
        Probe(
            "image",
            image,
            cure="let the namespace run such a Job, or choose another backend.kubernetes.preflight_image",
            needs=("permissions",),
        ),
    ]


# -- command


def _command(options: CommandOptions, environ: Mapping[str, str]) -> list[Probe]:
    environment = {**worker_environment(environ), **options.environment}

    def tried(key: str, command: str) -> Callable[[], Finding]:
        return lambda: _shell_command(key, command, environment)

    found = [("dispatcher", "dispatch_command", options.dispatch_command)]
    if options.cancel_command:
        found.append(("canceller", "cancel_command", options.cancel_command))
    return [
        Probe(name, tried(key, command), cure=f"correct backend.command.{key}, or install its program")
        for name, key, command in found
    ]


def _shell_command(key: str, command: str, environment: Mapping[str, str]) -> Finding:
    """Whether /bin/sh can read it and knows its first word. Nothing of it is run."""
    if not command.strip():
        raise NotUsable(f"backend.command needs {key}; set it to the command that starts an agent")
    if said := _asked_of_shell(["-n", "-c", command], environment):
        raise NotUsable(f"/bin/sh cannot read {key}: {said}")
    first = _first_word(command)
    if first and _asked_of_shell(["-c", 'command -v -- "$1" >/dev/null || echo unknown', "sh", first], environment):
        raise NotUsable(f"{key} begins with {first}, which is no program that this user can run from here")
    return Finding(f"{key} begins with {first}, which is there" if first else f"{key} can be read by /bin/sh")


def _asked_of_shell(arguments: list[str], environment: Mapping[str, str]) -> str:
    """What the shell has to say against it, "" for nothing."""
    try:
        done = errand.run(
            ["/bin/sh", *arguments], environment=environment, instance=programs.instance(), timeout=programs.SECONDS
        )
    except SpawnError as error:
        raise NotUsable(f"/bin/sh cannot be run: {error}") from error
    if done.late:
        return "it did not answer"
    said = (done.errors + done.output).decode("utf-8", "replace").strip()
    return said or (f"exit code {done.code}" if done.code else "")


def _first_word(command: str) -> str:
    """The program that a command begins with; "" where that takes more than reading words."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return ""
    if any(word.startswith("PATH=") for word in words):
        return ""  # it is looked for elsewhere
    words = [word for word in words if not re.fullmatch(r"[A-Za-z_]\w*=.*", word, re.DOTALL)]
    return words[0] if words and _PLAIN.fullmatch(words[0]) else ""
