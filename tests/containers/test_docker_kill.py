"""kill -9 of the worker at random instants over a real engine: nothing runs twice, is lost, or is left."""

from __future__ import annotations

import contextlib
import random
import subprocess

import pytest

from tests.containers.conftest import DockerRig
from tests.faults.test_kill import SEED, redeliver_unclaimed
from tests.rig import SAFETY, Worker


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])], ids=lambda n: f"{n}-kills"
)
def test_kills_at_random_instants(docker_rig: DockerRig, kills: int) -> None:
    rig = docker_rig
    rng = random.Random(SEED)
    rig.config["max_concurrent_tasks"] = 4
    rig.start().stop()
    tasks = []
    for number in range(kills):
        config = rig.place / "config.yaml"
        argv = rig.command_line("--config-file", str(config), "--web-socket-url", rig.plane.url)
        worker = Worker(argv, rig.env, rig.log)
        rig.workers.append(worker)
        script = f"echo $TASK_ID >> $HOME/runs; sleep {rng.uniform(0, 0.5):.2f}; exit {rng.choice([0, 1])}"
        tasks += [rig.submit(script, task_id=f"t{number}-{n}") for n in range(2)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(rng.uniform(0.2, 2.0))
        worker.kill()
    worker = rig.start()
    for task in tasks:
        redeliver_unclaimed(rig, task)
    rig.plane.wait_acknowledged(*tasks, timeout=2 * SAFETY)
    runs = (rig.place / "runs").read_text().split()
    assert len(runs) == len(set(runs)), "an agent ran twice"
    assert worker.stop() == 0
    rig.audit()
