from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.cgroup import Cgroup, cgroup_base
from oz_worker.process import Child, Identity, Request, Stat, boot_id, spawn
from oz_worker.tree import MARK, Processes, Snapshot, Tree, end_helpers, members
from tests.hosting import PATIENCE, alive, eventually, marked, written


@pytest.fixture(params=["swept", "cgroup"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Cgroup | None]:
    """Both ways; where no cgroup can be made the real one is stood in for by nothing: that is a failure."""
    if request.param == "swept":
        yield None
        return
    base = cgroup_base()
    assert base is not None, "no cgroup of version 2 can be made here"
    cgroup = Cgroup.make(base / f"oz-test-{os.getpid()}-{time.monotonic_ns()}")
    assert cgroup is not None
    yield cgroup
    cgroup.remove()
    assert not cgroup.path.exists()


class Forest:
    """One tree with a session leader that runs *script*, waiting inside its cgroup before it goes on."""

    def __init__(self, script: str, tmp_path: Path, cgroup: Cgroup | None, *, marked: bool = True) -> None:
        self.mark = f"test.{os.getpid()}.{time.monotonic_ns()}"
        self.tree = Tree(self.mark, Processes(), cgroup)
        read, write = os.pipe()
        environment = {**os.environ, "NOTES": str(tmp_path), **({MARK: self.mark} if marked else {})}
        self.child: Child = spawn(Request(["/bin/sh", "-c", f"read -r go; {script}"], environment, stdin=read))
        self.tree.add(self.child)
        self.tree.enter_cgroup(self.child)
        os.write(write, b"go\n")
        os.close(read)
        os.close(write)

    def stop(self, grace: float = PATIENCE, proof: float = PATIENCE) -> str:
        kill_at = time.monotonic() + grace
        return self.tree.stop(kill_at=lambda: kill_at, wait=time.sleep, proof=proof)

    def gone(self) -> bool:
        return not marked(self.mark) and self.child.poll() is not None

    def close(self) -> None:
        self.stop(0)
        self.tree.release()


def test_a_tree_that_obeys_gets_term_and_no_kill(tmp_path: Path, cgroup: Cgroup | None) -> None:
    script = "trap 'echo asked >$NOTES/asked; exit 0' TERM; echo up >$NOTES/up; while :; do sleep 0.01; done"
    forest = Forest(script, tmp_path, cgroup)
    written(tmp_path / "up")
    assert forest.stop() == ""
    assert written(tmp_path / "asked") == "asked\n"
    assert forest.gone()
    forest.close()


@pytest.mark.parametrize(
    "script",
    [
        "trap '' TERM; echo $$ >$NOTES/pid; while :; do sleep 60; done",
        "setsid sh -c 'trap \"\" TERM; echo $$ >$NOTES/pid; while :; do sleep 60; done' & wait",
        "(setsid nohup sh -c 'trap \"\" TERM; echo $$ >$NOTES/pid; while :; do sleep 60; done' &) ; wait; sleep 60",
        "nohup sh -c 'trap \"\" TERM HUP; echo $$ >$NOTES/pid; while :; do sleep 60; done' >/dev/null 2>&1 & exit 3",
    ],
    ids=["ignores TERM", "new session", "double fork", "left behind"],
)
def test_nothing_escapes_whatever_it_does(script: str, tmp_path: Path, cgroup: Cgroup | None) -> None:
    forest = Forest(script, tmp_path, cgroup)
    pid = int(written(tmp_path / "pid"))
    assert forest.stop(grace=0.2) == ""
    assert not alive(pid)
    assert forest.gone()
    forest.close()


def test_what_wiped_its_environment_is_found_by_session_group_or_parent(tmp_path: Path) -> None:
    script = (
        "env -i sh -c 'echo $$ >'$NOTES'/one; sleep 60; :' & "
        "env -i setsid sh -c 'echo $$ >'$NOTES'/two; sleep 60; :' & sleep 60"
    )
    forest = Forest(script, tmp_path, None, marked=False)
    pids = [int(written(tmp_path / name)) for name in ("one", "two")]
    assert forest.stop(grace=0.2) == ""
    assert not any(map(alive, pids))
    forest.close()


def test_a_fork_storm_is_ended(tmp_path: Path, cgroup: Cgroup | None) -> None:
    # Bounded by itself: each process forks until sixty generations are through, some in sessions of their own.
    storm = tmp_path / "storm"
    storm.write_text(
        "trap '' TERM\n[ $1 -gt 60 ] && exit\necho up >$NOTES/up\n"
        "sh $NOTES/storm $(($1 + 1)) &\n[ $(($1 % 7)) = 0 ] && setsid sh $NOTES/storm $(($1 + 9)) &\nsleep 60\n"
    )
    forest = Forest("sh $NOTES/storm 1", tmp_path, cgroup)
    written(tmp_path / "up")
    assert forest.stop(grace=0.0) == ""
    assert forest.gone()
    forest.close()


def test_a_leader_that_was_reaped_is_not_killed_as_a_group(tmp_path: Path) -> None:
    forest = Forest("setsid sleep 60 & echo $! >$NOTES/pid; exit 0", tmp_path, None)
    pid = int(written(tmp_path / "pid"))
    eventually(lambda: forest.child.poll() is not None)
    forest.tree.release()
    assert forest.stop() == ""
    assert not alive(pid)


def test_a_grace_that_is_shortened_meanwhile_ends_at_once(tmp_path: Path, cgroup: Cgroup | None) -> None:
    forest = Forest("trap '' TERM; echo up >$NOTES/up; while :; do sleep 60; done", tmp_path, cgroup)
    written(tmp_path / "up")
    kill_at = [time.monotonic() + 1000]
    ended: list[str] = []

    def stop() -> None:
        ended.append(forest.tree.stop(kill_at=lambda: kill_at[0], wait=lambda s: time.sleep(min(s, 0.1)), proof=20))

    thread = threading.Thread(target=stop)
    thread.start()
    kill_at[0] = 0
    thread.join(PATIENCE)
    assert ended == [""]
    assert forest.gone()
    forest.close()


def test_parallel_stops_share_their_sweeps(tmp_path: Path) -> None:
    processes = Processes()
    forests = [Forest("trap '' TERM; sleep 60 & wait; sleep 60", tmp_path, None) for _ in range(8)]
    for forest in forests:
        forest.tree._processes = processes
    threads = [threading.Thread(target=forest.stop, args=(0.1,)) for forest in forests]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # At most one every 100 ms, however many wait.
    assert processes._done <= (time.monotonic() - begun) / 0.1 + 2
    assert all(forest.gone() for forest in forests)
    for forest in forests:
        forest.tree.release()


def test_a_snapshot_is_never_older_than_the_call() -> None:
    processes = Processes()
    processes.snapshot()
    child = spawn(Request(["/bin/sleep", "60"], {}))
    assert child.pid in processes.snapshot().stats
    child.signal_group(signal.SIGKILL)
    eventually(child.reap)
    assert child.pid not in processes.snapshot().stats


def test_a_tree_that_was_busy_before_it_was_moved_is_found_whole(tmp_path: Path) -> None:
    base = cgroup_base()
    assert base is not None, "no cgroup of version 2 can be made here"
    cgroup = Cgroup.make(base / f"oz-late-{os.getpid()}-{time.monotonic_ns()}")
    assert cgroup is not None
    mark = f"late.{os.getpid()}.{time.monotonic_ns()}"
    tree = Tree(mark, Processes(), cgroup)
    script = "trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep 60') & sh -c 'sleep 60' & echo up >$NOTES/up; wait"
    environment = {**os.environ, "NOTES": str(tmp_path), MARK: mark}
    child = spawn(Request(["/bin/sh", "-c", script], environment))
    tree.add(child)
    eventually((tmp_path / "up").exists)
    tree.enter_cgroup(child)
    assert len(cgroup.pids()) >= 3
    assert tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=PATIENCE) == ""
    assert not marked(mark)
    tree.release()
    cgroup.remove()
    assert not cgroup.path.exists()


