"""Waits that may last give signs of life: of the thread that waits for a slow program, disk or server."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from oz_worker import errand, vitals
from oz_worker.backends import unit_root
from oz_worker.backends.workspace import remove_tree
from oz_worker.detached import UnitDirectory
from oz_worker.pulse import Pulse
from oz_worker.store import Store
from oz_worker.threads import Waker
from tests.hosting import eventually


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "WAIT_SECONDS", 0.05)


def sign_of(name: str) -> vitals.Sign:
    """The one thread of that name that was made last."""
    return next(sign for sign in reversed(vitals.signs()) if sign.name == name)


class Stalled:
    """A disk, a program and a server that give no answer until `answer` is called."""

    def __init__(self, place: Path) -> None:
        self.over = threading.Event()
        self.waker = Waker()
        self.store = Store(place / "state.db")
        self.store.start(lambda _name, _error: None)
        self.store.post(lambda _db: self.over.wait(60))

    def answer(self) -> None:
        """From now on all is well."""
        self.over.set()
        self.waker.wake()

    def disk(self) -> None:
        """Wait for it."""
        self.store.do(lambda _db: None)

    def program(self) -> None:
        """Wait for it."""
        environment = dict(os.environ)
        errand.run(["sleep", "60"], environment=environment, instance="i", timeout=60, interrupt=self.waker.fileno())

    def server(self) -> None:
        """Wait for it."""
        waker = Waker()
        pulse = Pulse(waker, lambda: float("inf"))
        while not self.over.is_set():
            pulse.poll(float("inf"))
        waker.close()


@pytest.mark.parametrize("wait", [Stalled.disk, Stalled.program, Stalled.server])
def test_who_waits_for_something_slow_gives_signs_of_life(wait: Callable[[Stalled], None], tmp_path: Path) -> None:
    stalled = Stalled(tmp_path)
    waiter = threading.Thread(target=vitals.essential("upkeep")(wait), args=(stalled,), daemon=True)
    waiter.start()
    eventually(lambda: [sign for sign in vitals.signs() if sign.name == "upkeep"])
    for _ in range(5):
        before = sign_of("upkeep").at
        eventually(lambda: sign_of("upkeep").at > before, "signs of life")  # noqa: B023 (called at once)
    hung = sign_of("store").at
    time.sleep(0.2)
    assert sign_of("store").at == hung, "the store's thread hangs, and nobody says otherwise"
    stalled.answer()
    waiter.join(30)
    assert stalled.store.close(30)
    stalled.waker.close()


def test_who_is_busy_with_very_many_files_gives_signs_of_life_at_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk a million files of one directory take hours, and a thousand units at the start take minutes."""
    seen: list[float] = []
    unlink, read, units = os.unlink, UnitDirectory.facts, tmp_path / "units"

    def slow(*arguments: Any, **options: Any) -> None:
        seen.append(sign_of("upkeep").at)
        unlink(*arguments, **options)

    def facts(directory: UnitDirectory) -> dict[str, Any] | None:
        seen.append(sign_of("upkeep").at)
        return read(directory)

    for number in range(50):
        (units / str(number)).mkdir(parents=True)
        (tmp_path / f"file{number}").touch()
    monkeypatch.setattr(UnitDirectory, "facts", facts)
    vitals.essential("upkeep")(unit_root.found)(unit_root.directories(units))
    assert len(set(seen)) == 50
    monkeypatch.setattr(os, "unlink", slow)
    assert vitals.essential("upkeep")(remove_tree)(str(tmp_path)) == ""
    assert len(set(seen)) == 100


def test_who_ends_well_is_watched_no_more_and_who_raises_is_dead() -> None:
    def body() -> None:
        assert sign_of("jobs").name == "jobs"

    vitals.essential("jobs")(body)()
    assert "jobs" not in [sign.name for sign in vitals.signs()]
    with pytest.raises(ZeroDivisionError), vitals.essential("jobs"):
        raise ZeroDivisionError
    assert sign_of("jobs").dead
