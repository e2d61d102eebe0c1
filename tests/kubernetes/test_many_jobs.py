"""200 Jobs at once with one worker: two children of kubectl, and memory that does not grow with them."""

from __future__ import annotations

import psutil
import pytest

from tests.cluster.images import SIDECAR
from tests.kubernetes.conftest import KubernetesRig
from tests.rig import until

MANY = 200
MOST_PER_TASK = 0.3 * 1024 * 1024
"""The budget of a running task in the worker's memory (design 11)."""


@pytest.mark.timeout(240)
def test_200_jobs_at_once(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    rig.kubernetes |= {"use_image_volumes": True, "sidecar_image": SIDECAR, "unschedulable_timeout": "0s"}
    worker = rig.start()
    warm = rig.submit("exit 0")
    rig.plane.wait_acknowledged(warm)
    process = psutil.Process(worker.pid)
    before = process.memory_info().rss
    tasks = [rig.submit("while [ ! -e $HOME/go ]; do sleep 2; done") for _ in range(MANY)]
    running = 'SELECT count(*) FROM tasks WHERE state = "running"'
    until(lambda: rig.query(running) == [(MANY,)], "200 Jobs", seconds=150)
    until(rig.only_watches, "nothing but the two watches", seconds=60)
    grown = process.memory_info().rss - before
    assert grown < MANY * MOST_PER_TASK, f"{grown / 1024 / 1024:.1f} MiB for {MANY} tasks"
    assert process.num_threads() < MANY + 20
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks, timeout=150)
    rig.settled()
    assert worker.stop() == 0
    rig.audit()
