"""A day of one worker, seen by a real Prometheus: each state as it is, then the questions of who looks back at it."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

from oz_worker import __version__
from tests.faults.stuck import page as health
from tests.faults.stuck import port_of
from tests.monitoring.test_alerts import ALERTS, GROUP
from tests.monitoring.test_dashboard import expressions
from tests.prometheus import SERVED, Prometheus
from tests.prometheus import page as metrics
from tests.rig import FAKE_OZ, SAFETY, WORKER_ID, Rig, Worker, until

IDENTITY = next(rule["expr"] for rule in GROUP["rules"] if rule.get("record") == "oz_worker:identity")
DISCONNECTED = ALERTS["OzWorkerDisconnected"]["expr"].replace("oz_worker:identity", f"({IDENTITY})")
BY_CONTENT = {
    "not_json": "garbage",
    "too_deep": "[" * 100_000,
    "not_object": "[]",
    "no_type": "{}",
    "unknown_type": '{"type": "news"}',
    "no_task_id": '{"type": "task_assignment", "data": {}}',
    "bad_execution_id": '{"type": "task_cancellation", "data": {"task_id": "t", "execution_id": 7}}',
}


class Day:
    """One worker with two slots, at one port through its restarts, and the Prometheus that scrapes it.

    Its workspaces and its log lie on a disk of 16 MiB, of which half must be free.
    """

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.disk = rig.place / "disk"
        self.agent = rig.place / "agent"
        self.agent.symlink_to(FAKE_OZ)
        self.log = self.disk / "worker.log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        rig.workspaces = self.disk / "workspaces"
        rig.config |= {"max_concurrent_tasks": 2, "min_free_disk": "8MiB", "health_listen": "127.0.0.1:0"}
        rig.config["link"]["dead_after"] = "600s"  # lines end where they are cut, however slow this machine is
        rig.config["stop_grace"] = "600s"  # what is cancelled ends when it is let go
        rig.config["backend"]["direct"] |= {
            "workspace_root": str(rig.workspaces),
            "oz_path": str(self.agent),
            "setup_command": "test ! -e $HOME/broken",
            "teardown_command": "test ! -e $HOME/untidy",
        }
        self.worker: Worker  # the one that runs

    def start(self, *, connected: bool) -> Worker:
        environ = {"OTEL_RESOURCE_ATTRIBUTES": "team=blue,__name__=x", "OTEL_SERVICE_NAME": "fleet"}
        environ |= SERVED | {"OTEL_EXPORTER_PROMETHEUS_PORT": str(self.port)}
        self.worker = self.rig.start("--log-file", str(self.log), env=environ, connected=connected)
        self.worker.log_path = self.log
        return self.worker

    def hold(self, name: str, end: str = "exit 0", begin: str = ":", **more: Any) -> Any:
        """A task that runs until the file *name* is there."""
        wait = f"while [ ! -e $HOME/{name} ]; do sleep 0.05; done"
        task = self.rig.submit(f"{begin}; touch $HOME/{name}-up; {wait}; {end}", **more)
        until((self.rig.place / f"{name}-up").exists, f"the agent of {name}")
        return task

    def let_go(self, name: str) -> None:
        """End the tasks that wait for *name*."""
        (self.rig.place / name).touch()

    def with_file(self, name: str, **task: Any) -> None:
        """A task from beginning to end while the file *name* is there."""
        (self.rig.place / name).touch()
        self.rig.plane.wait_acknowledged(self.rig.submit(**task))
        (self.rig.place / name).unlink()


@pytest.fixture
def day(rig: Rig) -> Iterator[Day]:
    disk = rig.place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(disk)], check=True)
    try:
        yield Day(rig)
    finally:
        rig.close()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_prometheus_sees_a_worker_through_its_day_and_answers_for_it(rig: Rig, day: Day) -> None:
    rig.plane.down()
    day.start(connected=False)
    with Prometheus(rig.place / "prometheus", f"127.0.0.1:{day.port}") as prometheus:
        without_a_server(prometheus)
        rig.plane.up()
        idle(prometheus)
        busy(day, prometheus)
        refusing(day, prometheus)
        failing(day, prometheus)
        looking_back(prometheus)
        restarted(day, prometheus)
        draining(day, prometheus)
    rig.audit()


def without_a_server(prometheus: Prometheus) -> None:
    """What stands there before anything has happened, and what an alert says of it."""
    prometheus.wait_for('oz_worker_websocket_reconnects_total{reason="dial_failed"} > bool 0', 1)
    assert prometheus.one("oz_worker_connected") == 0
    named = {"version": __version__, "backend": "direct", "worker_id": WORKER_ID}
    assert prometheus.query("oz_worker_info") == {frozenset(named.items()): 1}
    target = {"service_name": "fleet", "team": "blue", "worker_id": WORKER_ID, "worker_backend": "direct"}
    target |= {"service_version": __version__, "key___name__": "x"}
    target |= {"telemetry_sdk_language": "python", "telemetry_sdk_name": "oz-worker"}
    target["telemetry_sdk_version"] = __version__
    assert prometheus.query("target_info") == {frozenset(target.items()): 1}
    assert prometheus.one("sum(oz_worker_task_failures_total)") == 0
    assert prometheus.one("count(oz_worker_task_failures_total)") == 90
    absent = ("last_frame_age_seconds", "last_pong_age_seconds", "dispatch_seconds", "task_duration_seconds")
    assert [name for name in absent if f"oz_worker_{name}" in prometheus.kinds()] == []
    assert prometheus.query(DISCONNECTED) == {frozenset({("worker_id", WORKER_ID), ("backend", "direct")}): 0}


def idle(prometheus: Prometheus) -> None:
    """Connected, with nothing to do."""
    prometheus.wait_for("sum(oz_worker_connected)", 1)
    assert prometheus.query(DISCONNECTED) == {}
    assert prometheus.one("oz_worker_tasks_max_concurrent") == prometheus.one("oz_worker_slots_free") == 2
    assert prometheus.one("sum(oz_worker_tasks_active)/sum(oz_worker_tasks_max_concurrent > 0)") == 0
    assert prometheus.query("count(oz_worker_tasks_active > 0)") == {}
    assert prometheus.one("oz_worker_backend_up") == 1
    assert prometheus.kinds()["oz_worker_tasks_active"] == "gauge"
    prometheus.saw("oz_worker_last_pong_age_seconds", "oz_worker_info", "oz_worker_tasks_max_concurrent")


def busy(day: Day, prometheus: Prometheus) -> None:
    """A full house, an outage that the reports wait through, a line that is cut, a cancel."""
    rig = day.rig
    running = [day.hold("one"), day.hold("two", "exit 3")]
    rig.submit("exit 0", requeue=False)
    prometheus.wait_for('oz_worker_tasks_rejected_total{reason="at_capacity"}', 1)
    prometheus.wait_for("sum(oz_worker_tasks_active)/sum(oz_worker_tasks_max_concurrent > 0)", 1)
    assert prometheus.one("count(oz_worker_tasks_active > 0)") == 1
    assert prometheus.one("oz_worker_slots_free") == 0
    assert prometheus.one("oz_worker_tasks_claimed_total") == 2

    rig.plane.down()
    for name in ("one", "two"):
        day.let_go(name)
    prometheus.wait_for("oz_worker_outbox_rows", 2)
    prometheus.wait_for("oz_worker_outbox_oldest_seconds > bool 0", 1)
    prometheus.wait_for("oz_worker_tasks_active", 0)
    rig.plane.up()
    rig.plane.wait_acknowledged(*running)
    prometheus.wait_for("oz_worker_outbox_rows", 0)
    prometheus.wait_for("oz_worker_outbox_oldest_seconds", 0)
    assert prometheus.one('oz_worker_websocket_reconnects_total{reason="remote_close"}') == 1
    rig.plane.cut()
    prometheus.wait_for('oz_worker_websocket_reconnects_total{reason="remote_close"}', 2)
    prometheus.wait_for("oz_worker_connected", 1)


def refusing(day: Day, prometheus: Prometheus) -> None:
    """Whatever cannot be taken just now, and messages that mean nothing."""
    rig = day.rig
    ready = port_of(day.worker)
    deaf = day.hold("deaf", begin="trap '' TERM", execution_id="", requeue=False)
    rig.plane.cancel(deaf)
    day.worker.wait_log("cancelled by the server")
    rig.plane.redeliver(deaf)
    prometheus.wait_for('oz_worker_tasks_rejected_total{reason="cancelling"}', 1)
    day.let_go("deaf")
    prometheus.wait_for('oz_worker_tasks_completed_total{result="cancelled"}', 1)

    day.agent.rename(rig.place / "elsewhere")
    prometheus.wait_for("oz_worker_backend_up", 0)
    rig.submit("exit 0", requeue=False)
    prometheus.wait_for('oz_worker_tasks_rejected_total{reason="backend"}', 1)
    (rig.place / "elsewhere").rename(day.agent)
    prometheus.wait_for("oz_worker_backend_up", 1)

    ballast = day.disk / "ballast"
    fill(ballast)
    until(lambda: health(ready, "/readyz").text.startswith("disk: "), "the disk's reason")
    for number in range(8):  # each has a line of its own in a log that takes none
        rig.submit("exit 0", task_id=f"{number}" + "x" * 900, requeue=False)
    prometheus.wait_for('oz_worker_tasks_rejected_total{reason="disk"}', 8)
    prometheus.saw("oz_worker_log_lines_dropped_total")
    ballast.unlink()
    until(lambda: health(ready, "/readyz").status == 200, "room on the disk")

    for text in BY_CONTENT.values():
        rig.plane.send_text(text)
    prometheus.wait_for("sum(oz_worker_frames_refused_total)", len(BY_CONTENT))
    kinds = prometheus.query("oz_worker_frames_refused_total > 0")
    assert kinds == {frozenset({("kind", kind)}): 1 for kind in BY_CONTENT}


def fill(path: Path) -> None:
    """Leave no byte on the disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def failing(day: Day, prometheus: Prometheus) -> None:
    """Each phase of a task fails once; of the first failure an agent was the cause."""
    rig = day.rig
    day.with_file("broken", script="exit 0")
    day.with_file("untidy", script="exit 0")
    rig.plane.wait_acknowledged(rig.submit("exit 0", task_id="no/path"))
    rig.plane.wait_acknowledged(rig.submit(env_vars={"BAD": "nul\0l"}))
    prometheus.wait_for('oz_worker_task_failures_total{phase="assignment",reason="unknown"}', 1)
    prometheus.wait_for("sum(oz_worker_task_failures_total)", 5)


