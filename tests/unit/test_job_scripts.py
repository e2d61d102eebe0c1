"""The scripts of a task's pod, run by real shells, each as the first process in a file system of its own."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator

import psutil
import pytest

from oz_worker.backends.job_scripts import copy, wrapper

PATIENCE = 60.0
SHELLS = ("dash", "busybox", "bash")
COREUTILS = ("env", "sleep", "cp", "rm", "true", "cat", "ls", "ln", "chmod", "mkdir", "touch")


class Container:
    """A directory with a shell as /bin/sh, entered by chroot in namespaces of its own."""

    def __init__(self, root: Path, shell: str) -> None:
        self.root = root
        for name in ("bin", "agent", "workspace", "target", "proc", "dev", "tmp"):
            (root / name).mkdir(parents=True)
        (root / "dev/null").touch()
        if shell == "busybox":
            shutil.copy(_program("busybox"), root / "bin/busybox")
            for name in ("sh", *COREUTILS):
                (root / "bin" / name).symlink_to("busybox")
        else:
            self.install(shell, "sh")
            for name in COREUTILS:
                self.install(name)

    def install(self, program: str, name: str = "") -> None:
        """Put a program of this host, with its libraries, into /bin."""
        path = _program(program)
        shutil.copy(path, self.root / "bin" / (name or program))
        for word in subprocess.run(["ldd", path], capture_output=True, text=True).stdout.split():
            if word.startswith("/"):
                place = self.root / word[1:]
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    shutil.copy(word, place)

    def agent(self, script: str) -> None:
        path = self.root / "agent/entrypoint.sh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def start(
        self, script: str, *arguments: str, env: dict[str, str] | None = None, before: str = ""
    ) -> subprocess.Popen[bytes]:
        """Run *script* as the pod's container does; *before* is done in the same mounts, from outside."""
        mounts = 'mount -t proc none "$1/proc" && mount --bind /dev/null "$1/dev/null"'
        enter = f'{before}{mounts} && cd "$1/workspace" && shift && exec "$@"'
        alone = ["unshare", "-mpf", "--kill-child", *(() if os.geteuid() == 0 else ("-r",))]
        inside = [_program("chroot"), str(self.root), "/bin/sh", "-c", script, "oz-task", *arguments]
        variables = {"PATH": "/bin:/usr/bin:/usr/sbin:/sbin", **(env or {})}
        return subprocess.Popen(
            [*alone, "/bin/sh", "-c", enter, "enter", str(self.root), *inside],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *arguments: str, env: dict[str, str] | None = None, before: str = "") -> Done:
        return ended(self.start(script, *arguments, env=env, before=before))

    def text(self, path: str) -> str:
        place = self.root / path
        return place.read_text() if place.exists() else ""


