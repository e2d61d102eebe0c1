"""What a service manager hears (systemd's protocol of `Type=notify`): lines in a datagram on the socket it names."""

from __future__ import annotations

import logging
import os
import socket
from typing import MutableMapping

logger = logging.getLogger(__name__)

EXTEND_SECONDS = 60
"""What a start or a stop that goes on asks for beyond the manager's own limit, anew at each look of the watchdog."""
LEAST_SECONDS = 0.2
"""A manager that wants signs more often than that gets them so often."""
_MOST_DIGITS = 20
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notify:
    """The manager's ear, or nobody's. Safe from any thread; never blocks, never raises: who does not listen misses it.

    Takes its variables out of *environ*: a child that had them could speak for us.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address, period, pid = (environ.pop(name, "") for name in _VARIABLES)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._passing = True  # whether we are starting or stopping: what goes on may take its time
        self._told = ""
        meant = address and pid in ("", str(os.getpid()))
        # Longer numbers are nobody's period, and none is worth a loop that does nothing else.
        wanted = int(period) / 1e6 if meant and period.isdecimal() and len(period) < _MOST_DIGITS else 0.0
        self.watched_seconds = max(wanted, LEAST_SECONDS) if wanted else 0.0
        """How often the manager wants a sign of life of this process, 0 for never."""

    def ready(self, status: str) -> None:
        """The start is over."""
        self._passing = False
        self._send("READY=1", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """The stop begins, or takes its next step."""
        self._passing = True
        self._send("STOPPING=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """One line for people."""
        self._send(f"STATUS={status}")

    def looked(self, sound: bool) -> None:
        """At each look of the watchdog: while all threads are *sound*, say so.

        To a manager that watches another process, such as a wrapper, our life is no sign of that one's.
        """
        lines = ["WATCHDOG=1"] if self.watched_seconds else []
        lines += [f"EXTEND_TIMEOUT_USEC={EXTEND_SECONDS * 1_000_000}"] if self._passing else []
        if sound and lines:
            self._send(*lines)

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        data = "\n".join(" ".join(line.split("\n")) for line in lines).encode("utf-8", "replace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
                ear.setblocking(False)
                ear.sendto(data, self._address)
        except (OSError, ValueError) as error:
            if not self._told:
                self._told = str(error)
                logger.warning("the service manager cannot be told how it is (NOTIFY_SOCKET): %s", error)
