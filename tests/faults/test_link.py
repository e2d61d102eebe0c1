"""What a bad line means for tasks and their reports (faults 1-10; the line itself is tested in tests/link)."""

from __future__ import annotations

import functools
import signal
import time
from typing import Callable

import pytest

from oz_worker.devplane.tasks import Task
from oz_worker.devplane.wire import CLAIMED, REJECTED
from tests.rig import SAFETY, Rig, until

WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done"
UP_AND_WAIT = f"echo up > $HOME/up; {WAIT}"


def cut_in_a_frame(rig: Rig) -> None:
    """A text frame of 4,096 bytes of which ten arrive."""
    rig.plane.send_bytes(b"\x81\x7e\x10\x00" + b"x" * 10)
    rig.plane.cut("eof")


def cut_in_a_header(rig: Rig) -> None:
    """A frame whose length is missing."""
    rig.plane.send_bytes(b"\x81")
    rig.plane.cut("eof")


ENDS: dict[str, Callable[[Rig], None]] = {
    "reset": lambda rig: rig.plane.cut("reset"),
    "close": lambda rig: rig.plane.cut("close"),
    "in a frame": cut_in_a_frame,
    "in a header": cut_in_a_header,
}


def test_however_connections_end_the_running_task_does_not_notice(rig: Rig) -> None:
    """Fault 1, failures 6 and 7."""
    worker = rig.start()
    task = rig.submit(f"echo run >> $HOME/runs; {WAIT}; exit 3")
    until((rig.place / "runs").exists, "the agent")
    for number, end in enumerate(ENDS.values(), 1):
        end(rig)
        rig.plane.wait_connected(SAFETY, after=number)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 3
    assert (rig.place / "runs").read_text() == "run\n"
    assert worker.stop() == 0
    rig.audit()


def terminals(rig: Rig) -> list[str]:
    """The task ids of the terminal reports, in the order in which they came."""
    return [entry.frame.key.task_id for entry in rig.plane.received if entry.frame.terminal]


def test_reports_of_a_time_without_a_server_arrive_once_and_in_their_order(rig: Rig) -> None:
    """Fault 1, failures 1 and 11: in the order in which the tasks ended, not in that of their claims."""
    worker = rig.start()
    script = "while [ ! -e $HOME/go-$TASK_ID ]; do sleep 0.05; done"
    tasks = [rig.submit(script, task_id=f"t{number}") for number in range(12)]
    rig.plane.wait_for(lambda: all(task.claimed for task in tasks), SAFETY)
    rig.plane.down()
    order = [f"t{number}" for number in (5, 2, 11, 0, 7, 1, 10, 3, 9, 4, 8, 6)]
    for task_id in order:
        (rig.place / f"go-{task_id}").touch()
        until(functools.partial(_over, rig, task_id), f"the end of {task_id}")
    rig.plane.up()
    rig.plane.wait_acknowledged(*tasks)
    assert terminals(rig) == order
    assert worker.stop() == 0
    rig.audit()


def _over(rig: Rig, task_id: str) -> bool:
    """Whether all of a task is over, and so its report on its way: its line in the log comes before that."""
    return bool(rig.query(f"SELECT 1 FROM tasks WHERE task_id = '{task_id}' AND state = 'ended'"))


def test_a_half_open_line_is_noticed_and_what_was_written_into_it_comes_again(rig: Rig) -> None:
    """Faults 2, 3 and 10, failures 2 and 9: the server reads nothing and says nothing."""
    rig.config["link"].update(ping_interval="200ms", dead_after="800ms")
    worker = rig.start()
    task = rig.submit(f"{UP_AND_WAIT}; exit 5")
    until((rig.place / "up").exists, "the agent")
    rig.plane.stall()
    (rig.place / "go").touch()
    rig.plane.wait_connected(SAFETY, after=1)
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 5
    assert worker.stop() == 0
    assert "the connection is dead" in worker.log
    rig.audit()


def test_over_a_line_that_drips_tasks_come_and_go(rig: Rig) -> None:
    """Fault 4: a byte at a time, and still one connection."""
    worker = rig.start()
    rig.plane.slow_down(0.001)
    tasks = [rig.submit(f"exit {code}") for code in (0, 4)]
    rig.plane.wait_acknowledged(*tasks)
    assert [task.state for task in tasks] == ["completed", "failed"]
    assert len(rig.plane.connections) == 1
    rig.plane.resume()
    assert worker.stop() == 0
    rig.audit()


def test_a_claim_that_got_lost_comes_again_before_its_report(rig: Rig) -> None:
    """Failure 5."""
    worker = rig.start()
    rig.plane.cut_on(lambda frame: frame.kind == CLAIMED, unread=True)
    rig.plane.cut_on(lambda frame: frame.kind == CLAIMED, unread=True)
    task = rig.submit("exit 2")
    rig.plane.wait_acknowledged(task)
    assert [entry.frame.kind for entry in task.history] == ["task_claimed", "task_failed"]
    assert worker.stop() == 0
    rig.audit()


