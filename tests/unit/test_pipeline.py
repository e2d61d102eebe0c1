"""Two children joined: every byte arrives, and who failed first is known."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from oz_worker.pipeline import Flow, join
from oz_worker.process import ProgramMissing
from oz_worker.threads import Waker
from tests.rig import SAFETY, living_environments

INSTANCE = f"pipeline-{os.getpid()}"


def run(source: str, sink: str, *, timeout: float = SAFETY, interrupt: int = -1, last: int = 4) -> Flow:
    return join(
        ["sh", "-c", source],
        ["sh", "-c", sink],
        environment={"PATH": os.environ["PATH"]},
        instance=INSTANCE,
        timeout=timeout,
        last=last,
        interrupt=interrupt,
    )


def helpers() -> list[int]:
    return [pid for pid, environ in living_environments() if f"OZ_WORKER_HELPER={INSTANCE}".encode() in environ]


def test_every_byte_arrives_and_the_last_are_kept(tmp_path: Path) -> None:
    file, copy = tmp_path / "file", tmp_path / "copy"
    file.write_bytes(os.urandom(5_000_000))
    flow = run(f"cat {shlex.quote(str(file))}; echo done >&2", f"sleep 0.1; cat >{shlex.quote(str(copy))}", last=100)
    assert copy.read_bytes() == file.read_bytes()
    assert (flow.source.code, flow.sink.code, flow.source.errors) == (0, 0, b"done\n")
    assert flow.source.output == file.read_bytes()[-100:]
    assert run("printf a; sleep 0.1; printf b; sleep 0.1; printf cdef", "cat >/dev/null").source.output == b"cdef"
    assert run("true", "cat").source.output == b""


def test_who_failed_first_is_known() -> None:
    flow = run("head -c 300000 /dev/zero; echo torn >&2; exit 3", "cat >/dev/null")
    assert (flow.source.code, flow.source.errors, flow.sink.code, flow.sink_failed_first) == (3, b"torn\n", 0, False)
    flow = run("cat /dev/zero", "head -c 300000 >/dev/null; echo full >&2; exit 4")
    assert (flow.sink.code, flow.sink.errors, flow.sink_failed_first) == (4, b"full\n", True)
    assert flow.source.code == 128 + 13


def test_a_sink_that_has_enough_does_not_hurt_the_source() -> None:
    flow = run("head -c 3000000 /dev/zero; printf tail", "head -c 10 >/dev/null")
    assert (flow.source.code, flow.sink.code, flow.source.output, flow.sink_failed_first) == (0, 0, b"tail", False)
    flow = run("head -c 3000000 /dev/zero; printf tail", "exec <&-; sleep 0.2")
    assert (flow.source.code, flow.sink.code, flow.source.output) == (0, 0, b"tail")


def test_much_on_stderr_blocks_nobody() -> None:
    flow = run("head -c 1000000 /dev/zero >&2; printf abcd", "head -c 1000000 /dev/zero >&2; cat >/dev/null")
    assert (flow.source.output, len(flow.source.errors), len(flow.sink.errors)) == (b"abcd", 65536, 65536)


@pytest.mark.parametrize("sleeper", [0, 1])
def test_late_and_interrupted_children_are_killed(sleeper: int) -> None:
    scripts = ["cat /dev/zero", "cat >/dev/null"]
    scripts[sleeper] = "sleep 1000"
    flow = run(*scripts, timeout=0.3)
    assert (flow.source.late, flow.sink.late, flow.interrupted, flow.source.code) == (True, True, False, None)
    waker = Waker()
    waker.wake()
    assert run(*scripts, interrupt=waker.fileno()).interrupted
    waker.close()
    assert helpers() == []


def test_a_program_that_is_missing_leaves_nobody() -> None:
    with pytest.raises(ProgramMissing, match="no-such-program does not exist"):
        join(
            ["sleep", "1000"],
            ["/no-such-program"],
            environment={"PATH": os.environ["PATH"]},
            instance=INSTANCE,
            timeout=SAFETY,
            last=1,
        )
    assert helpers() == []
