"""Run the worker and kill it (SIGKILL, by itself) right before or right after its nth commit.

usage: die_at_commit.py N before|after [arguments of oz_worker ...]
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from typing import Any

from oz_worker.cli import main

LIMIT, WHEN = int(sys.argv[1]), sys.argv[2]


class Mortal(sqlite3.Connection):
    """A connection that counts commits of the worker's own database."""

    commits = 0

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql != "COMMIT":
            return super().execute(sql, parameters)
        Mortal.commits += 1
        if Mortal.commits == LIMIT and WHEN == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        cursor = super().execute(sql, parameters)
        if Mortal.commits == LIMIT:
            os.kill(os.getpid(), signal.SIGKILL)
        return cursor


original = sqlite3.connect


def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
    """The library's connect, with our connection."""
    return original(*arguments, factory=Mortal, **options)


sqlite3.connect = connect  # type: ignore[assignment]
raise SystemExit(main(sys.argv[3:]))
