"""Scripted bad behaviour for `dev --scenario`: each has a start, an end and a condition to pass.

A scenario runs on a thread of its own, drives the control plane and raises AssertionError or TimeoutError when its
condition does not hold. Whatever it does, the rules judge every frame, and at the end every task must have exactly one
acknowledged report.
"""

from __future__ import annotations

import json
import time
from typing import Callable, NamedTuple

from oz_worker.devplane import wire
from oz_worker.devplane.server import ControlPlane

REDIAL_SECONDS = 45.0
TASK_SECONDS = 60.0
LINGERING = 'echo "started"; sleep 1.5; echo "finished"'
BRIEF = 'echo "started"; sleep 0.5; echo "finished"'
SHORT = 'echo "hello from $(basename "$PWD")"'


class Scenario(NamedTuple):
    """`play` returns one sentence on what was shown, or raises."""

    about: str
    play: Callable[[ControlPlane], str]


def half_open(plane: ControlPlane) -> str:
    """The control plane stops reading and answering, without closing, while tasks run and end."""
    first = plane.wait_connected()
    tasks = [plane.submit(LINGERING) for _ in range(3)]
    plane.wait_for(lambda: all(task.claimed for task in tasks), TASK_SECONDS, "claims")
    began = time.monotonic()
    plane.stall()
    plane.wait_connected(REDIAL_SECONDS, after=first.number)
    redialled = time.monotonic() - began
    plane.wait_acknowledged(*tasks, timeout=TASK_SECONDS)
    return f"noticed and redialled after {redialled:.1f} s; every report arrived on the new connection"


def cut(plane: ControlPlane) -> str:
    """The connection breaks at the worst moments: claim lost, report read but not acknowledged, report lost."""
    plane.wait_connected()
    plane.cut_on(lambda frame: frame.kind == wire.CLAIMED, unread=True)
    task = plane.submit(SHORT)
    plane.wait_acknowledged(task, timeout=TASK_SECONDS)
    for unread in (False, True):
        plane.cut_on(lambda frame: frame.terminal, unread=unread)
        task = plane.submit(SHORT)
        plane.wait_acknowledged(task, timeout=TASK_SECONDS)
    for how in ("reset", "eof", "close"):
        number = plane.wait_connected(TASK_SECONDS).number
        task = plane.submit(BRIEF)
        plane.wait_for(lambda task=task: task.claimed, TASK_SECONDS, "a claim")  # type: ignore[misc]
        plane.cut(how)
        plane.wait_connected(REDIAL_SECONDS, after=number)
        plane.wait_acknowledged(task, timeout=TASK_SECONDS)
    return f"{len(plane.connections)} connections, every report arrived once or again to the byte"


def refuse(plane: ControlPlane) -> str:
    """Handshakes are refused in every way while a task runs and ends."""
    number = plane.wait_connected().number
    task = plane.submit(LINGERING)
    plane.wait_for(lambda: task.claimed, TASK_SECONDS, "a claim")
    refusals: tuple[tuple[int, dict[str, str]], ...] = ((503, {"Retry-After": "1"}), (429, {}), (401, {}), (500, {}))
    for status, headers in refusals:
        seen = len(plane.refused)
        plane.refuse(status, headers=headers, body="not now\n")
        plane.cut()
        plane.wait_for(lambda seen=seen: len(plane.refused) > seen, REDIAL_SECONDS, f"a dial to refuse with {status}")  # type: ignore[misc]
    plane.accept()
    plane.wait_connected(REDIAL_SECONDS, after=number)
    plane.wait_acknowledged(task, timeout=TASK_SECONDS)
    return f"{len(plane.refused)} handshakes were refused; the report arrived when they were not"


def garbage(plane: ControlPlane) -> str:
    """Messages that are no frames, and assignments that are no tasks."""
    plane.wait_connected()
    for text in (
        "",
        "{",
        "null",
        "[]",
        '{"type": "surprise", "data": {}}',
        '{"type": "task_assignment"}',
        '{"type": "task_assignment", "data": null}',
        '{"type": "task_assignment", "data": {"task": {}}}',
        '{"type": "task_cancellation", "data": {"task_id": 7}}',
        '{"type": ' + "[" * 5000,
        json.dumps({"type": "task_cancellation", "data": {"task_id": "x" * 200_000}}),
    ):
        plane.send_text(text)
    plane.send_binary(b"\0\1\2")
    broken = plane.submit(task_id="no-task", task_extra=None, extra={"task": None})
    plane.wait_acknowledged(broken, timeout=TASK_SECONDS)
    assert broken.state == "failed", f"an assignment without a task was reported as {broken.state}, not as failed"
    task = plane.submit(SHORT)
    plane.wait_acknowledged(task, timeout=TASK_SECONDS)
    assert task.state == "completed", f"a good task after the garbage was reported as {task.state}"
    return "the garbage was survived, the broken task reported, the good one completed"


def slow(plane: ControlPlane) -> str:
    """A control plane that writes one byte and reads sixteen at a time."""
    number = plane.wait_connected().number
    plane.slow_down(0.002)
    task = plane.submit(SHORT)
    plane.wait_acknowledged(task, timeout=TASK_SECONDS)
    plane.resume()
    assert task.state == "completed", f"the task was reported as {task.state}"
    lost = len(plane.connections) - number
    return "the task arrived and was reported in drips" + (f", with {lost} new connection(s)" if lost else "")


SCENARIOS = {
    "half-open": Scenario("stops reading and answering without closing", half_open),
    "cut": Scenario("breaks the connection at the worst moments", cut),
    "refuse": Scenario("refuses handshakes", refuse),
    "garbage": Scenario("sends what is no frame", garbage),
    "slow": Scenario("reads and writes a few bytes at a time", slow),
}
