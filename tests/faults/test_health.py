"""What those hear who ask how a worker is, over real sockets, in each state; and the service manager's socket."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
from pathlib import Path
from typing import Any, Callable

import pytest

from oz_worker.observe import notify
from tests.faults.stuck import page, port_of
from tests.rawserver import Peer, RawServer
from tests.rig import SAFETY, Rig, living_environments, until

UP_AND_WAIT = "echo up >> $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done"


def reasons(port: int) -> str:
    """Why it is not ready, "" when it is."""
    answer = page(port, "/readyz")
    assert (answer.status == 200) == (answer.text == "ready\n"), answer
    return "" if answer.status == 200 else answer.text


def explained(rig: Rig) -> dict[str, Any]:
    """What `status --explain` says of the one worker, which is what it says to people too."""
    words = ["status", "--state-dir", str(rig.state_dir), "--explain"]
    (account,) = json.loads(rig.run_command(*words, "--json").stdout)
    told: dict[str, Any] = account["explain"]
    assert told["ready"] == (not told["why_not"])
    return told


def both_say(rig: Rig, port: int, pattern: str) -> None:
    """Block until the page and the command give the same reasons, which fit *pattern*."""

    def same() -> bool:
        told = "".join(f"{why}\n" for why in explained(rig)["why_not"])
        return bool(re.fullmatch(pattern, told)) and told == reasons(port)

    until(same, f"{pattern!r} on both")


def test_readyz_and_status_give_the_same_reasons_in_each_state_and_healthz_stays_green(rig: Rig) -> None:
    rig.config |= {"health_listen": "127.0.0.1:0", "flush_timeout": "200ms", "max_concurrent_tasks": 1}
    worker = rig.start(odd="upkeep")
    port = port_of(worker)
    both_say(rig, port, "")

    shutil.move(rig.workspaces, rig.place / "elsewhere")
    gone = f"backend: workspace_root {re.escape(str(rig.workspaces))} is gone; make it again or mount it\n"
    both_say(rig, port, gone)
    worker.wait_log("WARNING not ready for new tasks: backend: workspace_root .* is gone")
    rig.plane.down()  # the reason of a dial that fails is always the same, that of a break is not
    both_say(rig, port, r"not connected to the server \(disconnected\): .+ refused .+\n" + gone)
    shutil.move(rig.place / "elsewhere", rig.workspaces)
    rig.plane.up()
    both_say(rig, port, "")
    worker.wait_log(r"INFO nothing here is in the way of new tasks any more \(it was: backend\)")

    worker.send(signal.SIGSTOP)
    until(lambda: f"`kill -CONT {worker.pid}` lets it go on" in explained(rig)["why_not"][0], "the cure of a stop")
    worker.send(signal.SIGCONT)
    both_say(rig, port, "")

    task = rig.submit(UP_AND_WAIT)
    until((rig.place / "up").exists, "the agent")
    until(lambda: explained(rig)["full"] == "1 tasks of at most 1", "the full house")
    both_say(rig, port, "")  # that is the work, no fault
    worker.send(signal.SIGUSR1)
    both_say(rig, port, r"stopping \(draining\): no new tasks are taken\n")
    assert page(port, "/healthz") == (200, "healthy\n")
    answer = until(lambda: (found := page(port, "/status")).status == 200 and found, "the status")
    asked = json.loads(answer.text)
    (told,) = json.loads(rig.run_command("status", "--json", "--state-dir", str(rig.state_dir)).stdout)
    assert [asked[0][name] for name in ("pid", "facts", "instance")] == [
        told[name] for name in ("pid", "facts", "instance")
    ]
    assert [one["task_id"] for one in asked[0]["tasks"]] == [task.task_id]
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    rig.audit()


def test_a_key_that_the_server_says_back_is_shown_by_no_page(rig: Rig) -> None:
    def refuse(peer: Peer) -> None:
        peer.refuse("401 Unauthorized", body=f"no such key: {rig.plane.key}".encode())

    rig.config["health_listen"] = "127.0.0.1:0"
    with RawServer(refuse) as server:
        worker = rig.start("--web-socket-url", server.url, connected=False)
        port = port_of(worker)
        until(lambda: "no such key" in reasons(port), "the server's words")
        account = until(lambda: "no such key" in (text := page(port, "/status").text) and text, "its account")
        for text in (reasons(port), account, rig.run_command("status", "--state-dir", str(rig.state_dir)).stdout):
            assert [secret for secret in rig.secrets if secret in text] == []
        assert worker.stop() == 0
    rig.audit()


def test_before_the_state_is_open_it_is_healthy_and_not_ready(rig: Rig) -> None:
    rig.config |= {"health_listen": "127.0.0.1:0", "min_free_disk": "1000000GiB"}
    assert rig.start().stop() == 0
    db = sqlite3.connect(rig.instance_dirs()[0] / "state.db", isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    rig.log.unlink()
    worker = rig.start(connected=False)
    port = port_of(worker)
    until(lambda: reasons(port) == "starting: the state and the backend are being opened\n", "the reason")
    assert page(port, "/healthz").status == 200
    until(lambda: page(port, "/status") == (200, "[]\n"), "no instance yet")
    db.close()
    until(lambda: re.fullmatch(r"disk: .* has \d+ MiB free, min_free_disk asks for \d+\n", reasons(port)), "the disk")
    assert worker.stop() == 0
    rig.audit()


def test_a_database_that_hangs_holds_up_its_own_page_alone(rig: Rig) -> None:
    """Opening a FIFO that nobody writes to hangs, as a file on a dead server does."""
    rig.config["health_listen"] = "127.0.0.1:0"
    worker = rig.start()
    port = port_of(worker)
    database = rig.instance_dirs()[0] / "state.db"
    database.rename(rig.place / "aside")
    os.mkfifo(database)
    for _ in range(3):
        assert page(port, "/status") == (503, "/status is not to be had: a disk or the database does not answer\n")
        assert page(port, "/healthz").status == 200
        until(lambda: page(port, "/readyz").status == 200, "readiness")
    os.close(os.open(database, os.O_WRONLY))  # lets the one that hangs go on
    database.unlink()
    (rig.place / "aside").rename(database)
    until(lambda: page(port, "/status").status == 200 and "trouble" not in page(port, "/status").text, "the page")
    assert worker.stop() == 0
    rig.audit()


def test_half_requests_and_other_methods_keep_nobody_from_asking(rig: Rig) -> None:
    rig.config["health_listen"] = "127.0.0.1:0"
    worker = rig.start()
    port = port_of(worker)
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for one in hanging:
        one.sendall(b"GET /healthz HT")
    assert page(port, "/healthz").status == 200
    until(lambda: page(port, "/readyz", "HEAD") == (200, ""), "readiness")
    assert page(port, "/status", "POST").status == 405
    assert page(port, "/metrics").status == 404
    for one in hanging:
        one.close()
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("address", ["in use", "203.0.113.1:0", "no-such-host.invalid:0"])
def test_an_address_that_cannot_be_served_is_exit_3_in_one_sentence(rig: Rig, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}" if address == "in use" else address
        worker = rig.start("--health-listen", address, connected=False)
        assert worker.exit_code() == 3
    (said,) = [line for line in worker.log.splitlines() if "health_listen" in line]
    assert re.search(f"nothing can be served on {re.escape(address)} \\(.+\\); choose an address", said)
    rig.audit()


class Manager:
    """A service manager's socket: everything that it heard, datagram by datagram."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)
        self.heard: list[str] = []

    def hears(self, pattern: str, after: int = 0) -> Callable[[], bool]:
        """Whether a datagram from the one numbered *after* on fits *pattern* as a whole."""

        def found() -> bool:
            try:
                while True:
                    self.heard.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return any(re.fullmatch(pattern, one) for one in self.heard[after:])

        return found


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_service_manager_is_told_and_no_task_can_speak_to_it(rig: Rig, kind: str) -> None:
    name = f"oz-worker-test-{os.urandom(8).hex()}"
    address = str(rig.place / "notify") if kind == "path" else f"@{name}"
    manager = Manager(address if kind == "path" else f"\0{name}")
    env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}
    rig.plane.down()
    worker = rig.start(env=env, connected=False)
    until(manager.hears(r"READY=1\nSTATUS=connecting(: .*)?"), "READY although the server is away")
    until(manager.hears(r"STATUS=disconnected: .*"), "the reason")
    rig.plane.up()
    until(manager.hears(rf"STATUS=connected: {re.escape(rig.plane.url.partition('/api')[0])}.*"), "the connection")
    until(manager.hears("WATCHDOG=1"), "a sign of life, which asks for no more time while nothing passes")
    worker.send(signal.SIGHUP)
    worker.wait_log("HUP: the log file is opened anew")

    task = rig.submit(f"cat /proc/self/environ /proc/$PPID/environ > $HOME/env; {UP_AND_WAIT}")
    until((rig.place / "up").exists, "the agent")
    before = len(manager.heard)
    worker.send(signal.SIGUSR1)
    until(manager.hears(r"STOPPING=1\nSTATUS=stopping \(draining\), connected: .*", before), "the stop")
    until(manager.hears(r"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=\d+", before), "time for the drain")
    for _pid, environ in living_environments():
        if b"OZ_WORKER_UNIT=" in environ and str(rig.place).encode() in environ:
            assert b"NOTIFY_SOCKET" not in environ
    inherited = (rig.place / "env").read_bytes()
    assert b"OZ_WORKER_UNIT=" in inherited
    assert b"NOTIFY_SOCKET" not in inherited
    assert b"WATCHDOG" not in inherited
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert worker.process.wait(SAFETY) == 0
    manager.hears("")()
    assert [one for one in manager.heard if "RELOADING" in one] == [], "nothing is loaded anew, whatever a HUP does"
    manager.socket.close()
    rig.own_files.add("env")
    Path(rig.place / "notify").unlink(missing_ok=True)
    rig.audit()


