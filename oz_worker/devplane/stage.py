"""What `dev` needs on disk and as processes: a private directory, a configuration, the agent's wrapper, one worker."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Callable, Mapping

import psutil

from oz_worker.devplane import handover
from oz_worker.devplane.guest import Guest

HERE = Path(__file__).resolve().parent
STOP = ((signal.SIGTERM, 15.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
KILLS = 5
STRAY_SECONDS = 3.0
TAIL_BYTES = 4096

QUICK_LINK = {
    "ping_interval": "500ms",
    "dead_after": "2s",
    "write_timeout": "2s",
    "dial_timeout": "5s",
    "backoff_min": "200ms",
    "backoff_max": "500ms",
    "healthy_after": "1s",
    "refused_backoff": "300ms",
}
"""Timings under which a scenario takes seconds instead of the minute it would take in earnest."""


class Stage:
    """A temporary directory (0700) with everything in it, the worker that runs there, and its *guest* in an engine."""

    def __init__(self, *, backend: str, oz_path: str, quick: bool, guest: Guest | None = None) -> None:
        self.guest = guest
        self.directory = Path(tempfile.mkdtemp(prefix="oz-dev-"))
        self.log = self.directory / "worker.log"
        self.worker: subprocess.Popen[bytes] | None = None
        self._runs = self.directory / "runs"
        self._config = self.directory / "config.yaml"
        self._prepare(backend, oz_path, quick)

    def start(self, url: str, root_url: str, key: str, on_end: Callable[[int], None]) -> None:
        """Start the worker; *on_end* is called with its exit code, on a thread of its own."""
        command = [sys.executable, "-m", "oz_worker", "--config-file", str(self._config)]
        command += ["--web-socket-url", url, "--server-root-url", root_url]
        environment = _environment(key)
        if self.guest is not None:
            # Where an engine's program leaves what it forgets, and by which one that outlives a kill -9 is found.
            environment["TMPDIR"] = str(self.directory)
        with open(self.log, "ab") as log:
            worker = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for dev alone: it stops the worker in order
            )
        self.worker = worker
        threading.Thread(target=lambda: on_end(worker.wait()), name="dev-worker", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether the worker has ended by itself; ask before `stop`."""
        return self.worker is not None and self.worker.poll() is not None

    def stop(self) -> int | None:
        """End the worker: TERM, TERM again, KILL, each with its time. Its exit code; None when it was never started."""
        if self.worker is None:
            return None
        for number, seconds in STOP:
            if self.worker.poll() is not None:
                break
            self.worker.send_signal(number)
            try:
                self.worker.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        return self.worker.poll()

    def cancelled(self, task_id: str, execution_id: str) -> bool:
        """Whether the cancel command of the backend `command` has seen the end of this agent."""
        return (handover.run_directory(self._runs, task_id, execution_id) / handover.CANCELLED).exists()

    def leftovers(self) -> list[str]:
        """What a worker that has stopped should have removed: workspaces and containers that still stand."""
        if self.guest is not None:
            return self.guest.tasks()
        places = self.directory / "workspaces"
        return sorted(place.name for place in places.iterdir() if place.name != ".oz-worker") if places.is_dir() else []

    def clean_up(self, say: Callable[[str], None], *, keep: bool) -> bool:
        """End what still runs from here and remove the rest, or keep it; whether that went well.

        A worker that stopped in order leaves no agents; one that was killed does, and dispatched ones are nobody's.
        """
        for act in ("terminate", *["kill"] * KILLS):  # again, for what was born between a look and its end
            strays = _strays(self.directory)
            for stray in strays:
                with contextlib.suppress(psutil.Error):
                    getattr(stray, act)()
            psutil.wait_procs(strays, STRAY_SECONDS)
        if keep:
            say(f"kept: {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)
        if self.guest is None:
            return True
        return self.guest.stay(say) if keep else self.guest.leave(say)

    def log_tail(self) -> str:
        """The end of the worker's log, whole lines."""
        try:
            data = self.log.read_bytes()
        except OSError:
            return ""
        tail = data[-TAIL_BYTES:]
        if len(data) > len(tail):
            tail = tail.partition(b"\n")[2]
        return tail.decode("utf-8", "replace")

    def _prepare(self, backend: str, oz_path: str, quick: bool) -> None:
        wrapper = self.directory / "bin" / "oz"
        wrapper.parent.mkdir()
        agent = [oz_path] if oz_path else [sys.executable, "-I", "-S", str(HERE / "agent.py")]
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(agent)} "$@"\n')
        wrapper.chmod(0o700)
        self._runs.mkdir(mode=0o700)
        config: dict[str, object] = {
            "worker_id": self.guest.worker_id if self.guest is not None else "dev",
            "state_dir": str(self.directory / "state"),
            "stop_grace": "2s",
            "backend": {backend: self._backend(backend, str(wrapper))},
        }
        if quick:
            config["link"] = QUICK_LINK
        self._config.write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML

    def _backend(self, backend: str, wrapper: str) -> Mapping[str, object]:
        if self.guest is not None:
            return self.guest.section
        if backend == "direct":
            return {"workspace_root": str(self.directory / "workspaces"), "oz_path": wrapper}
        script = [sys.executable, "-I", "-S", str(HERE / "handover.py")]
        return {
            "dispatch_command": shlex.join([*script, "dispatch", str(self._runs)]),
            "cancel_command": shlex.join([*script, "cancel", str(self._runs)]),
        }


def _strays(directory: Path) -> list[psutil.Process]:
    """Living processes that work in *directory* or were told of it; never this one or what it came from."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid in own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            told = [process.cwd(), *process.environ().values()]
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's
        if any(str(directory) in value for value in told):
            found.append(process)
    return found


def _environment(key: str) -> dict[str, str]:
    """Ours, plus the key, minus proxies for loopback; the worker must be the oz_worker that runs here."""
    environment = dict(os.environ, WARP_API_KEY=key)
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, (os.environ.get(name, ""), "127.0.0.1", "localhost")))
    paths = (str(HERE.parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment
