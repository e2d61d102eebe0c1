"""Frames nothing can be done about fall into few kinds, and say nothing of their content."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oz_worker.dialects.oz.frames import Refused, decode


def frame(data: Any, kind: str = "task_assignment") -> str:
    return json.dumps({"type": kind, "data": data})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "not_json"),
        ("{", "not_json"),
        ("\ufeff{}", "not_json"),
        ('{"type":"a\nb"}', "not_json"),
        ("[" * 200_000, "too_deep"),
        ('{"a":' * 200_000, "too_deep"),
        ("[]", "not_object"),
        ("NaN", "not_object"),
        ('"x"', "not_object"),
        ("{}", "no_type"),
        ('{"type":5}', "no_type"),
        (frame({}, "heartbeat"), "unknown_type"),
        (frame(None), "no_task_id"),
        (frame([]), "no_task_id"),
        ('{"type":"task_assignment"}', "no_task_id"),
        (frame({"task_id": ""}), "no_task_id"),
        (frame({"task_id": 5, "task": {}}), "no_task_id"),
        (frame({"task_id": "\ud800", "task": {}}), "no_task_id"),
        (frame({"task_id": "t" * 1025, "task": {}}), "no_task_id"),
        (frame({}, "task_cancellation"), "no_task_id"),
        (frame({"task_id": "t", "execution_id": 1}, "task_cancellation"), "bad_execution_id"),
    ],
)
def test_a_frame_without_use_is_of_one_kind_and_shows_no_value(text: str, kind: str) -> None:
    refused = decode(text)
    assert isinstance(refused, Refused)
    assert refused.kind == kind
    assert refused.detail.isprintable()
    assert len(refused.detail) < 120


def test_the_name_of_an_unknown_type_is_short_and_on_one_line() -> None:
    refused = decode(frame({}, "x\n" * 1000))
    assert isinstance(refused, Refused)
    assert refused.detail.isprintable()
    assert len(refused.detail) < 120
