"""What befalls the worker's own process (faults 20-24, 26, 27; 19 is test_kill)."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import urllib.request
from pathlib import Path
from typing import Iterator

import pytest

from tests.faults.stuck import page, port_of
from tests.rawserver import refused_port
from tests.rig import SAFETY, Rig, until

WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done"
UP_AND_WAIT = f"echo up >> $HOME/up; {WAIT}"


# -- signals (fault 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_idle_worker_leaves_with_0(rig: Rig, number: signal.Signals) -> None:
    worker = rig.start()
    assert worker.stop(number) == 0
    rig.audit()


def test_the_third_signal_leaves_at_once_and_the_next_worker_ends_what_was_begun(rig: Rig) -> None:
    """The second and the third come while the worker is held, so that it sees both before it can act on either."""
    rig.config["stop_grace"] = "1h"
    worker = rig.start()
    task = rig.submit("trap '' TERM; echo up > $HOME/up; while :; do sleep 1; done")
    until((rig.place / "up").exists, "the agent")
    worker.send(signal.SIGTERM)
    worker.wait_log("ending all tasks")
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        worker.send(number)
    # Each may be delivered to another thread, so either can be the third.
    assert worker.exit_code() in (130, 143)
    assert "killing all tasks" in worker.log
    assert not task.ended
    rig.config["stop_grace"] = "200ms"
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "graceful_shutdown"
    assert worker.stop() == 0
    rig.audit()


def test_quit_and_usr2_show_all_stacks_and_the_work_goes_on(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit(UP_AND_WAIT)
    until((rig.place / "up").exists, "the agent")
    for number in (signal.SIGQUIT, signal.SIGUSR2):
        worker.send(number)
    until(lambda: len(re.findall(r"stacks of \d+ threads", worker.log)) == 2, "both dumps")
    assert "--- MainThread" in worker.log
    assert re.search("--- task-[0-9a-f]{16}", worker.log)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    rig.audit()


def test_hup_opens_the_log_file_anew(rig: Rig) -> None:
    log = rig.place / "own.log"
    worker = rig.start("--log-file", str(log))
    log.rename(rig.place / "own.log.1")
    worker.send(signal.SIGHUP)
    until(log.exists, "the new log file")
    assert worker.stop() == 0
    assert "exit code 0" in log.read_text()
    assert "exit code" not in (rig.place / "own.log.1").read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    rig.audit()


def test_a_stop_while_the_state_is_being_opened_ends_the_start(rig: Rig) -> None:
    """The database is locked by somebody, which is waited for on a thread of its own."""
    assert rig.start().stop() == 0
    db = sqlite3.connect(rig.instance_dirs()[0] / "state.db", isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    worker = rig.start(connected=False)
    worker.wait_log(r"(?s)instance .*instance")
    assert worker.stop() == 0
    assert "stopped before the start was complete" in worker.log
    db.close()
    rig.audit()


def test_a_stop_during_the_first_dial_ends_the_start(rig: Rig) -> None:
    rig.plane.refuse(silent=True)
    worker = rig.start(connected=False)
    rig.plane.wait_for(lambda: rig.plane.refused, SAFETY, "the dial")
    assert worker.stop() == 0
    rig.audit()


def test_a_drain_while_the_server_is_away_is_bounded_and_keeps_the_report(rig: Rig) -> None:
    """Fault 21, failure 3."""
    rig.config["flush_timeout"] = "300ms"
    worker = rig.start()
    task = rig.submit(f"{UP_AND_WAIT}; exit 6")
    until((rig.place / "up").exists, "the agent")
    rig.plane.down()
    worker.send(signal.SIGUSR1)
    worker.wait_log("taking no new tasks")
    (rig.place / "go").touch()
    assert worker.exit_code() == 1
    assert "reports could not be delivered" in worker.log
    assert rig.query("SELECT count(*) FROM outbox") == [(1,)]
    rig.plane.up()
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 6
    assert worker.stop() == 0
    rig.audit()


# -- its state (fault 23)


def damage(rig: Rig, how: str) -> None:
    """Do something to the database of the worker that was killed."""
    path = rig.instance_dirs()[0] / "state.db"
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2 + 7])
    else:
        path.write_bytes(b"this is no database " * 500)


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_damaged_database_is_set_aside_and_the_running_task_is_adopted(rig: Rig, how: str) -> None:
    worker = rig.start()
    for number in range(20):  # enough rows for more than the first pages
        rig.submit("exit 0", task_id=f"before-{number}")
    rig.plane.wait_acknowledged()
    assert worker.stop() == 0
    worker = rig.start()
    task = rig.submit(f"{UP_AND_WAIT}; exit 3")
    until((rig.place / "up").exists, "the agent")
    worker.kill()
    damage(rig, how)
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 3
    assert worker.stop() == 0
    assert list(rig.instance_dirs()[0].glob("state.db.damaged-*"))
    assert "was damaged" in worker.log
    rig.audit()


def test_a_database_of_a_newer_version_is_left_alone_and_is_exit_3(rig: Rig) -> None:
    assert rig.start().stop() == 0
    path = rig.instance_dirs()[0] / "state.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    worker = rig.start(connected=False)
    assert worker.exit_code() == 3
    assert "newer version" in worker.log
    assert path.read_bytes() == before
    rig.audit()


def test_an_instance_that_is_held_is_exit_3_for_the_second_worker(rig: Rig) -> None:
    rig.config["instance_id"] = f"pinned-{os.getpid()}"
    worker = rig.start()
    held, file = f"held by process {worker.pid}", rig.place / "second.log"
    rig.own_files.add(file.name)
    for log_file in ("", str(file)):  # the sentence is a line of the log, wherever that goes; and never only there
        before = len(worker.log)
        second = rig.start("--log-format", "json", "--log-file", log_file, connected=False)
        assert second.exit_code() == 3
        told = second.log[before:].splitlines()
        records = [json.loads(line) for line in (file.read_text().splitlines() if log_file else told) if line[0] == "{"]
        assert [record["level"] for record in records if held in record["message"]] == ["critical"]
        assert bool(log_file) == any(line.startswith("oz_worker: the instance") and held in line for line in told)
    assert worker.stop() == 0
    rig.audit()


def test_a_state_directory_that_is_a_file_is_exit_3(rig: Rig) -> None:
    rig.state_dir.write_text("")
    worker = rig.start(connected=False)
    assert worker.exit_code() == 3
    assert "--state-dir" in worker.log
    rig.state_dir.unlink()
    rig.audit()


@pytest.fixture
def small_state(rig: Rig) -> Iterator[Path]:
    """The state directory on a file system of its own of 2 MiB."""
    rig.state_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(rig.state_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield rig.state_dir
    rig.close()
    subprocess.run(["umount", "-l", str(rig.state_dir)], check=True)


def test_a_state_directory_that_is_read_only_is_exit_3(rig: Rig, small_state: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_state)], check=True)
    worker = rig.start(connected=False)
    assert worker.exit_code() == 3
    assert "cannot be used" in worker.log
    rig.audit()


def test_on_a_full_disk_what_was_accepted_is_still_reported_and_new_work_is_refused(
    rig: Rig, small_state: Path
) -> None:
    rig.config["health_listen"] = "127.0.0.1:0"
    worker = rig.start(odd="upkeep")
    port = port_of(worker)
    task = rig.submit(f"{UP_AND_WAIT}; exit 5")
    until((rig.place / "up").exists, "the agent")
    until(lambda: rig.query("SELECT state, claim_acked FROM tasks") == [("running", 1)], "the row")
    fill(small_state / "ballast")
    refused = rig.submit("exit 0")
    rig.plane.wait_for(lambda: refused.state == "rejected", SAFETY, "the refusal")
    assert refused.frames("task_rejected")[0].reason == "worker is out of disk space"
    refused.requeue = False
    rig.plane.down()
    worker.wait_log("refused the connection")
    rig.plane.up()
    rig.plane.wait_connected(SAFETY, after=1)
    assert re.search("takes no task: its disk is full, so what stands here may be .* old", rig.explained())
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 5
    worker.wait_log("kept in memory")
    (small_state / "ballast").unlink()
    worker.wait_log("can be written again")
    until(lambda: page(port, "/readyz").status == 200, "readiness")
    until(lambda: re.search("link: connected .*\n.*\n  takes tasks\n", rig.explained()), "what was owed to the command")
    rig.plane.redeliver(refused)
    rig.plane.wait_acknowledged(refused)
    rig.plane.redeliver(task)
    rig.plane.wait_for(lambda: len(task.frames("task_failed")) == 2, SAFETY, "the same report, from the row made good")
    assert len(rig.plane.connections) == 2
    assert worker.stop() == 0
    rig.audit()


def fill(path: Path) -> None:
    """Write until the disk is full."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for size in (65536, 4096, 512, 1):
            try:
                while os.write(descriptor, b"x" * size):
                    pass
            except OSError:
                continue
    finally:
        os.close(descriptor)


