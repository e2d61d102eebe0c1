"""`status --explain`: why no task is taken, what was rejected, and what a task waits for, from what is written down.

Pure: facts in, sentences out. The worker writes the facts every few seconds (`engine.notes`), so an answer may be five
seconds old.
"""

from __future__ import annotations

import time
from typing import Any, Mapping, Sequence

from oz_worker.engine import gate
from oz_worker.engine.notes import BEAT_SECONDS, INTAKE, REJECTIONS, REPAIRED, WAITS
from oz_worker.lifecycle import FINAL, State
from oz_worker.rows import OutboxRow, TaskRow
from oz_worker.timing import format_duration

Facts = Mapping[str, Mapping[str, Any]]
NOTED = (INTAKE, REJECTIONS, REPAIRED, WAITS, "start")
"""The facts that only an explanation shows."""
SILENT_SECONDS = 3 * BEAT_SECONDS
"""After that a worker should have written again, also one that is busy removing much."""

_DOING = {
    State.ACCEPTED: "accepted",
    State.PREPARING: "being prepared",
    State.RUNNING: "running",
    State.CANCELLING: "being cancelled",
    State.ENDING: "over, and being cleaned up",
}
_BECAUSE = {"cancel": "the server cancelled it", "shutdown": "the worker stops", "deadline": "task_timeout has passed"}


def why_not_ready(facts: Facts, low: str = "") -> list[str]:
    """The sentences of `/readyz` about the running worker with these *facts*; empty when it is ready.

    *low*: which of its disks has no room, where somebody has looked just now.
    """
    step = facts.get("stop", {}).get("step", "running")
    troubles = list(facts.get(INTAKE, {}).get("troubles", []))
    if low and not any(why.startswith(gate.DISK) for why in troubles):  # it may not have been able to write that down
        troubles.insert(0, gate.DISK + low)
    return gate.why_not_ready(step, facts.get("link", {}), troubles)


def full(facts: Facts) -> str:
    """How many tasks there are when there is room for no more, "" while there is."""
    return str(facts.get(INTAKE, {}).get("full", ""))


def silence(facts: Facts, *, full: bool = False) -> str:
    """A sentence about a worker that has written nothing down for too long, or for a while on a disk that is *full*."""
    at = facts.get(INTAKE, {}).get("at")
    if full and not isinstance(at, (int, float)):
        return "its disk is full, so it could not write down how it is; free some space"
    if isinstance(at, (int, float)) and full:
        return f"its disk is full, so what stands here may be {_ago(at)} old; free some space"
    if not isinstance(at, (int, float)) or time.time() - at < SILENT_SECONDS:
        return ""
    return (
        f"it has written nothing down for {_ago(at)}, so what stands here may be old: its disk is full, it hangs, or is"
        " busy removing much; its log says more, with all stacks after a USR2 to its process"
    )


def of_link(link: Mapping[str, Any]) -> str:
    """The state of the link, since when, why, when it was tried last, and when it is tried again."""
    text = f"{link.get('state', 'unknown')} for {_ago(link.get('at'))}"
    if why := link.get("why"):
        text += f" ({why})"
    if tried := link.get("tried_at"):
        text += f"; tried {_ago(float(tried))} ago"
    if not link.get("again_at"):
        return text
    left = float(link["again_at"]) - time.time()
    return f"{text}; next try in {format_duration(left)}" if left > 0 else f"{text}; the next try is due"


def of_log(log: Mapping[str, Any]) -> str:
    """Whether its log has lost lines, how many, when and why; "" while it has not."""
    if not log.get("dropped"):
        return ""
    return f"its log lost {log['dropped']} lines since it started, the last {_ago(log.get('at'))} ago: {log['why']}"


def rejections(facts: Facts, task_id: str = "") -> list[dict[str, Any]]:
    """The last rejections, of one task or of all, oldest first."""
    return [one for one in facts.get(REJECTIONS, {}).get("last", []) if task_id in ("", one["task_id"])]


def of_rejection(one: Mapping[str, Any]) -> str:
    """One rejection, in a sentence."""
    name = "/".join(filter(None, (one["task_id"], one["execution_id"])))
    why = f" ({one['why']})" if one["why"] else ""
    return f"task {name} was rejected {_ago(one['at'])} ago: {one['reason']}{why}"


def of_task(row: TaskRow, reports: Sequence[OutboxRow], facts: Facts, *, running: bool) -> list[str]:
    """What is known of one attempt: where it stands, what it waits for, what is still to be delivered."""
    sentences = [_standing(row)]
    if row.state not in FINAL and not running:
        sentences.append("no worker serves it just now: it goes on, or its end is reported, when one is started")
    elif row.state not in FINAL:
        sentences.append(_waiting(row, facts))
    if row.deadline_at and row.state not in FINAL:
        sentences.append(f"task_timeout ends it in {format_duration(max(0.0, row.deadline_at - time.time()))}")
    sentences += _delivery(row, reports, facts, running=running)
    return sentences


def _standing(row: TaskRow) -> str:
    if row.state not in FINAL:
        since = row.started_at or row.accepted_at
        if row.state is State.ENDING:
            since = row.ended_at or since
        why = f", because {_BECAUSE[row.cause.value]}" if row.cause else ""
        return f"it is {_DOING[row.state]} for {_ago(since)}{why}"
    if row.state is State.DISPATCHED:
        return f"it was handed to dispatch_command {_ago(row.ended_at)} ago; what becomes of it, the server hears there"
    code = f", exit code {row.exit_code}" if row.exit_code else ""
    reason = f" ({row.reason}{code})" if row.result == "failed" else ""
    return f"it ended {_ago(row.ended_at)} ago: {row.result or 'unknown'}{reason}"


def _waiting(row: TaskRow, facts: Facts) -> str:
    state, told = facts.get(WAITS, {}).get("units", {}).get(row.unit, ("", ""))
    if state == row.state.value:
        return f"it waits for {told}"
    if row.state is State.RUNNING:
        return "it waits for nothing but the end of its agent"
    return "it waits for nothing that takes long"


def _delivery(row: TaskRow, reports: Sequence[OutboxRow], facts: Facts, *, running: bool) -> list[str]:
    """What the server has not confirmed yet."""
    sentences = []
    for report in reports:
        if report.unit != row.unit:
            continue
        what = f"its report ({report.kind.value})"
        if report.held:
            sentences.append(f"{what} is written and leaves when its clean-up is done")
            continue
        waits = f"{what} waits for {_ago(report.created_at)} to be delivered to {report.origin}"
        sentences.append(f"{waits}; the link: {of_link(facts.get('link', {}))}" if running else waits)
    if not sentences and row.state in FINAL and row.report_acked:
        sentences.append("the server has read its report")
    if not row.claim_acked and row.state not in FINAL and not sentences:
        sentences.append("the server has not confirmed yet that it knows of it")
    return sentences


def _ago(at: object) -> str:
    """How long ago a moment is; `?` for none."""
    if not isinstance(at, (int, float)):
        return "?"
    return format_duration(float(max(0, round(time.time() - at))))
