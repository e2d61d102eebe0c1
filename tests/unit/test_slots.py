"""Instance directories: one holder each, by the kernel's word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oz_worker import slots
from oz_worker.errors import NotUsable

HOLD = """
import pathlib, sys
from oz_worker import slots
s = slots.take(pathlib.Path(sys.argv[1]), sys.argv[2])
print(s.id, flush=True)
sys.stdin.read()
"""


def other_worker(state_dir: Path, pinned: str = "") -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(state_dir), pinned], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_two_workers_hold_two_directories_and_a_dead_one_is_taken_again(tmp_path: Path) -> None:
    process, theirs = other_worker(tmp_path)
    mine = slots.take(tmp_path)
    assert mine.id != theirs
    end(process)
    again = slots.take(tmp_path)
    assert again.id == theirs
    mine.release()
    again.release()


def test_a_pinned_instance_that_is_held_names_its_holder(tmp_path: Path) -> None:
    process, _theirs = other_worker(tmp_path, "blue")
    with pytest.raises(NotUsable, match=rf"blue .* held by process {process.pid}"):
        slots.take(tmp_path, "blue")
    found = slots.holder(tmp_path / "blue")
    assert found is not None
    assert found.pid == process.pid
    assert slots.reachable(found)
    end(process)
    assert slots.holder(tmp_path / "blue") is None


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    process, theirs = other_worker(tmp_path)
    found = slots.holder(tmp_path / theirs)
    assert found is not None
    assert not slots.reachable(found._replace(start_ticks=found.start_ticks + 1))
    assert not slots.reachable(found._replace(pid_namespace=1))
    assert not slots.reachable(found._replace(boot_id="another boot"))
    end(process)


def test_a_cloned_machine_makes_an_instance_of_its_own(tmp_path: Path) -> None:
    first = slots.take(tmp_path)
    first.release()
    machine = tmp_path / first.id / "machine"
    machine.write_text(json.dumps({"machine_id": "elsewhere", "hostname": "clone"}))
    second = slots.take(tmp_path)
    # In a container machine id and hostname change with each replacement and are not compared.
    assert (second.id == first.id) is slots.in_container()
    second.release()


def test_a_state_directory_that_is_a_file_is_said_in_a_sentence(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(NotUsable, match=r"cannot be used .*state_dir"):
        slots.take(place)


def test_modes_are_private(tmp_path: Path) -> None:
    slot = slots.take(tmp_path / "state")
    assert os.stat(tmp_path / "state").st_mode & 0o777 == 0o700
    assert os.stat(slot.path).st_mode & 0o777 == 0o700
    assert os.stat(slot.path / "lock").st_mode & 0o777 == 0o600
    slot.release()


def test_removing_while_another_waits_for_it_never_shares_it(tmp_path: Path) -> None:
    slot = slots.take(tmp_path, "gone")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("s.id", "s.path.exists()"), str(tmp_path), ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    slot.remove()
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    end(process)
