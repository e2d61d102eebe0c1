"""What containers end of, as the metrics of a real worker count it; and an agent on the host that the kernel ends."""

from __future__ import annotations

from tests.containers.conftest import DockerRig
from tests.engines.client import Client
from tests.engines.images import Images
from tests.prometheus import SERVED, page, sees, value
from tests.rig import Rig, until

PULLED = 'case " $* " in *" pull "*) exit 0;; esac'
"""The engine of the tests is far from any registry: its pulls succeed."""
GREEDY = "dd if=/dev/zero of=/dev/null bs=200M count=1"


def test_what_ends_containers_is_counted_by_its_reason(docker_rig: DockerRig) -> None:
    rig = docker_rig
    rig.docker |= {"image_pull_policy": "Always", "memory": "32m"}
    rig.in_front(PULLED)
    worker = rig.start(env=SERVED)
    removed = rig.submit("echo up > $HOME/up; sleep 600")
    greedy = rig.submit(GREEDY)
    rig.written("up")
    rig.plane.wait_acknowledged(greedy)
    sees(
        worker,
        'oz_worker_image_pull_seconds_count{result="succeeded"}',
        'oz_worker_task_failures_total{phase="backend",reason="container_oom"}',
    )
    (name,) = rig.running(1)
    worker.kill()
    rig.engine.cli("rm", "--force", "--volumes", name)
    rig.docker["sidecar_image"] = ""
    worker = rig.start(env=SERVED)
    without_a_program = rig.submit("exit 0")
    rig.plane.wait_acknowledged(removed, without_a_program)
    sees(
        worker,
        'oz_worker_task_failures_total{phase="backend",reason="container_wait"}',
        'oz_worker_task_failures_total{phase="backend",reason="container_start"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="container_wait"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="container_start"}',
    )
    assert worker.stop() == 0
    rig.audit()


def test_an_agent_killed_while_the_host_runs_out_of_memory_is_counted_apart(
    rig: Rig, engine: Client, images: Images
) -> None:
    """Somebody else's container runs out of its memory, and the kernel counts that for the whole host."""
    worker = rig.start(env=SERVED)
    task = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; kill -KILL $$")
    until((rig.place / "up").exists, "the agent")
    engine.cli("run", "--rm", "--network", "none", "--memory", "32m", images.task, "sh", "-c", GREEDY, check=False)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert (task.terminal.reason, task.terminal.exit_code) == ("agent_invocation", 137)
    assert "out of memory" in task.terminal.message
    sees(worker, 'oz_worker_task_failures_total{phase="backend",reason="agent_oom"}')
    assert value(page(worker), "task_failures_total", phase="backend", reason="agent_invocation") == 0
    assert worker.stop() == 0
    rig.audit()
