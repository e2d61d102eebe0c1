"""The headline recipe: the worker itself in a container, with the engine's socket and no state that outlives it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Iterator

import pytest
import yaml

from tests.containers.conftest import DockerRig
from tests.engines.images import load_image
from tests.rig import ODD_WORKER, ROOT, SAFETY, until

HOST = ("/usr", "/bin", "/lib", "/lib64", sys.prefix, sys.base_prefix, str(ROOT))
"""What of this machine a worker needs to run in an image that holds nothing."""


class Recipe:
    """Starts workers in containers."""

    def __init__(self, rig: DockerRig) -> None:
        self.rig = rig
        self.image = load_image(rig.engine, "oz-test/nothing:1", base=False, files={"etc/passwd": (0o644, b"")})
        self.names: list[str] = []
        rig.in_arguments.add(rig.plane.key)  # ours, of `docker run`

    def start(self) -> str:
        """A new worker, connected; the name of its container."""
        rig = self.rig
        config = rig.place / "config.yaml"
        config.write_text(yaml.safe_dump({**rig.config, "state_dir": "/state"}))
        name = f"{rig.worker_id}-{len(self.names)}"
        self.names.append(name)
        socket = rig.engine.env["DOCKER_HOST"].removeprefix("unix://")
        mounts = [*(f"{path}:{path}:ro" for path in dict.fromkeys(HOST) if Path(path).exists())]
        mounts += [f"{rig.place}:{rig.place}", f"{socket}:{socket}"]
        command = ["run", "--detach", "--name", name, "--network", "host", "--entrypoint", sys.executable]
        command += [word for mount in mounts for word in ("--volume", mount)]
        command += [word for key, value in rig.env.items() for word in ("--env", f"{key}={value}")]
        command += [self.image, str(ODD_WORKER), "upkeep", "--config-file", str(config)]
        command += ["--web-socket-url", rig.plane.url, "--server-root-url", rig.plane.root_url]
        before = len(rig.plane.connections)
        rig.engine.cli(*command)
        try:
            rig.plane.wait_connected(SAFETY, after=before)
        except TimeoutError:
            raise AssertionError(f"no connection; its log:\n{self.log(name)}") from None
        return name

    def log(self, name: str) -> str:
        """What a worker has said."""
        done = self.rig.engine.cli("logs", name, check=False)
        return (done.stdout + done.stderr).decode(errors="replace")

    def close(self) -> None:
        for name in self.names:
            self.rig.engine.cli("rm", "--force", "--volumes", name, check=False)
        self.rig.engine.cli("rmi", "--force", self.image, check=False)


@pytest.fixture
def recipe(docker_rig: DockerRig) -> Iterator[Recipe]:
    recipe = Recipe(docker_rig)
    yield recipe
    recipe.close()


def test_a_replaced_worker_without_state_takes_its_tasks_over(recipe: Recipe) -> None:
    rig = recipe.rig
    first = recipe.start()
    task = rig.submit("echo up >> $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 7")
    rig.written("up")
    owner = rig.engine.read("inspect", "--format", "{{.Id}}", first)
    (name,) = rig.containers()
    assert rig.engine.read("inspect", "--format", '{{index .Config.Labels "oz-worker.owner"}}', name) == owner
    rig.engine.cli("rm", "--force", "--volumes", first)
    second = recipe.start()
    until(lambda: re.search(rf"took over the container {name}", recipe.log(second)), "the adoption")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert task.terminal.exit_code == 7
    assert (rig.place / "up").read_text() == "up\n", "it ran once"
    until(lambda: rig.containers() == [], "its container removed")
    assert "Traceback" not in recipe.log(second)
    rig.engine.cli("stop", "--time", str(int(SAFETY)), second)
    assert rig.engine.read("inspect", "--format", "{{.State.ExitCode}}", second) == "0"
    recipe.close()
    rig.audit()
