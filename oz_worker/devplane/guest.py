"""What one `dev` has in a container engine: two images made on the spot, and everything that its worker makes there."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, Mapping
from urllib.parse import urlsplit

from oz_worker.containers import Engine, labelled
from oz_worker.devplane.image import SEARCH_PATH, machine_files, make_layer, pack
from oz_worker.engine_words import LABEL, EngineDown, EngineError
from oz_worker.engines import opened
from oz_worker.errors import NotUsable
from oz_worker.timing import Deadline

CALL_SECONDS = 30.0
LOAD_SECONDS = 600.0
LEAVE_SECONDS = 20.0
AGAIN_SECONDS = 0.2
TRY_SECONDS = 5

_HOST_VARIABLES = {"docker": "DOCKER_HOST", "podman": "CONTAINER_HOST"}
_HERE = re.compile(r"unix://|fd://|/|tcp://(127\.|localhost[:/]|\[::1\])")
_UNREACHED = re.compile(r"refused|timed out|unreachable|TimeoutError")
_TRY = "import http.client, socket, subprocess; socket.create_connection(({host!r}, {port}), {seconds}).close()"
_PASSWD, _GROUP = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", b"root:x:0:\n"


class Guest:
    """A guest of an engine with a worker id of its own, by whose label everything it made is found and removed.

    For one thread. Raises NotUsable when there is no program for the engine *kind*; touches the engine in `arrive`.
    """

    def __init__(self, kind: str) -> None:
        program = shutil.which(kind)
        if not program:
            raise NotUsable(f"dev --backend docker: no program {kind} on PATH; install it, or use --backend direct")
        mark = secrets.token_hex(4)
        self.worker_id = f"dev-{mark}"
        self._labels = {"worker": self.worker_id}
        self._label = f"label={LABEL}worker={self.worker_id}"
        self._came = False
        self._task, self._sidecar = f"oz-worker-dev/task:{mark}", f"oz-worker-dev/sidecar:{mark}"
        self._engine = Engine(
            kind, program, environment=dict(os.environ), instance=self.worker_id, timeout=CALL_SECONDS
        )

    @property
    def section(self) -> Mapping[str, object]:
        """The worker's `backend.docker`."""
        return {
            "engine": self._engine.kind,
            "default_image": self._task,
            "sidecar_image": self._sidecar,
            "image_pull_policy": "Never",
            "network": "host",  # the control plane is on loopback
        }

    def arrive(self, root_url: str, say: Callable[[str], None]) -> None:
        """Make and load the images, and prove that a container reaches *root_url*. Raises NotUsable.

        Not interrupted by a signal: an engine that has the whole archive would finish behind our back.
        """
        kind = self._engine.kind
        _must_be_here(kind)
        facts = opened(self._engine)
        say(f"making an image of this machine's Python {platform.python_version()}, shell and small programs")
        began, self._came = time.monotonic(), True
        found = machine_files()
        size = self._load_task(found.files, found.links, facts.architecture)
        self._load_sidecar(found.python, facts.architecture)
        took = time.monotonic() - began
        say(f"loaded into {kind} {facts.version} as {self._task}, {size / 1e6:.0f} MB in {took:.1f} s")
        self._try(found.python, root_url)

    def _load_task(self, files: Mapping[str, tuple[int, bytes]], links: Mapping[str, str], architecture: str) -> int:
        own = {"/etc/passwd": (0o644, _PASSWD), "/etc/group": (0o644, _GROUP)}
        layer = make_layer({**files, **own}, links, {"/tmp": 0o1777, "/root": 0o755})
        variables = [f"PATH={SEARCH_PATH}"]
        if libraries := os.environ.get("LD_LIBRARY_PATH", ""):
            variables.append(f"LD_LIBRARY_PATH={libraries}")  # ldd obeyed it, so the programs here need it
        self._load(self._task, layer, {"Env": variables, "Cmd": ["/bin/sh"]}, architecture)
        return len(layer)

    def _load_sidecar(self, python: str, architecture: str) -> None:
        start = f'#!/bin/sh\nexec {shlex.quote(python)} -I -S "${{0%/*}}/agent.py" "$@"\n'
        agent = (Path(__file__).resolve().parent / "agent.py").read_bytes()
        layer = make_layer({"/entrypoint.sh": (0o755, start.encode()), "/agent.py": (0o644, agent)})
        self._load(self._sidecar, layer, {"Cmd": ["/entrypoint.sh"]}, architecture)

    def _load(self, name: str, layer: bytes, config: Mapping[str, object], architecture: str) -> None:
        marked = {**config, "Labels": {LABEL + key: value for key, value in self._labels.items()}}
        try:
            self._engine.call("load", stdin=pack(name, [layer], marked, architecture), timeout=LOAD_SECONDS)
        except EngineError as error:
            raise NotUsable(f"the image {name} could not be loaded: {error}") from error

    def _try(self, python: str, root_url: str) -> None:
        """A container with the worker's options that does what the agent does first."""
        address = urlsplit(root_url)
        code = _TRY.format(host=address.hostname, port=address.port, seconds=TRY_SECONDS)
        labels = labelled({**self._labels, "role": "preflight"})
        options = ["--rm", "--pull", "never", *labels, "--network", "host", "--entrypoint", python]
        try:
            self._engine.call("run", *options, self._task, "-I", "-S", "-c", code)
        except EngineError as error:
            if not _UNREACHED.search(error.said) or isinstance(error, EngineDown):
                raise NotUsable(f"the image made of this machine does not run: {error}") from error
            raise NotUsable(_elsewhere(f"a container on the host's network does not reach {root_url}")) from error

    def tasks(self) -> list[str]:
        """The names of the tasks' containers that exist. Raises EngineError."""
        return sorted(one.name for one in self._engine.containers(self._label) if one.label("role") == "task")

    def leave(self, say: Callable[[str], None]) -> bool:
        """Remove everything; whether nothing is left.

        Without force for images: one that a container still needs tells of a container that came late, made by a
        request of a program that was killed; without its image none can come any more.
        """
        deadline = Deadline(LEAVE_SECONDS)
        while self._came:
            try:
                if not self._sweep():
                    say(f"removed from {self._engine.kind}: the images, and everything made with them")
                    return True
                trouble = "things appear again and again"
            except EngineDown as error:
                trouble, deadline = str(error), Deadline(0)
            except EngineError as error:
                trouble = str(error)
                time.sleep(AGAIN_SECONDS)
            if deadline.passed():
                say(f"not everything was removed: {trouble}; to remove it: {self.removal}")
                return False
        return True

    def _sweep(self) -> bool:
        """Remove what is there; whether there was anything."""
        containers = self._words("ps", "--all", "--quiet", "--no-trunc", "--filter", self._label)
        if containers:
            self._engine.call("container", "rm", "--force", "--volumes", *containers)
        volumes = self._words("volume", "ls", "--quiet", "--filter", self._label)
        if volumes:
            self._engine.call("volume", "rm", *volumes)
        images = self._words("image", "ls", "--quiet", "--no-trunc", "--filter", self._label)
        if images:
            self._engine.call("image", "rm", *images)
        return bool(containers or volumes or images)

    def stay(self, say: Callable[[str], None]) -> bool:
        """End what runs, keep the rest and say how to remove it; whether nothing runs."""
        if not self._came:
            return True
        try:
            running = self._words("ps", "--quiet", "--filter", self._label)
            if running:
                self._engine.call("kill", *running)
        except EngineError as error:
            say(f"what runs was not ended: {error}; to remove everything: {self.removal}")
            return False
        say(f"kept: the images, and everything made with them; to remove it: {self.removal}")
        return True

    @property
    def removal(self) -> str:
        """The commands by which a person removes everything."""
        kind, chosen = self._engine.kind, f"--filter {self._label}"
        pairs = (("ps -aq", "rm -fv"), ("volume ls -q", "volume rm"), ("images -q", "rmi"))
        return "; ".join(f"{kind} {listed} {chosen} | xargs -r {kind} {gone}" for listed, gone in pairs)

    def _words(self, *arguments: str) -> list[str]:
        return [*dict.fromkeys(self._engine.call(*arguments).decode().split())]


def _must_be_here(kind: str) -> None:
    """Refuse early where an image of this machine cannot run, or cannot reach it."""
    if not sys.platform.startswith("linux"):
        raise NotUsable("dev --backend docker needs Linux, of whose programs it makes its image; use --backend direct")
    name = _HOST_VARIABLES[kind]
    host = os.environ.get(name, "")
    if host and not _HERE.match(host):
        raise NotUsable(_elsewhere(f"{name} names an engine on another machine"))


def _elsewhere(why: str) -> str:
    return (
        f"dev --backend docker: {why}, and its control plane listens on this machine's loopback only; run dev on the"
        " machine of the engine itself (not in a container, not beside a virtual machine), or use --backend direct"
    )