# -- limits (fault 24)


def test_with_few_descriptors_fewer_tasks_are_taken_at_once_and_all_run(rig: Rig) -> None:
    worker = rig.start(shell='ulimit -n 64; exec "$@"')
    tasks = [rig.submit("exit 0") for _ in range(40)]
    rig.plane.wait_acknowledged(*tasks)
    assert {task.state for task in tasks} == {"completed"}
    refused = [task for task in tasks if task.frames("task_rejected")]
    assert refused
    assert refused[0].frames("task_rejected")[0].reason == "worker at maximum concurrency"
    assert len(rig.plane.connections) == 1
    assert worker.stop() == 0
    assert "Too many open files" not in worker.log
    rig.audit()


def test_without_threads_a_task_waits_and_the_worker_recovers(rig: Rig) -> None:
    worker = rig.start(odd="threads")
    (rig.place / "poison").touch()
    task = rig.submit("exit 0")
    worker.wait_log("no thread could be started")
    rig.plane.wait_for(lambda: task.claimed, SAFETY, "the claim")
    (rig.place / "poison").unlink()
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert worker.stop() == 0
    rig.audit()


# -- its log (fault 26)


LOGS = [("closed", "text"), ("full", "json"), ("unread", "text"), ("unread", "json"), ("file-full", "text")]


