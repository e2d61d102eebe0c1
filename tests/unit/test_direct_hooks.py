"""Setup and teardown of the direct backend: what they get, how they fail, what they leave."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.cgroup import cgroup_base
from oz_worker.errors import Stopped, TaskFault
from oz_worker.model import Cause, Reason
from oz_worker.process import read_stat
from tests.hosting import INSTANCE, PATIENCE, Stage, marked, prepare_fault, run, written


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


class TestSetup:
    def test_its_failure_is_told_with_code_and_nothing_starts(self, stage: Stage) -> None:
        stage.agent("touch $NOTES/ran")
        caught = prepare_fault(stage, stage.unit(), setup_command="exit 5")
        assert (caught.facts.reason, caught.facts.code) == (Reason.SETUP_COMMAND, 5)
        assert "exit code 5" in caught.facts.detail
        assert not (stage.root / "ran").exists()

    def test_a_hanging_one_is_ended_with_all_it_started(self, stage: Stage) -> None:
        setup = f"trap '' TERM; setsid sleep 60 & echo $! >{stage.root}/pid; while :; do sleep 60; done"
        unit = stage.unit()
        caught = prepare_fault(stage, unit, setup_command=setup, setup_timeout=0.5, grace=0.1)
        assert "took longer than 0.5s and was stopped; raise setup_timeout" in caught.facts.detail
        assert not marked(stage.mark(unit))

    def test_a_background_child_with_our_output_delays_nothing(self, stage: Stage) -> None:
        backend = stage.direct(setup_command="sleep 60 & echo started")
        unit = run(backend, stage.unit())
        assert unit.facts is not None
        assert unit.facts.code == 0
        assert marked(stage.mark(unit))  # a service that the agent needs may come from there
        assert backend.stragglers(unit) == ""
        assert not marked(stage.mark(unit))

    @pytest.mark.parametrize("text", ["A=1\\nnonsense\\n", "A='open", "A=1\\n\\000"])
    def test_a_mistake_in_the_file_is_an_error_with_its_line(self, stage: Stage, text: str) -> None:
        caught = prepare_fault(stage, stage.unit(), setup_command=f'printf "{text}" >"$OZ_ENVIRONMENT_FILE"')
        assert caught.facts.reason is Reason.SETUP_COMMAND
        assert "/env:" in caught.facts.detail
        assert "correct what setup_command writes" in caught.facts.detail

    @pytest.mark.parametrize(
        "what",
        [
            'rm "$F"; ln -s /etc/passwd "$F"',
            'rm "$F"; mkdir "$F"',
            'rm "$F"; mkfifo "$F"',
            "head -c 2000000 /dev/zero >$F",
        ],
    )
    def test_a_file_that_is_no_file_is_refused(self, stage: Stage, what: str) -> None:
        caught = prepare_fault(stage, stage.unit(), setup_command=f"F=$OZ_ENVIRONMENT_FILE; {what}")
        assert "OZ_ENVIRONMENT_FILE" in caught.facts.detail

    def test_a_stop_order_ends_it_at_once(self, stage: Stage) -> None:
        stage.agent("touch $NOTES/ran")
        backend = stage.direct(setup_command=f"echo up >{stage.root}/up; sleep 60")
        unit = stage.unit()
        raised: list[BaseException] = []

        def prepare() -> None:
            try:
                backend.prepare(unit)
            except Stopped as stopped:
                raised.append(stopped)

        thread = threading.Thread(target=prepare)
        thread.start()
        written(stage.root / "up")
        unit.order_stop(Cause.CANCEL, 10)
        thread.join(PATIENCE)
        assert raised
        assert not marked(stage.mark(unit))
        assert not backend.stop(unit).remains
        assert backend.clean_up(unit, keep=False) == ""
        assert not (stage.root / "ran").exists()


class TestTeardown:
    def test_it_runs_after_failure_and_cancel_and_only_once(self, stage: Stage) -> None:
        stage.agent("echo up; sleep 60")
        backend = stage.direct(teardown_command=f"echo ran >>{stage.root}/teardown")
        unit = stage.unit()
        backend.prepare(unit)
        backend.start(unit)
        unit.order_stop(Cause.CANCEL, 10)
        assert backend.stop(unit).remains == ""
        assert backend.teardown(unit) == ""
        assert backend.teardown(stage.again(unit)) == ""
        assert written(stage.root / "teardown") == "ran\n"

    def test_it_runs_after_a_failed_setup(self, stage: Stage) -> None:
        backend = stage.direct(setup_command="exit 1", teardown_command=f"echo ran >{stage.root}/teardown")
        unit = stage.unit()
        with pytest.raises(TaskFault):
            backend.prepare(unit)
        assert backend.teardown(unit) == ""
        assert written(stage.root / "teardown") == "ran\n"

    @pytest.mark.parametrize(
        ("command", "says"), [("exit 6", "exit code 6"), ("trap '' TERM; sleep 60; sleep 60", "longer than 0.3s")]
    )
    def test_its_failure_is_a_sentence_and_it_is_bounded(self, stage: Stage, command: str, says: str) -> None:
        backend = stage.direct(teardown_command=command, teardown_timeout=0.3, grace=0.1)
        unit = run(backend, stage.unit())
        assert says in backend.teardown(unit)
        assert not marked(stage.mark(unit))

    def test_what_it_leaves_running_is_ended(self, stage: Stage) -> None:
        backend = stage.direct(teardown_command="setsid sleep 60 & sleep 60 &", grace=0.1)
        unit = run(backend, stage.unit())
        assert backend.teardown(unit) == ""
        assert not marked(stage.mark(unit))

    def test_no_cleanup_keeps_the_workspace_as_it_is(self, stage: Stage) -> None:
        backend = stage.direct(teardown_command=f"echo ran >{stage.root}/teardown", cleanup=False)
        unit = run(backend, stage.unit())
        assert backend.teardown(unit) == ""
        assert backend.clean_up(unit, keep=True) == ""
        assert not (stage.root / "teardown").exists()
        assert len(os.listdir(stage.workspaces)) == 2


class TestEscalation:
    """What a second signal does: no grace any more, whatever is being ended."""

    def test_it_ends_a_running_teardown(self, stage: Stage) -> None:
        up = stage.root / "up"
        backend = stage.direct(teardown_command=f"trap '' TERM; echo up >{up}; sleep 60; sleep 60", grace=1000.0)
        unit = run(backend, stage.unit())
        sentences: list[str] = []
        thread = threading.Thread(target=lambda: sentences.append(backend.teardown(unit)))
        thread.start()
        written(up)
        unit.hurry()
        thread.join(PATIENCE)
        assert len(sentences) == 1
        assert "teardown_command was killed" in sentences[0]
        assert not marked(stage.mark(unit))

    def test_a_teardown_that_begins_later_has_its_time(self, stage: Stage) -> None:
        backend = stage.direct(teardown_command=f"sleep 0.2; echo ran >{stage.root}/ran")
        unit = run(backend, stage.unit())
        unit.hurry()
        assert backend.teardown(unit) == ""
        assert (stage.root / "ran").exists()

    def test_it_ends_stragglers_that_refuse_to_go(self, stage: Stage) -> None:
        stage.agent("(trap '' TERM; echo up >$NOTES/up; while :; do sleep 60; done) & exit 0")
        backend = stage.direct(grace=1000.0)
        unit = run(backend, stage.unit())
        written(stage.root / "up")
        remains: list[str] = []
        thread = threading.Thread(target=lambda: remains.append(backend.stragglers(unit)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        unit.hurry()
        thread.join(PATIENCE)
        assert remains == [""]

    def test_a_stop_order_that_comes_after_it_has_no_grace(self, stage: Stage) -> None:
        stage.agent("trap '' TERM; echo up >$NOTES/up; while :; do sleep 60; done")
        backend = stage.direct()
        unit = stage.unit()
        backend.prepare(unit)
        backend.start(unit)
        written(stage.root / "up")
        unit.hurry()
        unit.order_stop(Cause.SHUTDOWN, 1000)
        assert backend.stop(unit).remains == ""
        assert unit.hurried


def test_what_a_setup_left_running_ends_when_its_agent_never_starts(stage: Stage) -> None:
    pid = stage.root / "pid"
    backend = stage.direct(setup_command=f"setsid sleep 60 & echo $! >{pid}; exit 0")
    unit = stage.unit()
    backend.prepare(unit)
    unit.order_stop(Cause.CANCEL, 10)
    with pytest.raises(Stopped):
        backend.start(unit)
    assert marked(stage.mark(unit))
    assert backend.stragglers(unit) == ""
    assert not marked(stage.mark(unit))


def test_a_thread_that_cannot_be_started_delays_a_lost_end_and_no_more(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.agent("echo $PPID >$NOTES/recorder; exec sleep 60")
    backend = stage.direct()
    unit = stage.unit()
    backend.prepare(unit)
    backend.start(unit)
    recorder = int(written(stage.root / "recorder"))
    start, refused = threading.Thread.start, threading.Event()

    def none_left(thread: threading.Thread) -> None:
        if not refused.is_set() and thread.name.startswith("lost-"):
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    os.kill(recorder, signal.SIGKILL)
    unit.wait_for_end_or_stop(PATIENCE)
    assert refused.is_set()
    assert unit.facts is not None
    assert unit.facts.reason is Reason.AGENT_INVOCATION


class TestWhatCannotBeRemoved:
    def test_a_workspace_in_the_way_costs_no_zombie_and_shows_no_secret(self, stage: Stage) -> None:
        stage.agent("echo a-secret; exit 0")
        backend = stage.direct()
        unit = run(backend, stage.unit())
        directory = stage.instance_dir / "units" / unit.name
        recorder = int((directory / "pid").read_text().split()[0])
        workspace = next(path for path in stage.workspaces.iterdir() if path.name != ".oz-worker")
        mark = stage.workspaces / ".oz-worker" / workspace.name
        aside = mark.rename(stage.root / "aside")
        mark.symlink_to(mark.name)  # whose it is cannot be read any more
        assert f"whose workspace {workspace} is" in backend.clean_up(unit, keep=False)
        aside.rename(mark)
        assert read_stat(recorder) is None
        assert sorted(os.listdir(directory)) == ["pid", "status", "unit.json"]
        assert [found.name for found in backend.units()] == [unit.name]
        assert backend.clean_up(stage.again(unit), keep=False) == ""
        assert not workspace.exists()
        assert not directory.exists()

    def test_a_cgroup_goes_with_a_unit_of_which_only_the_name_is_known(self, stage: Stage) -> None:
        base = cgroup_base()
        assert base is not None, "no cgroup of version 2 can be made here"
        unit = stage.unit()
        path = base / f"oz-{INSTANCE}-{unit.name}"
        path.mkdir()
        backend = stage.direct(cgroup="off")
        assert backend.clean_up(stage.again(unit), keep=False) == ""
        assert not path.exists()
        path.mkdir()
        backend.recover()
        assert not path.exists()