def test_what_does_not_die_is_named(tmp_path: Path) -> None:
    # A directory that looks like a cgroup whose members ignore everything: state D cannot be had to order.
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, text in (("cgroup.procs", f"{os.getpid()}\n"), ("cgroup.events", "populated 1\n"), ("cgroup.kill", "")):
        (fake / name).write_text(text)
    cgroup = Cgroup(fake)
    assert cgroup.populated()
    tree = Tree("m", Processes(), cgroup)
    remains = tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=0.0)
    assert remains.startswith(f"processes on this host did not end after SIGKILL: {os.getpid()} (")
    assert (fake / "cgroup.kill").read_text() == "1"


class TestMembers:
    """The choice of members is pure: tables say what no test could time."""

    def table(self, *stats: Stat, marks: dict[int, str] | None = None) -> Snapshot:
        return Snapshot({stat.pid: stat for stat in stats}, marks or {})

    def chosen(
        self, snapshot: Snapshot, sessions: dict[int, int], known: frozenset[tuple[int, int]] = frozenset()
    ) -> set[int]:
        return {stat.pid for stat in members(snapshot, "m", sessions, known)}

    def test_a_number_that_a_stranger_took_over_counts_for_nothing(self) -> None:
        stranger, follower = Stat(10, "S", 1, 10, 10, 900), Stat(11, "S", 10, 10, 10, 901)
        assert self.chosen(self.table(stranger, follower), {10: 500}) == set()

    def test_what_is_older_than_the_leader_is_not_of_its_session(self) -> None:
        assert self.chosen(self.table(Stat(11, "S", 1, 10, 10, 400)), {10: 500}) == set()

    def test_a_session_outlives_its_leader(self) -> None:
        assert self.chosen(self.table(Stat(11, "S", 1, 11, 10, 600)), {10: 500}) == {11}

    def test_zombies_are_dead_and_their_children_are_not(self) -> None:
        snapshot = self.table(Stat(10, "Z", 1, 10, 10, 500), Stat(11, "S", 10, 11, 11, 600))
        assert self.chosen(snapshot, {10: 500}) == {11}

    def test_descendants_are_found_at_any_depth_and_remembered(self) -> None:
        deep = [Stat(pid, "S", pid - 1, pid, pid, 500 + pid) for pid in range(11, 20)]
        assert self.chosen(self.table(Stat(10, "S", 1, 10, 10, 500), *deep), {10: 500}) == set(range(10, 20))
        assert self.chosen(self.table(deep[-1]._replace(parent=1)), {10: 500}, frozenset({(19, 519)})) == {19}
        assert self.chosen(self.table(deep[-1]._replace(parent=1, ticks=9)), {10: 500}, frozenset({(19, 519)})) == set()

    def test_another_unit_s_mark_is_not_ours(self) -> None:
        snapshot = self.table(Stat(10, "S", 1, 1, 1, 5), Stat(11, "S", 1, 1, 1, 5), marks={10: "m", 11: "m2"})
        assert self.chosen(snapshot, {}) == {10}

    def test_we_are_never_a_member_of_ours(self) -> None:
        me = Stat(os.getpid(), "R", 1, 1, 1, 5)
        assert self.chosen(self.table(me, marks={me.pid: "m"}), {}) == set()


def test_a_handle_of_another_boot_names_nobody(tmp_path: Path) -> None:
    child = spawn(Request(["/bin/sleep", "60"], {}))
    tree = Tree("nobody", Processes())
    tree.add(Identity(child.pid, child.identity.ticks, "another boot"))
    assert tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=1) == ""
    assert child.poll() is None
    tree.add(Identity(child.pid, child.identity.ticks, boot_id()))
    assert tree.stop(kill_at=lambda: 0.0, wait=time.sleep, proof=20) == ""
    assert child.poll() == 137
    child.reap()


def test_helpers_of_a_dead_worker_are_ended_and_others_are_not() -> None:
    instance = f"i{time.monotonic_ns()}"
    ours = spawn(Request(["/bin/sleep", "60"], {"OZ_WORKER_HELPER": instance}))
    others = spawn(Request(["/bin/sleep", "60"], {"OZ_WORKER_HELPER": instance + "0"}))
    assert end_helpers(instance) == 1
    assert eventually(ours.poll) == 137
    assert others.poll() is None
    others.signal_group(signal.SIGKILL)
    eventually(others.reap)
    ours.reap()
