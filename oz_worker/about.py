"""What a thread is busy with: the task and the connection that its lines in the log are about.

Set once, at the top of a task's thread and when a connection opens, and read by the log. A line that names a task by
its `Key` is about that one, on whatever thread.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Optional

from oz_worker.model import Key

TASK: ContextVar[Optional[Key]] = ContextVar("task", default=None)
CONNECTION: ContextVar[str] = ContextVar("connection", default="")
EVERY = {"every": True}
"""`extra=EVERY`: a line that is never held back, however many there are of its kind."""
