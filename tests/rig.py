"""A real worker process against the strict control plane, and the audit that every such test ends with."""

from __future__ import annotations

import functools
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import yaml

from oz_worker.devplane.server import ControlPlane
from tests.audit import Arguments, around, audit_files, guard, secrets_in

ROOT = Path(__file__).resolve().parent.parent
FAKE_OZ = ROOT / "tests" / "bin" / "oz"
ODD_WORKER = ROOT / "tests" / "faults" / "odd_worker.py"
WORKER_ID = "rig-worker"
SAFETY = 40.0
"""Seconds until a test gives up; many times what anything here takes."""

SHORTEST_PAUSE = 0.01
LONGEST_PAUSE = 0.25
FAST_LINK = {
    "ping_interval": "500ms",
    "dead_after": "2s",
    "dial_timeout": "5s",
    "backoff_min": "50ms",
    "backoff_max": "300ms",
    "healthy_after": "1s",
    "refused_backoff": "200ms",
}


def until(condition: Callable[[], Any], what: str, seconds: float = SAFETY) -> Any:
    """Wait for a fact of another process that announces itself in no other way.

    A look that is dear (programs started, all processes read) is taken less often, so that looking never takes most of
    a core from what it waits for.
    """
    now = time.monotonic()
    limit = now + seconds
    while not (found := condition()):
        before, now = now, time.monotonic()
        assert now < limit, f"waited in vain for {what}"
        time.sleep(min(max(SHORTEST_PAUSE, 3 * (now - before)), LONGEST_PAUSE))
        now = time.monotonic()
    return found