FAILED = {
    ("assignment", "unknown"),
    ("backend", "agent_invocation"),
    ("backend", "setup_command"),
    ("backend", "workspace_setup"),
    ("cleanup", "teardown_command"),
}


def looking_back(prometheus: Prometheus) -> None:
    """What users are told to ask, and the dashboard; the window is longer than the day."""
    done = 'rate(oz_worker_tasks_completed_total{result="%s"}[1h])'
    everything = "sum(rate(oz_worker_tasks_completed_total[1h]))"
    ratio = {result: prometheus.one(f"sum({done % result}) / {everything}") for result in ("succeeded", "failed")}
    assert ratio == pytest.approx({"succeeded": 2 / 6, "failed": 3 / 6})
    failed = prometheus.query("sum by (phase,reason)(rate(oz_worker_task_failures_total[1h])) > 0")
    assert set(failed) == {frozenset({("phase", phase), ("reason", reason)}) for phase, reason in FAILED}
    startup = prometheus.query("oz_worker_task_sandbox_startup_failures_total > 0")
    assert startup == {frozenset({("reason", reason)}): 1 for reason in ("setup_command", "workspace_setup")}
    assert prometheus.one("sum(rate(oz_worker_websocket_reconnects_total[1h])) > bool 0") == 1
    assert prometheus.one("sum(oz_worker_task_duration_seconds_count)") == 6
    assert prometheus.one('sum(oz_worker_task_duration_seconds_bucket{le="+Inf"})') == 6
    assert prometheus.one("oz_worker_dispatch_seconds_count") == 4
    slowest = "histogram_quantile(0.95, sum by (le) (rate(oz_worker_task_duration_seconds_bucket[1h])))"
    assert 0 < (prometheus.one(slowest) or 0) <= 10_000
    assert prometheus.one("max_over_time(oz_worker_tasks_active[1h])") == 2
    assert prometheus.one("max_over_time(oz_worker_outbox_rows[1h]) >= bool 2") == 1
    assert prometheus.one("oz_worker_tasks_claimed_total") == 6
    for kind in ("at_capacity", "cancelling", "backend"):
        assert prometheus.one(f'oz_worker_tasks_rejected_total{{reason="{kind}"}}') == 1
    asked = [query for _title, query in expressions() if 'worker_id=~".*"' in query]
    assert asked
    # What asks for a rate needs an increase within its window; this worker pulls nothing.
    assert [query for query in asked if not prometheus.query(query) and not re.search(r"\[\w+\]", query)] == []
    prometheus.saw(
        "oz_worker_connected",
        "oz_worker_tasks_active",
        "oz_worker_slots_free",
        "oz_worker_backend_up",
        "oz_worker_last_frame_age_seconds",
        "oz_worker_outbox_rows",
        "oz_worker_outbox_oldest_seconds",
        "oz_worker_tasks_claimed_total",
        "oz_worker_dispatch_seconds_count",
        'oz_worker_tasks_rejected_total{reason="at_capacity"}',
        'oz_worker_tasks_rejected_total{reason="backend"}',
        'oz_worker_tasks_rejected_total{reason="cancelling"}',
        'oz_worker_tasks_rejected_total{reason="disk"}',
        'oz_worker_tasks_completed_total{result="succeeded"}',
        'oz_worker_tasks_completed_total{result="failed"}',
        'oz_worker_tasks_completed_total{result="cancelled"}',
        'oz_worker_task_duration_seconds_count{result="succeeded"}',
        'oz_worker_task_duration_seconds_count{result="failed"}',
        'oz_worker_task_duration_seconds_count{result="cancelled"}',
        'oz_worker_task_failures_total{phase="assignment",reason="unknown"}',
        'oz_worker_task_failures_total{phase="backend",reason="agent_invocation"}',
        'oz_worker_task_failures_total{phase="backend",reason="setup_command"}',
        'oz_worker_task_failures_total{phase="backend",reason="workspace_setup"}',
        'oz_worker_task_failures_total{phase="cleanup",reason="teardown_command"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="setup_command"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="workspace_setup"}',
        'oz_worker_websocket_reconnects_total{reason="dial_failed"}',
        'oz_worker_websocket_reconnects_total{reason="remote_close"}',
        'oz_worker_frames_refused_total{kind="not_json"}',
        'oz_worker_frames_refused_total{kind="too_deep"}',
        'oz_worker_frames_refused_total{kind="not_object"}',
        'oz_worker_frames_refused_total{kind="no_type"}',
        'oz_worker_frames_refused_total{kind="unknown_type"}',
        'oz_worker_frames_refused_total{kind="no_task_id"}',
        'oz_worker_frames_refused_total{kind="bad_execution_id"}',
    )


