"""Whole lines from the pipe of a child that runs on and on."""

from __future__ import annotations

import contextlib
import os

_PIECE = 64 * 1024


class Lines:
    """Reads a pipe without ever blocking. A line longer than *longest* bytes loses its beginning.

    One thread uses it, whenever the descriptor is readable.
    """

    def __init__(self, descriptor: int, longest: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._longest = longest
        self._rest = b""

    def read(self) -> list[bytes] | None:
        """The lines that are complete now; None at the end of the stream."""
        piece = b""
        with contextlib.suppress(BlockingIOError):
            piece = os.read(self._descriptor, _PIECE)
            if not piece:
                return None
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._rest = self._rest[-self._longest :]
        return lines
