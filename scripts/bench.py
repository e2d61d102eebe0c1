"""What the worker costs, beside what the machine costs without it: `make bench` (direct and docker, Linux).

Every row is measured against the same act without a worker in the same run, so that it says something on any machine.
Prints a table with the budget beside each row; exit 1 when one is over. `--quick` shows in half a minute that the
benchmark works; its numbers are too few to be judged by.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import bench_docker
import bench_rig as rig
from bench_rig import Place, Plane, percentile

MIB = 1024 * 1024
TREE = """sleep 1000 & a=$!; setsid sleep 1000 & b=$!; echo "$BENCH_MARK.a $a
$BENCH_MARK.b $b" >"$BENCH_FIFO"; while :; do sleep 1000; done"""


class Row(NamedTuple):
    """One line of the table; `over` says that the budget is broken."""

    what: str
    measured: str
    bare: str
    ratio: str
    budget: str
    over: bool


class Sizes(NamedTuple):
    """How often and how many."""

    dispatches: int
    starts: int
    idle_seconds: float
    held: int
    hold_seconds: float
    drained: int
    cancels: int
    containers: int
    running: tuple[int, ...]


FULL = Sizes(
    dispatches=300,
    starts=5,
    idle_seconds=30.0,
    held=500,
    hold_seconds=10.0,
    drained=1000,
    cancels=10,
    containers=25,
    running=(1, 10, 100),
)
QUICK = Sizes(
    dispatches=20,
    starts=2,
    idle_seconds=3.0,
    held=40,
    hold_seconds=2.0,
    drained=60,
    cancels=2,
    containers=3,
    running=(1, 5),
)


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small run")
    parser.add_argument("--only", choices=MEASURES, action="append", help="only this one; again for more")
    parser.add_argument("--directory", type=Path, help="where state and workspaces live (a temporary directory)")
    options = parser.parse_args()
    if sys.platform != "linux":
        sys.stderr.write("bench: needs Linux (pidfds, /proc)\n")
        return 3
    sizes = QUICK if options.quick else FULL
    rows: list[Row] = []
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors, {_commits()}")
    for name in options.only or MEASURES:
        with _place(options.directory) as place:
            rows += MEASURES[name](place, sizes)
            place.plane.check()
    _print(rows)
    over = [row.what for row in rows if row.over]
    print(f"over budget: {'; '.join(over)}" if over else "all rows are within their budgets")
    return 1 if over else 0


@contextlib.contextmanager
def _place(directory: Path | None) -> Iterator[Place]:
    plane = Plane()
    with tempfile.TemporaryDirectory(prefix="oz-bench-", dir=directory) as path, plane:
        yield Place(Path(path), plane)


def _commits() -> str:
    """What a durable transaction costs on this disk: three of them stand between an assignment and its agent."""
    with (
        tempfile.TemporaryDirectory(prefix="oz-bench-") as path,
        contextlib.closing(sqlite3.connect(Path(path) / "x.db", isolation_level=None)) as db,
    ):
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (x)")
        times = []
        for _ in range(50):
            began = time.monotonic()
            db.execute("INSERT INTO t VALUES (1)")
            times.append(time.monotonic() - began)
    return f"an SQLite commit takes {_ms(statistics.median(times))}"


# -- measures


def dispatch(place: Place, sizes: Sizes) -> list[Row]:
    """From the frame of an assignment to the first line of the agent, one at a time, bare starts in between."""
    through, bare = [], []
    with place.worker():
        for number in range(sizes.dispatches):
            began = time.monotonic()
            process = place.bare_start(f"bare{number}")
            bare.append(place.started()[2] - began)
            process.wait()
            task = rig.submit(place, place.marks(f"task{number}"))
            seen = place.started()[2]
            place.plane.wait_acknowledged(task, timeout=rig.SAFETY)
            through.append(seen - (task.sent_at or 0.0))
    base = statistics.median(bare)
    p50, p99 = statistics.median(through), percentile(through, 0.99)
    return [
        _row("assignment -> agent runs, p50", p50, base, base + 0.010, _ms),
        _row("assignment -> agent runs, p99", p99, base, base + 0.050, _ms),
    ]