@pytest.mark.parametrize("ever", [True, False])
def test_a_manager_that_has_gone_away_hurts_nobody(rig: Rig, ever: bool) -> None:
    address = rig.place / "notify"
    manager = Manager(str(address)) if ever else None
    worker = rig.start(env={"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "400000", "WATCHDOG_PID": ""})
    if manager is not None:
        until(manager.hears("WATCHDOG=1"), "a sign of life")
        manager.socket.close()
        address.unlink()
    worker.wait_log("NOTIFY_SOCKET")
    task = rig.submit("exit 0")
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    assert worker.log.count("NOTIFY_SOCKET") == 1
    rig.audit()


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "1"}, 0.2),  # not a loop that does nothing else
        *(({"WATCHDOG_USEC": odd}, 0.0) for odd in ("", "0", "-1", "soon", "1e6", " 9", "9" * 5000, "\u00b2")),
    ],
)
def test_signs_of_life_are_for_who_wants_them_of_this_process(
    tmp_path: Path, variables: dict[str, str], seconds: float
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "OTHER": "stays", **variables}
    ear = notify.Notify(environ)
    assert (ear.watched_seconds, environ) == (seconds, {"OTHER": "stays"})
    ear.looked(True)
    ear.ready("up\nREADY=0")
    ear.looked(True)
    ear.looked(False)
    manager.hears("")()
    sign = ["WATCHDOG=1"] if seconds else []
    extension = "EXTEND_TIMEOUT_USEC=60000000"
    assert manager.heard == ["\n".join([*sign, extension]), "READY=1\nSTATUS=up READY=0", *sign]
    manager.socket.close()
