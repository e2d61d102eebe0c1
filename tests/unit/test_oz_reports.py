"""Frames that go out: fields by kind, bounded, byte-identical."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oz_worker.dialects.oz.reports import FRAME_BYTES, MESSAGE_BYTES, encode, shortened
from oz_worker.model import Key, Reason, Refusal, Report, ReportKind

KEY = Key("t", "e")


@pytest.mark.parametrize(
    ("report", "kind", "data"),
    [
        (Report(ReportKind.CLAIMED, KEY), "task_claimed", {"worker_id": "w"}),
        (
            Report(ReportKind.REJECTED, KEY, message=Refusal.AT_CAPACITY.wire),
            "task_rejected",
            {"reason": "worker at maximum concurrency"},
        ),
        (Report(ReportKind.COMPLETED, KEY, message="done"), "task_completed", {"message": "done"}),
        (
            Report(ReportKind.COMPLETED, KEY, message="c", cancelled=True),
            "task_completed",
            {"message": "c", "task_state": "CANCELLED"},
        ),
        (
            Report(ReportKind.FAILED, KEY, message="m", reason=Reason.AGENT_INVOCATION, exit_code=143),
            "task_failed",
            {"message": "m", "failure_reason": "agent_invocation", "exit_code": 143},
        ),
        (
            Report(ReportKind.FAILED, KEY, message="m", reason=Reason.JOB_FAILED, exit_code=0),
            "task_failed",
            {"message": "m", "failure_reason": "job_failed"},
        ),
        (Report(ReportKind.FAILED, KEY), "task_failed", {"message": "", "failure_reason": "unknown"}),
        (Report(ReportKind.CLOSED, KEY), "execution_closed", {}),
    ],
)
def test_each_kind_has_its_fields_and_the_execution_only_when_there_is_one(
    report: Report, kind: str, data: dict[str, Any]
) -> None:
    expected = {"type": kind, "data": {"task_id": "t", "execution_id": "e", **data}}
    assert json.loads(encode(report, worker_id="w")) == expected
    del expected["data"]["execution_id"]  # type: ignore[attr-defined]
    assert json.loads(encode(report._replace(key=Key("t")), worker_id="w")) == expected


def test_the_bytes_of_a_frame_are_fixed() -> None:
    report = Report(ReportKind.FAILED, KEY, message='é "x"\n\u2028', reason=Reason.UNKNOWN, exit_code=1)
    assert encode(report, worker_id="w") == (
        '{"type":"task_failed","data":{"task_id":"t","execution_id":"e",'
        '"message":"é \\"x\\"\\n\u2028","failure_reason":"unknown","exit_code":1}}'
    )


@given(st.builds(Report, st.sampled_from(ReportKind), st.builds(Key, st.text(min_size=1, max_size=300)), st.text()))
def test_every_report_becomes_small_valid_utf8_that_reads_back(report: Report) -> None:
    frame = encode(report, worker_id="w")
    assert frame == encode(report, worker_id="w")
    assert json.loads(frame.encode())["data"]["task_id"] == report.key.task_id


@pytest.mark.parametrize("filler", ["a", "é", "😀", "\x00", "\udc80"])
@pytest.mark.parametrize("offset", range(4))
def test_a_long_message_is_cut_visibly_at_a_character(filler: str, offset: int) -> None:
    longest = Key("\x01" * 1024, "\x01" * 1024)
    cut = shortened("x" * offset + filler * 100_000)
    assert len(cut.encode()) <= MESSAGE_BYTES
    assert len(cut.encode()) > MESSAGE_BYTES - 8
    assert cut.endswith(" …")
    frame = encode(Report(ReportKind.FAILED, longest, message=cut), worker_id="w")
    assert len(frame.encode()) <= FRAME_BYTES


def test_a_message_that_just_fits_is_left_alone() -> None:
    assert shortened("a" * MESSAGE_BYTES) == "a" * MESSAGE_BYTES
    assert shortened("a" * (MESSAGE_BYTES + 1)).endswith("a …")
