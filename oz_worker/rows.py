"""The rows of the database and the SQL that reads and writes them. Nothing here holds a secret.

Every function takes the connection of a transaction that runs on the store's thread.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Iterable

from oz_worker.lifecycle import FINAL, State
from oz_worker.model import Cause, Key, ReportKind

SCHEMA = (
    """CREATE TABLE tasks (
        task_id TEXT NOT NULL, execution_id TEXT NOT NULL, attempt INTEGER NOT NULL,
        unit TEXT NOT NULL PRIMARY KEY,          -- deterministic name of what runs outside
        state TEXT NOT NULL, cause TEXT,         -- cause: why we end it ourselves; the first one stays
        origin TEXT NOT NULL,                    -- the server it came from: its report goes nowhere else
        backend TEXT NOT NULL, endpoint TEXT NOT NULL, uid INTEGER NOT NULL,
        accepted_at REAL NOT NULL, deadline_at REAL, started_at REAL, ended_at REAL, keep_until REAL,
        claim_acked INTEGER NOT NULL, agent_started INTEGER NOT NULL, report_acked INTEGER NOT NULL,
        closed INTEGER NOT NULL,                 -- execution_closed was put into the outbox
        result TEXT, reason TEXT, exit_code INTEGER, frame TEXT, remains TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX tasks_by_key ON tasks (task_id, execution_id, attempt)",
    "CREATE INDEX tasks_open ON tasks (state) WHERE state NOT IN ('ended', 'dispatched')",
    """CREATE TABLE outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        unit TEXT NOT NULL, task_id TEXT NOT NULL, execution_id TEXT NOT NULL, kind TEXT NOT NULL,
        origin TEXT NOT NULL, frame TEXT NOT NULL, held INTEGER NOT NULL, created_at REAL NOT NULL
    )""",
    "CREATE TABLE facts (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
)
"""Version 1. A later version appends its own tuple to `store.MIGRATIONS`; nothing here ever changes."""


UNTIL_HEARD = float("inf")
"""In `keep_until`: what is left of the unit goes once its report is acknowledged."""


@dataclass
class TaskRow:
    """One attempt of a task: the mirror in memory of its row. Changed on the store's thread only."""

    key: Key
    attempt: int
    unit: str
    origin: str
    backend: str
    endpoint: str
    uid: int
    accepted_at: float
    state: State = State.ACCEPTED
    cause: Cause | None = None
    deadline_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    keep_until: float | None = None
    claim_acked: bool = False
    agent_started: bool = False
    report_acked: bool = False
    closed: bool = False
    result: str = ""
    reason: str = ""
    exit_code: int | None = None
    frame: str = ""
    remains: str = ""


@dataclass
class OutboxRow:
    """A report on its way, durable before it is sent. `held`: fixed, but not to be sent before the teardown."""

    unit: str
    key: Key
    kind: ReportKind
    origin: str
    frame: str
    held: bool
    created_at: float
    id: int = 0


_COLUMNS = (
    "task_id, execution_id, attempt, unit, state, cause, origin, backend, endpoint, uid, accepted_at, deadline_at,"
    " started_at, ended_at, keep_until, claim_acked, agent_started, report_acked, closed, result, reason, exit_code,"
    " frame, remains"
)
_SAVE = f"INSERT OR REPLACE INTO tasks ({_COLUMNS}) VALUES ({', '.join('?' * len(_COLUMNS.split(',')))})"


def save_task(db: sqlite3.Connection, row: TaskRow) -> None:
    """Write the whole row as it stands in memory. Idempotent, so that a failed write can be made good later."""
    db.execute(
        _SAVE,
        (
            storable(row.key.task_id),
            storable(row.key.execution_id),
            row.attempt,
            row.unit,
            row.state.value,
            row.cause.value if row.cause else None,
            row.origin,
            row.backend,
            row.endpoint,
            row.uid,
            row.accepted_at,
            row.deadline_at,
            row.started_at,
            row.ended_at,
            row.keep_until,
            row.claim_acked,
            row.agent_started,
            row.report_acked,
            row.closed,
            row.result,
            row.reason,
            row.exit_code,
            row.frame,
            storable(row.remains),
        ),
    )


def latest_attempt(db: sqlite3.Connection, key: Key) -> TaskRow | None:
    """The newest attempt of *key*, None when the key is unknown."""
    found = db.execute(
        f"SELECT {_COLUMNS} FROM tasks WHERE task_id = ? AND execution_id = ? ORDER BY attempt DESC LIMIT 1",
        (storable(key.task_id), storable(key.execution_id)),
    ).fetchone()
    return _task(found) if found else None


def open_tasks(db: sqlite3.Connection) -> list[TaskRow]:
    """All attempts with something left to do, oldest first."""
    return _tasks(db, "state NOT IN ('ended', 'dispatched') ORDER BY accepted_at", ())


def settled_with_rest(db: sqlite3.Connection) -> list[TaskRow]:
    """Attempts in a final state about which something is left to say or to do."""
    return _tasks(
        db,
        "(state = 'ended' AND report_acked = 0) OR (state = 'dispatched' AND (claim_acked = 0 OR cause = 'cancel'))"
        " OR unit IN (SELECT unit FROM outbox) ORDER BY accepted_at",
        (),
    )


def of_unit(db: sqlite3.Connection, unit: str) -> TaskRow | None:
    """The attempt that runs, or ran, as *unit*."""
    found = _tasks(db, "unit = ?", (unit,))
    return found[0] if found else None


