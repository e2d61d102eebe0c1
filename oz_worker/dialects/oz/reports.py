"""Frames that go out: report to text. Pure and deterministic, so that a re-send is byte-identical."""

from __future__ import annotations

import json
from typing import Any

from oz_worker.dialects.oz.go_json import scrub
from oz_worker.model import Reason, Report, ReportKind

MESSAGE_BYTES = 4 * 1024
FRAME_BYTES = 64 * 1024
"""Kept because ids are bounded when they come in and a message grows at most sixfold when it is escaped."""

_ELLIPSIS = " …"

_TYPES = {
    ReportKind.CLAIMED: "task_claimed",
    ReportKind.REJECTED: "task_rejected",
    ReportKind.COMPLETED: "task_completed",
    ReportKind.FAILED: "task_failed",
    ReportKind.CLOSED: "execution_closed",
}


def encode(report: Report, *, worker_id: str) -> str:
    """The frame of *report* (oz.md 4.3 and 24; names.md, Wire). Of a rejection, `message` is the reason."""
    data: dict[str, Any] = {"task_id": report.key.task_id}
    if report.key.execution_id:
        data["execution_id"] = report.key.execution_id
    data.update(_particulars(report, worker_id))
    return json.dumps({"type": _TYPES[report.kind], "data": data}, ensure_ascii=False, separators=(",", ":"))


def _particulars(report: Report, worker_id: str) -> dict[str, Any]:
    if report.kind is ReportKind.CLAIMED:
        return {"worker_id": worker_id}
    if report.kind is ReportKind.CLOSED:
        return {}
    message = shortened(report.message)
    if report.kind is ReportKind.REJECTED:
        return {"reason": message}
    if report.kind is ReportKind.COMPLETED:
        return {"message": message, **({"task_state": "CANCELLED"} if report.cancelled else {})}
    reason = report.reason or Reason.UNKNOWN
    # 0 and unknown cannot be told apart on the wire: the field is absent for both.
    code = {"exit_code": report.exit_code} if report.exit_code else {}
    return {"message": message, "failure_reason": reason.value, **code}


def shortened(message: str) -> str:
    """*message* as valid text of at most MESSAGE_BYTES in UTF-8, cut visibly and never inside a character."""
    raw = scrub(message).encode()
    if len(raw) <= MESSAGE_BYTES:
        return raw.decode()
    return raw[: MESSAGE_BYTES - len(_ELLIPSIS.encode())].decode(errors="ignore") + _ELLIPSIS
