"""The command line as users meet it: real processes, exit codes, sentences on stderr, never a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oz_worker.config import flags
from oz_worker.config.commands import dev_values, place, waiting_time
from oz_worker.config.paths import directories_below, user_base
from oz_worker.errors import ConfigurationError

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "existing_worker"


def oz_worker(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "oz_worker", *words],
        env={**kept, **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_wrong_configuration_is_sentences_and_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("wroker_id: w\nstop_grace: 5\ncleanup: yes\nbackend:\n  direct:\n    workspace_rot: /x\n")
    for command in ("check", "run"):
        result = oz_worker(command, "--config-file", str(file), WARP_API_KEY="wk-hidden")
        assert result.returncode == 2
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        expected = [
            f"oz_worker: {file}:1:1: unknown key 'wroker_id'; did you mean 'worker_id'?",
            f"oz_worker: {file}:2:13: `stop_grace`: '5' has no unit; write 5s for seconds, 5m for minutes",
            f"oz_worker: {file}:6:5: unknown key 'workspace_rot' in backend.direct; did you mean 'workspace_root'?",
            "oz_worker: no worker id: give --worker-id, or `worker_id` in the file; runs are routed to it by that name",
        ]
        assert [line for line in lines if "warning" not in line] == expected
        warning = f"oz_worker: warning: {file}:3:10: 'yes' is read as true; write true or false"
        assert (warning in lines) is (command == "check")
        assert "wk-hidden" not in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--conifg-file", "x"], "oz_worker: unknown flag --conifg-file; did you mean '--config-file'?"),
        (["--worker", "x"], "oz_worker: unknown flag --worker"),
        (["--api-kye=wk-hidden"], "oz_worker: unknown flag --api-kye; did you mean '--api-key'?"),
        (["--worker-id"], "oz_worker: argument --worker-id: expected one argument; `oz_worker --help` shows"),
        (["chekc"], "oz_worker: unexpected argument 'chekc'; did you mean 'check'?"),
        (["--worker-id", "w", "check"], "oz_worker: unexpected argument 'check'"),
        (["--no-cleanup=perhaps"], "oz_worker: argument --no-cleanup: ignored explicit argument"),
        (["status", "--api-key", "x"], "oz_worker: unknown flag --api-key"),
        (["logs"], "oz_worker: the following arguments are required: TASK; `oz_worker logs --help`"),
        (["drain", "--wait", "5"], "oz_worker: --wait: '5' has no unit; write 5s for seconds"),
        (["dev", "--count", "none"], "oz_worker: --count: expected a whole number, got 'none'"),
        (["dev", "--scenario", "slwo"], "oz_worker: --scenario: expected half-open, cut, refuse, garbage or slow"),
        (["status", "--config-file", "/nonexistent"], "oz_worker: /nonexistent: cannot be read (No such file"),
        (["status", "--instance-id", "A_B"], "oz_worker: --instance-id: 'A_B' is not of the form"),
    ],
)
def test_a_usage_error_is_one_sentence_and_exit_2(words: list[str], sentence: str) -> None:
    result = oz_worker(*words)
    assert result.returncode == 2
    assert result.stderr.startswith(sentence)
    assert "Traceback" not in result.stderr
    assert "wk-hidden" not in result.stderr


def test_version_and_help() -> None:
    result = oz_worker("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, "oz-worker 0.1.0\n", "")
    result = oz_worker("--help")
    assert result.returncode == 0
    assert "--config-file PATH" in result.stdout
    assert "--web-socket-url" not in result.stdout
    for command in flags.COMMANDS:
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)


def test_print_config_loads_again_and_shows_no_secret(tmp_path: Path) -> None:
    environ = {"WARP_API_KEY": "wk-hidden", "GITHUB_TOKEN": "ghp-hidden", "STATE_DIRECTORY": "/var/lib/x"}
    for fixture in sorted(FIXTURES.glob("*.yaml")):
        words = ["--config-file", str(fixture), "--stop-grace", "1h30m", "-e", "TOKEN=flag-hidden"]
        first = oz_worker("check", "--print-config", *words, **environ)
        assert first.returncode == 0, first.stderr
        assert "hidden" not in first.stdout + first.stderr
        assert "# api_key: ***  # $WARP_API_KEY\n" in first.stdout
        assert 'stop_grace: "1h30m"  # --stop-grace\n' in first.stdout
        assert 'state_dir: "/var/lib/x"  # $STATE_DIRECTORY\n' in first.stdout
        assert 'flush_timeout: "5s"  # default\n' in first.stdout
        (tmp_path / "again.yaml").write_text(first.stdout)
        again = oz_worker("check", "--print-config", "--config-file", str(tmp_path / "again.yaml"), **environ)
        assert again.returncode == 0, again.stderr
        values = [re.findall(r"^ *[^ #].*?(?=  # |$)", text, re.MULTILINE) for text in (first.stdout, again.stdout)]
        assert values[0] == values[1]
        assert len(values[0]) > 40


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = f"{sys.executable} -m oz_worker check --print-config --worker-id w | true"
    result = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "WARP_API_KEY": "k"},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr


def test_switches_take_true_and_false_as_before() -> None:
    words = ["--no-cleanup=true", "--one-shot=false", "--exit-on-refusal"]
    parsed = flags.parse(words)
    assert (parsed.no_cleanup, parsed.one_shot, parsed.exit_on_refusal) == (True, False, True)


def test_run_is_the_command_when_none_is_named() -> None:
    assert flags.parse([]).command == "run"
    assert flags.parse(["--worker-id", "status"]).command == "run"
    assert flags.parse(["run", "--worker-id", "w"]).worker_id == "w"
    assert flags.parse(["-eA=b", "-e", "C", "--env=D=e", "-v/a:/b"]).env == ["A=b", "C", "D=e"]


def test_dev_gets_what_was_asked_for() -> None:
    words = "dev --backend command --count 3 --cancel-after 1.5s --serve --listen 127.0.0.1:0 --scenario cut --keep"
    parsed = flags.parse([*words.split(), "--oz-path", "oz", "--", "echo --count", "--", "x"])
    assert dev_values(parsed, {}) == {
        "backend": "command",
        "count": 3,
        "cancel_after": 1.5,
        "serve": True,
        "listen": "127.0.0.1:0",
        "scenario": "cut",
        "oz_path": "oz",
        "keep": True,
        "engine": "",
        "script": ("echo --count", "--", "x"),
    }
    defaults = dev_values(flags.parse(["dev"]), {})
    assert (defaults["backend"], defaults["count"], defaults["cancel_after"]) == ("direct", 1, None)
    assert (defaults["listen"], defaults["script"]) == ("127.0.0.1:0", ())


def test_where_status_looks(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("worker_id: a b\ninstance_id: i-1\nstop_grace: nonsense\n")
    environ = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}

    def look(*words: str, **more: str) -> tuple[list[str], str]:
        directories, instance = place(flags.parse(["status", *words]), {**environ, **more})
        return list(directories), instance

    file = str(tmp_path / "c.yaml")
    assert look("--state-dir", "/s", "--config-file", file) == (["/s"], "i-1")
    assert look("--state-dir", "/s", "--instance-id", "i-2") == (["/s"], "i-2")
    ((directory,), instance) = look("--config-file", file)
    assert re.fullmatch(r".*/a_b_[0-9a-f]{8}", directory)
    assert instance == "i-1"
    assert look("--worker-id", "x", STATE_DIRECTORY="/var/lib/sd:/b") == (["/var/lib/sd"], "")
    assert look(STATE_DIRECTORY="/var/lib/sd") == (["/var/lib/sd"], "")
    (tmp_path / "broken.yaml").write_text("{")
    with pytest.raises(ConfigurationError):
        look("--config-file", str(tmp_path / "broken.yaml"))
    assert waiting_time(None, environ) == 0.0
    assert waiting_time("2m", environ) == 120.0


def test_state_directories_of_a_user_are_found(tmp_path: Path) -> None:
    base = user_base({"XDG_STATE_HOME": str(tmp_path), "HOME": "/home/x"})
    assert base == f"{tmp_path}/oz-worker"
    assert user_base({"XDG_STATE_HOME": "relative", "HOME": "/home/x"}) == "/home/x/.local/state/oz-worker"
    assert directories_below(base) == []
    (tmp_path / "oz-worker" / "b").mkdir(parents=True)
    (tmp_path / "oz-worker" / "a").mkdir()
    (tmp_path / "oz-worker" / "file").write_text("")
    assert directories_below(base) == [f"{tmp_path}/oz-worker/a", f"{tmp_path}/oz-worker/b"]


def test_an_interrupt_is_no_traceback_and_130(tmp_path: Path) -> None:
    fifo = tmp_path / "key"
    os.mkfifo(fifo)
    words = [sys.executable, "-m", "oz_worker", "check", "--worker-id", "w", "--api-key-file", str(fifo)]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        writer = os.open(fifo, os.O_WRONLY)  # returns once the child reads the key, and there it stays
        # Python acts on a signal between two steps: one that comes right before a blocking read waits for the next.
        stderr = None
        while stderr is None:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, stderr = child.communicate(timeout=5)
        os.close(writer)
    assert (child.returncode, stderr) == (130, "")
