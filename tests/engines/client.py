"""The command line of one container engine, told by its environment which engine is meant."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Mapping

TOOLS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where engines are installed; added to PATH, because a minimal environment leaves the sbin directories out."""
PATH = os.pathsep.join([*filter(None, [os.environ.get("PATH", "")]), TOOLS])
THRIFT = {"GOGC": "400"}
"""For the environment of short-lived programs in Go (docker, podman, kubectl), of which the suite starts thousands: a
fifth to two fifths of their CPU time is the collection of garbage that their end would take away."""
PATIENCE = 60.0
"""Seconds until a call is given up; many times what any of them takes."""
Standing = tuple[frozenset[str], frozenset[str], frozenset[str], frozenset[str]]
"""Ids or names of all containers, volumes, networks and dangling images."""


class EngineError(AssertionError):
    """An engine or one of its servers did not do what the test needs; says what it printed."""


def find_program(name: str) -> str:
    """The path of a program, "" when it is not installed."""
    return shutil.which(name, path=PATH) or ""


class Client:
    """`docker` or `podman` in the environment `env`. Any number of threads may call it at once."""

    def __init__(self, program: str, env: Mapping[str, str], mark: str) -> None:
        self.program = program
        self.env = {"PATH": PATH, **THRIFT, **env}
        """All that a process needs in order to reach this engine; meant to be added to a worker's environment."""
        self.mark = mark
        """The variable of `env` by which a process of ours that talks to this engine is known."""

    def cli(
        self, *arguments: str, stdin: bytes = b"", check: bool = True, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one command to its end. Raises EngineError when it fails, unless *check* is false, or takes too long."""
        command = [self.program, *arguments]
        try:
            done = subprocess.run(command, input=stdin, env=self.env, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise EngineError(f"{' '.join(command)}: no end within {timeout:g} s") from None
        if check and done.returncode:
            raise EngineError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.decode(errors='replace')}")
        return done

    def read(self, *arguments: str) -> str:
        """What a command that must succeed prints, without the white space around it."""
        return self.cli(*arguments).stdout.decode(errors="replace").strip()

    def ids(self, *arguments: str) -> frozenset[str]:
        """The words that a command prints."""
        return frozenset(self.read(*arguments).split())

    def standing(self) -> Standing:
        """What stands there now."""
        return (
            self.ids("ps", "--all", "--quiet", "--no-trunc"),
            self.ids("volume", "ls", "--quiet"),
            self.ids("network", "ls", "--format", "{{.Name}}"),
            self.ids("images", "--quiet", "--no-trunc", "--filter", "dangling=true"),
        )

    def remove(self, *filters: str) -> None:
        """Remove the containers and the volumes that `--filter` chooses, whatever they do."""
        if found := self.ids("ps", "--all", "--quiet", *filters):
            self.cli("rm", "--force", "--volumes", *found, check=False)
        if found := self.ids("volume", "ls", "--quiet", *filters):
            self.cli("volume", "rm", "--force", *found, check=False)

    def close(self) -> None:
        """Nothing to do for an engine that is not ours. May be called twice."""
