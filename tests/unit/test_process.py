from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from oz_worker import process
from oz_worker.errand import run
from oz_worker.process import Child, DirectoryMissing, Identity, ProgramMissing, Request, SpawnError, spawn
from tests.hosting import alive, eventually


def child_of(script: str) -> Child:
    return spawn(Request(["/bin/sh", "-c", script], dict(os.environ)))


def ended(child: Child) -> int:
    return int(eventually(lambda: None if child.poll() is None else (child.poll() or 0) + 1)) - 1


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -SEGV $$", 139)]
)
def test_an_exit_code_is_the_one_a_shell_would_see(script: str, code: int) -> None:
    child = child_of(script)
    assert ended(child) == code
    assert child.reap()
    assert child.poll() == code


def test_an_ended_child_keeps_its_number_until_it_is_reaped() -> None:
    child = child_of("exit 3")
    assert ended(child) == 3
    stat = process.read_stat(child.pid)
    assert stat is not None
    assert stat.dead
    assert child.signal_group(signal.SIGKILL)
    assert child.reap()
    assert not child.signal_group(signal.SIGKILL)
    assert process.read_stat(child.pid) is None


def test_a_running_child_is_not_reaped() -> None:
    child = child_of("sleep 60")
    assert not child.reap()
    assert child.poll() is None
    child.signal_group(signal.SIGKILL)
    assert ended(child) == 137
    child.reap()


def test_a_child_leads_a_session_of_its_own() -> None:
    child = child_of("sleep 60")
    assert os.getsid(child.pid) == child.pid == os.getpgid(child.pid)
    child.signal_group(signal.SIGKILL)
    ended(child)
    child.reap()


def test_a_missing_program_a_missing_directory_and_a_file_without_rights_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with pytest.raises(ProgramMissing, match="nothing-here does not exist"):
        spawn(Request(["/nothing-here"], {}))
    with pytest.raises(ProgramMissing, match="plain is not executable"):
        spawn(Request([str(tmp_path / "plain")], {}))
    with pytest.raises(DirectoryMissing, match=r"working directory .*gone does not exist"):
        spawn(Request(["/bin/true"], {}, str(tmp_path / "gone")))
    with pytest.raises(SpawnError, match="could not be started"):
        spawn(Request(["/bin/true", "a\0b"], {}))
    with pytest.raises(SpawnError, match="or one of them, are longer than this system takes; pass long ones in files"):
        spawn(Request(["/bin/true", "a" * 4_000_000], {}))


def test_a_reused_number_is_another_identity() -> None:
    me = process.identify(os.getpid())
    assert me is not None
    assert me.alive()
    assert not me._replace(ticks=me.ticks + 1).alive()
    assert not me._replace(boot="another boot").alive()
    child = child_of("sleep 60")
    stranger = Identity(child.pid, child.identity.ticks + 1, child.identity.boot)
    assert not process.signal_exactly(stranger, signal.SIGKILL)
    assert child.poll() is None
    assert process.signal_exactly(child.identity, signal.SIGKILL)
    assert ended(child) == 137
    assert not process.signal_exactly(child.identity, signal.SIGKILL)
    child.reap()


def test_a_process_line_is_read_whatever_the_program_calls_itself() -> None:
    line = b"42 (evil) R 1 (\n) S 7 42 43 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 0"
    assert process.parse_stat(line) == process.Stat(42, "S", 7, 42, 43, 777)


def test_no_descriptor_of_ours_reaches_a_child(tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run(["/bin/ls", "-l", "/proc/self/fd"], environment=os.environ, instance="i", timeout=20)
    assert b"secret" not in outcome.output


def test_children_get_the_limit_of_open_files_that_we_were_started_with() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource, os; from oz_worker import limits; from oz_worker.errand import run\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))\n"
        "limits.raise_open_files(); limits.raise_open_files()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "wait = 'while [ $(ulimit -Sn) != 100 ]; do sleep 0.01; done; ulimit -Sn'\n"
        "print(run(['/bin/sh', '-c', wait], environment=os.environ, instance='i', timeout=20).output.decode())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(hard), "100"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


class TestErrand:
    def test_streams_and_code_are_kept_apart_and_the_helper_mark_is_set(self) -> None:
        script = "cat; echo $OZ_WORKER_HELPER; echo wrong >&2; exit 4"
        outcome = run(
            ["/bin/sh", "-c", script], environment=os.environ, instance="inst-1", timeout=20, stdin=b"in\n" * 50_000
        )
        assert outcome == (4, b"in\n" * 50_000 + b"inst-1\n", b"wrong\n", False, False)

    def test_a_flood_is_cut_and_does_not_block(self) -> None:
        script = "head -c 3000000 /dev/zero"
        outcome = run(["/bin/sh", "-c", script], environment=os.environ, instance="i", timeout=20, limit=1000)
        assert (outcome.code, len(outcome.output), outcome.truncated) == (0, 1000, True)

    def test_input_that_nobody_reads_does_not_block(self) -> None:
        outcome = run(["/bin/true"], environment=os.environ, instance="i", timeout=20, stdin=b"x" * 1_000_000)
        assert outcome.code == 0

    def test_a_late_child_is_killed_with_its_group(self, tmp_path: Path) -> None:
        script = f"sleep 60 & echo $! >{tmp_path}/pid; wait"
        outcome = run(["/bin/sh", "-c", script], environment=os.environ, instance="i", timeout=0.5)
        assert outcome.late
        assert outcome.code is None
        pid = int((tmp_path / "pid").read_text())
        eventually(lambda: not alive(pid))

    def test_a_grandchild_that_holds_the_pipe_delays_nothing_for_long_and_lives(self) -> None:
        outcome = run(["/bin/sh", "-c", "sleep 60 & echo $!"], environment=os.environ, instance="i", timeout=20)
        assert outcome.code == 0
        assert alive(int(outcome.output))
        os.kill(int(outcome.output), signal.SIGKILL)

    def test_an_interrupt_ends_it(self) -> None:
        read, write = os.pipe()
        timer = threading.Timer(0.1, os.write, (write, b"x"))
        timer.start()
        outcome = run(["/bin/sleep", "60"], environment=os.environ, instance="i", timeout=50, interrupt=read)
        assert outcome.late
        timer.join()
        os.close(read)
        os.close(write)

    def test_many_side_by_side_lose_no_code_and_no_descriptor(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        codes: list[int | None] = []

        def one(number: int) -> None:
            script = ["/bin/sh", "-c", f"exit {number}"]
            codes.append(run(script, environment=os.environ, instance="i", timeout=60).code)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(code for code in codes if code is not None) == list(range(20))
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [1, 60_000, 500_000])
def test_what_a_child_is_to_read_is_whole_although_we_are_killed(tmp_path: Path, size: int) -> None:
    """An order that lost its conditions on the way would be another order."""
    read = tmp_path / "read"
    child = f"kill -KILL $PPID; cat > {read}.new; mv {read}.new {read}"
    script = (
        "import os; from oz_worker.errand import run\n"
        f"run(['/bin/sh', '-c', {child!r}], stdin=b'x' * {size}, environment=dict(os.environ), instance='', timeout=60)"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    eventually(read.exists)
    assert read.stat().st_size == size


def test_more_than_a_pipe_holds_arrives_too() -> None:
    data = os.urandom(1 << 20) * 4
    outcome = run(["/bin/cat"], environment=dict(os.environ), instance="i", timeout=60, stdin=data, limit=1 << 23)
    assert (outcome.code, outcome.output == data) == (0, True)
