"""Each thread that the worker is useless without dies and is stuck once: the account, the exit, the next start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oz_worker import vitals
from oz_worker.observe.health import trips_of
from tests.faults.stuck import page, poison, port_of, tripped
from tests.prometheus import SERVED, sees, value
from tests.prometheus import page as page_of_metrics
from tests.rig import ROOT, SAFETY, Rig, until

UP_AND_WAIT = "echo up >> $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 3"
HERE = ("main", "store", "watcher", "upkeep", "output")
"""Those of a worker with the direct backend that also count as stuck; `log` and `watchdog` are told of below."""
ACTS = [f"{fate} {name}" for fate in ("stick", "die") for name in HERE] + ["die log", "die watchdog"]
DISPENSABLE = {
    *("resolver", "task-<unit>", "opening", "dispatch-..", "lost-<unit>", "cancel-..", "image", "sidecar"),  # one job
    *("http-metrics", "console-...", "otel-*", "Otel*", "http-health", "health-<..>", "watchdog-.."),  # observers
}
"""Threads without which a worker is not useless: it goes on, whatever becomes of them."""


def test_every_thread_is_tried_or_dispensable() -> None:
    """A new one stands in the daemon's table, and there it has to be the one or the other."""
    daemon = (ROOT / "oz_worker" / "daemon.py").read_text()
    rows = re.findall(r"^\| ([^ |]+) *\|", daemon, re.MULTILINE)
    table = set(rows) - {"thread"}
    assert len(rows) == len(table) + 1
    assert table - DISPENSABLE == set(vitals.LIMITS)
    sources = {path: path.read_text() for path in (ROOT / "oz_worker").rglob("*.py")}
    marked = [name for text in sources.values() for name in re.findall(r'vitals\.essential\("(\w+)"\)', text)]
    assert sorted(marked) == sorted(vitals.LIMITS), "each is watched in one place"
    started = {name for text in sources.values() for name in re.findall(r'threads\.start\(\s*f?"([\w-]+)', text)}
    known = [re.split(r"[<.*]", name)[0] for name in table]
    assert {name for name in started if not any(name.startswith(one) for one in known)} == {"check-"}  # no worker's
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tried = {*ACTS, *re.findall(r'"((?:stick|die) \w+)"', tests)}
    assert {f"{fate} {name}" for fate in ("stick", "die") for name in vitals.LIMITS} - tried == set()


@pytest.mark.parametrize("act", ACTS)
def test_a_worker_with_a_dead_or_stuck_thread_tells_of_it_and_leaves_with_1(rig: Rig, act: str) -> None:
    rig.config |= {"flush_timeout": "300ms", "task_output": "log", "health_listen": "127.0.0.1:0"}
    worker = rig.start(odd="vital")
    port = port_of(worker)
    task = rig.submit(UP_AND_WAIT)
    until((rig.place / "up").exists, "the agent")
    until(lambda: rig.query("SELECT state FROM tasks") == [("running",)], "the row")
    assert page(port, "/healthz").status == 200
    poison(rig, act)
    fate, name = act.split()
    if fate == "stick":  # one that dies is told at once to the main thread, which leaves
        answer = until(lambda: (found := page(port, "/healthz")).status == 503 and found, "the red page")
        assert answer.text.startswith(f"thread {name} has given no sign of life for "), answer
    tripped(rig, worker, act, task)


def test_a_worker_that_is_helped_to_leave_is_counted_once(rig: Rig) -> None:
    """A thread died, and the server on which the leaving waits says nothing: the watchdog ends what has begun."""
    rig.config["flush_timeout"] = rig.config["link"]["dial_timeout"] = "600s"
    worker = rig.start(odd="helped")
    task = rig.submit(UP_AND_WAIT)
    until((rig.place / "up").exists, "the agent")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.refuse(silent=True)
    rig.plane.cut()
    until(lambda: rig.query("SELECT state FROM tasks") == [("running",)], "the row")
    (rig.place / "go").touch()
    until(lambda: rig.query("SELECT kind FROM outbox WHERE NOT held") == [("failed",)], "a report that waits")
    poison(rig, "die upkeep")
    assert worker.exit_code() == 1
    assert "thread upkeep died, so this worker" in worker.log, "the main thread had begun to leave"
    assert "watchdog: thread upkeep died" in worker.log, "and was helped"
    (rig.place / "poison").unlink()
    rig.plane.accept()
    worker = rig.start(env=SERVED)
    sees(worker, "oz_worker_watchdog_trips_total")
    assert value(page_of_metrics(worker), "watchdog_trips_total") == 1
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    rig.audit(traceback=True)