def add_missing(db: sqlite3.Connection, row: TaskRow) -> None:
    """Write *row* unless its unit is known already."""
    if of_unit(db, row.unit) is None:
        save_task(db, row)


def closed_tasks(db: sqlite3.Connection) -> list[TaskRow]:
    """All attempts in a final state, oldest first."""
    return _tasks(db, "state IN ('ended', 'dispatched') ORDER BY accepted_at", ())


def tasks_of(db: sqlite3.Connection, task_id: str) -> list[TaskRow]:
    """Every attempt of every execution of *task_id*, oldest first."""
    return _tasks(db, "task_id = ? ORDER BY accepted_at", (storable(task_id),))


def kept_past(db: sqlite3.Connection, now: float) -> list[TaskRow]:
    """Ended attempts whose unit was kept until a moment that has passed."""
    return _tasks(db, "state IN ('ended', 'dispatched') AND keep_until > 0 AND keep_until <= ?", (now,))


def forget_ended(db: sqlite3.Connection, before: float) -> int:
    """Delete acknowledged final rows older than *before* whose unit is not kept; the count."""
    cursor = db.execute(
        "DELETE FROM tasks WHERE state IN ('ended', 'dispatched') AND coalesce(ended_at, accepted_at) < ?"
        " AND keep_until IS NULL AND unit NOT IN (SELECT unit FROM outbox)",
        (before,),
    )
    return cursor.rowcount


def add_report(db: sqlite3.Connection, row: OutboxRow) -> int:
    """Append a report; its id, which is never used again."""
    cursor = db.execute(
        "INSERT INTO outbox (unit, task_id, execution_id, kind, origin, frame, held, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.unit,
            storable(row.key.task_id),
            storable(row.key.execution_id),
            row.kind.value,
            row.origin,
            row.frame,
            row.held,
            row.created_at,
        ),
    )
    return int(cursor.lastrowid or 0)


def release_report(db: sqlite3.Connection, report_id: int) -> None:
    """Let a held report go."""
    db.execute("UPDATE outbox SET held = 0 WHERE id = ?", (report_id,))


def delete_reports(db: sqlite3.Connection, report_ids: Iterable[int]) -> None:
    """Forget acknowledged reports."""
    db.executemany("DELETE FROM outbox WHERE id = ?", [(report_id,) for report_id in report_ids])


_REPORTS = "SELECT unit, task_id, execution_id, kind, origin, frame, held, created_at, id FROM outbox"


def reports(db: sqlite3.Connection) -> list[OutboxRow]:
    """All reports that are not acknowledged, in the order in which they were fixed."""
    return [_report(found) for found in db.execute(f"{_REPORTS} ORDER BY id").fetchall()]


def report_by_id(db: sqlite3.Connection, report_id: int) -> OutboxRow | None:
    """One report, for salvage from a damaged file."""
    found = db.execute(f"{_REPORTS} WHERE id = ?", (report_id,)).fetchone()
    return _report(found) if found else None


def put_fact(db: sqlite3.Connection, name: str, value: str) -> None:
    """Write one fact for `status`."""
    db.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))


def facts(db: sqlite3.Connection) -> dict[str, str]:
    """All facts for `status`."""
    return dict(db.execute("SELECT name, value FROM facts").fetchall())


def _report(found: tuple[Any, ...]) -> OutboxRow:
    unit, task_id, execution_id, kind, origin, frame, held, created_at, report_id = found
    return OutboxRow(
        str(unit),
        Key(task_id, execution_id),
        ReportKind(kind),
        str(origin),
        str(frame),
        bool(held),
        created_at,
        report_id,
    )


def _tasks(db: sqlite3.Connection, where: str, values: tuple[object, ...]) -> list[TaskRow]:
    query = f"SELECT {_COLUMNS} FROM tasks WHERE {where}"
    return [_task(found) for found in db.execute(query, values).fetchall()]


def _task(found: tuple[object, ...]) -> TaskRow:
    (task_id, execution_id, attempt, unit, state, cause, origin, backend, endpoint, uid, *rest) = found
    (accepted, deadline, started, ended, keep, claim, agent, report, closed, result, reason, code, frame, remains) = (
        rest
    )
    return TaskRow(
        key=Key(str(task_id), str(execution_id)),
        attempt=int(str(attempt)),
        unit=str(unit),
        origin=str(origin),
        backend=str(backend),
        endpoint=str(endpoint),
        uid=int(str(uid)),
        accepted_at=float(str(accepted)),
        state=State(state),
        cause=Cause(cause) if cause else None,
        deadline_at=_real(deadline),
        started_at=_real(started),
        ended_at=_real(ended),
        keep_until=_real(keep),
        claim_acked=bool(claim),
        agent_started=bool(agent),
        report_acked=bool(report),
        closed=bool(closed),
        result=str(result or ""),
        reason=str(reason or ""),
        exit_code=int(str(code)) if code is not None else None,
        frame=str(frame or ""),
        remains=str(remains),
    )


def _real(value: object) -> float | None:
    return None if value is None else float(str(value))


def storable(value: str) -> str:
    """SQLite takes no lone surrogates; the id of a refused assignment may hold one."""
    return value.encode("utf-8", "backslashreplace").decode()


assert {"ended", "dispatched"} == {state.value for state in FINAL}, "the SQL above names the final states"
