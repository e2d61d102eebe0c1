from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from oz_worker import detached
from oz_worker.detached import Detached, Launch, UnitDirectory, launch
from oz_worker.process import ProgramMissing, boot_id
from tests.hosting import eventually, written


@pytest.fixture
def unit(tmp_path: Path) -> UnitDirectory:
    directory = UnitDirectory(tmp_path / "unit")
    directory.create({"task_id": "t"})
    return directory


def order(script: str, **environment: str) -> Launch:
    return Launch(["/bin/sh", "-c", script], {"PATH": os.environ["PATH"], **environment}, "/")


def finished(waiting: Detached) -> int:
    eventually(lambda: waiting.child.poll() is not None)
    assert waiting.child.reap()
    return waiting.child.poll() or 0


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)],
)
def test_the_status_is_the_agents(unit: UnitDirectory, script: str, code: int) -> None:
    waiting = launch(order(script), unit)
    waiting.go()
    assert finished(waiting) == 0
    assert unit.status() == code


def test_nothing_runs_and_nothing_is_recorded_before_the_word(unit: UnitDirectory, tmp_path: Path) -> None:
    waiting = launch(order(f"echo ran >{tmp_path}/ran"), unit)
    assert unit.handle() is None
    assert unit.status() is None
    waiting.drop()
    assert finished(waiting) == 125
    assert unit.status() is None
    assert not (tmp_path / "ran").exists()


def test_the_handle_is_on_disk_before_the_agent_runs(unit: UnitDirectory) -> None:
    waiting = launch(order(f"cat {unit.file('pid')}"), unit)
    waiting.go()
    finished(waiting)
    handle = unit.handle()
    assert handle is not None
    assert handle.identity == waiting.child.identity
    assert handle.identity.boot == boot_id()
    assert unit.output.read_text().startswith(f"{handle.identity.pid} ")


def test_a_term_to_the_whole_group_ends_the_agent_and_not_the_recorder(unit: UnitDirectory) -> None:
    waiting = launch(order("echo up; exec sleep 60"), unit)
    waiting.go()
    written(unit.output)
    assert waiting.child.signal_group(signal.SIGTERM)
    assert finished(waiting) == 0
    assert unit.status() == 143


def test_a_recorder_that_is_killed_leaves_blanks_and_they_are_no_status(unit: UnitDirectory) -> None:
    waiting = launch(order("echo up; exec sleep 60"), unit)
    waiting.go()
    written(unit.output)
    assert waiting.child.signal_group(signal.SIGKILL)
    assert finished(waiting) == 137
    assert Path(unit.file("status")).read_bytes() == b"    "
    assert unit.status() is None


@pytest.mark.parametrize("raw", [b"", b"    ", b"1", b"12  ", b"x\n  ", b"-1\n ", b"1234\n"])
def test_only_digits_and_newline_are_a_status(unit: UnitDirectory, raw: bytes) -> None:
    Path(unit.file("status")).write_bytes(raw)
    assert unit.status() is None


@pytest.mark.parametrize("raw", [b"", b"12", b"1 2 boot", b"a b c d", b"\xff 1 2 3"])
def test_a_damaged_handle_is_no_handle(unit: UnitDirectory, raw: bytes) -> None:
    Path(unit.file("pid")).write_bytes(raw)
    assert unit.handle() is None


def test_the_agent_gets_its_environment_and_no_input_of_ours(unit: UnitDirectory) -> None:
    names = {"go": "1", "status": "2", "IFS": "x", "OZ_WORKER_UNIT": "i.u", "a.b": "dot", "npm//:_token": "odd\nvalue"}
    waiting = launch(order("tr '\\0' '\\n' </proc/self/environ; cat; ls -l /proc/self/fd", **names), unit)
    waiting.go()
    finished(waiting)
    text = unit.output.read_text()
    for name, value in names.items():
        assert f"{name}={value}\n" in text
    assert "OZ_WORKER_GO" not in text
    assert "OZ_WORKER_ODD" not in text
    assert "pipe:" not in text


def test_values_of_odd_names_do_not_show_in_arguments(unit: UnitDirectory) -> None:
    odd = {"a.b": "the-secret"}
    waiting = launch(
        order("for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; done 2>/dev/null; echo end", **odd), unit
    )
    waiting.go()
    finished(waiting)
    assert "the-secret" not in unit.output.read_text()


def test_a_missing_program_is_named_before_anything_runs(unit: UnitDirectory) -> None:
    with pytest.raises(ProgramMissing, match="/no/oz does not exist"):
        launch(Launch(["/no/oz"], {}, "/"), unit)
    assert unit.handle() is None


def test_a_handle_that_cannot_be_written_lets_nothing_run(unit: UnitDirectory, tmp_path: Path) -> None:
    waiting = launch(order(f"echo ran >{tmp_path}/ran"), unit)
    os.mkdir(unit.file("pid.new"))  # in the way of the temporary file
    with pytest.raises(OSError, match="directory"):
        waiting.go()
    assert finished(waiting) == 125
    assert not (tmp_path / "ran").exists()


def test_files_of_a_unit_are_private(unit: UnitDirectory) -> None:
    waiting = launch(order("exit 0"), unit, "setup")
    waiting.go()
    finished(waiting)
    assert unit.status("setup") == 0
    assert os.stat(unit.path).st_mode & 0o777 == 0o700
    assert {os.stat(unit.file(name)).st_mode & 0o777 for name in os.listdir(unit.path)} == {0o600}
    assert sorted(os.listdir(unit.path)) == ["output.log", "setup.pid", "setup.status", "unit.json"]


def test_the_whole_path_leaks_no_descriptor(unit: UnitDirectory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        waiting = launch(order("exit 0"), unit)
        waiting.go()
        finished(waiting)
    assert len(os.listdir("/proc/self/fd")) == before
    assert detached.memory_kills() >= 0
