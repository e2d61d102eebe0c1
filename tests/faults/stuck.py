"""Threads of a worker that runs with `odd="vital"` made to die or to stick, and its pages about that."""

from __future__ import annotations

import http.client
import os
import re
from typing import Any, NamedTuple

from tests.rig import Rig, Worker


class Page(NamedTuple):
    """An answer of the health endpoint."""

    status: int
    text: str


def poison(rig: Rig, *acts: str) -> None:
    """Each of *acts* is `die` or `stick` and the name of a thread. Whole at once: the worker may read it any time."""
    fresh = rig.place / "poison.new"
    fresh.write_text("".join(f"{act}\n" for act in acts))
    fresh.rename(rig.place / "poison")


def port_of(worker: Worker) -> int:
    """Where it serves its health: tests let the kernel choose."""
    return int(worker.wait_log(r"serving /healthz.* port \d+").rpartition(" ")[2])


def page(port: int, path: str, method: str = "GET") -> Page:
    """Ask for a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return Page(answer.status, answer.read().decode())
    finally:
        connection.close()


def tripped(rig: Rig, worker: Worker, act: str, running: Any) -> None:
    """What befell the worker, its account of it, and that its task is taken up by the next one."""
    _, name = act.split()
    assert worker.exit_code() == 1, worker.log
    said = f"thread {name} died" if act.startswith("die") else f"watchdog: thread {name} has given no sign of life"
    assert re.search(said, worker.log), worker.log
    assert re.search(r"stacks of \d+ threads(.|\n)*--- ", worker.log), worker.log
    os.unlink(rig.place / "poison")
    worker = rig.start(env={"OTEL_METRICS_EXPORTER": "console"})
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    assert running.terminal.exit_code == 3
    assert worker.stop() == 0
    assert re.search(r'watchdog_trips_total"[^[]*\[{"labels": {}, "value": 1\b', worker.log), (
        "counted for who scrapes now"
    )
    rig.audit(traceback=act.startswith("die"))
