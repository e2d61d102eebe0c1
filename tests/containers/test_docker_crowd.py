"""Many tasks of one image at once: it is pulled once, and every one of them is reported."""

from __future__ import annotations

import os

from tests.containers.conftest import DockerRig
from tests.engines.bad_registry import BadRegistry, Fault
from tests.engines.images import agent_files
from tests.engines.registry import Registry
from tests.rig import SAFETY, until

TASKS = 50


def test_fifty_tasks_of_one_image_pull_it_once(
    docker_rig: DockerRig, registry: Registry, bad_registry: BadRegistry
) -> None:
    rig = docker_rig
    files = {**agent_files("agent/"), "own": (0o644, os.urandom(1 << 16))}
    name = f"crowd/agent:p{os.getpid()}"
    registry.publish(rig.engine, name, files=files)
    image = bad_registry.reference(name)
    rig.docker.update(sidecar_image="", default_image=image, image_pull_policy="Always")
    pull = rig.hold("pull*")
    worker = rig.start()
    tasks = [rig.submit(f"echo $TASK_ID >> $HOME/runs; exit {number % 3}") for number in range(TASKS)]
    pull.reached()
    worker.wait_stacks(r"^task-.* in _await\n.* in wait_until\n", TASKS)
    pull.release()
    rig.plane.wait_acknowledged(*tasks, timeout=2 * SAFETY)
    assert [task.terminal.exit_code or 0 for task in tasks] == [number % 3 for number in range(TASKS)]
    assert sorted((rig.place / "runs").read_text().split()) == sorted(task.task_id for task in tasks)
    assert bad_registry.count("manifests", "HEAD") == 1
    assert len(bad_registry.asked) == len(set(bad_registry.asked)), "something was asked for twice"
    assert bad_registry.count("blobs") >= 2
    until(lambda: rig.containers() == [], "the removal of every container")
    assert worker.stop() == 0
    rig.engine.cli("rmi", "--force", image)
    rig.audit()


def test_the_images_of_one_task_are_pulled_at_the_same_time(
    docker_rig: DockerRig, registry: Registry, bad_registry: BadRegistry
) -> None:
    rig = docker_rig
    names = [f"{kind}/agent:p{os.getpid()}" for kind in ("task", "side")]
    for name, files in zip(names, ({}, agent_files()), strict=True):
        registry.publish(rig.engine, name, files={**files, "own": (0o644, os.urandom(1 << 10))})
    image, sidecar = map(bad_registry.reference, names)
    rig.docker.update(default_image=image, sidecar_image=sidecar, image_pull_policy="Always")
    bad_registry.fault = Fault(hang="manifests")
    worker = rig.start()
    task = rig.submit("exit 0")
    until(lambda: {asked.repository for asked in bad_registry.asked} == {"task/agent", "side/agent"}, "both pulls")
    bad_registry.fault = Fault()
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert worker.stop() == 0
    rig.engine.cli("rmi", "--force", image, sidecar)
    rig.audit()


def test_what_only_waited_for_its_turn_is_known_never_to_have_run(docker_rig: DockerRig) -> None:
    rig = docker_rig
    program = rig.engine.program
    rig.in_front('[ "$1" != run ] || { echo run >> "$HERE/ordered"; exec sleep 1000; }')
    worker = rig.start()
    tasks = [rig.submit("exit 0") for _ in range(10)]
    ordered = rig.place / "in-front-0" / "ordered"
    until(lambda: ordered.exists() and len(ordered.read_text().splitlines()) == 8, "as many orders as go at once")
    until(lambda: len(list(rig.instance_dirs()[0].glob("units/*"))) == 10, "all of them prepared")
    worker.kill()
    rig.docker["engine_path"] = program
    worker = rig.start()
    rig.plane.wait_acknowledged(*tasks)
    assert sorted(task.terminal.reason for task in tasks) == ["container_wait"] * 8 + ["unknown"] * 2
    never_made = [task.terminal.message for task in tasks if task.terminal.reason == "container_wait"]
    assert all("was ordered, and there is none now" in message for message in never_made)
    assert worker.stop() == 0
    rig.audit()