class Done:
    def __init__(self, code: int, out: bytes, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def ended(child: subprocess.Popen[bytes]) -> Done:
    out, err = child.communicate(timeout=PATIENCE)
    return Done(child.returncode, out, err.decode())


def _program(name: str) -> str:
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert found is not None, f"{name} is needed for this test"
    return found


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def _has_lines(path: Path, number: int) -> bool:
    return path.exists() and len(path.read_text().splitlines()) == number


def first_process(child: subprocess.Popen[bytes]) -> int:
    """The pid, out here, of the first process in there."""
    unshare = psutil.Process(child.pid)
    wait_for(unshare.children)
    return int(unshare.children()[0].pid)


@pytest.fixture(params=SHELLS)
def container(tmp_path: Path, request: pytest.FixtureRequest) -> Container:
    return Container(tmp_path / "root", request.param)


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []
    yield children
    for child in children:
        child.kill()
        child.communicate()


HARD = ("", "two words", "$HOME $(id) `id` $$", 'quo"te', "it's", "line\nline", "back\\slash", "*", "--flag=ü")


@pytest.mark.parametrize("teardown", ["", ":"])
def test_the_arguments_arrive_as_they_are_and_so_does_the_exit_code(container: Container, teardown: str) -> None:
    container.agent('for one in "$@"; do printf "%s\\000" "$one"; done; exit 7')
    done = container.run(wrapper(teardown), *HARD)
    assert done.out.decode().split("\0")[:-1] == list(HARD)
    assert (done.code, done.err) == (7, "")


@pytest.mark.parametrize("teardown", ["", ":"])
def test_what_setup_left_is_exported_and_ours_is_not(container: Container, teardown: str) -> None:
    (container.root / "workspace/.oz-env").write_text("set -eu\nA='x y'\nexport B=\"$A z\"\n")
    container.agent('echo "$A|$B|${SECRET-gone}"; env')
    env = {"OZ_ENVIRONMENT_FILE": "/workspace/.oz-env", "SECRET": "s"}
    done = container.run(wrapper(teardown, forget="SECRET"), env=env)
    assert done.code == 0
    first, *names = done.out.decode().splitlines()
    assert first == "x y|x y z|gone"
    mine = {"PATH", "PWD", "OLDPWD", "SHLVL", "_", "OZ_ENVIRONMENT_FILE", "A", "B"}
    assert {name.partition("=")[0] for name in names} <= mine


def test_without_a_teardown_the_agent_is_the_first_process(container: Container) -> None:
    container.agent('echo "$$"')
    assert container.run(wrapper("")).out == b"1\n"


TEARDOWN = 'echo "it\'s $0 $A $$" > /workspace/torn\nexit 3'


@pytest.mark.parametrize("code", [0, 1, 130, 143, 255])
def test_the_teardown_runs_after_every_end_and_changes_no_exit_code(container: Container, code: int) -> None:
    container.agent(f"exit {code}")
    done = container.run(wrapper(TEARDOWN), env={"A": "a"})
    assert done.code == code
    assert container.text("workspace/torn").startswith("it's /bin/sh a ")
    assert done.err == "oz-worker: teardown_command ended with exit code 3\n"


def test_an_agent_that_is_killed_is_torn_down_too(container: Container) -> None:
    container.agent("kill -KILL $$")
    done = container.run(wrapper(TEARDOWN))
    assert (done.code, bool(container.text("workspace/torn"))) == (137, True)


@pytest.mark.parametrize(
    ("agent", "code"),
    [("trap 'echo got TERM; exit 9' TERM", 9), ("trap 'echo got TERM; exit 0' TERM", 0), (":", 143)],
)
def test_a_term_reaches_the_agent_and_then_the_teardown_runs(
    container: Container, running: list[subprocess.Popen[bytes]], agent: str, code: int
) -> None:
    container.agent(f"{agent}\ntouch /workspace/ready\nwhile :; do sleep 0.1; done")
    running.append(child := container.start(wrapper(TEARDOWN)))
    wait_for((container.root / "workspace/ready").exists)
    os.kill(first_process(child), signal.SIGTERM)
    done = ended(child)
    assert (done.code, bool(container.text("workspace/torn"))) == (code, True)
    assert done.out == (b"" if agent == ":" else b"got TERM\n")


def test_a_signal_that_the_agent_survives_ends_nothing(
    container: Container, running: list[subprocess.Popen[bytes]]
) -> None:
    wait = "while [ ! -e /workspace/go ]; do sleep 0.1; done"
    container.agent(f"trap 'echo >> /workspace/got' USR1 HUP\ntouch /workspace/ready\n{wait}\nexit 5")
    running.append(child := container.start(wrapper(TEARDOWN)))
    wait_for((container.root / "workspace/ready").exists)
    for number, name in enumerate((signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1), 1):
        os.kill(first_process(child), name)
        wait_for(functools.partial(_has_lines, container.root / "workspace/got", number))
    assert not container.text("workspace/torn")
    (container.root / "workspace/go").touch()
    assert (ended(child).code, bool(container.text("workspace/torn"))) == (5, True)


def test_a_term_during_the_teardown_does_not_cut_it_short(
    container: Container, running: list[subprocess.Popen[bytes]]
) -> None:
    container.agent("exit 4")
    teardown = "touch /workspace/tearing; while [ ! -e /workspace/go ]; do sleep 0.1; done; touch /workspace/torn"
    running.append(child := container.start(wrapper(teardown)))
    wait_for((container.root / "workspace/tearing").exists)
    os.kill(first_process(child), signal.SIGTERM)
    time.sleep(0.3)
    (container.root / "workspace/go").touch()
    assert (ended(child).code, (container.root / "workspace/torn").exists()) == (4, True)


def test_a_teardown_that_hangs_is_ended(container: Container) -> None:
    container.agent("exit 6")
    done = container.run(wrapper("sleep 600", limit=1))
    assert done.code == 6
    assert done.err.endswith("oz-worker: teardown_command ended with exit code 143\n")


def test_a_teardown_that_is_deaf_to_term_is_killed(tmp_path: Path) -> None:
    container = Container(tmp_path / "root", "dash")
    container.agent("exit 6")
    done = container.run(wrapper("trap '' TERM; while :; do sleep 1; done", limit=1))
    assert done.code == 6
    assert done.err.endswith("oz-worker: teardown_command ended with exit code 137\n")


def test_a_teardown_without_a_sleep_in_the_image_runs_to_its_end(tmp_path: Path) -> None:
    container = Container(tmp_path / "root", "dash")
    (container.root / "bin/sleep").unlink()
    container.agent("exit 6")
    done = container.run(wrapper("touch /workspace/torn"))
    assert (done.code, container.root.joinpath("workspace/torn").exists()) == (6, True)


def test_the_agent_can_be_interrupted_where_coreutils_can_give_that_back(tmp_path: Path) -> None:
    container = Container(tmp_path / "root", "dash")
    container.agent("cat /proc/self/status")
    status = container.run(wrapper(":")).out.decode()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    assert not ignored & (1 << (signal.SIGINT - 1) | 1 << (signal.SIGQUIT - 1))


@pytest.mark.parametrize("teardown", ["", TEARDOWN])
def test_a_file_of_variables_that_no_shell_reads_is_said_and_no_agent_runs(container: Container, teardown: str) -> None:
    (container.root / "workspace/.oz-env").write_text("A='open\n")
    container.agent("touch /workspace/ran")
    done = container.run(wrapper(teardown), env={"OZ_ENVIRONMENT_FILE": "/workspace/.oz-env"})
    assert done.code == 2
    assert "oz-worker: /workspace/.oz-env is not what a shell can read; correct what setup_command writes" in done.err
    assert not container.text("workspace/ran")
    assert bool(container.text("workspace/torn")) == bool(teardown)


@pytest.mark.parametrize("teardown", ["", TEARDOWN])
def test_a_file_of_variables_that_ends_the_shell_ends_the_task(container: Container, teardown: str) -> None:
    (container.root / "workspace/.oz-env").write_text("exit 3\n")
    done = container.run(wrapper(teardown), env={"OZ_ENVIRONMENT_FILE": "/workspace/.oz-env"})
    assert (done.code, bool(container.text("workspace/torn"))) == (3, bool(teardown))


@pytest.mark.parametrize("teardown", ["", TEARDOWN])
def test_a_missing_entrypoint_is_said_also_in_the_pod_s_status(container: Container, teardown: str) -> None:
    (container.root / "dev/termination-log").touch()
    done = container.run(wrapper(teardown))
    assert done.code == 127
    assert "oz-worker: there is no /agent/entrypoint.sh that can be run" in done.err
    assert container.text("dev/termination-log").startswith("there is no /agent/entrypoint.sh")
    assert bool(container.text("workspace/torn")) == bool(teardown)


def test_a_sidecar_s_files_are_copied_with_their_links_owners_and_modes(container: Container) -> None:
    root = container.root
    for name in ("opt/tool", "run/secrets", "sys", "var"):
        (root / name).mkdir(parents=True)
    (root / "opt/tool/a").write_text("a")
    (root / "opt/tool/a").chmod(0o4750)
    os.link(root / "opt/tool/a", root / "opt/tool/b")
    (root / "opt/tool/link").symlink_to("/opt/tool/a")
    (root / "dangling").symlink_to("/nowhere")
    (root / ".dot").write_text("dot")
    (root / "..dots").write_text("dots")
    (root / "white space").write_text("white")
    (root / "run/secrets/token").write_text("secret")
    (root / "var/run").symlink_to("/run")
    done = container.run(copy())
    assert (done.code, done.err) == (0, "")
    target = root / "target"
    assert (target / "opt/tool/a").read_text() == "a"
    assert (target / "opt/tool/a").stat().st_mode == (root / "opt/tool/a").stat().st_mode
    assert (target / "opt/tool/a").stat().st_ino == (target / "opt/tool/b").stat().st_ino
    assert os.readlink(target / "opt/tool/link") == "/opt/tool/a"
    assert os.readlink(target / "dangling") == "/nowhere"
    names = {".dot", "..dots", "white space", "dangling", "agent", "bin", "opt", "run", "tmp", "var", "workspace"}
    assert {each.name for each in target.iterdir()} - {"lib", "lib64", "usr"} == names
    assert not (target / "run/secrets").exists()
    assert (root / "run/secrets/token").exists()


def test_a_copy_that_lacks_room_fails_and_says_so(container: Container) -> None:
    (container.root / "big").write_bytes(os.urandom(1 << 20))
    room = 'mount -t tmpfs -o size=100k none "$1/target" && '
    done = container.run(copy(), before=room)
    assert done.code == 1
    assert "oz-worker: the files of this sidecar image could not all be copied" in done.err


def test_a_copy_without_its_program_fails_and_says_so(tmp_path: Path) -> None:
    container = Container(tmp_path / "root", "dash")
    (container.root / "bin/cp").unlink()
    done = container.run(copy())
    assert done.code == 1
    assert "it needs cp" in done.err


def test_one_file_that_cannot_be_copied_fails_the_copy(container: Container) -> None:
    (container.root / "target/agent").write_text("in the way of a directory")
    done = container.run(copy())
    assert done.code == 1
    assert (container.root / "target/bin").is_dir()
