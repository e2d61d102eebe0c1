from __future__ import annotations

import json
from typing import Any

import pytest

from oz_worker.devplane import wire
from oz_worker.model import Reason, Refusal

GOOD: list[tuple[str, dict[str, Any]]] = [
    (wire.CLAIMED, {"task_id": "t", "worker_id": "w"}),
    (wire.CLAIMED, {"task_id": "t", "worker_id": "w", "execution_id": "e"}),
    (wire.REJECTED, {"task_id": "t", "reason": "one_shot_complete"}),
    (wire.COMPLETED, {"task_id": "t", "message": "m", "task_state": "CANCELLED"}),
    (wire.FAILED, {"task_id": "t", "message": "m", "failure_reason": "unknown", "exit_code": 255}),
    (wire.CLOSED, {"task_id": "t", "execution_id": "e"}),
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    (wire.CLAIMED, {"task_id": "t"}, "lacks worker_id"),
    (wire.CLAIMED, {"task_id": "t", "worker_id": "w", "execution_id": ""}, "empty"),
    (wire.CLAIMED, {"task_id": 7, "worker_id": "w"}, "int"),
    (wire.CLAIMED, {"task_id": "t", "worker_id": "w", "message": "m"}, "does not know: message"),
    (wire.REJECTED, {"task_id": "t", "reason": "full"}, "reason"),
    (wire.COMPLETED, {"task_id": "t", "message": "m", "task_state": "SUCCEEDED"}, "task_state"),
    (wire.COMPLETED, {"task_id": "t", "message": "x" * 4097}, "over 4096"),
    (wire.COMPLETED, {"task_id": "t", "message": "\ud800"}, "surrogate"),
    (wire.FAILED, {"task_id": "t", "message": "m"}, "failure_reason"),
    (wire.FAILED, {"task_id": "t", "message": "m", "failure_reason": "agent_oom"}, "does not know: 'agent_oom'"),
    (wire.FAILED, {"task_id": "t", "message": "m", "failure_reason": "unknown", "exit_code": 0}, "exit_code"),
    (wire.FAILED, {"task_id": "t", "message": "m", "failure_reason": "unknown", "exit_code": True}, "exit_code"),
    (wire.FAILED, {"task_id": "t", "message": "m", "failure_reason": "unknown", "exit_code": None}, "exit_code"),
    ("task_progress", {"task_id": "t"}, "type"),
]


@pytest.mark.parametrize(("kind", "data"), GOOD)
def test_frames_of_the_protocol_are_read(kind: str, data: dict[str, Any]) -> None:
    text = json.dumps({"type": kind, "data": data})
    frame = wire.parse(text)
    assert (frame.kind, frame.key, frame.text) == (kind, wire.Key("t", data.get("execution_id", "")), text)


@pytest.mark.parametrize(("kind", "data", "words"), BAD)
def test_anything_else_is_a_fault_that_says_what_is_wrong(kind: str, data: dict[str, Any], words: str) -> None:
    with pytest.raises(wire.WireFault, match=words):
        wire.parse(json.dumps({"type": kind, "data": data}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "7",
        "[" * 100_000,
        '{"type": "task_claimed"}',
        '{"type": "task_claimed", "data": []}',
        '{"type": [], "data": {}}',
        '{"type": "task_claimed", "data": {}, "more": 1}',
        '{"type": "task_claimed", "data": {"task_id": "t", "task_id": "t", "worker_id": "w"}}',
        '{"type": "task_failed", "data": {"task_id": "t", "exit_code": NaN}}',
        " " * 65537,
    ],
)
def test_what_is_no_frame_at_all_is_a_fault_and_nothing_worse(text: str) -> None:
    with pytest.raises(wire.WireFault):
        wire.parse(text)


def test_an_assignment_carries_an_execution_id_only_when_there_is_one() -> None:
    bare = json.loads(wire.assignment("t", task={"id": "t"}))
    assert bare == {"type": "task_assignment", "data": {"task_id": "t", "task": {"id": "t"}}}
    full = json.loads(wire.assignment("t", execution_id="e", env_vars={"A": "b"}, extra={"task": None}))
    assert full["data"] == {"task_id": "t", "execution_id": "e", "env_vars": {"A": "b"}, "task": None}


def test_the_judge_and_the_worker_know_the_same_reasons() -> None:
    assert {reason.value for reason in Reason} == wire.REASONS
    assert {refusal.wire for refusal in Refusal} == wire.REJECTIONS
