"""Ending everything that belongs to a unit, also what left its process group, and proving that it is gone.

Two ways. Where a cgroup (version 2) can be made for the unit, the kernel knows the members and kills them at once.
A sweep over the process table, alone or behind the cgroup's kill, finds the rest: by the environment mark, by session
and group of the leaders we started, and as descendants of any of these. A zombie is dead. The gap that remains: a
process that wiped its environment, left its session and lost its parent before the first sweep; with a cgroup, within
the milliseconds before its leader was moved.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from typing import Callable, Iterable, Mapping, NamedTuple, Union

from oz_worker.cgroup import Cgroup
from oz_worker.process import (
    HELPER,
    LINUX,
    Child,
    Identity,
    Stat,
    arguments_of,
    boot_id,
    environment_of,
    read_stat,
    signal_exactly,
)
from oz_worker.unreadable import Unreadable, patiently, unreadable

logger = logging.getLogger(__name__)

MARK = "OZ_WORKER_UNIT"
_SWEEP_PAUSE = 0.1
_CGROUP_PAUSE = 0.02

Leader = Union[Child, Identity]
Marks = dict[tuple[int, int], Union[str, None]]
"""By pid and start ticks: the unit's mark in the environment of a process, None when it has none."""


class Snapshot(NamedTuple):
    """The process table at one moment: every live or dead process, and the unit mark of those that carry one."""

    stats: Mapping[int, Stat]
    marks: Mapping[int, str]