def restarted(day: Day, prometheus: Prometheus) -> None:
    """Killed with a task on it: the next one takes it up, and its counters begin anew."""
    task = day.hold("kept")
    day.worker.kill()
    day.start(connected=True)
    prometheus.wait_for('oz_worker_tasks_reattached_total{result="attached"}', 1)
    prometheus.wait_for("oz_worker_tasks_active", 1)
    assert prometheus.one("oz_worker_tasks_claimed_total") == 0
    assert prometheus.one("resets(oz_worker_tasks_claimed_total[1h])") == 1
    day.let_go("kept")
    day.rig.plane.wait_acknowledged(task)
    prometheus.wait_for("sum(oz_worker_tasks_completed_total)", 1)
    prometheus.wait_for("oz_worker_tasks_active", 0)
    prometheus.saw('oz_worker_tasks_reattached_total{result="attached"}')


def draining(day: Day, prometheus: Prometheus) -> None:
    """The last task is finished, nothing new is taken, and the page is one that promtool finds no fault with."""
    last = day.hold("last")
    day.worker.send(signal.SIGUSR1)
    day.worker.wait_log("USR1")
    day.rig.submit("exit 0", requeue=False)
    prometheus.saw('oz_worker_tasks_rejected_total{reason="draining"}')
    until(lambda: prometheus.trouble() == "", "a scrape that succeeded")
    text = metrics(day.worker)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=SAFETY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    day.let_go("last")
    assert day.worker.exit_code() == 0
    assert last.acknowledged
    until(prometheus.trouble, "a scrape that nobody answered")
