"""Dispatch and cancel commands of `dev --backend command`: start the agent detached on this host, end it again.

    python -I -S handover.py dispatch DIRECTORY    payload on stdin (oz.md 11); exit 0 once the agent runs
    python -I -S handover.py cancel DIRECTORY      ends the agent of OZ_RUN_ID, OZ_EXECUTION_ID

Only the standard library. DIRECTORY is private to one `dev`; each run has a directory of its own below it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 2.0
CANCELLED = "cancelled"
"""In a run's directory: the cancel command has seen the end of the agent, perhaps before its first word."""


def run_directory(root: Path, run_id: str, execution_id: str) -> Path:
    """Where a run lives; ids are foreign text, so the name is a digest."""
    return root / hashlib.sha256(f"{run_id}\0{execution_id}".encode()).hexdigest()[:16]


def dispatch(root: Path) -> int:
    """Start the agent in a session of its own and note its process id."""
    payload = json.load(sys.stdin)
    place = run_directory(root, payload["run_id"], payload.get("execution_id") or "")
    workspace = place / "workspace"
    workspace.mkdir(parents=True, mode=0o700)
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": os.environ.get("HOME", "/"), **payload["env"]}
    with open(place / "output.log", "wb") as output:
        child = subprocess.Popen(
            [str(root.parent / "bin" / "oz"), *payload["base_args"]],
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (place / "pid").write_text(str(child.pid))
    return 0


def cancel(place: Path) -> int:
    """End the group that `dispatch` started, and note that it is gone. Gone already is success."""
    try:
        pid = int((place / "pid").read_text())
    except (OSError, ValueError):
        return 0
    if not _gone(pid):
        return 1
    (place / CANCELLED).touch()
    return 0


def _gone(group: int) -> bool:
    """TERM, and KILL after a grace; whether nothing of the group runs any more."""
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            ends = time.monotonic() + GRACE_SECONDS
            if _runs(group):
                os.killpg(group, number)
            while time.monotonic() < ends and _runs(group):
                time.sleep(0.02)
        return not _runs(group)
    except (ProcessLookupError, PermissionError):
        return True


def _runs(group: int) -> bool:
    """Whether the process group has a member that is no zombie; its number is not given anew while it has any."""
    if not os.path.exists("/proc/self/stat"):
        os.killpg(group, 0)  # ProcessLookupError says no
        return True
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # ended meanwhile
        if int(member_of) == group and state != "Z":
            return True
    return False


def main() -> int:
    """Do what the first argument says."""
    root = Path(sys.argv[2])
    if sys.argv[1] == "dispatch":
        return dispatch(root)
    return cancel(run_directory(root, os.environ["OZ_RUN_ID"], os.environ.get("OZ_EXECUTION_ID", "")))


if __name__ == "__main__":
    sys.exit(main())