class Processes:
    """The process table, read at most every 100 ms for all who wait (rule 28). Safe from any thread.

    One condition guards the counters. Whoever finds no sweep under way makes the next one, outside the lock; the
    others wait for it and are woken by its end, also by a failing one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sweeping = False
        self._begun = 0
        self._done = 0
        self._last = float("-inf")
        self._snapshot = Snapshot({}, {})
        self._marks: Marks = {}  # used by the thread that sweeps

    def snapshot(self) -> Snapshot:
        """A snapshot that was begun after this call. Raises Unreadable."""
        with self._changed:
            wanted = self._begun + 1
            while True:
                if self._done >= wanted:
                    return self._snapshot
                if not self._sweeping:
                    self._sweeping = True
                    break
                self._changed.wait()
        try:
            return self._sweep()
        finally:
            with self._changed:
                self._sweeping = False
                self._changed.notify_all()

    def _sweep(self) -> Snapshot:
        """Only the thread that set `_sweeping` is in here."""
        time.sleep(max(0.0, self._last + _SWEEP_PAUSE - time.monotonic()))
        with self._changed:
            self._begun += 1
            number = self._begun
        self._last = time.monotonic()
        snapshot = read_processes(known=self._marks)
        self._marks = {identity: mark for identity, mark in self._marks.items() if identity[0] in snapshot.stats}
        with self._changed:
            self._snapshot = snapshot
            self._done = number
        return snapshot


def read_processes(mark: str = MARK, known: Marks | None = None) -> Snapshot:
    """Read the process table now; *known* holds what was read of a process before, and is added to.

    Raises Unreadable for a table that is not whole: what it does not show would seem to be gone.
    An environment is read once for each process, which halves the cost of a sweep: a mark that was there stays true
    when a program wipes it, and one that was not there comes only to a recorder, which is known by its number.
    """
    known = {} if known is None else known
    if not LINUX:
        return _read_elsewhere(mark)
    stats: dict[int, Stat] = {}
    marks: dict[int, str] = {}
    wanted = mark.encode() + b"="
    for name in _proc():
        if not name.isdigit():
            continue
        pid = int(name)
        stat = read_stat(pid)
        if stat is None:
            continue
        stats[pid] = stat
        if stat.dead or stat.parent == 2:  # a thread of the kernel has no environment
            continue
        identity = (pid, stat.ticks)
        if identity not in known:
            known[identity] = _read_mark(pid, wanted)
        value = known[identity]
        if value is not None:
            marks[pid] = value
    if not stats:
        raise unreadable("/proc", OSError(errno.ENOENT, "it is empty, so it is not mounted"))
    return Snapshot(stats, marks)


def _proc() -> list[str]:
    try:
        return os.listdir("/proc")
    except OSError as error:
        raise unreadable("/proc", error) from error


def _read_mark(pid: int, wanted: bytes) -> str | None:
    path = f"/proc/{pid}/environ"
    try:
        with open(path, "rb", buffering=0) as file:
            raw = b"\0" + file.read()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise unreadable(path, error) from error
        return None  # gone, or another user's
    start = raw.find(b"\0" + wanted)
    if start < 0:
        return None
    start += 1 + len(wanted)
    end = raw.find(b"\0", start)
    return os.fsdecode(raw[start : end if end >= 0 else len(raw)])


def _read_elsewhere(mark: str) -> Snapshot:
    import psutil

    stats = {pid: stat for pid in psutil.pids() if (stat := read_stat(pid))}
    marks = {pid: env[mark] for pid in stats if (env := environment_of(pid)) and mark in env}
    return Snapshot(stats, marks)


def members(snapshot: Snapshot, mark: str, sessions: Mapping[int, int], known: Iterable[tuple[int, int]]) -> list[Stat]:
    """The live processes of a unit: marked, in a session or group of a leader, known from before, or below one.

    *sessions* maps a leader's pid to its start ticks. A leader's number that now belongs to a younger process is a
    stranger's: nothing is taken for ours because of it. Nothing older than the leader is either.
    """
    remembered = set(known)
    numbers = {
        pid: ticks for pid, ticks in sessions.items() if pid not in snapshot.stats or snapshot.stats[pid].ticks == ticks
    }
    found: set[int] = set()
    children: dict[int, list[int]] = {}
    for pid, stat in snapshot.stats.items():
        children.setdefault(stat.parent, []).append(pid)
        ours = snapshot.marks.get(pid) == mark or (pid, stat.ticks) in remembered
        for number in (stat.session, stat.group):
            ours = ours or (number in numbers and stat.ticks >= numbers[number])
        if ours:
            found.add(pid)
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    found.discard(os.getpid())
    return [snapshot.stats[pid] for pid in found if not snapshot.stats[pid].dead]


class Tree:
    """Everything that belongs to one unit. `add` and `release` come from the unit's thread, `stop` from any.

    One lock lets one thread stop it at a time: whoever comes second finds nothing left, or goes on where the first
    gave up. It is held for as long as the processes take to end, which `kill_at` bounds.
    """

    def __init__(self, mark: str, processes: Processes, cgroup: Cgroup | None = None) -> None:
        self.mark = mark
        self.cgroup = cgroup
        self._processes = processes
        self._leaders: list[Leader] = []
        self._known: set[tuple[int, int]] = set()
        self._leaders_told = False  # guarded by the lock, like what is known
        self._stopping = threading.Lock()

    def add(self, leader: Leader) -> None:
        """A session leader of the unit: a child of ours, or one found after a restart."""
        self._leaders.append(leader)

    def enter_cgroup(self, leader: Child) -> None:
        """Move *leader* and what it has started meanwhile into the unit's cgroup; the rest is born inside.

        Called once the leader runs and not before: a move makes the kernel wait for an RCU grace period (11 to 19 ms),
        which nobody should wait for. Who leaves the tree within that time is found by the sweep that ends a stop.
        """
        if self.cgroup is None:
            return
        inside: set[int] = set()
        while outside := [pid for pid in (leader.pid, *_descendants(leader.pid)) if pid not in inside]:
            inside.update(outside)
            for pid in outside:
                self.cgroup.add(pid)

    def stop(self, *, kill_at: Callable[[], float], wait: Callable[[float], None], proof: float) -> str:
        """TERM now, KILL at *kill_at()* (monotonic, asked again and again), until nothing lives.

        Blocks the caller in *wait(seconds)*, which may return early. Gives up *proof* seconds after the KILL. Returns
        what could not be confirmed gone, "" when all is: also when what says so cannot be read. Idempotent; costs one
        look when nothing lives.
        """
        with self._stopping:
            remains = self._stop_cgroup(self.cgroup, kill_at, wait, proof) if self.cgroup else ""
            return remains or self._stop_swept(kill_at, wait, proof)

    def _stop_cgroup(
        self, cgroup: Cgroup, kill_at: Callable[[], float], wait: Callable[[float], None], proof: float
    ) -> str:
        told = killed = False
        while True:
            now = time.monotonic()
            over = killed and now >= kill_at() + proof
            kill = now >= kill_at()
            try:
                if not cgroup.populated():
                    return ""
                if over:
                    return _remains(filter(None, map(read_stat, cgroup.pids()))) or f"{cgroup.path} is not empty"
                if kill:
                    cgroup.kill()
                elif not told:
                    cgroup.terminate()
                told = True
            except Unreadable as error:
                if over:
                    return _unconfirmed(error)
                self._signal_leaders(signal.SIGKILL if kill else signal.SIGTERM, again=kill)
            killed = killed or kill
            wait(_CGROUP_PAUSE if killed else min(_CGROUP_PAUSE, max(0.001, kill_at() - now)))

    def _stop_swept(self, kill_at: Callable[[], float], wait: Callable[[float], None], proof: float) -> str:
        told: set[tuple[int, int]] = set()
        killed = False
        while True:
            unread: Unreadable | None = None
            try:
                alive = self._look()
            except Unreadable as error:
                alive, unread = [], error
            if not alive and unread is None:
                return ""
            now = time.monotonic()
            if now >= kill_at() + proof and killed:
                return _unconfirmed(unread) if unread else _remains(alive)
            kill = now >= kill_at()
            killed = killed or kill
            signum = signal.SIGKILL if kill else signal.SIGTERM
            if unread:
                self._signal_leaders(signum, again=kill)
            fresh = [stat for stat in alive if kill or (stat.pid, stat.ticks) not in told]
            self._signal(fresh, signum)
            told.update((stat.pid, stat.ticks) for stat in fresh)
            if not kill:
                wait(min(_SWEEP_PAUSE, max(0.001, kill_at() - now)))

    def _look(self) -> list[Stat]:
        snapshot = self._processes.snapshot()
        sessions = {}
        for leader in self._leaders:
            identity = leader.identity if isinstance(leader, Child) else leader
            if identity.boot == boot_id():
                sessions[identity.pid] = identity.ticks
        alive = members(snapshot, self.mark, sessions, self._known)
        self._known = {(stat.pid, stat.ticks) for stat in alive}
        return alive

    def _signal(self, targets: list[Stat], signum: int) -> None:
        """The groups of unreaped leaders first, at once, so that a fork cannot slip through; then one by one."""
        if not targets:
            return
        reached = {leader.pid for leader in self._leaders if isinstance(leader, Child) and leader.signal_group(signum)}
        for stat in targets:
            if stat.group not in reached:
                signal_exactly(Identity(stat.pid, stat.ticks, boot_id()), signum)

    def _signal_leaders(self, signum: int, *, again: bool) -> None:
        """What can be done without reading anything: the groups of our own children. TERM once, KILL *again*."""
        if again or not self._leaders_told:
            self._leaders_told = True
            for leader in self._leaders:
                if isinstance(leader, Child):
                    leader.signal_group(signum)

    def release(self) -> None:
        """Reap our leaders that have ended: from here on their numbers may be reused."""
        for leader in self._leaders:
            if isinstance(leader, Child):
                leader.reap()


def _descendants(pid: int) -> list[int]:
    """The processes below *pid*, as far as the kernel lists children (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    queue = [pid]
    while queue:
        parent = queue.pop()
        try:
            with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
                children = [int(word) for word in file.read().split()]
        except OSError:
            continue
        found += children
        queue += children
    return found


def _remains(alive: Iterable[Stat]) -> str:
    """One sentence about what would not die."""
    named = [f"{stat.pid} ({_name(stat.pid)}, state {stat.state})" for stat in alive]
    if not named:
        return ""
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"processes on this host did not end after SIGKILL: {', '.join(named[:5])}{more}"


def _unconfirmed(error: Unreadable) -> str:
    return f"whether its processes on this host ended could not be confirmed: {error}"


def _name(pid: int) -> str:
    arguments = arguments_of(pid)
    return os.path.basename(arguments[0]) if arguments else "?"


def end_earlier_helpers(instance: str) -> None:
    """Kill what a dead worker of *instance* left of its short CLI children (rule 5). Raises Unreadable."""
    ended = patiently(lambda: end_helpers(instance))
    if ended:
        logger.info("ended %d helper processes of an earlier worker", ended)


def end_helpers(instance: str) -> int:
    """Kill the short CLI children of *instance*; how many there were. Raises Unreadable."""
    snapshot = read_processes(HELPER)
    found = [pid for pid, mark in snapshot.marks.items() if mark == instance and pid != os.getpid()]
    for pid in found:
        signal_exactly(Identity(pid, snapshot.stats[pid].ticks, boot_id()), signal.SIGKILL)
    return len(found)
