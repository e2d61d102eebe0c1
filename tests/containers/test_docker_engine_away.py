"""The engine stops, hangs, loses its socket: running tasks are not failed by it, new ones wait within their limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Iterator

import psutil
import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.docker import Docker
from oz_worker.errors import OzWorkerError, Stopped, TaskFault
from oz_worker.model import Cause, Reason
from tests.containers.docker_site import DockerSite
from tests.engines.client import EngineError
from tests.engines.docker import Engine
from tests.engines.fixtures import OwnEngine
from tests.engines.images import load_images
from tests.hosting import PATIENCE, eventually, written

QUICK: dict[str, Any] = {"command_timeout": 2.0, "engine_down_timeout": 60.0}


class Away(DockerSite):
    """A docker backend over an engine of the test's own."""

    engine: Engine

    def started(self, backend: Docker, script: str) -> Unit:
        """A unit whose agent runs."""
        up = self.root / f"up-{len(self.units)}"
        unit = self.unit(f"echo up > {up}; {script}")
        backend.prepare(unit)
        backend.start(unit)
        written(up)
        return unit

    def go(self, name: str) -> str:
        """Shell that waits for `let(name)`."""
        return f"while [ ! -e {self.root}/{name} ]; do sleep 0.05; done"

    def let(self, name: str) -> None:
        (self.root / name).touch()


@pytest.fixture
def away(tmp_path: Path, own_engine: OwnEngine) -> Iterator[Away]:
    engine = own_engine()
    site = Away(tmp_path, engine, load_images(engine), **QUICK)
    yield site
    site.close()


class Starting(threading.Thread):
    """A task's thread that prepares and starts a unit."""

    def __init__(self, backend: Docker, unit: Unit) -> None:
        super().__init__(daemon=True)
        self.backend, self.unit = backend, unit
        self.error: OzWorkerError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.backend.prepare(self.unit)
            self.backend.start(self.unit)
        except OzWorkerError as error:
            self.error = error

    def over(self) -> None:
        self.join(PATIENCE * 2)
        assert not self.is_alive()


def code(backend: Docker, unit: Unit) -> int | None:
    unit.wait_for_end_or_stop(PATIENCE * 2)
    assert unit.facts is not None, "it did not end"
    assert backend.clean_up(unit, keep=False) == ""
    return unit.facts.code


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_containers_outlive_the_engine_and_their_ends_are_learned(away: Away, how: str) -> None:
    backend = away.open()
    meanwhile = away.started(backend, f"{away.go('meanwhile')}; exit 7")
    later = away.started(backend, f"{away.go('later')}; exit 8")
    getattr(away.engine, how)()
    eventually(backend.unavailable, "the backend to notice")
    waits = Starting(backend, away.unit("exit 5"))
    away.let("meanwhile")
    away.engine.start_again()
    assert code(backend, meanwhile) == 7
    assert later.facts is None
    waits.over()
    assert waits.error is None
    assert code(backend, waits.unit) == 5
    eventually(lambda: not backend.unavailable())
    away.let("later")
    assert code(backend, later) == 8


def test_without_live_restore_the_containers_end_with_the_engine_and_their_codes_are_learned(
    tmp_path: Path, own_engine: OwnEngine
) -> None:
    engine = own_engine("--live-restore=false")
    site = Away(tmp_path, engine, load_images(engine), **QUICK)
    backend = site.open()
    polite = site.started(backend, "trap 'exit 9' TERM; while :; do sleep 0.1; done")
    deaf = site.started(backend, "trap '' TERM; while :; do sleep 0.1; done")
    engine.stop()
    engine.start_again()
    assert (code(backend, polite), code(backend, deaf)) == (9, 137)
    site.close()


def test_a_socket_that_vanishes_for_a_while(away: Away) -> None:
    backend = away.open()
    running = away.started(backend, f"{away.go('go')}; exit 7")
    away.engine.hide_socket()
    waits = Starting(backend, away.unit("exit 5"))
    away.let("go")
    away.engine.show_socket()
    assert code(backend, running) == 7
    waits.over()
    assert waits.error is None
    assert code(backend, waits.unit) == 5


def test_an_engine_that_hangs_runs_nothing_twice(away: Away) -> None:
    backend = away.open()
    running = away.started(backend, f"{away.go('go')}; exit 7")
    away.engine.freeze()
    waits = Starting(backend, away.unit(f"echo ran >> {away.root}/runs; exit 5"))
    eventually(backend.unavailable, "the backend to notice")
    away.let("go")
    away.engine.thaw()
    assert code(backend, running) == 7
    waits.over()
    assert waits.error is None
    assert code(backend, waits.unit) == 5
    assert (away.root / "runs").read_text() == "ran\n"


