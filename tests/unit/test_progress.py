"""CLIs that take minutes: what counts as progress, and that nothing is left of one that was ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from oz_worker.process import HELPER, ProgramMissing
from oz_worker.progress import Ending, Screen, watch
from oz_worker.threads import Waker
from tests.rig import living_environments, until

INSTANCE = f"watched-{os.getpid()}"
DOCKER = (
    b"1: Pulling from t/a\r\n\r\n\x1b[1A\x1b[2K\r14720aa8fb4e: Pulling fs layer \r\x1b[1B\r\n"
    b"\x1b[1A\x1b[2K\r0a49aded2a06: Downloading [=>      ]  32.77kB/3.001MB\r\x1b[1B"
    b"\x1b[2A\x1b[2K\r14720aa8fb4e: Downloading [=>      ]  32.77kB/1.069MB\r\x1b[2B"
)
PODMAN = b"\x1b[2A\x1b[JCopying blob 251ea17c537f [==>---] 1.4MiB / 2.9MiB%s\r\nCopying blob 14720aa8fb4e %s \r\n"


def run(script: str, *, timeout: float = 30, quiet: float = 0, shows_on: str = "stdout", interrupt: int = -1) -> Ending:
    return watch(
        ["/bin/sh", "-c", script],
        environment={"PATH": os.environ["PATH"]},
        instance=INSTANCE,
        timeout=timeout,
        quiet=quiet,
        shows_on=shows_on,
        interrupt=interrupt,
    )


def test_a_redraw_of_the_same_numbers_is_no_progress() -> None:
    screen = Screen()
    assert screen.feed(DOCKER)
    assert screen.last == "14720aa8fb4e: Downloading [=>      ]  32.77kB/1.069MB"
    again = DOCKER[DOCKER.index(b"\x1b[1A\x1b[2K\r0a49") :]
    assert not screen.feed(again)
    assert not screen.feed(again.replace(b"[=>   ", b"[==>  "))  # another bar
    assert screen.feed(again.replace(b"32.77kB/3", b"102.8kB/3"))
    assert screen.feed(again)  # a layer that is begun anew moves, too


def test_a_spinner_and_a_speed_are_no_progress() -> None:
    screen = Screen()
    assert screen.feed(PODMAN % (b" | 1.0 MiB/s", b"."))
    assert not screen.feed(PODMAN % (b" | 0.5 MiB/s", b"..."))
    assert screen.feed(PODMAN % (b" | 0.5 MiB/s", b"done"))


def test_the_screen_reads_the_same_in_pieces_of_any_size() -> None:
    for size in (1, 2, 3, 7, 50):
        screen, moves = Screen(), 0
        for start in range(0, len(DOCKER), size):
            moves += screen.feed(DOCKER[start : start + size])
        assert (screen.last, list(screen.said)) == (
            "14720aa8fb4e: Downloading [=>      ]  32.77kB/1.069MB",
            ["1: Pulling from t/a"],
        )
        assert moves >= 1


def test_a_flood_without_an_end_of_line_is_not_kept() -> None:
    screen = Screen()
    for _ in range(100):
        screen.feed(b"x" * 65536)
    assert len(screen._rest) <= 8192


def test_a_program_sees_a_wide_terminal_and_its_errors_come_apart() -> None:
    done = run("test -t 1 || exit 9; stty size <&1; echo wrong >&2; exit 3")
    assert (done.code, done.words, done.last) == (3, b"wrong\n", "100 400")


def test_a_program_that_shows_progress_on_stderr() -> None:
    done = run(
        "test -t 2 || exit 9; test -t 1 && exit 8; printf 'Copying blob 251ea17c537f 1B / 2B\\rError: x\\n' 1>&2",
        shows_on="stderr",
    )
    assert (done.code, done.words) == (0, b"Error: x")


def test_what_moves_slowly_is_not_ended_and_what_redraws_is() -> None:
    moving = run(
        "for i in 1 2 3 4 5 6 7 8; do printf '14720aa8fb4e: Downloading %skB/9MB\\r' $i; sleep 0.4; done", quiet=2.5
    )
    assert (moving.code, moving.stalled) == (0, False)
    redrawing = run("while :; do printf '14720aa8fb4e: Downloading 1kB/9MB\\r'; sleep 0.05; done", quiet=0.5)
    assert (redrawing.code, redrawing.stalled, redrawing.interrupted) == (None, True, False)
    assert redrawing.last == "14720aa8fb4e: Downloading 1kB/9MB"


def test_the_limit_and_the_interrupt_end_it() -> None:
    late = run("while :; do date +%N; sleep 0.05; done", timeout=0.5, quiet=30)
    assert (late.code, late.stalled, late.interrupted) == (None, False, False)
    waker = Waker()
    waker.wake()
    left = run("sleep 1000", interrupt=waker.fileno())
    waker.close()
    assert (left.code, left.interrupted) == (None, True)


def test_nothing_is_left_of_it_neither_process_nor_descriptor(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    assert run("sleep 1000 & sleep 1000", timeout=0.3).code is None
    until(lambda: not helpers(), "the end of the whole group")
    pid = tmp_path / "pid"
    try:  # a grandchild that left the group holds the terminal: it is not waited for
        assert run(f"setsid sleep 1000 & echo $! >{pid}; exit 4").code == 4
        assert helpers() == {int(pid.read_text())}
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    with pytest.raises(ProgramMissing):
        watch(["/no/such"], environment={}, instance="w", timeout=1, quiet=1, shows_on="stdout")
    assert set(os.listdir("/proc/self/fd")) == before


def helpers() -> set[int]:
    """Living processes that this test process has started."""
    mark = f"{HELPER}={INSTANCE}".encode()
    return {pid for pid, environ in living_environments() if mark in environ.split(b"\0")}
