from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.command import Command
from oz_worker.errors import NotUsable, TaskFault
from oz_worker.model import Cause, Reason, Sidecar
from tests.audit import guard
from tests.hosting import PATIENCE, Stage, alive, eventually, marked, planted, run, written


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def started(backend: Command, unit: Unit) -> Unit:
    backend.prepare(unit)
    backend.start(unit)
    return unit


def ended(unit: Unit) -> Unit:
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None
    return unit


def test_the_payload_is_a_contract(stage: Stage) -> None:
    unit = stage.unit(
        argv=("agent", "run", "--task-id", "task"),
        environment={"TASK_ID": "task", "A": "b=c", "MULTI": "two\nlines"},
        docker_image="image:1",
        sidecars=(Sidecar("side:1", "/mnt/x", True),),
        document={"id": "task", "title": "ünï", "nested": {"n": 1.5}},
    )
    run(stage.command(f"cat >{stage.root}/payload"), unit)
    guard().allow(stage.root / "payload")
    assert json.loads((stage.root / "payload").read_text()) == {
        "version": 1,
        "run_id": "task",
        "execution_id": "run-1",
        "server_root_url": "https://server.example",
        "worker_id": "worker-1",
        "docker_image": "image:1",
        "base_args": ["agent", "run", "--task-id", "task"],
        "env": {"TASK_ID": "task", "A": "b=c", "MULTI": "two\nlines", "PRIVATE_TOKEN": planted(unit)},
        "sidecars": [{"image": "side:1", "mount_path": "/mnt/x", "read_write": True}],
        "task": {"id": "task", "title": "ünï", "nested": {"n": 1.5}},
    }


def test_no_sidecars_are_null(stage: Stage) -> None:
    spec = stage.unit().spec
    assert spec is not None
    assert stage.command("true").payload(spec)["sidecars"] is None


def test_the_dispatchers_environment_has_the_names_and_no_secret(stage: Stage) -> None:
    unit = stage.unit(environment={"TASK_ID": "t", "TOKEN": "task-secret"}, docker_image="image:1")
    backend = stage.command(
        f"tr '\\0' '\\n' </proc/self/environ >{stage.root}/seen",
        environment={"OZ_RUN_ID": "clobbered", "MINE": "1"},
        host={**os.environ, "WARP_API_KEY": "worker-key", "HOSTS": "2"},
    )
    run(backend, unit)
    found = dict(line.split("=", 1) for line in (stage.root / "seen").read_text().splitlines() if "=" in line)
    expected = {
        "RUN_ID": "task",
        "EXECUTION_ID": "run-1",
        "WORKER_BACKEND": "command",
        "SERVER_ROOT_URL": "https://server.example",
        "DOCKER_IMAGE": "image:1",
    }
    for name, value in expected.items():
        assert found[f"OZ_{name}"] == found[f"WARP_{name}"] == value
    assert (found["MINE"], found["HOSTS"]) == ("1", "2")
    assert not {"WARP_API_KEY", "TOKEN", "TASK_ID"} & set(found)


def test_success_is_a_hand_over_and_what_it_left_running_is_the_work(stage: Stage) -> None:
    backend = stage.command(f"sleep 60 & echo $! >{stage.root}/pid")
    unit = run(backend, stage.unit())
    assert unit.facts is not None
    assert (unit.facts.code, unit.facts.reason, unit.facts.dispatched) == (0, None, True)
    assert backend.stragglers(unit) == ""
    assert backend.clean_up(unit, keep=False) == ""
    assert alive(int(written(stage.root / "pid")))
    assert not list(stage.instance_dir.rglob("payload"))


def test_a_grandchild_that_holds_the_output_delays_nothing(stage: Stage) -> None:
    unit = run(stage.command("sleep 60 2>&1 & cat >/dev/null"), stage.unit())
    assert unit.facts is not None
    assert unit.facts.dispatched


def test_a_payload_that_nobody_reads_blocks_nothing(stage: Stage) -> None:
    unit = run(stage.command("exit 0"), stage.unit(document={"big": "x" * 5_000_000}))
    assert unit.facts is not None
    assert unit.facts.dispatched


def test_a_failure_is_told_and_nothing_is_cancelled(stage: Stage) -> None:
    backend = stage.command("echo why; exit 6", cancel_command=f"touch {stage.root}/cancelled")
    unit = run(backend, stage.unit())
    assert unit.facts is not None
    assert (unit.facts.reason, unit.facts.code) == (Reason.DISPATCH_COMMAND, 6)
    assert backend.tail(unit, 10) == b"why\n"
    assert not (stage.root / "cancelled").exists()


def test_a_late_dispatcher_is_ended_as_a_tree_and_cancelled_once(stage: Stage) -> None:
    backend = stage.command(
        f"setsid sleep 60 & echo $! >{stage.root}/pid; sleep 60",
        dispatch_timeout=0.5,
        cancel_command=f'echo "$OZ_RUN_ID $OZ_EXECUTION_ID $OZ_WORKER_BACKEND" >>{stage.root}/cancelled',
    )
    unit = run(backend, stage.unit())
    assert unit.facts is not None
    assert unit.facts.reason is Reason.DISPATCH_TIMEOUT
    assert "longer than 0.5s" in unit.facts.detail
    assert "unknown" in unit.facts.detail
    assert not alive(int(written(stage.root / "pid")))
    assert not marked(stage.mark(unit))
    assert written(stage.root / "cancelled") == "task run-1 command\n"
    assert backend.stop(unit).reason is Reason.DISPATCH_TIMEOUT
    assert written(stage.root / "cancelled") == "task run-1 command\n"


