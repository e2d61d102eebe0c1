"""A docker backend over a real engine, with agents that are shell scripts, and the base count at the end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from oz_worker.backends.base import Unit
from oz_worker.backends.docker import Docker
from oz_worker.model import Key, TaskSpec, unit_name
from oz_worker.settings import DockerOptions
from tests.audit import guard
from tests.engines.census import audit_back_to, census
from tests.engines.client import Client
from tests.engines.images import Images
from tests.hosting import INSTANCE

WORKER = f"site-{os.getpid()}"
FORWARD = """trap 'kill -TERM $agent' TERM
/bin/sh -c "$AGENT_SCRIPT" & agent=$!
wait $agent; code=$?
while kill -0 $agent 2>/dev/null; do wait $agent; code=$?; done
exit $code"""
"""What passes TERM on to the agent's script: the first process of a container ignores a TERM that it does not catch."""
ARGV = ("agent", "run", "--task-id", "task", "--server-root-url", "http://127.0.0.1:1")


class DockerSite:
    """The docker backend in a place on disk; `open` again is what a restarted worker does."""

    def __init__(self, root: Path, engine: Client, images: Images, *, kind: str = "docker", **options: Any) -> None:
        self.root = root
        self.engine = engine
        self.images = images
        self.options = {"engine": kind, **options}
        self.before = census(engine)
        self.backends: list[Docker] = []
        self.units: list[Unit] = []

    def closed(self, *, instance: str = INSTANCE, worker: str = WORKER, **options: Any) -> Docker:
        """A backend that is not open yet; *path* goes before PATH, *environ* replaces what leads to the engine."""
        path = options.pop("path", "")
        environ = options.pop("environ", self.engine.env)
        chosen: dict[str, Any] = {
            "default_image": self.images.task,
            "sidecar_image": self.images.sidecar,
            "image_pull_policy": "Never",
            "network": "none",
            "volumes": (f"{self.root}:{self.root}",),
            **self.options,
            **options,
        }
        host = {**environ, "PATH": os.pathsep.join(filter(None, (path, self.engine.env["PATH"])))}
        return Docker(
            DockerOptions(**chosen),
            worker_id=worker,
            instance=instance,
            instance_dir=self.root / "state" / instance,
            host_environ=host,
            task_log_max=1 << 20,
        )

    def open(self, **options: Any) -> Docker:
        """An open backend."""
        backend = self.closed(**options)
        backend.open()
        self.backends.append(backend)
        return backend

    def unit(self, script: str, *, instance: str = INSTANCE, **spec: Any) -> Unit:
        """A unit whose agent runs *script*; keyword arguments change its spec."""
        key = Key(f"task-{len(self.units)}", "run-1")
        environment = {"FAKE_OZ_SCRIPT": FORWARD, "AGENT_SCRIPT": script, **spec.pop("environment", {})}
        environment = guard().keep_of(self.root, environment)
        wanted = TaskSpec(key=key, run_id=key.task_id, argv=ARGV, environment=environment, **spec)
        unit = Unit(unit_name(key, 1), instance, key, wanted)
        self.units.append(unit)
        return unit

    def state(self, unit: Unit) -> str:
        """The state of the unit's container, "" when there is none."""
        form = ("container", "inspect", "--format", "{{.State.Status}}", f"oz-{unit.name}")
        return self.engine.cli(*form, check=False).stdout.decode().strip()

    def running(self, unit: Unit) -> bool:
        """Whether the unit's container runs."""
        return self.state(unit) == "running"

    def close(self) -> None:
        """Close the backends, remove what tests are free to leave: containers, sidecars. Then the base count holds."""
        for backend in self.backends:
            backend.close()
        self.engine.remove("--filter", f"label=oz-worker.worker={WORKER}")
        audit_back_to(self.engine, self.before)

    def fake_docker(self, body: str) -> str:
        """A directory for PATH with a `docker` that runs *body* in sh first; `$REAL` is the real one."""
        place = self.root / f"bin-{len(list(self.root.glob('bin-*')))}"
        place.mkdir()
        real = shutil.which("docker", path=self.engine.env["PATH"])
        (place / "docker").write_text(f'#!/bin/sh\nREAL={real}\n{body}\nexec "$REAL" "$@"\n')
        (place / "docker").chmod(0o755)
        return str(place)