def starts(place: Place, sizes: Sizes) -> list[Row]:
    """Started and connected; and the end by TERM in each state of the link."""
    connected, exits, bare = [], [], []
    for _ in range(sizes.starts):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.monotonic() - began)
        before, began = len(place.plane.connections), time.monotonic()
        process = place.start_worker()
        connection = place.plane.wait_connected(rig.SAFETY, after=before)
        connected.append(connection.opened_at - began)
        exits.append(rig.terminate(process))
    base = statistics.median(bare)
    ends = {
        "connected": exits,
        "in the handshake": [_end_in_handshake(place) for _ in range(sizes.starts)],
        "in backoff": [_end_in_backoff(place) for _ in range(sizes.starts)],
    }
    return [
        _row("started and connected", statistics.median(connected), base, 0.8, _ms),
        *(
            _row(f"TERM -> exit, idle, {state}", statistics.median(took), base, 0.3, _ms)
            for state, took in ends.items()
        ),
    ]


def _end_in_handshake(place: Place) -> float:
    """A server that accepts and says nothing: once it has the request, the worker waits for an answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = place.start_worker(url=f"ws://127.0.0.1:{server.getsockname()[1]}/")
        server.settimeout(rig.SAFETY)
        with server.accept()[0] as silent:
            silent.recv(1)
            return rig.terminate(process)


def _end_in_backoff(place: Place) -> float:
    """A server that hangs up, and a first delay of a minute: once the socket is closed there is only the wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = {"backoff_min": "60s", "backoff_max": "60s"}
        process = place.start_worker(url=f"ws://127.0.0.1:{server.getsockname()[1]}/", link=link)
        server.settimeout(rig.SAFETY)
        with server.accept()[0] as hung_up:
            hung_up.recv(65536)
            hung_up.shutdown(socket.SHUT_WR)
            hung_up.settimeout(rig.SAFETY)
            with contextlib.suppress(ConnectionError):
                while hung_up.recv(65536):
                    pass
        return rig.terminate(process)