def test_gone_without_a_status_is_cancelled_once_and_unknown(stage: Stage) -> None:
    backend = stage.command(
        f"echo $$ >{stage.root}/agent; echo $PPID >{stage.root}/pid; exec sleep 60",
        cancel_command=f"echo ran >>{stage.root}/cancelled",
    )
    unit = started(backend, stage.unit())
    os.kill(int(written(stage.root / "pid")), 9)
    ended(unit)
    assert unit.facts is not None
    assert unit.facts.reason is Reason.DISPATCH_COMMAND
    assert "unknown" in unit.facts.detail
    assert written(stage.root / "cancelled") == "ran\n"
    assert not alive(int(written(stage.root / "agent")))


def test_a_cancel_waits_for_the_dispatcher_and_then_cancels(stage: Stage) -> None:
    wait = f"while [ ! -e {stage.root}/done ]; do sleep 0.02; done"
    backend = stage.command(
        f"echo up >{stage.root}/up; {wait}; echo dispatched >{stage.root}/log",
        cancel_command=f"cat {stage.root}/log >{stage.root}/cancelled",
    )
    unit = started(backend, stage.unit())
    written(stage.root / "up")
    unit.order_stop(Cause.CANCEL, 0)
    ends: list[bool] = []
    thread = threading.Thread(target=lambda: ends.append(backend.stop(unit).dispatched))
    thread.start()
    (stage.root / "done").touch()
    thread.join(PATIENCE)
    assert ends == [False]
    assert written(stage.root / "cancelled") == "dispatched\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", ""),
        ("exit 0", ""),
        ("echo no such job >&2; exit 4", "exit code 4: no such job"),
        ("sleep 60", "longer than 0.3s"),
        ("sleep 60 & exit 0", ""),
    ],
)
def test_cancelling_what_was_handed_over_says_what_went_wrong(stage: Stage, command: str, says: str) -> None:
    backend = stage.command("true", cancel_command=command, cancel_timeout=0.3)
    unit = run(backend, stage.unit())
    assert backend.clean_up(unit, keep=False) == ""
    sentence = backend.cancel_dispatched(stage.again(unit))
    assert says in sentence
    assert bool(sentence) is bool(says)


def test_the_cancel_command_gets_no_key_and_the_operators_variables(stage: Stage) -> None:
    backend = stage.command(
        "true",
        cancel_command=f'echo "key=$WARP_API_KEY mine=$MINE" >{stage.root}/seen',
        environment={"MINE": "1"},
        host={**os.environ, "WARP_API_KEY": "worker-key"},
    )
    assert backend.cancel_dispatched(stage.unit()) == ""
    assert written(stage.root / "seen") == "key= mine=1\n"


def test_a_timeout_of_nothing_means_the_default(stage: Stage) -> None:
    unit = run(stage.command("sleep 0.1", dispatch_timeout=0.0), stage.unit())
    assert unit.facts is not None
    assert unit.facts.dispatched


def test_a_backend_without_a_command_is_refused(stage: Stage) -> None:
    with pytest.raises(NotUsable, match="needs dispatch_command"):
        stage.command("  ")


def test_a_dispatcher_of_an_earlier_worker_is_decided_by_its_status(stage: Stage) -> None:
    first = stage.command(f"echo up >{stage.root}/up; while [ ! -e {stage.root}/done ]; do sleep 0.02; done; exit 0")
    unit = started(first, stage.unit())
    written(stage.root / "up")
    second = stage.command("false")
    taken = stage.again(unit)
    second.attach(taken)
    (stage.root / "done").touch()
    facts = ended(taken).facts
    assert facts is not None
    assert facts.dispatched
    ended(unit)
    eventually(lambda: not list(stage.instance_dir.rglob("payload")))


def test_the_payload_is_on_no_disk_while_the_dispatcher_runs(stage: Stage) -> None:
    wait = f"while [ ! -e {stage.root}/done ]; do sleep 0.02; done"
    backend = stage.command(f"echo up >{stage.root}/up; {wait}; cat >{stage.root}/payload")
    unit = started(backend, stage.unit(environment={"TOKEN": "task-secret"}))
    written(stage.root / "up")
    files = [path for path in stage.instance_dir.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"task-secret" in path.read_bytes()]
    (stage.root / "done").touch()
    ended(unit)
    guard().allow(stage.root / "payload")
    found = json.loads((stage.root / "payload").read_text())["env"]
    assert found == {"TOKEN": "task-secret", "PRIVATE_TOKEN": planted(unit)}


def test_without_a_thread_nothing_is_dispatched_and_a_stop_returns(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stage.command(f"echo ran >{stage.root}/ran")
    unit = stage.unit()
    backend.prepare(unit)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(TaskFault, match="can't start new thread") as caught:
            backend.start(unit)
    assert not caught.value.facts.agent_started
    unit.order_stop(Cause.CANCEL, 0)
    assert backend.stop(unit).remains == ""
    eventually(lambda: not marked(stage.mark(unit)))
    assert not (stage.root / "ran").exists()