class Worker:
    """One process of the worker, and its log."""

    def __init__(self, argv: list[str], env: Mapping[str, str], log: Path) -> None:
        self.log_path = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, cwd=log.parent
            )
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        """Everything it has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_log(self, pattern: str) -> str:
        """Block until a line matches *pattern*."""

        def seen() -> re.Match[str] | None:
            assert self.process.poll() is None or re.search(pattern, self.log), f"the worker left:\n{self.log}"
            return re.search(pattern, self.log)

        return str(until(seen, f"{pattern!r} in the log")[0])

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait_stacks(self, pattern: str, count: int = 1) -> None:
        """Block until *pattern* fits the stacks of so many of its threads at once, innermost call last."""

        def seen() -> bool:
            before = len(self.log)
            self.send(signal.SIGUSR2)
            stacks = until(functools.partial(_dumped, self, before), "the stacks of the worker")
            return sum(bool(re.search(pattern, stack, re.DOTALL)) for stack in stacks) >= count

        until(seen, f"{pattern!r} in the stacks of {count} threads")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(SAFETY)

    def exit_code(self) -> int:
        """Block until it has ended."""
        return self.process.wait(SAFETY)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """One signal, then its exit code."""
        self.send(number)
        return self.exit_code()


def _dumped(worker: Worker, start: int) -> list[str]:
    """What each thread does, once the list of them all stands in the log behind *start*; its lines are indented."""
    found = re.search(r"stacks of (\d+) threads\n((?:  .*\n)*)", worker.log[start:])
    stacks = found[2].split("  --- ")[1:] if found else []
    return stacks if found and len(stacks) == int(found[1]) else []


class Rig:
    """A place for one worker: configuration, state, workspaces, control plane. Made by the `rig` fixture."""

    def __init__(self, place: Path, plane: ControlPlane, ca_file: str = "") -> None:
        self.place = place
        self.plane = plane
        self.state_dir = place / "state"
        self.workspaces = place / "workspaces"
        self.log = place / "worker.log"
        self.workers: list[Worker] = []
        self.secrets = [plane.key]
        self.own_files: set[str] = set()  # files in which a test keeps secrets on purpose
        self.in_arguments: set[str] = set()  # secrets that a test puts into arguments on purpose
        self.arguments = Arguments()
        self.audited = False
        guard().owes(f"the rig in {place}", lambda: self.audited)
        self.env = {
            "PATH": f"{FAKE_OZ.parent}:{os.environ['PATH']}",
            "HOME": str(place),
            "PYTHONPATH": str(ROOT),
            "WARP_API_KEY": plane.key,
            "OTEL_METRICS_EXPORTER": "none",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.config: dict[str, Any] = {
            "worker_id": WORKER_ID,
            "state_dir": str(self.state_dir),
            "link": dict(FAST_LINK),
            "stop_grace": "1s",
            "min_free_disk": 0,
            "min_free_inodes": 0,
            "backend": {"direct": {"workspace_root": str(self.workspaces), "oz_path": str(FAKE_OZ)}},
        }
        if ca_file:
            self.config["ca_file"] = ca_file

    def submit(self, script: str = "", **more: Any) -> Any:
        """Queue a task that runs *script* as its agent; its secrets are audited."""
        env_vars = {"FAKE_OZ_SCRIPT": script, **more.pop("env_vars", {})}
        env_vars.setdefault("PRIVATE_TOKEN", f"token-{os.urandom(8).hex()}")
        self.secrets.append(env_vars["PRIVATE_TOKEN"])
        task = self.plane.submit(env_vars=env_vars, **more)
        self.secrets.append(task.secret)
        return task

    def command_line(self, *arguments: str) -> list[str]:
        """The worker's command line, for anything but `run` too."""
        return [sys.executable, "-m", "oz_worker", *arguments]

    def start(
        self,
        *flags: str,
        env: Mapping[str, str] | None = None,
        connected: bool = True,
        odd: str = "",
        shell: str = "",
        text: str = "",
    ) -> Worker:
        """Start a worker; unless told otherwise, wait until it is connected.

        *odd*: with that fault of `tests/faults/odd_worker.py` inside. *shell*: by a script that ends in `exec "$@"`.
        *text*: the configuration, instead of `config`.
        """
        config = self.place / "config.yaml"
        config.write_text(text or yaml.safe_dump(self.config))
        before = len(self.plane.connections)
        argv = ["--config-file", str(config), "--web-socket-url", self.plane.url]
        argv += ["--server-root-url", self.plane.root_url, *flags]
        argv = [sys.executable, str(ODD_WORKER), odd, *argv] if odd else self.command_line(*argv)
        argv = ["/bin/sh", "-c", shell, "sh", *argv] if shell else argv
        worker = Worker(argv, {**self.env, **(env or {})}, self.log)
        self.workers.append(worker)
        if connected:
            try:
                self.plane.wait_connected(SAFETY, after=before)
            except TimeoutError:
                raise AssertionError(f"no connection; the worker's log:\n{worker.log}") from None
        return worker

    def run_command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command of the program to its end."""
        return subprocess.run(
            self.command_line(*arguments), env=self.env, capture_output=True, text=True, timeout=SAFETY, check=False
        )

    def explained(self, *task: str) -> str:
        """What `status --explain` says."""
        done = self.run_command("status", "--state-dir", str(self.state_dir), "--explain", *task)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def instance_dirs(self) -> list[Path]:
        """The instance directories that exist."""
        return (
            [path for path in self.state_dir.iterdir() if (path / "lock").exists()] if self.state_dir.exists() else []
        )

    def query(self, sql: str) -> list[Any]:
        """The rows of *sql* in the database of the first instance, read beside the worker."""
        db = sqlite3.connect(f"file:{self.instance_dirs()[0] / 'state.db'}?mode=ro", uri=True)
        try:
            return db.execute(sql).fetchall()
        finally:
            db.close()

    def execute(self, sql: str) -> None:
        """Change the database of the first instance while no worker holds it."""
        db = sqlite3.connect(self.instance_dirs()[0] / "state.db")
        try:
            db.execute(sql)
            db.commit()
        finally:
            db.close()

    def unit_processes(self) -> list[int]:
        """Living processes that carry the marker of a unit of this rig's instances, or of their helpers."""
        marks = [b"OZ_WORKER_UNIT=" + path.name.encode() + b"." for path in self.instance_dirs()]
        marks += [b"OZ_WORKER_HELPER=" + path.name.encode() for path in self.instance_dirs()]
        return [pid for pid, environ in living_environments() if any(mark in environ for mark in marks)]

    def close(self) -> None:
        """End what the test left running; look for secrets where the test itself had nothing to audit."""
        self.arguments.stop()
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        for pid in self.unit_processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not self.audited:
            self.audited = True
            self.audit_secrets()

    def audit(self, *, workspaces: bool = True, traceback: bool = False) -> None:
        """Nothing of a task is left, nothing secret was written, nothing crashed, every rule was kept.

        *traceback*: the test made the worker crash, which must be in its log.
        """
        self.plane.check()
        for worker in self.workers:
            assert worker.process.poll() is not None, "a worker still runs: stop it before the audit"
        log = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        assert ("Traceback" in log) == traceback, log
        left = self.unit_processes()
        assert left == [], f"processes left: {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in left]}\n{log}"
        for instance in self.instance_dirs():
            units = list((instance / "units").iterdir()) if (instance / "units").exists() else []
            assert units == [], f"units left: {units}\n{log}"
        if workspaces and self.workspaces.exists():
            kept = [path for path in self.workspaces.rglob("*") if path.name != ".oz-worker"]
            assert kept == [], f"workspaces left: {kept}\n{log}"
        self.audited = True
        self.audit_secrets()

    def audit_secrets(self) -> None:
        """No secret, however it is spelled, stands in any file but those in `own_files`, in what the server was told,
        or in the arguments of a process. Also while a worker runs.
        """
        audit_files(self.place, self.secrets, but=self.own_files)
        told = b"\n".join(entry.frame.text.encode() for entry in list(self.plane.received)).lower()
        shown = secrets_in(told, self.secrets)
        assert not shown, f"the server was told a secret: {around(told, shown[0])!r}"
        self.arguments.audit(set(self.secrets) - self.in_arguments)


def living_environments() -> list[tuple[int, bytes]]:
    """Process ids and environments of everything alive that we may read; zombies are dead."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_bytes()
            if stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] in (b"Z", b"X"):
                continue
            found.append((int(entry), Path(f"/proc/{entry}/environ").read_bytes()))
        except OSError:
            continue
    return found
