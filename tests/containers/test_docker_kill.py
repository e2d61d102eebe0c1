"""kill -9 of the worker at random instants over a real engine: nothing runs twice, is lost, or is left."""

from __future__ import annotations

from tests.containers.conftest import DockerRig
from tests.faults.kills import kill_at_random_instants, loops


@loops(8, soak=200)
def test_kills_at_random_instants(docker_rig: DockerRig, kills: int) -> None:
    assert kill_at_random_instants(docker_rig, kills, within=(0.2, 2.0)).stop() == 0
    docker_rig.audit()
