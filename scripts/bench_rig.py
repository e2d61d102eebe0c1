"""What the benchmark drives: a real worker process, a control plane in this one, and agents that say when they run.

Linux only: ends of processes are awaited with pidfds, memory and processor time are read from /proc.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import yaml

from oz_worker.devplane.connection import Connection
from oz_worker.devplane.server import ControlPlane

ROOT = Path(__file__).resolve().parents[1]
SAFETY = 120.0
"""Seconds after which the benchmark gives up on whatever it waits for."""

AGENT = """#!/bin/sh
[ -z "$BENCH_FIFO" ] || echo "$BENCH_MARK $$" >"$BENCH_FIFO"
[ -z "$BENCH_RUN" ] || eval "$BENCH_RUN"
"""


class Plane(ControlPlane):
    """The control plane of `dev`, with the arrival time of every ping."""

    def __init__(self) -> None:
        super().__init__()
        self.ping_times: list[float] = []

    def ping_received(self, connection: Connection) -> None:
        """Note the time, then do what the plane does. Requires holding the lock."""
        self.ping_times.append(time.monotonic())
        super().ping_received(connection)


class Place:
    """A temporary directory with the agent, the configuration of a worker, and the FIFO on which agents report."""

    def __init__(self, directory: Path, plane: Plane) -> None:
        self.directory = directory
        self.plane = plane
        self.agent = directory / "oz"
        self.agent.write_text(AGENT)
        self.agent.chmod(0o755)
        self.fifo = directory / "started"
        os.mkfifo(self.fifo)
        # Open for both, so that an agent never waits for a reader and the reader never sees an end.
        self._fifo = os.open(self.fifo, os.O_RDWR | os.O_CLOEXEC)
        self._starts: queue.SimpleQueue[tuple[str, int, float]] = queue.SimpleQueue()
        threading.Thread(target=self._read_starts, name="starts", daemon=True).start()
        self._log = (directory / "worker.log").open("ab")
        self.extra: Mapping[str, str] = {}
        """Further variables of the worker's environment."""

    def environment(self) -> dict[str, str]:
        """The worker's."""
        return {
            "OTEL_METRICS_EXPORTER": "none",  # else it depends on which extras are installed
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "PYTHONPATH": str(ROOT),
            "WARP_API_KEY": self.plane.key,
            **self.extra,
        }

    def marks(self, mark: str, run: str = "") -> dict[str, str]:
        """Variables that make the agent report itself as *mark* and then run *run*."""
        return {"BENCH_FIFO": str(self.fifo), "BENCH_MARK": mark, "BENCH_RUN": run}

    def started(self) -> tuple[str, int, float]:
        """The next agent that ran its first line: its mark, its process id, and when (monotonic)."""
        return self._starts.get(timeout=SAFETY)

    def start_worker(self, *, url: str = "", **settings: Any) -> subprocess.Popen[bytes]:
        """A worker on this place. Does not wait until it is connected."""
        config: dict[str, Any] = {
            "worker_id": "bench",
            "state_dir": str(self.directory / "state"),
            "backend": {
                "direct": {"workspace_root": str(self.directory / "workspaces"), "oz_path": str(self.agent)},
            },
            **settings,
        }
        path = self.directory / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "oz_worker", "--config-file", str(path)]
        command += ["--web-socket-url", url or self.plane.url, "--server-root-url", self.plane.root_url]
        return subprocess.Popen(
            command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )

    @contextlib.contextmanager
    def worker(self, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A connected worker, stopped at the end; raises when that does not end with exit code 0."""
        before = len(self.plane.connections)
        process = self.start_worker(**settings)
        try:
            self.plane.wait_connected(SAFETY, after=before)
            yield process
            terminate(process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise RuntimeError(f"the worker ended with {process.returncode}:\n{self.last_lines()}")

    def last_lines(self) -> str:
        """The end of the log of all workers of this place."""
        return "\n".join((self.directory / "worker.log").read_text().splitlines()[-20:])

    def bare_start(self, mark: str, run: str = "") -> subprocess.Popen[bytes]:
        """The same agent without a worker."""
        environment = {**self.environment(), **self.marks(mark, run)}
        null = subprocess.DEVNULL  # what is left of it must not hold our own output open
        command = [str(self.agent), "agent", "run"]
        return subprocess.Popen(command, env=environment, start_new_session=True, stdin=null, stdout=null, stderr=null)

    def _read_starts(self) -> None:
        rest = b""
        while True:
            data = os.read(self._fifo, 65536)
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                mark, pid = line.decode().split()
                self._starts.put((mark, int(pid), now))


def terminate(process: subprocess.Popen[bytes]) -> float:
    """TERM, then wait for the end; the seconds that took."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    await_ends([process.pid])
    took = time.monotonic() - began
    process.wait()
    return took


def await_ends(pids: Sequence[int]) -> None:
    """Block until all of *pids* have ended. Raises TimeoutError."""
    limit = time.monotonic() + SAFETY
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ended = poll.poll(max(0.0, limit - time.monotonic()) * 1000)
        os.close(descriptor)
        if not ended:
            raise TimeoutError(f"process {pid} still runs after {SAFETY:.0f} s")


def resident_bytes(pid: int) -> int:
    """Exact resident memory (the counters in `statm` lag behind by pages per processor)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Rss")


def processor_seconds(pid: int) -> float:
    """Time on a processor of all threads so far; `stat` counts in ticks of 10 ms, which is too coarse here."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total / 1e9


def descendants(pid: int) -> int:
    """How many processes stand below *pid*."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            parents.setdefault(int(text[text.rindex(")") + 2 :].split()[1]), []).append(int(path.parent.name))
    found, waiting = 0, [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += len(children)
        waiting += children
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that *share* of all are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered)) - 1))]


def submit(place: Place, variables: Mapping[str, str]) -> Any:
    """Queue a task whose agent gets *variables*."""
    return place.plane.submit(env_vars=variables)
