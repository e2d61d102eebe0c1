"""What agents and policies say of themselves reaches reports: with no secret in it."""

from __future__ import annotations

from tests.kubernetes.conftest import KubernetesRig

TOKEN = "s3cr3t-0123456789"


def _with_logs_as_message(rig: KubernetesRig) -> None:
    for container in rig.kubernetes["pod_template"]["containers"]:
        container["terminationMessagePolicy"] = "FallbackToLogsOnError"


def test_a_message_of_a_container_shows_no_secret(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    _with_logs_as_message(rig)
    worker = rig.start()
    task = rig.submit('echo "the token is $PRIVATE_TOKEN"; exit 3', env_vars={"PRIVATE_TOKEN": TOKEN})
    rig.plane.wait_acknowledged(task)
    print(task.terminal.message)
    assert task.terminal.reason == "container_exit"
    assert TOKEN not in task.terminal.message
    assert TOKEN not in rig.log.read_text()
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


def test_a_refusal_shows_no_secret(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    text = f'admission webhook "policy" denied the request: PRIVATE_TOKEN={TOKEN} looks like a secret'
    with rig.cluster.faults.fail(400, "create", "jobs", message=text):
        task = rig.submit("exit 0", env_vars={"PRIVATE_TOKEN": TOKEN})
        rig.plane.wait_acknowledged(task)
    print(task.terminal.message)
    assert task.terminal.reason == "job_create"
    assert TOKEN not in task.terminal.message
    assert TOKEN not in rig.log.read_text()
    assert worker.stop() == 0
    rig.audit()


def test_what_nobody_can_mask_any_more_is_not_repeated(kubernetes_rig: KubernetesRig) -> None:
    """The variables stand in a Secret that a worker may not read: after a restart nobody knows them."""
    rig = kubernetes_rig
    rig.kubernetes["env_in_secret"] = True
    _with_logs_as_message(rig)
    worker = rig.start()
    script = "echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; echo token $PRIVATE_TOKEN; exit 3"
    task = rig.submit(script, env_vars={"PRIVATE_TOKEN": TOKEN})
    rig.written("up")
    worker.kill()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert (task.terminal.reason, task.terminal.exit_code) == ("container_exit", 3)
    assert TOKEN not in task.terminal.message
    rig.settled()
    assert worker.stop() == 0
    rig.audit()
