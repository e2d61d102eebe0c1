"""A worker in small, to be killed: opens a direct backend, starts one unit up to a point, says so, and waits.

usage: driver.py ROOT UNTIL, where UNTIL is prepared, launched (before its word) or started.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from oz_worker.detached import Launch, launch
from tests.hosting import INSTANCE, Stage


def main(root: str, until: str) -> None:
    """Get that far, print the unit's name, and wait to be killed."""
    stage = Stage.__new__(Stage)
    stage.root, stage.opened, stage.units = Path(root), [], []
    stage.instance_dir = stage.root / "state" / INSTANCE
    stage.workspaces, stage.oz = stage.root / "workspaces", stage.root / "oz"
    setup = (stage.root / "setup").read_text() if (stage.root / "setup").exists() else ""
    backend = stage.direct(setup_command=setup, cgroup=os.environ["CGROUP"])
    environment = {"TASK_ID": "task", "TOKEN": "task-secret", "odd.name": "odd-secret"}
    mcp = '{"server":{"headers":{"key":"mcp-secret"}}}'
    unit = stage.unit(environment=environment, argv=("agent", "run", "--mcp", mcp), mcp=mcp)
    print(unit.name, flush=True)
    backend.prepare(unit)
    if until == "launched":
        directory = stage.instance_dir / "units" / unit.name
        run = backend._units.find(unit)
        assert run is not None
        launch(Launch([str(stage.oz)], {**run.environment}, str(directory)), run.directory)
    elif until == "started":
        backend.start(unit)
    print("ready", flush=True)
    time.sleep(60)


main(*sys.argv[1:])
