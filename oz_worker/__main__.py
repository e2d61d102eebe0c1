# -*- coding: utf-8 -*-
# Kept parsable by old Pythons: the check below must be able to say its sentence.
"""Entry point of `python -m oz_worker`: the platform first, then the command line."""

import sys


def main():  # type: () -> int
    """Refuse what cannot work in one sentence (exit 3), else hand over to the command line."""
    if sys.version_info < (3, 10):
        sys.stderr.write(
            "oz_worker needs Python 3.10 or later; this is Python %d.%d. Start it with a newer python3.\n"
            % sys.version_info[:2]
        )
        return 3
    if sys.platform == "win32":
        sys.stderr.write("oz_worker does not run on Windows; use Linux, macOS or WSL 2.\n")
        return 3
    from oz_worker.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
