"""`task_output: log`: each piece once, nothing of a secret where a file was cut, and no flood that stops anybody."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from oz_worker import vitals
from oz_worker.backends.base import Unit
from oz_worker.engine import follow
from oz_worker.engine.follow import Follower, Source
from oz_worker.known import Known
from oz_worker.model import Key, TaskSpec
from tests.rig import until

TOKEN = "t0ken-9d8e7f6a5b4c3d2e"
MORE_THAN_CAN_BE_SHOWN = 64 << 30
NOTICE = b"[oz_worker: output over 20000 bytes; what came before is gone]\n"


def source_of(place: Path, name: str = "t-1") -> Source:
    """A task whose output stands in *place*."""
    key = Key(name)
    spec = TaskSpec(key=key, run_id=name, argv=(), environment={}, secrets=(TOKEN,))
    return Source(key, Unit(name, "i", key, spec), place / f"{name}.log")


@pytest.fixture
def shown(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What was logged."""
    caplog.set_level(logging.INFO, "oz_worker.task")
    return caplog


def test_a_task_that_is_there_for_a_while_after_its_end_is_not_shown_again(
    tmp_path: Path, shown: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "PAUSE_SECONDS", 0.01)
    source, looks = source_of(tmp_path), list[int]()
    source.file.write_bytes(b"the only line\n")
    there = [source]

    def sources() -> list[Source]:
        looks.append(1)
        return list(there)

    follower = Follower(sources, Known())
    follower.finish(source)
    follower.start(lambda _name, _error: None)
    until(lambda: len(looks) > 5, "some looks at a task that has ended")
    there.clear()
    until(lambda: not follower._readings, "nothing is kept of a task that is gone")
    follower.stop()
    assert shown.messages == ["task t-1 | the only line"]


def test_a_file_that_was_cut_and_has_grown_again_is_shown_from_its_new_beginning(
    tmp_path: Path, shown: pytest.LogCaptureFixture
) -> None:
    """Longer than before, so that only its beginning tells; it begins in the middle of a secret."""
    source = source_of(tmp_path)
    source.file.write_bytes(b"early\n" * 100)
    follower = Follower(list, Known())
    with follower._lock:
        follower._show(source)
    source.file.write_bytes(NOTICE + TOKEN[3:].encode() + b" late\n" + b"later\n" * 200)
    follower.finish(source)
    text = shown.text
    assert NOTICE.decode().strip() in text
    assert "*** late" in text
    assert TOKEN[6:] not in text
    assert [text.count(word) for word in ("early", "later")] == [100, 200]


def test_of_a_flood_the_end_is_shown_and_the_rest_is_said_to_be_missing(
    tmp_path: Path, shown: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB of ends of lines took 20 minutes, for which no other task could end: the watchdog ended the worker."""
    monkeypatch.setattr(follow, "MOST_BEHIND", 100_000)
    source = source_of(tmp_path)
    flood = b"y\n" * (follow.MOST_BEHIND * 4)
    source.file.write_bytes(flood + b"the end\n")
    Follower(list, Known()).finish(source)
    assert len(shown.messages) < follow.MOST_LINES * (follow.MOST_BEHIND // follow.PIECE + 2)
    assert f"{len(flood) + 8 - follow.MOST_BEHIND} bytes came too fast" in shown.messages[0]
    assert any("lines left out: too many at once" in message for message in shown.messages)
    assert shown.messages[-1] == "task t-1 | the end"


def test_output_without_end_holds_up_neither_other_tasks_nor_the_signs_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oz_worker.task")
    endless, short = source_of(tmp_path, "endless"), source_of(tmp_path, "short")
    endless.file.touch()
    os.truncate(endless.file, MORE_THAN_CAN_BE_SHOWN)  # takes no room
    short.file.write_text("all there is\n")
    follower = Follower(lambda: [endless], Known())
    follower.start(lambda _name, _error: None)
    try:
        until(lambda: "task endless | " in caplog.text, "the first piece")
        ending = threading.Thread(target=follower.finish, args=(short,), daemon=True)
        ending.start()
        ending.join(60)
        assert "task short | all there is" in caplog.text
        (sign,) = [sign for sign in vitals.signs() if sign.name == "output"]
        last = sign.at
        until(lambda: sign.at > last, "another sign of life")
    finally:
        follower.stop()
        os.truncate(endless.file, 0)
