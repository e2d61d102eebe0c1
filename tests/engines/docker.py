"""A throw-away Docker Engine: dockerd in a pid and a mount namespace of its own, which take everything with them."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Mapping

from tests.engines import holder
from tests.engines.client import PATH, PATIENCE, THRIFT, Client, EngineError, Standing, find_program
from tests.memory import GIB, memory

_FLAGS = (
    "--storage-driver=overlay2",
    "--exec-opt=native.cgroupdriver=cgroupfs",
    "--iptables=false",
    "--ip6tables=false",
    "--bridge=none",
    "--live-restore",
    "--shutdown-timeout=5",
)


class Engine(Client):
    """A private Docker Engine, running from the moment it is made; one thread at a time starts and stops it.

    dockerd, containerd, shims, containers and mounts live in namespaces held by `holder.py`, and go with them: at
    `close`, and also when the process that made the engine is killed. Containers survive dockerd (live-restore).
    Networks are `none` and `host` only. *hosts* (name to address) and *certs* (registry to the path of its authority's
    certificate) are known to this engine alone. *data_mb* puts all images, containers and volumes on a disk of that
    size. *flags* go to dockerd.
    """

    def __init__(
        self,
        *flags: str,
        data_mb: int = 0,
        hosts: Mapping[str, str] | None = None,
        certs: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        # Short: the path of a socket ends at 107 characters.
        self.place = Path(tempfile.mkdtemp(prefix="oze-", dir=memory(4 * GIB)))
        self.socket = self.place / "docker.sock"
        host = f"unix://{self.socket}"
        super().__init__(
            find_program("docker"),
            {"DOCKER_HOST": host, "DOCKER_CONFIG": str(self.place / "client")},
            f"DOCKER_HOST={host}",
        )
        self._flags = flags
        self._cgroup = self.place.name
        self._said = b""
        self._lay_out(hosts or {}, certs or {})
        self._holder = self._hold(data_mb)
        try:
            self._await("ready")
            self.start()
        except BaseException:
            self.close()
            raise

    def _lay_out(self, hosts: Mapping[str, str], certs: Mapping[str, str | os.PathLike[str]]) -> None:
        covers = holder.private_directories(self.place)
        for path in [self.place / "client", self.place / "data", *covers.values()]:
            path.mkdir()
        for cover in covers.values():
            (cover / "upper").mkdir()
            (cover / "work").mkdir()
        own = covers["/etc"] / "upper"
        known = Path("/etc/hosts").read_text() if Path("/etc/hosts").exists() else ""
        lines = [f"{address} {name}\n" for name, address in hosts.items()]
        (own / "hosts").write_text("".join([known.rstrip("\n"), "\n", *lines]))
        for registry, authority in certs.items():
            (own / "docker" / "certs.d" / registry).mkdir(parents=True)
            shutil.copy(authority, own / "docker" / "certs.d" / registry / "ca.crt")
        (self.place / "daemon.json").write_text("{}")  # never the machine's own

    def _hold(self, data_mb: int) -> subprocess.Popen[bytes]:
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-I", "-S"]
        command += [holder.__file__, str(self.place), self._cgroup, str(data_mb)]
        with (self.place / "holder.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"PATH": PATH, "HOME": str(self.place)},
                start_new_session=True,  # a Ctrl-C at the terminal is ours to answer, by `close`
            )

    @property
    def log(self) -> str:
        """What dockerd has written, in all its lives."""
        path = self.place / "dockerd.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start dockerd and wait until it answers."""
        (self.place / "dockerd.pid").unlink(missing_ok=True)  # left by `kill`, and refused by the next one
        argv = [find_program("dockerd"), f"--config-file={self.place}/daemon.json", f"--host=unix://{self.socket}"]
        argv += [
            f"--data-root={self.place}/data",
            f"--exec-root={self.place}/exec",
            f"--pidfile={self.place}/dockerd.pid",
        ]
        argv += [*_FLAGS, f"--cgroup-parent=/{self._cgroup}", *self._flags]
        self._tell(start=argv, env={"PATH": PATH, **THRIFT, "HOME": str(self.place)})
        self._await("started")
        limit = time.monotonic() + PATIENCE
        while not self._answers():
            if time.monotonic() > limit:
                raise self._failure(f"dockerd does not answer within {PATIENCE:g} s")
            if self._next_word(0.02) == "ended":
                raise self._failure("dockerd ended")

    start_again = start

    def stop(self) -> None:
        """SIGTERM, and wait until dockerd has ended; containers run on."""
        self._tell(signal=signal.SIGTERM)
        self._await("ended")

    def kill(self) -> None:
        """kill -9 for dockerd, frozen or not; containers run on."""
        self._tell(signal=signal.SIGKILL)
        self._await("ended")

    def freeze(self) -> None:
        """SIGSTOP: from now on dockerd accepts connections and answers nothing."""
        self._tell(signal=signal.SIGSTOP)
        self._await("stopped")

    def thaw(self) -> None:
        """SIGCONT: dockerd answers everything that waits."""
        self._tell(signal=signal.SIGCONT)
        self._await("continued")

    def hide_socket(self) -> None:
        """Take the socket's file away: new connections fail, open ones go on."""
        self.socket.rename(self.place / "hidden.sock")

    def show_socket(self) -> None:
        """Put the socket's file back."""
        (self.place / "hidden.sock").rename(self.socket)

    def standing(self) -> Standing:
        """By the API: four starts of the program, before and after every test, would cost a hundred times as much."""
        return (
            frozenset(one["Id"] for one in self._get("/containers/json?all=1")),
            frozenset(one["Name"] for one in self._get("/volumes")["Volumes"] or ()),
            frozenset(one["Name"] for one in self._get("/networks")),
            frozenset(one["Id"] for one in self._get("/images/json?filters=%7B%22dangling%22:%5B%22true%22%5D%7D")),
        )

    def close(self) -> None:
        """End and remove everything: containers, processes, mounts, cgroups, files. Also twice, and after a crash."""
        assert self._holder.stdin
        assert self._holder.stdout
        self._holder.stdin.close()
        try:
            self._holder.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            holder.thaw_cgroups(self._cgroup)  # else what is paused would hold the namespace
            self._holder.wait(PATIENCE)
        self._holder.stdout.close()
        holder.remove(self.place, self._cgroup)  # nothing is left to do unless the holder was killed

    def _answers(self) -> bool:
        try:
            return b" 200 " in self._ask("/_ping")
        except OSError:
            return False

    def _get(self, path: str) -> Any:
        """What the API says; raises EngineError when it does not."""
        try:
            head, _, body = self._ask(path).partition(b"\r\n\r\n")
        except OSError as error:
            raise self._failure(f"{path}: {error}") from None
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise self._failure(f"{path}: {head!r} {body!r}")
        return json.loads(body)

    def _ask(self, path: str) -> bytes:
        """The whole answer; HTTP/1.0, so that it ends with the connection and has no chunks."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(PATIENCE)
            line.connect(str(self.socket))
            line.sendall(f"GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
            with line.makefile("rb") as answer:
                return answer.read()

    def _tell(self, **word: Any) -> None:
        assert self._holder.stdin
        try:
            self._holder.stdin.write(json.dumps(word).encode() + b"\n")
            self._holder.stdin.flush()
        except BrokenPipeError:
            raise self._failure("the holder of the namespace is gone") from None

    def _await(self, word: str) -> None:
        while (said := self._next_word(PATIENCE)) != word:
            if said == "ended" or not said:
                raise self._failure(f"waited for dockerd to be {word}, but it {said or 'never was'}")

    def _next_word(self, timeout: float) -> str:
        """What the holder says next, "" for nothing within *timeout*."""
        assert self._holder.stdout
        while b"\n" not in self._said:
            if not select.select([self._holder.stdout], [], [], timeout)[0]:
                return ""
            data = os.read(self._holder.stdout.fileno(), 4096)
            if not data:
                raise self._failure("the holder of the namespace is gone")
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def _failure(self, what: str) -> EngineError:
        path = self.place / "holder.log"
        held = path.read_text(errors="replace") if path.exists() else ""
        return EngineError(f"{what}; it said:\n{held[-2000:]}{self.log[-2000:]}")
