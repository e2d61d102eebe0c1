"""Results for people, a line for each as it comes, and for programs, in one document."""

from __future__ import annotations

import json
from typing import Any, Sequence

from oz_worker import __version__
from oz_worker.checks.probe import Outcome, Result
from oz_worker.errors import ExitCode
from oz_worker.observe.logs import lines_of
from oz_worker.redact import Redactor

_INDENT = 31


def row(result: Result, hide: Redactor) -> str:
    """One result, with its cure below it."""
    head = f"{result.outcome.value:8} {result.name:13} {result.seconds:6.2f}s "
    text = f"{head}{lines_of(hide(result.said))}\n"
    return f"{text}{'':{_INDENT}}cure: {lines_of(hide(result.cure))}\n" if result.cure else text


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    counts = {outcome: sum(1 for each in results if each.outcome is outcome) for outcome in Outcome}
    return ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count) + "\n"


def document(results: Sequence[Result], code: int, *, worker_id: str, backend: str, hide: Redactor) -> str:
    """All results as JSON. Every key is always there; new ones may come, none changes its meaning."""
    shown: dict[str, Any] = {
        "version": __version__,
        "worker_id": worker_id,
        "backend": backend,
        "usable": code == ExitCode.STOPPED,
        "exit_code": code,
        "tests": [
            {
                "name": each.name,
                "result": each.outcome.value,
                "seconds": round(each.seconds, 3),
                "said": hide(each.said),
                "cure": hide(each.cure),
            }
            for each in results
        ],
    }
    return json.dumps(shown, indent=2) + "\n"
