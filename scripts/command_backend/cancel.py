"""Example `cancel_command` of the command backend: tells your runtime to end a run that it took over.

POSTs {"run_id", "execution_id"} to OZ_CANCEL_URL. Authorization, timeout and exit codes are those of dispatch.py,
which must lie beside this file. Only the standard library.
"""

from __future__ import annotations

import os
import sys

from dispatch import post


def main() -> int:
    """Send the ids that the worker put into the environment."""
    url = os.environ.get("OZ_CANCEL_URL", "")
    if not url:
        print("OZ_CANCEL_URL is not set: give it the address of your runtime", file=sys.stderr)
        return 2
    run_id = os.environ.get("OZ_RUN_ID", "")
    if not run_id:
        print("OZ_RUN_ID is not set: the worker sets it, run by hand this needs it too", file=sys.stderr)
        return 1
    problem = post(url, run_id, {"run_id": run_id, "execution_id": os.environ.get("OZ_EXECUTION_ID", "")})
    if problem:
        print(f"cancel of {run_id}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