def test_a_cancel_while_the_engine_hangs_is_not_held_up_and_leaves_nothing(away: Away) -> None:
    backend = away.open()
    unit = away.unit(f"echo ran >> {away.root}/runs; sleep 1000")
    backend.prepare(unit)
    away.engine.freeze()
    starting = threading.Event()

    def start() -> None:
        starting.set()
        with pytest.raises((Stopped, TaskFault)):
            backend.start(unit)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    starting.wait()
    unit.order_stop(Cause.CANCEL, 0.1)
    away.engine.thaw()
    thread.join(PATIENCE * 2)
    assert not thread.is_alive()
    assert backend.stop(unit).remains == ""
    assert backend.clean_up(unit, keep=False) == ""
    eventually(lambda: away.state(unit) == "", "nothing was made late")


@contextlib.contextmanager
def held_copy(away: Away, unit: Unit) -> Iterator[None]:
    """A copy out of the unit's container whose reader does not read: every `inspect` of it hangs."""
    name = f"oz-{unit.name}"
    copy = subprocess.Popen([away.engine.program, "cp", f"{name}:/", "-"], env=away.engine.env, stdout=subprocess.PIPE)
    assert copy.stdout is not None
    try:
        assert copy.stdout.read(1), "it has begun"

        def hangs() -> bool:
            try:
                away.engine.cli("container", "inspect", name, timeout=2)
            except EngineError:
                return True
            return False

        eventually(hangs, "the engine to hold back what is asked of that container")
        yield
    finally:
        copy.kill()
        copy.stdout.close()
        copy.wait()


def streams(away: Away) -> set[int]:
    """The event streams of this process."""
    found = (child for child in psutil.Process().children() if "events" in child.cmdline())
    return {child.pid for child in found if child.cmdline()[0] == away.engine.program}


def test_a_copy_that_nobody_reads_blinds_nobody_to_the_others(away: Away) -> None:
    backend = away.open()
    held = away.started(backend, f"{away.go('held')}; exit 3")
    missed = away.started(backend, f"{away.go('missed')}; exit 4")
    heard = away.started(backend, f"{away.go('heard')}; exit 5")
    with held_copy(away, held):
        away.let("heard")
        assert code(backend, heard) == 5
        (old,) = eventually(lambda: streams(away))
        os.kill(old, signal.SIGSTOP)
        away.let("missed")
        eventually(lambda: away.state(missed) == "exited")
        os.kill(old, signal.SIGKILL)
        assert code(backend, missed) == 4, "its end is learned from a list"
        eventually(lambda: streams(away) - {old}, "another stream")
        assert backend.unavailable() == ""
        assert {found.name for found in backend.units()} == {held.name}
        fresh = away.started(backend, "exit 6")
        assert code(backend, fresh) == 6
    away.let("held")
    assert code(backend, held) == 3


def test_an_engine_that_stays_away_ends_the_wait_with_a_clear_reason(away: Away) -> None:
    backend = away.open(engine_down_timeout=0.5)
    running = away.started(backend, "sleep 1000")
    unit = away.unit("exit 0")
    backend.prepare(unit)
    away.engine.stop()
    with pytest.raises(TaskFault) as caught:
        backend.start(unit)
    assert caught.value.facts.reason is Reason.CONTAINER_CREATE
    assert "did not answer" in caught.value.facts.detail
    running.wait_for_end_or_stop(PATIENCE)
    assert running.facts is not None
    assert running.facts.reason is Reason.CONTAINER_WAIT
    assert "engine_down_timeout" in running.facts.detail
    assert running.facts.remains, "it may still run: the slot waits for the proof"
    away.engine.start_again()
    running.order_stop(Cause.SHUTDOWN, 0.1)
    eventually(lambda: backend.stop(running).remains == "")
    assert not away.running(running)
    eventually(lambda: not backend.unavailable())
    for one in (running, unit):
        assert backend.clean_up(one, keep=False) == ""


def test_a_worker_that_starts_while_ends_were_missed_learns_them_all(away: Away) -> None:
    first = away.open()
    units = [away.started(first, f"{away.go('go')}; exit {number}") for number in (3, 4)]
    first.close()
    away.engine.kill()
    away.let("go")
    away.engine.start_again()
    second = away.open()
    taken = [Unit(unit.name, unit.instance, unit.key) for unit in units]
    assert {found.name for found in second.recover()} == {unit.name for unit in units}
    for unit in taken:
        second.attach(unit)
    assert [code(second, unit) for unit in taken] == [3, 4]
