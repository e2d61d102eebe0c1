"""Where lines of the log go: stderr, or a file that others may move, remove or fill up."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time

from oz_worker.errors import NotUsable

LOOK_SECONDS = 1.0


class LogFile:
    """Belongs to the log's thread, but for `open` (before it starts) and `reopen` (from any). Raises nothing else.

    A file that was moved away or removed is noticed within a second of writing and made anew, with HUP or without.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = 2
        self._regular = False
        self._reopen = False
        self._next_look = 0.0
        self._torn = False  # a line was written in part
        self._stuck = False  # the last try to open the file anew failed, and that was said
        self.trouble = ""  # what nobody has been told yet: why lines are lost, or go on into the old file

    def open(self) -> None:
        """Raises NotUsable."""
        if not self._path:
            return
        try:
            self._take(_open(self._path))
        except OSError as error:
            raise NotUsable(
                f"log_file {self._path} cannot be opened ({error.strerror}); name a file that this user may write, or"
                " leave log_file out for stderr"
            ) from None

    def reopen(self) -> None:
        """Open the file anew with the next line."""
        self._reopen = True

    def write(self, text: str) -> bool:
        """Write *text*, waiting for its reader; False when it is lost, `trouble` says why."""
        if self._path and (self._reopen or self._gone()):
            self._reopen = False
            self._replace()
        raw = (("\n" if self._torn else "") + text).encode("utf-8", "backslashreplace")
        left = raw
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # a FIFO that is full, or somebody made our stderr non-blocking
                time.sleep(0.05)
            except OSError as error:  # closed, or its disk is full: the line is lost, the worker goes on
                self.trouble = f"{self._path or 'stderr'} cannot be written ({error.strerror})"
                self._torn = self._torn or len(left) < len(raw)
                return False
        self._torn = False
        return True

    def aside(self, text: str) -> None:
        """Say *text* on stderr, where the log goes elsewhere and if that has room just now: nothing waits for it."""
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(2, select.POLLOUT)
            if self._path and poll.poll(0):
                os.write(2, text.encode("utf-8", "backslashreplace")[: select.PIPE_BUF])  # what a pipe takes whole

    def _gone(self) -> bool:
        if not self._regular or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_SECONDS
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True
        except OSError:
            return False  # its directory cannot be looked at now

    def _replace(self) -> None:
        try:
            fresh = _open(self._path)
        except OSError as error:
            if not self._stuck:
                self.trouble = (
                    f"the log file {self._path} cannot be opened anew ({error.strerror}); the old one is used"
                )
            self._stuck = True
            return
        self._stuck = False
        os.close(self._descriptor)
        self._take(fresh)
        self._torn = False

    def _take(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)


def _open(path: str) -> int:
    """Never waits for the reader of a FIFO: without one it cannot be opened."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
