"""A program in the place of `docker`, for what no real engine does on demand."""

from __future__ import annotations

import os
from pathlib import Path

from oz_worker.containers import Engine


def fake_engine(place: Path, script: str, kind: str = "docker") -> Engine:
    """An engine whose program is *script*; it may use "$*", and `$HERE`, a directory of its own."""
    program = place / kind
    program.write_text(f"#!/bin/sh\nHERE={place}\n{script}\n")
    program.chmod(0o755)
    return Engine(kind, str(program), environment={"PATH": os.environ["PATH"]}, instance=place.name, timeout=30)
