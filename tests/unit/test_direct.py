from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.backends.direct import describe
from oz_worker.cgroup import cgroup_base
from oz_worker.errors import NotUsable, TaskFault
from oz_worker.model import Cause, Reason
from tests.audit import guard
from tests.hosting import PATIENCE, Stage, alive, eventually, marked, planted, prepare_fault, run, written

ENVIRON = "tr '\\0' '\\n' </proc/self/environ >$NOTES/seen; echo end >$NOTES/end"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def seen(stage: Stage, name: str = "seen") -> dict[str, str]:
    guard().allow(stage.root / name)
    lines = (stage.root / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


class TestOpen:
    def test_a_missing_oz_is_told_with_its_cure(self, stage: Stage) -> None:
        with pytest.raises(NotUsable, match="no program oz on PATH; install"):
            stage.direct(oz_path="", host={"PATH": str(stage.root / "nowhere")})
        with pytest.raises(NotUsable, match="/no/oz does not exist"):
            stage.direct(oz_path="/no/oz")
        stage.oz.chmod(0o644)
        with pytest.raises(NotUsable, match=r"not executable; make it so with chmod \+x"):
            stage.direct()

    def test_oz_is_found_on_the_path(self, stage: Stage) -> None:
        stage.agent("echo found >$NOTES/found")
        assert run(stage.direct(oz_path="", host={"PATH": str(stage.root)}), stage.unit()).facts
        assert written(stage.root / "found")

    def test_directories_that_cannot_serve_are_named(self, stage: Stage) -> None:
        (stage.root / "file").write_text("")
        with pytest.raises(NotUsable, match=r"workspace_root .*file is not a directory"):
            stage.direct(workspace_root=str(stage.root / "file"))
        with pytest.raises(NotUsable, match=r"target_dir .*gone is not a directory"):
            stage.direct(target_dir=str(stage.root / "gone"))
        with pytest.raises(NotUsable, match=r"harness_config_dirs.claude .*gone"):
            stage.direct(harness_config_dirs={"claude": str(stage.root / "gone")})
        with pytest.raises(NotUsable, match="known are claude, codex"):
            stage.direct(harness_config_dirs={"other": str(stage.root)})

    def test_a_target_directory_needs_no_workspace_root(self, stage: Stage) -> None:
        stage.direct(target_dir=str(stage.root))
        assert not stage.workspaces.exists()

    def test_what_goes_away_later_makes_it_unavailable(self, stage: Stage) -> None:
        backend = stage.direct()
        assert backend.unavailable() == ""
        stage.oz.rename(stage.root / "moved")
        assert "oz is gone or not executable" in backend.unavailable()
        (stage.root / "moved").rename(stage.oz)
        stage.workspaces.rename(stage.root / "moved")
        assert "is gone; make it again" in backend.unavailable()


class TestEnvironment:
    def test_the_agents_environment_is_composed_in_its_order(self, stage: Stage) -> None:
        stage.agent(ENVIRON)
        host = {
            "PATH": os.environ["PATH"],
            "HOME": "/host",
            "LANG": "C",
            "https_proxy": "p1",
            "HTTPS_PROXY": "p2",
            "WARP_API_KEY": "worker-key",
            "SECRET_OF_HOST": "x",
            "EXTRA": "inherited",
            "NOTIFY_SOCKET": "/n",
        }
        task = {"TASK_ID": "t", "A": "task", "B": "task", "GIT_CONFIG_GLOBAL": "/elsewhere", "odd.name": "kept"}
        unit = stage.unit(environment=task)
        run(stage.direct(host=host, inherit_environment=("EXTRA", "ABSENT"), environment={"B": "config"}), unit)
        found = seen(stage)
        gitconfig = found.pop("GIT_CONFIG_GLOBAL")
        found.pop("PWD")
        assert found == {
            "PATH": os.environ["PATH"],
            "HOME": "/host",
            "LANG": "C",
            "https_proxy": "p1",
            "HTTPS_PROXY": "p2",
            "EXTRA": "inherited",
            "TASK_ID": "t",
            "A": "task",
            "B": "config",
            "odd.name": "kept",
            "PRIVATE_TOKEN": planted(unit),
            "OZ_WORKER_UNIT": stage.mark(unit),
        }
        assert Path(gitconfig).parent == stage.instance_dir / "units" / unit.name
        assert stat.S_IMODE(os.stat(gitconfig).st_mode) == 0o600

    def test_setup_adds_variables_by_the_file_but_not_the_git_configuration(self, stage: Stage) -> None:
        stage.agent(ENVIRON)
        setup = (
            f"tr '\\0' '\\n' </proc/self/environ >{stage.root}/setup; pwd >{stage.root}/where\n"
            "echo \"TOKEN='from setup'\nGIT_CONFIG_GLOBAL=/evil\nOZ_WORKER_UNIT=no\nPATH=$PATH:/x\""
            ' >"$OZ_ENVIRONMENT_FILE"'
        )
        unit = stage.unit(environment={"TASK_ID": "t", "WARP_API_KEY": "task-key"})
        backend = stage.direct(setup_command=setup, host={**os.environ, "WARP_API_KEY": "worker-key", "CUSTOM": "1"})
        run(backend, unit)
        during, agent = seen(stage, "setup"), seen(stage)
        workspace = written(stage.root / "where").strip()
        path = during["OZ_ENVIRONMENT_FILE"]
        expected = {"WORKSPACE_ROOT": workspace, "WORKER_BACKEND": "direct", "RUN_ID": "task", "ENVIRONMENT_FILE": path}
        for name, value in expected.items():
            assert during[f"OZ_{name}"] == during[f"WARP_{name}"] == value
        assert during["WARP_API_KEY"] == "task-key"
        assert during["CUSTOM"] == "1"
        assert not path.startswith(workspace)
        assert not os.path.exists(path)
        assert agent["TOKEN"] == "from setup"
        assert agent["PATH"].endswith(":/x")
        assert agent["GIT_CONFIG_GLOBAL"] != "/evil"
        assert agent["OZ_WORKER_UNIT"] == stage.mark(unit)
        assert "CUSTOM" not in agent
        assert unit.secrets is not None
        assert "from setup" in unit.secrets

    def test_hooks_do_not_get_the_workers_key_nor_teardown_the_tasks_environment(self, stage: Stage) -> None:
        hook = "tr '\\0' '\\n' </proc/self/environ >" + str(stage.root)
        backend = stage.direct(
            setup_command=f"{hook}/setup",
            teardown_command=f"{hook}/teardown; pwd >{stage.root}/where",
            environment={"OPERATOR": "says"},
            host={**os.environ, "WARP_API_KEY": "worker-key"},
        )
        unit = run(backend, stage.unit(environment={"TASK_ID": "t", "TOKEN": "secret"}))
        assert backend.teardown(unit) == ""
        assert "WARP_API_KEY" not in seen(stage, "setup")
        assert seen(stage, "setup")["TOKEN"] == "secret"
        found = seen(stage, "teardown")
        assert not {"WARP_API_KEY", "TOKEN", "TASK_ID", "OZ_ENVIRONMENT_FILE"} & set(found)
        workspace = written(stage.root / "where").strip()
        assert (found["OZ_WORKSPACE_ROOT"], found["OZ_RUN_ID"], found["OPERATOR"]) == (workspace, "task", "says")
        assert found["GIT_CONFIG_GLOBAL"] == seen(stage, "setup")["GIT_CONFIG_GLOBAL"]

    @pytest.mark.parametrize(
        ("harness", "variable", "name"), [("claude", "CLAUDE_CONFIG_DIR", ".claude"), ("codex", "CODEX_HOME", ".codex")]
    )
    def test_a_harness_has_a_directory_of_its_own_filled_from_the_hosts(
        self, stage: Stage, harness: str, variable: str, name: str
    ) -> None:
        (stage.root / "config" / "deep").mkdir(parents=True)
        (stage.root / "config" / "deep" / "settings").write_text("mine")
        stage.agent(ENVIRON + f"; cat ${variable}/deep/settings >$NOTES/copied; echo >>$NOTES/copied")
        unit = run(stage.direct(harness_config_dirs={harness: str(stage.root / "config")}), stage.unit(harness=harness))
        assert unit.facts is not None
        assert unit.facts.code == 0
        assert seen(stage)[variable] == f"{seen(stage)['PWD']}/{name}"
        assert written(stage.root / "copied") == "mine\n"


class TestArguments:
    MCP = '{"server":{"env":{"KEY":"mcp-secret"}}}'

    def test_argv_arrives_to_the_letter(self, stage: Stage) -> None:
        stage.agent("for a; do printf '[%s]' \"$a\"; done >$NOTES/argv; echo >>$NOTES/argv")
        run(stage.direct(), stage.unit(argv=("agent", "run", "--mcp", self.MCP, "a b", "", "$HOME")))
        assert written(stage.root / "argv") == f"[agent][run][--mcp][{self.MCP}][a b][][$HOME]\n"

    def test_mcp_by_file_keeps_it_off_the_command_line(self, stage: Stage) -> None:
        stage.agent('cat "$4" >$NOTES/mcp; stat -c %a "$4" >$NOTES/mode; echo "$@" >$NOTES/argv')
        backend = stage.direct(mcp_config="file")
        unit = run(backend, stage.unit(argv=("agent", "run", "--mcp", self.MCP), mcp=self.MCP))
        assert (stage.root / "mcp").read_text() == self.MCP
        assert written(stage.root / "mode") == "600\n"
        assert "mcp-secret" not in written(stage.root / "argv")
        assert backend.clean_up(unit, keep=True) == ""
        assert not list(stage.instance_dir.rglob("mcp.json"))


class TestEnds:
    @pytest.mark.parametrize(
        ("script", "code", "says"),
        [
            ("exit 3", 3, "exit code 3"),
            ("kill -SEGV $$", 139, "SIGSEGV (exit code 139)"),
            ("kill -TERM $$", 143, "SIGTERM (exit code 143)"),
            ("kill -KILL $$", 137, "SIGKILL (exit code 137)"),
            ("exit 137", 137, "dmesg"),
            ("exec /nothing/there", 127, "not found"),
            ("exit 255", 255, "exit code 255"),
        ],
    )
    def test_every_end_has_its_class_and_a_sentence(self, stage: Stage, script: str, code: int, says: str) -> None:
        stage.agent(script)
        facts = run(stage.direct(), stage.unit()).facts
        assert facts is not None
        assert (facts.code, facts.reason, facts.agent_started) == (code, Reason.AGENT_INVOCATION, True)
        assert says in facts.detail

    def test_a_kill_for_memory_is_told_apart(self) -> None:
        assert "ran out of memory" in describe(137, oom=True)

    def test_oz_that_vanished_is_told_when_it_should_start(self, stage: Stage) -> None:
        backend = stage.direct()
        stage.oz.unlink()
        unit = stage.unit()
        backend.prepare(unit)
        with pytest.raises(TaskFault) as caught:
            backend.start(unit)
        assert caught.value.facts.reason is Reason.AGENT_INVOCATION
        assert "oz does not exist" in caught.value.facts.detail
        assert backend.clean_up(unit, keep=False) == ""

    def test_a_recorder_that_is_killed_alone_does_not_leave_the_agent_behind(self, stage: Stage) -> None:
        stage.agent("echo $PPID >$NOTES/recorder; echo $$ >$NOTES/agent; exec sleep 60")
        backend = stage.direct(cgroup="off")
        unit = stage.unit()
        backend.prepare(unit)
        backend.start(unit)
        agent = int(written(stage.root / "agent"))
        os.kill(int(written(stage.root / "recorder")), 9)
        unit.wait_for_end_or_stop(PATIENCE)
        assert unit.facts is not None
        assert unit.facts.code is None
        assert "killed or the host restarted" in unit.facts.detail
        assert not alive(agent)

    def test_what_the_agent_left_running_is_ended_after_its_end(self, stage: Stage) -> None:
        stage.agent("setsid sh -c 'trap \"\" TERM; echo $$ >'$NOTES'/pid; while :; do sleep 60; done' & sleep 0.1")
        for cgroup in ("auto", "off"):
            backend = stage.direct(cgroup=cgroup, grace=0.2)
            unit = run(backend, stage.unit(cgroup))
            pid = int(written(stage.root / "pid"))
            assert unit.facts is not None
            assert unit.facts.code == 0
            assert alive(pid)
            assert backend.stragglers(unit) == ""
            assert not alive(pid)
            assert backend.clean_up(unit, keep=False) == ""
            (stage.root / "pid").unlink()


class TestOutput:
    def test_a_flood_is_cut_with_one_notice_and_its_end_stays(self, stage: Stage) -> None:
        # What fits into no limit first, then a line after each cut, so that the notice could come twice.
        stage.agent("head -c 3000000 /dev/zero; while [ ! -e $NOTES/cut ]; do sleep 0.01; done; echo last; sleep 60")
        backend = stage.direct(log_max=1_000_000)
        unit = stage.unit()
        backend.prepare(unit)
        backend.start(unit)
        output = stage.instance_dir / "units" / unit.name / "output.log"
        eventually(lambda: b"[oz_worker: output over" in backend.tail(unit, 1_000_000))
        (stage.root / "cut").touch()
        eventually(lambda: backend.tail(unit, 5) == b"last\n")
        assert output.stat().st_size < 1_000_000
        assert output.read_bytes().count(b"[oz_worker: output over") == 1
        unit.order_stop(Cause.CANCEL, 0)
        backend.stop(unit)

    def test_output_is_private_and_its_tail_raw(self, stage: Stage) -> None:
        stage.agent("printf 'a\\0\\377b'; printf 'c\\n' >&2")
        backend = stage.direct()
        unit = run(backend, stage.unit())
        assert backend.tail(unit, 4) == b"\xffbc\n"
        assert stat.S_IMODE((stage.instance_dir / "units" / unit.name / "output.log").stat().st_mode) == 0o600


class TestWorkspace:
    def test_it_is_private_empty_and_goes_with_the_unit(self, stage: Stage) -> None:
        stage.agent(
            "pwd >$NOTES/where; ls -A >$NOTES/inside; echo end >>$NOTES/inside; touch left; mkdir -p a/b; chmod 0 a"
        )
        backend = stage.direct()
        unit = run(backend, stage.unit("Task 1", "run/1".replace("/", "-")))
        assert written(stage.root / "where").strip() == f"{stage.workspaces}/Task_1-run-1-{unit.name[:8]}"
        assert written(stage.root / "inside") == "end\n"
        assert backend.clean_up(unit, keep=False) == ""
        assert os.listdir(stage.workspaces) == [".oz-worker"]
        assert os.listdir(stage.workspaces / ".oz-worker") == []
        assert os.listdir(stage.instance_dir / "units") == []

    def test_an_unsafe_id_is_refused_and_leaves_nothing(self, stage: Stage) -> None:
        for task in ("../x", "..", "a/b", ""):
            assert prepare_fault(stage, stage.unit(task)).facts.reason is Reason.WORKSPACE_SETUP
        assert os.listdir(stage.workspaces) == [".oz-worker"]

    def test_a_foreign_directory_in_the_way_is_left_alone(self, stage: Stage) -> None:
        unit = stage.unit()
        way = stage.workspaces / f"task-run-1-{unit.name[:8]}"
        way.mkdir(parents=True)
        (way / "precious").write_text("x")
        caught = prepare_fault(stage, unit)
        assert "is not this worker's" in caught.facts.detail
        assert (way / "precious").exists()

    def test_a_target_directory_is_shared_and_nothing_of_ours_lies_in_it(self, stage: Stage) -> None:
        target = stage.root / "target"
        target.mkdir()
        (target / "precious").write_text("x")
        stage.agent(ENVIRON + "; ls -A >$NOTES/inside; git config --global user.name me 2>/dev/null; touch made")
        backend = stage.direct(target_dir=str(target), teardown_command="echo x >torn", cleanup=False)
        unit = run(backend, stage.unit(harness="claude"))
        assert seen(stage)["PWD"] == str(target)
        assert (stage.root / "inside").read_text() == "precious\n"
        assert backend.teardown(unit) == ""  # also with no-cleanup, as ever
        assert backend.clean_up(unit, keep=False) == ""
        assert sorted(os.listdir(target)) == ["made", "precious", "torn"]

    def test_the_state_of_a_unit_holds_no_secret(self, stage: Stage) -> None:
        backend = stage.direct()
        unit = run(backend, stage.unit(environment={"TASK_ID": "t", "TOKEN": "very-secret"}, secrets=("very-secret",)))
        for path in (stage.instance_dir / "units" / unit.name).iterdir():
            assert b"very-secret" not in path.read_bytes(), path
        facts = json.loads((stage.instance_dir / "units" / unit.name / "unit.json").read_text())
        assert (facts["task_id"], facts["execution_id"], facts["worker"]) == ("task", "run-1", "worker-1")

    def test_a_unit_is_removed_where_it_was_made_also_under_another_configuration(self, stage: Stage) -> None:
        unit = run(stage.direct(), stage.unit())
        elsewhere = stage.direct(workspace_root=str(stage.root / "elsewhere"))
        assert elsewhere.clean_up(stage.again(unit), keep=False) == ""
        assert os.listdir(stage.workspaces) == [".oz-worker"]

    def test_nothing_of_the_kernels_is_left_either(self, stage: Stage) -> None:
        base = cgroup_base()
        assert base is not None
        backend = stage.direct()
        unit = run(backend, stage.unit())
        path = base / f"oz-{unit.instance}-{unit.name}"
        assert path.is_dir()
        assert backend.clean_up(unit, keep=False) == ""
        assert not path.exists()
        path.mkdir()  # of a worker that died before it had written anything
        backend.recover()
        assert not path.exists()


class TestCancel:
    def test_many_cancels_at_once_end_everything(self, stage: Stage) -> None:
        deaf = "trap '' TERM; while :; do sleep 60; done"
        stage.agent(f'setsid sh -c "{deaf}" & echo up; {deaf}')
        backend = stage.direct(cgroup="off")
        units = [stage.unit(f"task-{number}") for number in range(6)]
        for unit in units:
            backend.prepare(unit)
            backend.start(unit)
        for unit in units:
            eventually(lambda unit=unit: backend.tail(unit, 9))  # type: ignore[misc]
            unit.order_stop(Cause.CANCEL, 0.2)
        ends: list[str] = []
        threads = [threading.Thread(target=lambda unit=unit: ends.append(backend.stop(unit).remains)) for unit in units]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert ends == [""] * 6
        assert not any(marked(stage.mark(unit)) for unit in units)
        assert all(backend.clean_up(unit, keep=False) == "" for unit in units)

    def test_hurry_ends_the_grace(self, stage: Stage) -> None:
        stage.agent("trap '' TERM; echo up; while :; do sleep 60; done")
        for cgroup in ("auto", "off"):
            backend = stage.direct(cgroup=cgroup)
            unit = stage.unit(cgroup)
            backend.prepare(unit)
            backend.start(unit)
            eventually(lambda unit=unit, backend=backend: backend.tail(unit, 9))  # type: ignore[misc]
            unit.order_stop(Cause.SHUTDOWN, 10_000)
            threading.Timer(0.1, unit.hurry).start()
            begun = time.monotonic()
            assert backend.stop(unit).remains == ""
            assert time.monotonic() - begun < 1000

    def test_no_zombie_and_no_descriptor_is_left(self, stage: Stage) -> None:
        backend = stage.direct()
        run(backend, stage.unit("warm-up"))
        before = len(os.listdir("/proc/self/fd"))
        for number in range(5):
            unit = run(backend, stage.unit(f"task-{number}"))
            assert backend.stragglers(unit) == ""
            pid = int((stage.instance_dir / "units" / unit.name / "pid").read_text().split()[0])
            assert backend.clean_up(unit, keep=False) == ""
            assert not os.path.exists(f"/proc/{pid}")
        assert len(os.listdir("/proc/self/fd")) == before
