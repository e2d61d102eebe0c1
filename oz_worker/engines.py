"""Which container engine there is: its program, where it will look for its engine, and whether agents can run there."""

from __future__ import annotations

import json
import os
import shutil
from typing import Mapping

from oz_worker.containers import Engine
from oz_worker.engine_words import EngineError, Facts
from oz_worker.errors import NotUsable

_DOCKER = ("DOCKER_HOST", "docker context ls")
"""Where docker's program is told which engine to use: a variable, and what lists the rest."""


def find_program(kind: str, path: str, environment: Mapping[str, str]) -> str:
    """The engine's program: *path* if given, else *kind* on PATH. Raises NotUsable."""
    if path:
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise NotUsable(f"backend.docker.engine_path {path} is no program that may be run; correct the path")
        return os.path.abspath(path)
    found = shutil.which(kind, path=environment.get("PATH", os.defpath))
    if not found:
        raise NotUsable(f"no program {kind} on PATH; install it, or set backend.docker.engine_path")
    return found


def environment_for(kind: str, environment: Mapping[str, str], default: str = "/var/run/docker.sock") -> dict[str, str]:
    """*environment* for the engine's program, with what it would not find by itself: a rootless engine's socket.

    Documented of the existing worker, whose client looks there; the docker program does so only by a context.
    """
    chosen = kind != "docker" or environment.get("DOCKER_HOST") or _context(environment) or os.path.exists(default)
    candidates = [
        os.path.join(environment[name], tail)
        for name, tail in (("HOME", ".docker/run/docker.sock"), ("XDG_RUNTIME_DIR", "docker.sock"))
        if environment.get(name)
    ]
    found = "" if chosen else next(filter(os.path.exists, candidates), "")
    return {**environment, **({"DOCKER_HOST": f"unix://{found}"} if found else {})}


def endpoint_of(kind: str, environment: Mapping[str, str]) -> str:
    """Which engine the program will talk to, by its own rules: the variable, the context, else the default."""
    if kind == "podman":
        return f"podman {environment.get('CONTAINER_HOST') or 'of this host'}"
    if host := environment_for(kind, environment).get("DOCKER_HOST"):
        return f"docker {host}"
    context = _context(environment)
    return f"docker context {context}" if context else "docker of this host"


def _context(environment: Mapping[str, str]) -> str:
    """The docker context that is chosen by variable or configuration file, "" for the default one."""
    chosen = environment.get("DOCKER_CONTEXT", "")
    if not chosen:
        folder = environment.get("DOCKER_CONFIG") or os.path.join(environment.get("HOME", "/"), ".docker")
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                chosen = str(json.load(file).get("currentContext", ""))
        except (OSError, ValueError, AttributeError):
            return ""
    return "" if chosen == "default" else chosen


def opened(engine: Engine) -> Facts:
    """What the engine says of itself, fit to run Linux agents. Raises NotUsable with the cure."""
    try:
        facts = engine.facts()
    except EngineError as error:
        raise NotUsable(
            f"the {engine.kind} engine cannot be used: {str(error).rstrip('.?')}. {_cure(engine, error)}"
        ) from error
    if facts.system != "linux" or facts.architecture not in ("amd64", "arm64"):
        is_what = f"{facts.system or 'unknown'}/{facts.architecture or 'unknown'}"
        raise NotUsable(f"the {engine.kind} engine runs {is_what} containers; agents need linux/amd64 or linux/arm64")
    return facts


def _cure(engine: Engine, error: EngineError) -> str:
    if "permission denied" in error.said.lower():
        return "Let this user use the engine's socket, for example by its group (docker), and start the worker again"
    name, listing = ("CONTAINER_HOST", "podman system connection ls") if engine.kind == "podman" else _DOCKER
    host = engine.environment.get(name, "")
    where = f"{name} is {host}" if host and "@" not in host else f"see {name} and `{listing}`"
    return f"Start the engine, or name the right one: {where}"