def idle(place: Place, sizes: Sizes) -> list[Row]:
    """A connected worker with nothing to do."""
    bare = subprocess.Popen(
        [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"], stdout=subprocess.PIPE
    )
    assert bare.stdout is not None
    bare.stdout.readline()
    base = rig.resident_bytes(bare.pid) / MIB
    bare.stdout.close()
    bare.kill()
    bare.wait()
    with place.worker() as worker:
        time.sleep(min(3.0, sizes.idle_seconds))  # what runs once after the start is not idleness
        used, began = rig.processor_seconds(worker.pid), time.monotonic()
        time.sleep(sizes.idle_seconds)
        share = (rig.processor_seconds(worker.pid) - used) / (time.monotonic() - began) * 100
        resident = rig.resident_bytes(worker.pid) / MIB
    return [
        _row("idle, resident memory", resident, base, 35, _mib),
        _row("idle, share of a processor", share, 0, 0.1, lambda value: f"{value:.3f} %"),
    ]


def held(place: Place, sizes: Sizes) -> list[Row]:
    """Many sleeping tasks at once: what each costs, and whether the pings stay even."""
    count, interval, plane = sizes.held, 1.0, place.plane
    with place.worker(link={"ping_interval": f"{interval:g}s", "dead_after": "20s"}) as worker:
        before, children = rig.resident_bytes(worker.pid), rig.descendants(worker.pid)
        began = time.monotonic()
        for number in range(count):
            rig.submit(place, place.marks(f"task{number}", "exec sleep 1000"))
        for _ in range(count):
            place.started()
        reached = time.monotonic() - began
        time.sleep(sizes.hold_seconds)
        alive = sum(task.claimed and not task.ended for task in plane.tasks.values())
        each = (rig.resident_bytes(worker.pid) - before) / count / MIB
        extra = rig.descendants(worker.pid) - children - 2 * count
        with plane.lock:
            times = [began, *(moment for moment in plane.ping_times if moment >= began), time.monotonic()]
    late = max(0.0, *(later - earlier - interval for earlier, later in itertools.pairwise(times)))
    what = f"{count} tasks at once"
    return [
        Row(f"{what}, held", f"{alive} in {reached:.1f} s", "", "", f"{count}", alive != count),
        _row(f"{what}, the latest ping", late, 0, 1.0, _ms),
        _row("a running task, memory of the worker", each, 0, 0.3, _mib),
        _row("a running task, processes beside it and its sh", extra / count, 0, 0, lambda value: f"{value:.2f}"),
    ]


def drained(place: Place, sizes: Sizes) -> list[Row]:
    """Many tasks that end at once, from the first frame to the last acknowledged report."""
    count = sizes.drained
    began = time.monotonic()
    for _ in range(count):
        subprocess.run([str(place.agent), "agent", "run"], env=place.environment(), check=True)
    base = count / (time.monotonic() - began)
    with place.worker():
        began = time.monotonic()
        tasks = [rig.submit(place, {}) for _ in range(count)]
        place.plane.wait_acknowledged(*tasks, timeout=rig.SAFETY)
        rate = count / (time.monotonic() - began)
    failed = [task for task in tasks if task.state != "completed"]
    assert not failed, f"{len(failed)} tasks did not complete: {failed[0].terminal}"
    what = f"{count} short tasks, one after the other when bare"
    return [Row(what, f"{rate:.0f}/s", f"{base:.0f}/s", f"{base / rate:.1f} x", "150/s", rate < 150)]


def cancelled(place: Place, sizes: Sizes) -> list[Row]:
    """From a cancel to the end of the agent, a child of it, and a child that left its session."""
    grace = 1.0
    obeying, stubborn, bare = [], [], []
    with place.worker(stop_grace=f"{grace:g}s"):
        for number in range(sizes.cancels):
            obeying.append(_cancel(place, f"task{number}", TREE))
            bare.append(_bare_end(place, f"bare{number}"))
        for number in range(max(1, sizes.cancels // 3)):
            stubborn.append(_cancel(place, f"stubborn{number}", f"trap '' TERM; {TREE}"))
    base, hard = statistics.median(bare), statistics.median(stubborn)
    return [
        _row("cancel -> tree gone, TERM obeyed", statistics.median(obeying), base, 0.3, _ms),
        _row(f"cancel -> tree gone, TERM ignored, grace {grace:g} s", hard, 0, grace + 0.5, _ms),
    ]


def _cancel(place: Place, mark: str, run: str) -> float:
    task = rig.submit(place, place.marks(mark, run))
    pids = [place.started()[1] for _ in range(3)]
    began = time.monotonic()
    place.plane.cancel(task)
    rig.await_ends(pids)
    took = time.monotonic() - began
    place.plane.wait_acknowledged(task, timeout=rig.SAFETY)
    return took


def _bare_end(place: Place, mark: str) -> float:
    process = place.bare_start(mark, TREE)
    pids = [place.started()[1] for _ in range(3)]
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    # Its foreground sleep has no report; it dies with its group.
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    rig.await_ends(pids)
    return time.monotonic() - began


def docker(place: Place, sizes: Sizes) -> list[Row]:
    """The same questions to the docker backend, beside `docker run`; nothing where no engine can be had."""
    if why := bench_docker.missing():
        print(why)
        return []
    through, bare = bench_docker.dispatched(place, sizes.containers)
    asked, beside = bench_docker.dispatched_always(place, sizes.containers)
    found, extra = bench_docker.held(place, sizes.running)
    first, most = sizes.running[0], sizes.running[-1]
    each = (found[most] - found[first]) / (most - first)
    took, base = bench_docker.drained(place, sizes.running[-1])
    return [
        _row("docker: assignment -> agent runs, p50", through, bare, bare * bench_docker.LEAST_RATIO, _ms),
        Row("docker: the same, policy Always, p50", _ms(asked), _ms(beside), f"{asked / beside:.2f} x", "", False),
        *(Row(f"docker: worker with {n} containers", _mib(found[n]), "", "", "", False) for n in sizes.running),
        _row("docker: a running container, memory of the worker", each, 0, 0.3, _mib),
        _row("docker: a running container, processes of the worker", extra, 0, 0, lambda value: f"{value:.2f}"),
        Row(f"docker: {most} short tasks", f"{took:.1f} s", f"{base:.1f} s", f"{took / base:.2f} x", "", False),
    ]


MEASURES: dict[str, Callable[[Place, Sizes], list[Row]]] = {
    "dispatch": dispatch,
    "starts": starts,
    "idle": idle,
    "held": held,
    "drained": drained,
    "cancelled": cancelled,
    "docker": docker,
}


# -- printing


def _row(what: str, measured: float, bare: float, limit: float, show: Callable[[float], str]) -> Row:
    """A row whose budget is an upper limit."""
    ratio = f"{measured / bare:.1f} x" if bare else ""
    return Row(what, show(measured), show(bare) if bare else "0", ratio, show(limit), measured > limit)


def _print(rows: list[Row]) -> None:
    table = [("what", "measured", "bare", "ratio", "budget", "verdict")]
    table += [(*row[:5], "OVER" if row.over else "ok") for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    for number, line in enumerate(table):
        print("| " + " | ".join(text.ljust(widths[column]) for column, text in enumerate(line)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _mib(value: float) -> str:
    return f"{value:.3g} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