@pytest.mark.parametrize(("where", "form"), [*LOGS, ("file-full", "json"), ("file-unread", "json")])
def test_without_a_usable_log_tasks_go_on(rig: Rig, where: str, form: str) -> None:
    """On stderr or in its file: a reader that stopped, and a disk that is full."""
    fifo = rig.place / "fifo"
    os.mkfifo(fifo)
    rig.own_files.add("fifo")
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    blocked(reader)
    target = {"closed": "0<&- 1>&- 2>&-", "full": ">/dev/full 2>&1", "unread": '>"$HOME/fifo" 2>&1'}.get(where, "")
    if where.startswith("file"):
        rig.config["log_file"] = "/dev/full" if where == "file-full" else str(fifo)
    rig.config["log_level"] = "debug"
    rig.config["log_format"] = form
    port = refused_port()
    exporter = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": str(port)}
    worker = rig.start(shell=f'exec "$@" {target}', env=exporter)
    tasks = [rig.submit(f"exit {code}") for code in (0, 3)]
    rig.plane.wait_acknowledged(*tasks)
    rig.plane.cut()
    rig.plane.wait_connected(SAFETY, after=1)
    if "full" in where:
        whose = "/dev/full" if where == "file-full" else "stderr"
        why = f"{whose} cannot be written (No space left on device)"
        until(lambda: re.search(rf"its log lost \d+ lines .*: {re.escape(why)}", rig.explained()), "a line in `status`")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SAFETY) as answer:
            scraped = answer.read().decode()
        lost = re.search(r"^oz_worker_log_lines_dropped_total\{.*\} (\d+)$", scraped, re.MULTILINE)
        assert lost is not None
        assert int(lost[1]) > 0
        assert worker.log.count(f"lines of the log are lost: {why}") == (where == "file-full")
    assert worker.stop() == 0
    assert [task.state for task in tasks] == ["completed", "failed"]
    os.close(reader)
    rig.audit()


def blocked(descriptor: int) -> None:
    """Fill a pipe."""
    try:
        while os.write(descriptor, b"x" * 4096):
            pass
    except BlockingIOError:
        return


# -- one worker after another (fault 27)


def test_a_new_worker_works_beside_one_that_drains_and_nothing_runs_twice(rig: Rig) -> None:
    old = rig.start()
    first = rig.submit(f"echo first >> $HOME/runs; {WAIT}")
    until((rig.place / "runs").exists, "the agent")
    old.send(signal.SIGUSR1)
    old.wait_log("taking no new tasks")
    new = rig.start()
    second = rig.submit("echo second >> $HOME/runs")
    rig.plane.wait_acknowledged(second)
    (rig.place / "go").touch()
    assert old.exit_code() == 0
    rig.plane.wait_acknowledged(first)
    assert new.stop() == 0
    assert sorted((rig.place / "runs").read_text().split()) == ["first", "second"]
    rig.audit()


def test_what_a_dead_worker_left_is_taken_up_by_one_that_runs(rig: Rig) -> None:
    """Failure 38."""
    old = rig.start()
    task = rig.submit(f"{UP_AND_WAIT}; exit 7")
    ended = rig.submit("exit 4")
    until((rig.place / "up").exists, "the agent")
    rig.plane.wait_acknowledged(ended)
    new = rig.start(odd="upkeep")
    assert len(rig.instance_dirs()) == 2
    old.kill()
    new.wait_log("left behind: 1 tasks taken up")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 7
    until(lambda: len(rig.instance_dirs()) == 1, "the removal of the empty instance")
    rig.plane.redeliver(ended)
    rig.plane.wait_for(lambda: len(ended.frames("task_failed")) == 2, SAFETY, "the old report, from the rows moved")
    assert (rig.place / "up").read_text() == "up\n"
    assert new.stop() == 0
    rig.audit()