@pytest.mark.parametrize("text", ["", "-5", "1e9", "9" * 400, "\u0663", "\0", "7 7"])
def test_a_count_of_trips_that_nobody_wrote_is_not_believed(tmp_path: Path, text: str) -> None:
    """A counter must not begin below 0, and no number may be one that the page cannot hold."""
    (tmp_path / "trips").write_text(text)
    with pytest.raises(ValueError, match=r"holds no number|codec"):
        trips_of(tmp_path / "trips")
    (tmp_path / "trips").write_text("12\n")
    assert trips_of(tmp_path / "trips") == 12


@pytest.mark.parametrize("acts", [("stick log", "stick main"), ("hold main",)], ids=["log", "lock"])
def test_the_account_reaches_stderr_when_the_log_is_stuck_too(rig: Rig, acts: tuple[str, ...]) -> None:
    """The thread that writes hangs, or somebody hangs with the lock that every line of the log needs."""
    log = rig.place / "own.log"
    worker = rig.start("--log-file", str(log), odd="vital")
    poison(rig, *acts)
    assert worker.exit_code() == 1
    assert "watchdog" not in log.read_text()
    assert "watchdog: thread main has given no sign of life" in worker.log
    assert worker.log.count(" (most recent call first):") > 3
    assert re.search(r"odd_worker.py\", line \d+ in stamp", worker.log)
    rig.audit()


def test_a_stuck_worker_leaves_although_nobody_reads_its_stderr(rig: Rig) -> None:
    fifo = rig.place / "fifo"
    os.mkfifo(fifo)
    rig.own_files.add("fifo")
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(reader, b"x" * 4096):
            pass
    worker = rig.start(odd="vital", shell='exec "$@" >"$HOME/fifo" 2>&1')
    poison(rig, "stick main")
    assert worker.exit_code() == 1
    os.close(reader)
    rig.audit()


def test_a_log_that_is_stuck_stops_nothing(rig: Rig) -> None:
    rig.config["health_listen"] = "127.0.0.1:0"
    worker = rig.start(odd="vital")
    port = port_of(worker)
    poison(rig, "stick log")
    task = rig.submit("sleep 2")  # four looks of this watchdog
    rig.plane.wait_acknowledged(task)
    assert page(port, "/healthz") == (200, "healthy\n")
    assert worker.stop() == 0
    rig.audit()


def test_the_pages_answer_while_main_thread_and_watchdog_are_stuck(rig: Rig) -> None:
    """Also the judgement over the watchdog, which nobody but who asks can make."""
    rig.config["health_listen"] = "127.0.0.1:0"
    worker = rig.start(odd="vital")
    port = port_of(worker)
    until(lambda: page(port, "/readyz") == (200, "ready\n"), "readiness")
    poison(rig, "stick main", "stick watchdog")
    until(lambda: page(port, "/healthz").status == 503, "the red page")
    assert re.fullmatch(
        r"thread watchdog has given no sign of life for \d+ s \(limit 1 s\)\n", page(port, "/healthz").text
    )
    assert page(port, "/readyz").status == 503
    answer = until(lambda: (found := page(port, "/status")).status == 200 and found, "the status")
    (account,) = json.loads(answer.text)
    assert account["facts"]["link"]["state"] == "connected"
    worker.kill()
    rig.audit()


def test_a_worker_that_its_manager_aborts_shows_its_stacks(rig: Rig) -> None:
    """What `WatchdogSec=` does to one that cannot even run its watchdog."""
    worker = rig.start(shell='ulimit -c 0; exec "$@"')
    worker.send(signal.SIGABRT)
    assert worker.exit_code() == -signal.SIGABRT
    assert re.search(r"Fatal Python error: Aborted(.|\n)* in _serve\n", worker.log)
    rig.audit()


def test_a_process_that_was_stopped_is_not_stuck() -> None:
    """SIGSTOP for longer than the limit, as a debugger, a frozen cgroup or a paused machine does."""
    script = """
import os, signal, subprocess, threading, time
from oz_worker import vitals
from oz_worker.observe import watchdog
from oz_worker.observe.logs import Logs
from oz_worker.redact import Redactor
vitals.LIMITS["store"], watchdog.LOOK_SECONDS = 3.0, 0.2
@vitals.essential("store")
def work():
    while True:
        time.sleep(vitals.wait(0.1))
for _ in range(20):
    threading.Thread(target=work, daemon=True).start()
looks = []
logs = Logs(level="info", form="text", file="", redact=Redactor())
watchdog.Watchdog(logs, on_trip=lambda: None, on_look=looks.append).start(lambda name, error: None)
time.sleep(1)
subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
stopped = len(looks)
while len(looks) < stopped + 5:
    time.sleep(0.05)
print("lives", all(looks))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "lives True\n"), done.stderr
