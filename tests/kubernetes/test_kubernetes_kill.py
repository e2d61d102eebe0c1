"""kill -9 of the worker at random instants over a cluster: nothing runs twice, is lost, or is left."""

from __future__ import annotations

import contextlib
import random
import subprocess

import pytest

from oz_worker.backends.job_object import TASK_ID
from tests.faults.test_kill import SEED, redeliver_unclaimed
from tests.kubernetes.conftest import KubernetesRig
from tests.rig import SAFETY, Worker, until


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])], ids=lambda n: f"{n}-kills"
)
@pytest.mark.parametrize("in_secret", [False, True], ids=["plain", "env-in-secret"])
def test_kills_at_random_instants(kubernetes_rig: KubernetesRig, kills: int, in_secret: bool) -> None:
    rig = kubernetes_rig
    rng = random.Random(SEED)
    rig.config["max_concurrent_tasks"] = 4
    rig.kubernetes["env_in_secret"] = in_secret
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
            worker.process.wait(rng.uniform(0.3, 3.0))
        worker.kill()
    worker = rig.start()
    for task in tasks:
        redeliver_unclaimed(rig, task)
    rig.plane.wait_acknowledged(*tasks, timeout=3 * SAFETY)
    runs = (rig.place / "runs").read_text().split()
    assert len(runs) == len(set(runs)), "an agent ran twice"
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


def test_kills_and_lost_disks_run_nothing_twice(kubernetes_rig: KubernetesRig) -> None:
    """Each worker begins with an empty disk: what it does not find in the cluster was never started."""
    rig = kubernetes_rig
    rng = random.Random(SEED)
    for number in range(4):
        worker = rig.start()
        script = f"echo $TASK_ID >> $HOME/runs; sleep {rng.uniform(0, 0.5):.2f}; exit 0"
        tasks = [rig.submit(script, task_id=f"t{number}-{n}") for n in range(2)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(rng.uniform(0.3, 2.0))
        worker.kill()
        rig.lose_the_disk()
        made = {job["metadata"]["annotations"][TASK_ID] for job in rig.jobs()}
        worker = rig.start()
        for task in tasks:
            if task.task_id not in made and not task.frames("task_completed"):
                rig.plane.redeliver(task)  # the server's own clock would do it
        rig.plane.wait_acknowledged(*tasks, timeout=3 * SAFETY)
        worker.kill()
    runs = (rig.place / "runs").read_text().split()
    assert len(runs) == len(set(runs)), "an agent ran twice"
    worker = rig.start()
    until(lambda: rig.jobs() == [], "the removal of what was killed before its removal")
    rig.settled()
    assert worker.stop() == 0
    rig.audit()
