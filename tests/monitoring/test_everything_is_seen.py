"""Each instrument and each value of each label is seen above 0 on the page of a real worker by some test of the suite.

Such tests say so by `sees` or `Prometheus.saw` with literal series, which are collected here from their source: what is
added to the catalogue and seen by nobody fails. Here too are the workers that go through what no other test is about.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
from pathlib import Path
from typing import Iterator

from oz_worker import instruments
from oz_worker.model import Key, unit_name
from tests.prometheus import SERVED, named, page, sees, value
from tests.rig import FAKE_OZ, ROOT, Rig, until

NOBODY = {
    "task_failures_total": {
        "task_cancelled": "a cancel is no failure: it is counted as a result",
        "pod_watch": "of the existing worker; here what becomes of pods is told by other reasons",
    },
    "task_sandbox_startup_failures_total": {
        **dict.fromkeys(
            ("task_timeout", "task_cancelled", "graceful_shutdown", "unknown"),
            "the worker ended it, or never began with it",
        ),
        **dict.fromkeys(
            ("container_exit", "container_oom", "agent_oom", "dispatch_timeout"), "the agent had begun, or may have"
        ),
        **dict.fromkeys(("cancel_command", "teardown_command", "cleanup"), "of the phase cleanup alone"),
        "pod_watch": "as above",
    },
}
"""By instrument and reason: what stands in the catalogue for the sake of one list, and why no worker can cause it."""


def seen() -> Iterator[tuple[str, dict[str, str]]]:
    """Name and labels of each series that a test looks for on a real worker's page."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "sees(" in text or "saw(" in text else ():
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                for argument in node.args if called in ("sees", "saw") else ():
                    if isinstance(argument, ast.Constant):
                        yield named(str(argument.value))


def wanted() -> Iterator[tuple[str, str, str]]:
    """Instrument, label and value of everything in the catalogue; an instrument without labels is its name alone."""
    for each in instruments.CATALOGUE:
        name, closed = each.name.removeprefix("oz_worker_"), each.closed()
        values = [(name, label, value) for label in each.labels for value in sorted(closed.get(label, ()))]
        yield from values or [(name, "", "")]


def test_everything_in_the_catalogue_is_seen_above_0_by_some_test() -> None:
    found = set()
    for name, labels in seen():
        name = name.removesuffix("_count")
        found |= {(name, "", ""), *((name, label, value) for label, value in labels.items())}
    everything = set(wanted())
    assert {one for one in found if one[1]} <= everything, "no such series"
    excused = {(name, "reason", reason) for name, reasons in NOBODY.items() for reason in reasons}
    assert excused <= everything - found, "it is seen, or not there: it needs no excuse"
    assert sorted(everything - found - excused) == []


def unit(rig: Rig, task: object) -> Path:
    """The directory of a task's first attempt."""
    key = Key(task.task_id, task.execution_id)  # type: ignore[attr-defined]
    return rig.instance_dirs()[0] / "units" / unit_name(key, 1)


def vanish(directory: Path) -> None:
    """Nothing is left of a unit, as after a restart of its machine with another disk."""
    os.killpg(int((directory / "pid").read_text().split()[0]), signal.SIGKILL)
    shutil.rmtree(directory)


def test_what_a_killed_worker_left_is_counted_by_what_is_found_of_it(rig: Rig) -> None:
    """Its database does not know one of the tasks any more, although its report is there: what is salvaged of a damaged
    one looks like that."""
    rig.config["flush_timeout"] = rig.config["link"]["dead_after"] = "600s"
    options = rig.config["backend"]["direct"]
    options["teardown_command"] = "while [ -e $HOME/teardown ]; do sleep 0.05; done"
    options["setup_command"] = "if [ -e $HOME/without ]; then rm $HOME/agent; fi"
    options["oz_path"] = str(rig.place / "agent")
    (rig.place / "agent").symlink_to(FAKE_OZ)
    (rig.place / "teardown").touch()
    worker = rig.start(env=SERVED)
    hold = "echo up >> $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done"
    attached, lost, never = (rig.submit(hold) for _ in range(3))
    ending, adopted = (rig.submit("exit 3") for _ in range(2))
    until(lambda: rig.query("SELECT count(*) FROM tasks WHERE state = 'running'") == [(3,)], "three that run")
    until(lambda: rig.query("SELECT count(*) FROM outbox WHERE held") == [(2,)], "two that are torn down")
    until(lambda: rig.query("SELECT count(*) FROM tasks WHERE claim_acked") == [(5,)], "five claims that were read")
    until(lambda: (rig.place / "up").read_text() == "up\n" * 3, "the agents")
    worker.kill()
    for task in (lost, never):
        vanish(unit(rig, task))
    rig.execute(f"UPDATE tasks SET state = 'accepted', started_at = NULL WHERE task_id = '{never.task_id}'")
    rig.execute(f"DELETE FROM tasks WHERE task_id = '{adopted.task_id}'")
    worker = rig.start(env=SERVED)
    sees(
        worker,
        'oz_worker_tasks_reattached_total{result="attached"}',
        'oz_worker_tasks_reattached_total{result="adopted"}',
        'oz_worker_tasks_reattached_total{result="never_started"}',
        'oz_worker_tasks_reattached_total{result="lost"}',
        'oz_worker_tasks_reattached_total{result="ending"}',
    )
    (rig.place / "teardown").unlink()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(attached, lost, never, ending, adopted)
    sees(worker, 'oz_worker_task_failures_total{phase="backend",reason="unknown"}')
    text = page(worker)
    assert value(text, "task_failures_total", phase="backend", reason="unknown") == 2, "never started; salvaged"
    assert value(text, "task_failures_total", phase="backend", reason="agent_invocation") == 2, "lost; ended with 3"
    assert 'reason=""' not in text

    (rig.place / "without").touch()
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    sees(worker, 'oz_worker_task_sandbox_startup_failures_total{reason="agent_invocation"}')
    (rig.place / "without").unlink()
    (rig.place / "agent").symlink_to(FAKE_OZ)
    ended = rig.submit("echo up >> $HOME/last; sleep 600")
    until((rig.place / "last").exists, "the last agent")
    rig.plane.pongs = "none"  # nothing is acknowledged, so that the worker waits and is asked once more
    worker.send(signal.SIGTERM)
    sees(worker, 'oz_worker_task_failures_total{phase="backend",reason="graceful_shutdown"}')
    rig.plane.pongs = "echo"
    assert worker.exit_code() == 0
    assert ended.terminal.reason == "graceful_shutdown"
    rig.audit(workspaces=False)  # of those that vanished nobody knows any more where they worked
