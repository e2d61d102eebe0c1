"""The cluster's side of the container runtime: orders out, ends back in on the loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from tests.cluster import runtime
from tests.cluster.loop import Loop

Ended = Callable[[str, Any], None]
"""Called with `started` and None, `failed` and why, or `ended` and the exit code; the last two are the end."""


class Mount(NamedTuple):
    """A directory or file of the host at a place of the container."""

    source: Path
    target: str
    read_only: bool = False


class Order(NamedTuple):
    """What to run, and in what."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str = "/"
    root: Path = Path()
    mounts: Sequence[Mount] = ()
    host: str = ""
    user: tuple[int, int] = (0, 0)
    log: Path | None = None
    within: str = ""
    """The id of a container that runs, for a program in it; then `root`, `mounts` and `host` are without meaning."""


class Containers:
    """Everything that runs in the cluster. All methods are for the loop's thread but `close`."""

    def __init__(self, place: Path, loop: Loop) -> None:
        self._loop = loop
        self._told: dict[str, Ended] = {}
        self._rest = b""
        stage = place / "stage"
        stage.mkdir()
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-I", "-S"]
        self._errors = (place / "runtime.log").open("wb")
        self._process = subprocess.Popen(
            [*command, runtime.__file__, str(stage)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            start_new_session=True,  # a Ctrl-C at the terminal is ours to answer, by `close`
        )
        assert self._process.stdout
        self._out = self._process.stdout.fileno()
        loop.call(lambda: loop.watch(self._out, self._heard))

    def start(self, name: str, order: Order, told: Ended) -> None:
        """Start it under *name*; *told* hears of its beginning and its end."""
        self._told[name] = told
        row: dict[str, Any] = {
            "do": "start",
            "id": name,
            "argv": [*order.argv],
            "env": dict(order.env),
            "cwd": order.cwd,
        }
        row |= {"root": str(order.root), "mounts": [[str(mount.source), *mount[1:]] for mount in order.mounts]}
        row |= {"host": order.host, "user": [*order.user], "log": str(order.log or "")}
        self._send({**row, "in": order.within} if order.within else row)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the first process of a container; what has ended already does not mind."""
        self._send({"do": "signal", "id": name, "number": number})

    @property
    def running(self) -> list[str]:
        """The names of everything that has not ended."""
        return sorted(self._told)

    def _send(self, row: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(row).encode() + b"\n")
        self._process.stdin.flush()

    def _heard(self) -> None:
        data = os.read(self._out, 1 << 16)
        if not data:
            self._loop.forget(self._out)
            raise RuntimeError(f"the container runtime ended: {Path(self._errors.name).read_text()[-2000:]}")
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            row = json.loads(line)
            told = self._told[row["id"]]
            if row["said"] != "started":
                del self._told[row["id"]]
            told(row["said"], row.get("why", row.get("code")))

    def close(self) -> None:
        """End every container, and wait. The loop is closed before."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is gone already, and everything with it
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process.stdout.close()
        self._errors.close()
