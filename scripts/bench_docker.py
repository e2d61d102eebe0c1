"""The Docker rows of `make bench`: an engine of its own, and a bare `docker run` of the same image beside each."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import bench_rig as rig
from bench_rig import AGENT, ROOT, Place

sys.path.insert(0, str(ROOT))
from tests.engines.client import find_program
from tests.engines.docker import Engine
from tests.engines.images import Images, busybox_is_static, load_image
from tests.engines.registry import Registry

HOLD = "exec sleep 100000"
LEAST_RATIO = 1.15
"""The budget of design 11: at most so many times a bare `docker run` of the same image."""


def missing() -> str:
    """Why there are no Docker rows on this machine, "" where there are."""
    programs = ("docker", "dockerd", "unshare", "docker-registry", "setpriv")
    if os.geteuid() or not all(map(find_program, programs)) or not busybox_is_static():
        return "no Docker rows: they need root, docker.io, docker-registry and busybox-static"
    return ""


class Ground:
    """An engine with two images: busybox, and a sidecar with the agent of the benchmark; of *registry*, if one is."""

    def __init__(self, engine: Engine, place: Place, registry: Registry | None = None) -> None:
        self.engine = engine
        self.place = place
        agent = {"entrypoint.sh": (0o755, AGENT.encode())}

        def image(name: str, **content: Any) -> str:
            return registry.publish(engine, name, **content) if registry else load_image(engine, name, **content)

        self.images = Images(image("oz-bench/task:1"), image("oz-bench/sidecar:1", base=False, files=agent))

    @contextlib.contextmanager
    def worker(self, **docker: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A connected worker whose image and sidecar are known already."""
        options = {
            "default_image": self.images.task,
            "sidecar_image": self.images.sidecar,
            "image_pull_policy": "Never",
            "network": "none",
            "volumes": [f"{self.place.directory}:{self.place.directory}"],
            **docker,
        }
        self.place.extra = self.engine.env
        with self.place.worker(backend={"docker": options}) as process:
            self.run("warm")
            yield process

    def run(self, mark: str) -> float:
        """One task through the worker: from its frame to its first line; returns once its report is acknowledged."""
        task = rig.submit(self.place, self.place.marks(mark))
        seen = self.place.started()[2]
        self.place.plane.wait_acknowledged(task, timeout=rig.SAFETY)
        return seen - (task.sent_at or 0.0)

    def bare(self, mark: str, volume: str) -> float:
        """The same container by `docker run`."""
        variables = self.place.marks(mark)
        words = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        shared = f"{self.place.directory}:{self.place.directory}"
        command = [self.engine.program, "run", "--detach", "--network", "none", "--pull", "never", "--volume", shared]
        command += ["--volume", f"{volume}:/agent:ro", "--workdir", "/workspace", *words]
        command += ["--entrypoint", "/agent/entrypoint.sh", self.images.task, "agent", "run"]
        began = time.monotonic()
        done = subprocess.run(command, env=self.engine.env, capture_output=True, text=True, check=True)
        seen = self.place.started()[2]
        self.engine.cli("wait", done.stdout.strip())
        self.engine.cli("rm", "--force", "--volumes", done.stdout.strip())
        return seen - began

    def volume(self) -> str:
        """The sidecar's volume, which the worker has made."""
        return self.engine.read("volume", "ls", "--quiet", "--filter", "name=ozw-")


@contextlib.contextmanager
def ground(place: Place, registry: Registry | None = None) -> Iterator[Ground]:
    """The engine, ended with everything in it."""
    engine = Engine()
    try:
        yield Ground(engine, place, registry)
    finally:
        engine.close()


def dispatched_always(place: Place, count: int) -> tuple[float, float]:
    """The same as `dispatched`, where every task asks a registry on loopback for both images: the default policy."""
    with contextlib.closing(Registry(place.directory / "registry")) as registry:
        return dispatched(place, count, registry)


def dispatched(place: Place, count: int, registry: Registry | None = None) -> tuple[float, float]:
    """The median through the worker and the median of bare runs, taken in turns."""
    policy = "Always" if registry else "Never"
    with ground(place, registry) as here, here.worker(image_pull_policy=policy):
        volume = here.volume()
        through, bare = [], []
        for number in range(count):
            bare.append(here.bare(f"bare{number}", volume))
            through.append(here.run(f"task{number}"))
    return statistics.median(through), statistics.median(bare)


def held(place: Place, counts: tuple[int, ...]) -> tuple[dict[int, float], float]:
    """Resident MiB of the worker with so many running containers, and its processes for each of the most."""
    found: dict[int, float] = {}
    with ground(place) as here, here.worker() as worker:
        while here.engine.ids("ps", "--all", "--quiet", "--filter", "label=oz-worker.role=task"):
            time.sleep(0.1)  # until the first task is removed and its `docker rm` with it
        time.sleep(1.0)
        idle = rig.descendants(worker.pid)
        running = 0
        for count in counts:
            for number in range(running, count):
                rig.submit(place, place.marks(f"task{number}", HOLD))
            for _ in range(running, count):
                place.started()
            running = count
            found[count] = rig.resident_bytes(worker.pid) / (1 << 20)
        time.sleep(1.0)  # the last `docker run` has printed its id and goes
        extra = (rig.descendants(worker.pid) - idle) / running
        for name in here.engine.ids("ps", "--quiet", "--filter", "label=oz-worker.role=task"):
            here.engine.cli("kill", name)
        place.plane.wait_acknowledged(timeout=rig.SAFETY)
    return found, extra


def drained(place: Place, count: int) -> tuple[float, float]:
    """Seconds for *count* short tasks, first frame to last report, and for as many bare runs, four at once."""
    with ground(place) as here, here.worker():
        volume = here.volume()
        began = time.monotonic()
        tasks = [rig.submit(place, {}) for _ in range(count)]
        place.plane.wait_acknowledged(*tasks, timeout=rig.SAFETY)
        took = time.monotonic() - began
        script = Path(place.directory) / "bare.sh"
        script.write_text(
            f'#!/bin/sh\nexec "{here.engine.program}" run --rm --network none --pull never --volume {volume}:/agent:ro'
            f" --entrypoint /agent/entrypoint.sh {here.images.task}\n"
        )
        began = time.monotonic()
        numbers = "\n".join(map(str, range(count))).encode()
        subprocess.run(
            ["xargs", "-n", "1", "-P", "4", "sh", str(script)], input=numbers, env=here.engine.env, check=True
        )
        return took, time.monotonic() - began