def test_a_rejection_dies_with_its_connection(rig: Rig) -> None:
    """Sent late it could refuse a task that was assigned anew."""
    rig.config["max_concurrent_tasks"] = 1
    worker = rig.start()
    first = rig.submit(UP_AND_WAIT)
    until((rig.place / "up").exists, "the agent")
    rig.plane.cut_on(lambda frame: frame.kind == REJECTED, unread=True)
    second = rig.submit("exit 0")
    rig.plane.wait_connected(SAFETY, after=1)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(first)
    rig.plane.redeliver(second)
    rig.plane.wait_acknowledged(second)
    assert second.frames(REJECTED) == []
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("state", ["in backoff", "while refused", "half-open"])
def test_a_stop_is_obeyed_in_every_state_of_the_line(rig: Rig, state: str) -> None:
    """Fault 8, failure 12 (in the handshake: test_worker): nothing is undelivered, so the exit code is 0 everywhere."""
    rig.config["link"].update(
        backoff_min="1h", backoff_max="1h", refused_backoff="1h", dead_after="1h", dial_timeout="1h"
    )
    worker = rig.start()
    if state == "half-open":
        rig.plane.stall()
    else:
        if state == "while refused":
            rig.plane.refuse(403)
        else:
            rig.plane.down()
        rig.plane.cut()
        worker.wait_log("disconnected|Next try in")  # the second when it was cut in its handshake
    assert worker.stop() == 0
    rig.audit()


def test_a_stop_ends_a_busy_worker_also_when_its_server_is_mute(rig: Rig) -> None:
    """Fault 8: the reports wait at most flush_timeout, and are the next worker's."""
    rig.config["flush_timeout"] = "300ms"
    worker = rig.start()
    task = rig.submit(UP_AND_WAIT)
    until((rig.place / "up").exists, "the agent")
    until(lambda: rig.query("SELECT claim_acked FROM tasks") == [(1,)], "the acknowledged claim")
    rig.plane.stall()
    assert worker.stop() == 1
    assert not task.ended
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "graceful_shutdown"
    assert worker.stop() == 0
    rig.audit()


def test_a_worker_that_was_frozen_goes_on_with_its_tasks(rig: Rig) -> None:
    """Fault 9: longer than dead_after, while a task of it ends and another one comes in."""
    rig.config["link"].update(ping_interval="100ms", dead_after="400ms")
    rig.config["task_timeout"] = "1h"
    worker = rig.start()
    ended = rig.submit(f"echo up > $HOME/up; {WAIT}; echo over > $HOME/over; exit 3")
    running = rig.submit("while [ ! -e $HOME/go-on ]; do sleep 0.05; done")
    until((rig.place / "up").exists, "the agent")
    rig.plane.wait_for(lambda: running.claimed, SAFETY)
    worker.send(signal.SIGSTOP)
    (rig.place / "go").touch()
    until((rig.place / "over").exists, "its end")
    frozen = rig.submit("exit 0")
    until(lambda: _quiet(rig), "more than dead_after of silence")
    worker.send(signal.SIGCONT)
    rig.plane.wait_acknowledged(ended)
    if not frozen.claimed:
        rig.plane.redeliver(frozen)
    rig.plane.wait_acknowledged(frozen)
    (rig.place / "go-on").touch()
    rig.plane.wait_acknowledged(running)
    assert [task.state for task in (ended, frozen, running)] == ["failed", "completed", "completed"]
    assert worker.stop() == 0
    rig.audit()


def _quiet(rig: Rig) -> bool:
    """Whether the worker's connection has said nothing for a second."""
    with rig.plane.lock:
        return time.monotonic() - rig.plane.connections[-1].last_byte_at > 1.0


def acknowledged(*tasks: Task) -> bool:
    return all(task.acknowledged for task in tasks)


def test_reports_of_many_tasks_survive_a_line_that_breaks_at_every_fifth_frame(rig: Rig) -> None:
    """Failures 1 and 2: claims and reports, cut before and after they were read."""
    worker = rig.start()
    counted = [0]

    def fifth(_frame: object) -> bool:
        counted[0] += 1
        return counted[0] % 5 == 0

    for number in range(4):
        rig.plane.cut_on(fifth, unread=number % 2 == 0)
    tasks = [rig.submit(f"exit {number % 2}") for number in range(12)]
    until(lambda: _redelivered(rig, tasks), "every report")
    assert worker.stop() == 0
    rig.audit()


def _redelivered(rig: Rig, tasks: list[Task]) -> bool:
    """What a cut swallowed on its way to the worker is sent again, as a server does."""
    rig.plane.check()
    with rig.plane.lock:
        if acknowledged(*tasks):
            return True
        for task in tasks:
            last = task.history[-1].at if task.history else 0.0
            if (
                not task.claimed
                and not task.ended
                and rig.plane.connections[-1].opened_at > max(last, task.sent_at or 0)
            ):
                task.sent_at = None
                rig.plane.redeliver(task)
    return False
