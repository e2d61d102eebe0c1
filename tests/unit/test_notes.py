"""The notes of a worker: bounded, kept over restarts, written late on a full disk, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oz_worker import rows
from oz_worker.backends.base import Unit
from oz_worker.backends.patience import Patience
from oz_worker.engine import notes
from oz_worker.engine.notes import KEPT, Notes
from oz_worker.engine_words import EngineDown
from oz_worker.errors import StoreFull
from oz_worker.model import Key, Refusal
from oz_worker.store import Store
from tests.hosting import eventually
from tests.unit.test_store import disk, fill, opened


def facts(store: Store) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in store.do(rows.facts).items()}


def of(store: Store) -> Notes:
    return Notes(store, list, list, str, str)


def test_the_last_rejections_are_kept_over_restarts_and_cost_few_writes(tmp_path: Path) -> None:
    store = opened(tmp_path / "state.db")
    one, before = of(store), store.do(lambda db: db.total_changes)
    for number in range(1000):
        one.rejected(Key(f"t{number}", "\ud800"), Refusal.DISK, "x" * 10_000)
    assert store.do(lambda db: db.total_changes) - before < 1000 / 10, "not each is written by itself"
    one.look()
    kept = facts(store)["rejections"]["last"]
    assert [entry["task_id"] for entry in kept] == [f"t{number}" for number in range(1000 - KEPT, 1000)]
    assert len(json.dumps(kept)) < 100_000
    store.close(10)
    store = opened(tmp_path / "state.db")
    of(store).rejected(Key("new", ""), Refusal.BACKEND, "")
    kept = facts(store)["rejections"]["last"]
    assert [entry["task_id"] for entry in kept[-2:]] == ["t999", "new"]
    assert len(kept) == KEPT
    store.close(10)


def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path: Path) -> None:
    with disk(tmp_path / "tiny", "512k") as place:
        store = opened(place / "state.db")
        store.do(lambda db: rows.put_fact(db, "small", "1"))
        fill(place / "ballast")
        one = Notes(store, list, lambda: ["disk: /x has 0 MiB free"], str, str)
        for number in range(60):
            one.rejected(Key(f"t{number}", "e"), Refusal.DISK, "y" * 600)
        one.look()
        eventually(lambda: store.trouble, "the first write that fails")
        before = (place / "state.db-wal").stat().st_size
        one.note("link", {"state": "disconnected"})
        one.note("link", {"state": "connected"})
        for _look in range(20):
            one.look()
        with pytest.raises(StoreFull):
            store.do(lambda db: rows.put_fact(db, "large", "z" * 100_000))
        assert (place / "state.db-wal").stat().st_size == before
        (place / "ballast").unlink()
        assert not {"rejections", "link"} & set(facts(store))
        assert store.trouble, "reading is no sign that it can be written"
        one.look()
        assert not store.trouble
        found = facts(store)
        assert [entry["task_id"] for entry in found["rejections"]["last"]][-1] == "t59"
        assert found["intake"]["troubles"] == ["disk: /x has 0 MiB free"]
        assert found["link"] == {"state": "connected"}, "the newest"
        store.close(10)


def test_facts_are_written_when_they_change_and_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path / "state.db")
    troubles = ["backend: it is away"]
    one = Notes(store, list, lambda: troubles, str, str)
    one.look()
    first = facts(store)
    one.look()
    assert facts(store) == first
    troubles.clear()
    one.look()
    changed = facts(store)
    assert changed[notes.INTAKE]["troubles"] == []
    monkeypatch.setattr(notes, "BEAT_SECONDS", 0.0)
    one.look()
    beaten = facts(store)
    assert beaten[notes.INTAKE]["at"] > changed[notes.INTAKE]["at"], "a sign that it can write"
    assert beaten[notes.WAITS] == changed[notes.WAITS]
    store.close(10)


def test_a_unit_says_what_it_waits_for_and_the_inner_reason_counts() -> None:
    unit = Unit("u", "i", Key("t", "e"))
    seen: list[str] = []

    def act() -> str:
        with unit.waiting(lambda: "the image" if not seen else ""):
            seen.append(unit.waits_for())
            if len(seen) < 3:
                raise EngineDown("docker run did not answer")
        return "done"

    unit.outside = lambda: "the cluster"
    assert Patience(60, lambda: seen.append(unit.waits_for())).persist(act, unit) == "done"
    assert seen[0] == "the image"
    assert seen[-1] == "the engine, which does not answer: docker run did not answer"
    assert unit.waits_for() == "the cluster"
