from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.process import Request, identify, read_stat, spawn
from oz_worker.watcher import Watcher
from tests.hosting import PATIENCE, eventually


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    watcher.start()
    yield watcher
    watcher.close()


def test_every_end_is_told_once_with_its_code(watcher: Watcher) -> None:
    ends: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    children = []
    for number in range(40):
        child = spawn(Request(["/bin/sh", "-c", f"exit {number}"], {}))
        children.append(child)
        watcher.watch_child(child, lambda code, number=number: ends.put((number, code)))  # type: ignore[misc]
    found = sorted(ends.get(timeout=PATIENCE) for _ in range(40))
    assert found == [(number, number) for number in range(40)]
    assert ends.empty()
    assert all(child.reap() for child in children)


def test_a_child_is_left_to_its_owner_to_reap(watcher: Watcher) -> None:
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()
    child = spawn(Request(["/bin/false"], {}))
    watcher.watch_child(child, ends.put)
    assert ends.get(timeout=PATIENCE) == 1
    stat = read_stat(child.pid)
    assert stat is not None
    assert stat.dead
    assert child.reap()


def test_a_process_of_somebody_else_is_watched_too(watcher: Watcher) -> None:
    # `sh` ends at once and leaves its child to init, or to whoever reaps orphans here.
    script = "sleep 60 >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True).stdout)
    identity = identify(pid)
    assert identity is not None
    ended = threading.Event()
    watcher.watch_process(identity, ended.set)
    assert not ended.is_set()
    os.kill(pid, signal.SIGKILL)
    assert ended.wait(PATIENCE)


def test_a_process_that_is_gone_already_is_told_at_once(watcher: Watcher) -> None:
    identity = identify(os.getpid())
    assert identity is not None
    ended = threading.Event()
    watcher.watch_process(identity._replace(ticks=1), ended.set)
    assert ended.is_set()


def test_a_callback_that_fails_ends_nothing_else(watcher: Watcher) -> None:
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def fail(code: int) -> None:
        raise RuntimeError("on purpose")

    first, second = spawn(Request(["/bin/true"], {})), spawn(Request(["/bin/sh", "-c", "sleep 0.1"], {}))
    watcher.watch_child(first, fail)
    watcher.watch_child(second, ends.put)
    assert ends.get(timeout=PATIENCE) == 0
    assert first.reap()
    assert second.reap()


def test_timers_go_on_and_close_is_prompt() -> None:
    watcher = Watcher()
    watcher.start()
    ticks: queue.SimpleQueue[None] = queue.SimpleQueue()
    watcher.every(0.01, lambda: ticks.put(None))
    for _ in range(3):
        ticks.get(timeout=PATIENCE)
    watcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "watcher"]


def test_closing_leaves_processes_and_descriptors_alone() -> None:
    before = len(os.listdir("/proc/self/fd"))
    watcher = Watcher()
    watcher.start()
    child = spawn(Request(["/bin/sleep", "60"], {}))
    watcher.watch_child(child, lambda code: None)
    watcher.close()
    assert child.poll() is None
    assert len(os.listdir("/proc/self/fd")) == before
    child.signal_group(signal.SIGKILL)
    eventually(child.reap)


NO_PIDFD = """
import os, sys, queue, signal, subprocess
del os.pidfd_open
from oz_worker.watcher import Watcher
from oz_worker.process import Request, spawn, identify
watcher = Watcher(); watcher.start(); ends = queue.SimpleQueue()
child = spawn(Request(["/bin/sh", "-c", "exit 9"], {}))
watcher.watch_child(child, ends.put)
print(ends.get(timeout=20), child.reap())
script = "sleep 60 >/dev/null 2>&1 & echo $!"
pid = int(subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True).stdout)
watcher.watch_process(identify(pid), lambda: ends.put("gone"))
os.kill(pid, signal.SIGKILL)
print(ends.get(timeout=20))
watcher.close()
"""


def test_a_kernel_without_pidfd_costs_threads_but_no_end() -> None:
    found = subprocess.run([sys.executable, "-c", NO_PIDFD], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["9", "True", "gone"]


ORPHANS = """
import os, sys, time
from oz_worker.process import Request, spawn, read_stat
from oz_worker.watcher import become_subreaper, reap_orphans
assert become_subreaper()
kept = spawn(Request(["/bin/sh", "-c", "setsid sleep 0.05 & exit 5"], {}))
deadline = time.monotonic() + 20
seen, orphans = set(), set()
while time.monotonic() < deadline:
    seen = reap_orphans(seen)
    orphans |= seen
    if orphans and not seen:
        break
    time.sleep(0.02)
print(len(orphans), [read_stat(pid) for pid in orphans], kept.pid in orphans, kept.poll())
"""


def test_orphans_are_reaped_and_children_that_someone_waits_for_are_not() -> None:
    found = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] in ("1 [None] False 5", "2 [None, None] False 5")


def test_a_watcher_that_never_started_closes(tmp_path: Path) -> None:
    Watcher().close()
