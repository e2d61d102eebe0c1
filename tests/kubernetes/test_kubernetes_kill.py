"""kill -9 of the worker at random instants over a cluster: nothing runs twice, is lost, or is left."""

from __future__ import annotations

import contextlib
import random
import subprocess

import pytest

from oz_worker.backends.job_object import TASK_ID
from tests.faults.kills import SEED, kill_at_random_instants, loops, ran_once
from tests.kubernetes.conftest import KubernetesRig
from tests.rig import SAFETY, until


@loops(8, soak=200)
@pytest.mark.parametrize("in_secret", [False, True], ids=["plain", "env-in-secret"])
def test_kills_at_random_instants(kubernetes_rig: KubernetesRig, kills: int, in_secret: bool) -> None:
    rig = kubernetes_rig
    rig.kubernetes["env_in_secret"] = in_secret
    worker = kill_at_random_instants(rig, kills, within=(0.3, 3.0))
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
    ran_once(rig)
    worker = rig.start()
    until(lambda: rig.jobs() == [], "the removal of what was killed before its removal")
    rig.settled()
    assert worker.stop() == 0
    rig.audit()
