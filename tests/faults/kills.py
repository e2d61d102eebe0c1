"""The loop of kill -9 at random instants that every way to run work has to bear."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess

import pytest

from oz_worker.devplane.tasks import Task
from tests.rig import SAFETY, Rig, Worker

SEED = int(os.environ.get("OZ_TEST_SEED", "20261121"))


def loops(few: int, soak: int) -> pytest.MarkDecorator:
    """Parametrizes `kills`: *few* in every run of the suite, *soak* where it is asked for."""
    many = pytest.param(soak, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("kills", [few, many], ids=lambda n: f"{n}-kills")


def kill_at_random_instants(rig: Rig, kills: int, *, within: tuple[float, float]) -> Worker:
    """Kill as many workers, each *within* so many seconds of its start; then let one finish everything, and return it.

    Each gets two tasks, and each task's agent notes that it runs.
    """
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
            worker.process.wait(rng.uniform(*within))
        worker.kill()
    worker = rig.start()
    redeliver_unclaimed(rig, *tasks)
    rig.plane.wait_acknowledged(*tasks, timeout=3 * SAFETY)
    ran_once(rig)
    return worker


def redeliver_unclaimed(rig: Rig, *tasks: Task) -> None:
    """Assign again what no worker has claimed yet."""
    for task in tasks:
        if not (task.claimed or task.ended):
            rig.plane.redeliver(task)


def ran_once(rig: Rig) -> None:
    """No agent noted its run twice."""
    runs = (rig.place / "runs").read_text().split()
    assert len(runs) == len(set(runs)), "an agent ran twice"
