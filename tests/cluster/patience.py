"""How long tests of a cluster wait: kubectl alone costs a tenth of a second of a core, and many share two."""

from __future__ import annotations

from typing import Any, Callable

from tests import hosting

PATIENCE = 60.0


def eventually(holds: Callable[[], Any], what: str = "") -> Any:
    """The first true value of *holds*; fails after a deadline that no healthy run comes near."""
    return hosting.eventually(holds, what, PATIENCE)
