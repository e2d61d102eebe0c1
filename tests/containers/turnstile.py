"""A program in front of the real engine's, which holds one call until it is told to go on."""

from __future__ import annotations

import os
from pathlib import Path

from tests.rig import until

_HOLD = ': >"$HERE/held"; read -r word <"$HERE/gate"; : >"$HERE/passed"'
_CREATE = 'shift 2; "$REAL" create "$@"'
_WAYS = {
    "before": _HOLD,
    "half": f"{_CREATE} >/dev/null; {_HOLD}; exit 1",
    "after": f'"$REAL" "$@"; code=$?; {_HOLD}; exit $code',
}


class Turnstile:
    """Passes every call on to *real*, but holds the first whose command line fits *call*, a pattern of sh.

    It is held *before* the real program starts, or *after* that has ended; `run --detach` also *half* done, when the
    container is created and not started. What holds is one process that starts nothing, so that a look at the
    processes in that moment finds it. One that is not *armed* lets everything through until it is.
    """

    def __init__(self, place: Path, real: str, call: str, when: str = "before", *, armed: bool = True) -> None:
        place.mkdir()
        self._place = place
        self._open = -1
        os.mkfifo(place / "gate")
        self.program = place / "docker"
        first = f'[ -e "$HERE/armed" ] && mkdir "$HERE/taken" 2>/dev/null && {{ {_WAYS[when]}; }}'
        script = f'#!/bin/sh\nHERE={place} REAL={real}\ncase "$*" in\n{call}) {first};;\nesac\nexec "$REAL" "$@"\n'
        self.program.write_text(script)
        self.program.chmod(0o755)
        if armed:
            self.arm()

    def arm(self) -> None:
        """Hold the next call that fits."""
        (self._place / "armed").touch()

    def reached(self) -> None:
        """Block until a call is held."""
        until((self._place / "held").exists, "the call that is to be held")

    def release(self) -> None:
        """Let the held call go on, if it still lives."""
        if self._open < 0:
            self._open = os.open(self._place / "gate", os.O_RDWR)  # not write-only: that would wait for a reader
            os.write(self._open, b"go\n")

    def passed(self) -> None:
        """Block until the held call goes on."""
        until((self._place / "passed").exists, "the call that was held")

    def close(self) -> None:
        """Let go of the gate."""
        if self._open >= 0:
            os.close(self._open)
            self._open = -1
