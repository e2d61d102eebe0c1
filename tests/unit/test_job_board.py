"""The board hears whatever a server says, in any shape: its thread serves every task of the worker."""

from __future__ import annotations

import time
from typing import Any

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.job_board import Board
from oz_worker.backends.job_object import INSTANCE, TASK_ID, UNIT
from oz_worker.backends.job_waits import Limits
from oz_worker.backends.job_whose import Whose, age, found, is_going, is_kept, is_over
from oz_worker.cluster import Cluster, Object
from oz_worker.model import Key

ODD: list[Any] = [None, "x", 5, [None], ["x"], [{}], {"a": 1}, {"conditions": None}, {"conditions": [None, "x", 7]}]
ODD += [{"conditions": {"a": "b"}}, {"conditions": "Complete"}, {"containerStatuses": [None, {"state": 3}]}]


def _thing(part: str, odd: Any) -> dict[str, Any]:
    metadata = {"name": "j", "uid": "uid-1", "labels": {UNIT: "u"}, "annotations": {TASK_ID: "t"}}
    return {"metadata": metadata, "spec": {}, "status": {}, part: odd}


def _board(late: list[Object]) -> Board:
    door = Cluster("/bin/false", namespace="n", flags=(), environment={}, instance="i", timeout=1.0)
    return Board(door, Limits(1.0, 1.0, 1.0), late.append, lambda: None)


@pytest.mark.parametrize("part", ["spec", "status"])
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_odd_shapes_say_nothing(part: str, odd: Any) -> None:
    late: list[Object] = []
    board, unit = _board(late), Unit("u", "i", Key("t", ""))
    thing = _thing(part, odd)
    board.changed("jobs", "ADDED", thing)
    assert len(late) == 1
    board.follow(unit, _thing("spec", {}))
    for kind in ("jobs", "pods"):
        board.changed(kind, "MODIFIED", thing)
        board.listed(kind, [thing], time.monotonic())
    board.due()
    assert unit.facts is None
    whose = Whose({INSTANCE: "i", "oz-worker-hash": "h"}, lambda name: False)
    assert (is_over(thing), is_kept(thing), is_going(thing), age(thing, 0.0)) == (False, False, False, 0.0)
    assert found(thing) is not None
    assert not whose.is_ours(thing)


@pytest.mark.parametrize("labels", [None, "x", 5, ["x"]])
def test_odd_labels_are_nobodys(labels: Any) -> None:
    thing = {"metadata": {"name": "j", "uid": "u", "labels": labels}}
    whose = Whose({INSTANCE: "i", "oz-worker-hash": "h"}, lambda name: False)
    assert not whose.is_ours(thing)
    assert whose.owner(thing) == "somebody else"
