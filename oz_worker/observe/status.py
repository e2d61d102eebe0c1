"""`status`, `drain` and `logs`: what a running worker wrote down, read from beside it.

There is no control socket: facts come from the database (read-only), the lock says which process holds them, and
`drain` is a USR1 to that process.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence, TypeVar

from oz_worker import rows, slots
from oz_worker.engine import disk, gate
from oz_worker.engine.disk import DiskGuard
from oz_worker.engine.notes import INTAKE
from oz_worker.errors import ExitCode, NotUsable
from oz_worker.lifecycle import FINAL
from oz_worker.observe import explain
from oz_worker.observe.logs import lines_of
from oz_worker.process import read_stat
from oz_worker.rows import TaskRow
from oz_worker.slots import Holder
from oz_worker.store import peek
from oz_worker.timing import Deadline, format_duration

CHECK_SECONDS = 0.1
T = TypeVar("T")
SHOWN = 10
"""So many rejections are shown to people; `--json` has all that are kept."""


def status_command(
    state_dirs: Sequence[str], *, instance_id: str, all_instances: bool, as_json: bool, explained: bool = False
) -> int:
    """Print what runs, since when, what waits to be delivered, and how the link is; with *explained* also why no task
    is taken and what was rejected. 3 when no worker runs."""
    accounts = [account_of(path, explained=explained) for path in _chosen(state_dirs, instance_id)]
    shown = [account for account in accounts if account["running"] or all_instances]
    if as_json:
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    else:
        sys.stdout.write("".join(map(_for_people, shown)))
    if any(account["running"] for account in accounts):
        return ExitCode.STOPPED
    which = f" with the instance id {instance_id}" if instance_id else ""
    raise NotUsable(
        f"no worker{which} runs in {_named(state_dirs)}; start one, or name its configuration with --config-file or its"
        " directory with --state-dir"
    )


def explain_command(state_dirs: Sequence[str], *, task_id: str, instance_id: str, as_json: bool) -> int:
    """Print what is known of a task: where it stands, what it waits for, why it was rejected. 3 if that is nothing."""
    attempts: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    unread: list[str] = []
    for path in _chosen(state_dirs, instance_id):
        running = _holder(path) is not None
        read = peek(path / "state.db", lambda db: (rows.tasks_of(db, task_id), rows.reports(db), _facts(db)))
        if read is None:
            unread += [str(path / "state.db")]
            continue
        found, waiting, facts = read
        rejected += explain.rejections(facts, rows.storable(task_id))
        for row in found:
            about = {"instance": path.name, "execution_id": row.key.execution_id, "attempt": row.attempt}
            about |= {"state": row.state.value, "running": running}
            attempts.append({**about, "sentences": explain.of_task(row, waiting, facts, running=running)})
    if unread and not attempts and not rejected:
        raise NotUsable(
            f"what is known of task {task_id} cannot be read from {' or '.join(unread)}; ask as the worker's user, or"
            " start the worker, which sets a damaged database aside"
        )
    if not attempts and not rejected:
        raise NotUsable(
            f"nothing is known of task {task_id} in {_named(state_dirs)}: it was not offered to a worker here (its id"
            " and the worker's, case included?), or that was long ago, or the disk was full then, or another directory"
            " is meant (--config-file, --state-dir)"
        )
    if as_json:
        answer = {"task_id": task_id, "attempts": attempts, "rejections": rejected}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
        return ExitCode.STOPPED
    for attempt in attempts:
        name = lines_of("/".join(filter(None, (task_id, attempt["execution_id"]))))
        lines = "".join(f"  {lines_of(sentence)}\n" for sentence in attempt["sentences"])
        sys.stdout.write(f"task {name}, attempt {attempt['attempt']} ({attempt['instance']}):\n{lines}")
    sys.stdout.write("".join(f"{lines_of(explain.of_rejection(one))}\n" for one in rejected))
    return ExitCode.STOPPED


def drain_command(
    state_dirs: Sequence[str], *, instance_id: str, all_instances: bool, as_json: bool, wait: float
) -> int:
    """Tell running workers to finish what they have and leave; with *wait* seconds, until they have left."""
    held = [(path, found) for path in _chosen(state_dirs, instance_id) if (found := _holder(path)) is not None]
    if not held:
        raise NotUsable(
            f"no worker runs in {_named(state_dirs)}; there is nothing to drain, unless another one is meant"
            " (--config-file, --state-dir)"
        )
    if len(held) > 1 and not all_instances:
        names = ", ".join(path.name for path, _found in held)
        raise NotUsable(f"several workers run here ({names}); choose one with --instance-id, or drain them with --all")
    for path, found in held:
        _check_reachable(path, found)
        os.kill(found.pid, signal.SIGUSR1)
    left = _await_end([path for path, _found in held], wait)
    answer = [{"instance": path.name, "pid": found.pid, "left": path not in left} for path, found in held]
    if as_json:
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        for entry in answer:
            said = "has drained and left" if entry["left"] else "is draining"
            sys.stdout.write(f"worker {entry['pid']} ({entry['instance']}) {said}\n")
    return ExitCode.FAULT if wait and left else ExitCode.STOPPED


def logs_command(state_dirs: Sequence[str], *, task_id: str, instance_id: str) -> int:
    """Print the redacted output of an ended task, or say where a running one writes."""
    for path in _chosen(state_dirs, instance_id):
        for row in reversed(peek(path / "state.db", lambda db: rows.tasks_of(db, task_id)) or []):
            from oz_worker.engine.output import copy_name

            copy = path / "logs" / copy_name(row)
            raw = path / "units" / row.unit / "output.log"
            if copy.is_file():
                _print_file(copy)
                return ExitCode.STOPPED
            if raw.is_file():
                sys.stdout.write(f"task {task_id} is {row.state.value}; it writes to {raw} (not redacted)\n")
                return ExitCode.STOPPED
            if (command := _shows(row)) and raw.parent.is_dir():
                shows = f"`{command}` shows its output (not redacted)"
                sys.stdout.write(f"task {task_id} is {row.state.value}; {shows}\n")
                return ExitCode.STOPPED
    raise NotUsable(
        f"no output of task {task_id} is kept in {_named(state_dirs)}; it ends with task_log_retention,"
        " or it was written by another worker (--config-file, --state-dir, --instance-id)"
    )


def _shows(row: TaskRow) -> str:
    """The command that shows the output of a task that runs elsewhere, "" for one of this host."""
    if row.backend == "docker":
        return f"{row.endpoint.partition(' ')[0]} logs -f oz-{row.unit}"
    if row.backend == "kubernetes":
        from oz_worker.backends.job_object import job_name

        return f"kubectl --namespace={row.endpoint.split()[2]} logs --follow job/{job_name(row.key)} --container=task"
    return ""


def _named(state_dirs: Sequence[str]) -> str:
    return " or ".join(state_dirs) or "any of the usual places of this user"


def _chosen(state_dirs: Sequence[str], instance_id: str) -> list[Path]:
    paths = [path for state_dir in state_dirs for path in slots.instances(Path(state_dir))]
    return [path for path in paths if instance_id in ("", path.name)]


def _holder(path: Path) -> Holder | None:
    try:
        return slots.holder(path)
    except (OSError, ValueError, KeyError) as error:
        raise NotUsable(f"{path}/lock cannot be read ({error}); ask as the user who runs the worker") from None


def _check_reachable(path: Path, found: Holder) -> None:
    """Rule 4: never signal a number that may mean another process here."""
    if slots.reachable(found):
        return
    raise NotUsable(
        f"the worker of {path} is process {found.pid} of another container or host; run this there, for example"
        " docker exec CONTAINER python -m oz_worker drain"
    )


def _await_end(paths: list[Path], wait: float) -> list[Path]:
    deadline = Deadline(wait)
    left = paths
    while left and not deadline.passed():
        time.sleep(min(CHECK_SECONDS, deadline.left()))
        left = [path for path in left if path.exists() and not slots.unlocked(path)]
    return left


def _facts(db: sqlite3.Connection) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in rows.facts(db).items()}


def account_of(path: Path, *, explained: bool = False) -> dict[str, Any]:
    """What is known of the instance in *path*, as `--json` prints it. Read from beside it, from any thread."""
    found = _holder(path)
    account: dict[str, Any] = {"instance": path.name, "directory": str(path), "running": found is not None}
    if found is not None:
        account["pid"] = found.pid
        account["reachable"] = slots.reachable(found)
    read = peek(path / "state.db", lambda db: (rows.reports(db), rows.open_tasks(db), _facts(db)))
    if read is None:
        account["trouble"] = (
            "the database cannot be read: ask as the worker's user; one that is damaged is set aside, and what can be"
            " saved of it is, when the worker is started again"
        )
        if explained and found is not None:
            account["explain"] = {"ready": False, "why_not": [account["trouble"]], "full": "", "rejections": []}
        return account
    waiting, tasks, facts = read
    said = facts
    if found is not None and not _is_of(facts.get("worker", {}), found):  # it starts, and has not written any yet
        said = {name: fact for name, fact in facts.items() if name not in ("link", "stop", INTAKE)}
    full = found is not None and disk.full(path)
    if found is not None and (trouble := _standstill(found) or explain.silence(said, full=full)):
        account["trouble"] = trouble
    if explained and found is not None:
        why_not = [account["trouble"]] if "trouble" in account else []
        start = facts.get("start", {})
        starting = gate.starting(start.get("why", "") if _is_of(start, found) else "")
        if said is facts:
            why_not += explain.why_not_ready(said, _low(said))
        elif not full:  # else it may have been connected for long, and could not write that
            why_not.append(starting)
        told = {"full": explain.full(said), "rejections": explain.rejections(facts)}
        account["explain"] = {"ready": not why_not, "why_not": why_not, **told}
    facts = said
    account["facts"] = {name: fact for name, fact in facts.items() if name not in explain.NOTED}
    account["tasks"] = [_task(row) for row in tasks if row.state not in FINAL]
    undelivered = [time.time() - report.created_at for report in waiting if not report.held]
    oldest = round(max(0.0, *undelivered), 1) if undelivered else 0.0
    account["outbox"] = {"undelivered": len(undelivered), "oldest_seconds": oldest}
    return account


def _low(facts: explain.Facts) -> str:
    """What the worker itself sees at its disks, "" where it has not said which they are."""
    worker = facts.get("worker", {})
    if "disks" not in worker:  # an older worker
        return ""
    least = {"min_free": int(worker["min_free_disk"]), "min_inodes": int(worker["min_free_inodes"])}
    return DiskGuard(tuple(map(Path, worker["disks"])), **least).trouble()


def _is_of(fact: Mapping[str, Any], found: Holder) -> bool:
    """Whether the process that holds the instance has written this fact, and none before it."""
    return (fact.get("pid"), fact.get("start_ticks")) == (str(found.pid), str(found.start_ticks))


def _standstill(found: Holder) -> str:
    """A sentence about a process that somebody has stopped."""
    stat = read_stat(found.pid) if slots.reachable(found) else None
    if stat is None or stat.state not in ("T", "t"):
        return ""
    return f"process {found.pid} is stopped (SIGSTOP, or a debugger); `kill -CONT {found.pid}` lets it go on"


def _task(row: TaskRow) -> dict[str, Any]:
    return {
        "task_id": row.key.task_id,
        "execution_id": row.key.execution_id,
        "state": row.state.value,
        "ending_because": row.cause.value if row.cause else "",
        "unit": row.unit,
        "seconds": round(time.time() - row.accepted_at, 1),
        "deadline_in_seconds": round(row.deadline_at - time.time(), 1) if row.deadline_at else None,
    }


def _for_people(account: dict[str, Any]) -> str:
    worker = account.get("facts", {}).get("worker", {})
    who = f"pid {account['pid']}" if account["running"] else "not running"
    name = f"worker {worker['worker_id']} ({account['instance']})" if worker else f"worker in {account['directory']}"
    lines = [f"{name}: {who}" + (f", backend {worker['backend']}" if "backend" in worker else "")]
    if account.get("trouble") and not account.get("explain"):
        lines.append(f"  {account['trouble']}")
    if "tasks" in account:  # its database could be read
        lines += _written_down(account)
    if (explained := account.get("explain")) is not None:
        full = f"  takes no task: all slots are taken, {explained['full']}" if explained["full"] else "  takes tasks"
        lines += [f"  takes no task: {lines_of(why)}" for why in explained["why_not"]] or [full]
        lines += [f"  {lines_of(explain.of_rejection(one))}" for one in explained["rejections"][-SHOWN:]]
    return "\n".join(lines) + "\n"


def _written_down(account: dict[str, Any]) -> Iterator[str]:
    facts = account["facts"]
    worker, link, stop = facts.get("worker", {}), facts.get("link", {}), facts.get("stop", {})
    if account["running"] and link:
        yield f"  link: {lines_of(explain.of_link(link))}"
    if account["running"] and stop.get("step", "running") != "running":
        yield f"  stopping: {stop['step']}"
    outbox = account["outbox"]
    if outbox["undelivered"]:
        yield f"  {outbox['undelivered']} reports undelivered, the oldest for {outbox['oldest_seconds']} s"
    if account["running"] and (lost := explain.of_log(facts.get("log", {}))):
        yield f"  {lines_of(lost)}"
    tasks = account["tasks"]
    yield f"  {len(tasks)} tasks" + (f" of at most {worker['limit']}" if worker.get("limit", "0") != "0" else "")
    for task in tasks:
        name = lines_of("/".join(filter(None, (task["task_id"], task["execution_id"]))))
        why = f" ({task['ending_because']})" if task["ending_because"] else ""
        yield f"    {name}: {task['state']}{why} for {format_duration(max(0.0, task['seconds']))}"


def _print_file(path: Path) -> None:
    with path.open("rb") as source:
        while chunk := source.read(65536):
            sys.stdout.buffer.write(chunk)
    sys.stdout.flush()
