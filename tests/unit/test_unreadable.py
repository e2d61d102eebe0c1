"""What cannot be read is not taken for gone: neither a unit's files, nor a process, nor a cgroup."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.backends.base import Unit
from oz_worker.cgroup import Cgroup
from oz_worker.model import Cause
from oz_worker.process import Child, Identity, Request, boot_id, identify, read_stat, spawn
from oz_worker.tree import Processes, Tree
from oz_worker.unreadable import Unreadable
from tests.hosting import PATIENCE, Stage, eventually, marked, written


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


class Hidden:
    """A file in whose place stands a link to itself: to open it fails, and not because it does not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(path.name + ".aside")
        path.rename(self.aside)
        path.symlink_to(path.name)

    def show(self) -> None:
        self.aside.rename(self.path)


def running(stage: Stage) -> tuple[Unit, Path]:
    """A unit whose agent runs until `done` exists, and its directory."""
    stage.agent("echo up >$NOTES/up; while [ ! -e $NOTES/done ]; do sleep 0.02; done; exit 17")
    backend = stage.direct()
    unit = stage.unit()
    backend.prepare(unit)
    backend.start(unit)
    written(stage.root / "up")
    return unit, stage.instance_dir / "units" / unit.name


@pytest.mark.parametrize("name", ["pid", "unit.json", "status"])
def test_a_restart_leaves_a_unit_alone_until_it_can_be_read(stage: Stage, name: str) -> None:
    unit, directory = running(stage)
    hidden = Hidden(directory / name)
    backend = stage.direct()
    taken = stage.again(unit)
    thread = threading.Thread(target=backend.attach, args=(taken,))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert marked(stage.mark(unit))
    hidden.show()
    thread.join(PATIENCE)
    (stage.root / "done").touch()
    taken.wait_for_end_or_stop(PATIENCE)
    assert taken.facts is not None
    assert taken.facts.code == 17


def test_an_end_is_told_once_its_status_can_be_read(stage: Stage) -> None:
    unit, directory = running(stage)
    handle = Hidden(directory / "pid")
    (stage.root / "done").touch()
    eventually(lambda: (directory / "status").read_bytes().startswith(b"17\n"))
    assert not unit.wait_until(lambda: unit.facts is not None, 0.3)
    handle.show()
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None
    assert unit.facts.code == 17


def test_a_stop_that_cannot_be_confirmed_says_so_and_the_next_one_can(stage: Stage) -> None:
    unit, directory = running(stage)
    unit.order_stop(Cause.CANCEL, 0.2)
    hidden = Hidden(directory / "pid")
    backend = stage.opened[0]
    assert "could not be confirmed" in backend.stop(unit).remains
    hidden.show()
    facts = backend.stop(unit)
    assert (facts.remains, facts.agent_started) == ("", True)


def test_a_listing_leaves_no_unit_out(stage: Stage) -> None:
    unit, directory = running(stage)
    hidden = Hidden(directory / "unit.json")
    with pytest.raises(Unreadable, match=r"unit\.json cannot be read"):
        stage.direct().recover()
    with pytest.raises(Unreadable):
        stage.direct().units()
    hidden.show()
    assert [found.name for found in stage.direct().recover()] == [unit.name]


class NoDescriptors:
    """While it is entered this process can open nothing."""

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, self.limits[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


@pytest.fixture
def child() -> Iterator[Child]:
    child = spawn(Request(["/bin/sleep", "60"], {}))
    yield child
    child.signal_group(signal.SIGKILL)
    eventually(child.reap)


def test_a_process_that_cannot_be_looked_at_is_not_gone(child: Child) -> None:
    with NoDescriptors():
        with pytest.raises(Unreadable, match="Too many open files"):
            child.identity.alive()
        with pytest.raises(Unreadable):
            Processes().snapshot()
    assert child.identity.alive()


def test_a_boot_that_cannot_be_read_is_not_remembered_as_another() -> None:
    script = (
        "from tests.unit.test_unreadable import *\n"
        "with NoDescriptors():\n"
        "    try: boot_id()\n"
        "    except Unreadable: print('unreadable')\n"
        "print(open('/proc/sys/kernel/random/boot_id').read().strip() == boot_id())\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["unreadable", "True"]


def test_a_tree_that_cannot_be_looked_at_is_not_proven_gone(child: Child) -> None:
    boot_id()
    tree = Tree("nobody", Processes())
    tree.add(child.identity)
    with NoDescriptors():
        remains = tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=0.0)
    assert "could not be confirmed" in remains
    assert child.poll() is None
    assert tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=PATIENCE) == ""
    assert child.poll() == 137


def test_children_of_ours_are_ended_without_a_look(child: Child) -> None:
    tree = Tree("nobody", Processes())
    tree.add(child)
    with NoDescriptors():
        tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=0.0)
    assert eventually(child.poll) == 137


def test_a_cgroup_that_cannot_be_read_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "cgroup.events").symlink_to("cgroup.events")
    with pytest.raises(Unreadable):
        Cgroup(tmp_path).populated()
    tree = Tree("nobody", Processes(), Cgroup(tmp_path))
    assert "could not be confirmed" in tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=0.0)
    assert not Cgroup(tmp_path / "gone").populated()


def test_a_child_without_an_identity_is_not_kept() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with NoDescriptors(), pytest.raises(Unreadable):
        Child(os.getpid())
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_stranger_and_nobody_are_told_apart_from_the_unreadable() -> None:
    assert read_stat(2**22 + 1) is None
    assert identify(2**22 + 1) is None
    assert not Identity(os.getpid(), 1, boot_id()).alive()
