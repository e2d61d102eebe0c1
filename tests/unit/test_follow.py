"""`task_output: log` under a task that writes faster than anybody can show it."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from oz_worker import vitals
from oz_worker.backends.base import Unit
from oz_worker.engine.follow import Follower, Source
from oz_worker.known import Known
from oz_worker.model import Key, TaskSpec
from tests.rig import until

MORE_THAN_CAN_BE_SHOWN = 64 << 30


def _source(place: Path, name: str) -> Source:
    key = Key(name, "")
    return Source(key, Unit(name, "i", key, TaskSpec(key, name, (), {})), place / name)


def test_output_without_end_holds_up_neither_other_tasks_nor_the_signs_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oz_worker.task")
    endless, short = _source(tmp_path, "endless"), _source(tmp_path, "short")
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
