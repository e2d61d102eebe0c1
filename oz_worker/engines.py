"""Which container engine there is: its program, where it will look for its engine, and whether agents can run there."""

from __future__ import annotations

import json
import os
import shutil
from typing import Mapping

from oz_worker.containers import Engine, EngineError, Facts
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


def endpoint_of(kind: str, environment: Mapping[str, str]) -> str:
    """Which engine the program will talk to, by its own rules: the variable, the context, else the default."""
    host = environment.get("CONTAINER_HOST" if kind == "podman" else "DOCKER_HOST", "")
    if host or kind == "podman":
        return f"{kind} {host or 'of this host'}"
    context = environment.get("DOCKER_CONTEXT", "")
    if not context:
        folder = environment.get("DOCKER_CONFIG") or os.path.join(environment.get("HOME", "/"), ".docker")
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                context = str(json.load(file).get("currentContext", ""))
        except (OSError, ValueError, AttributeError):
            context = ""
    return f"{kind} context {context}" if context not in ("", "default") else f"{kind} of this host"


def opened(engine: Engine) -> Facts:
    """What the engine says of itself, fit to run Linux agents. Raises NotUsable with the cure."""
    try:
        facts = engine.facts()
    except EngineError as error:
        raise NotUsable(f"the {engine.kind} engine cannot be used: {error}. {_cure(engine, error)}") from error
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
