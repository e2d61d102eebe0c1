"""Sidecars over a real engine: images with known files, a program that misbehaves on purpose, the base count.

Run as a program it asks for one mount and prints it, to be killed or raced: see `Depot.process`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Sequence

from oz_worker.backends.base import Unit
from oz_worker.backends.images import ImageFacts, ImageUnusable
from oz_worker.backends.sidecars import Sidecars
from oz_worker.containers import Engine
from oz_worker.model import Key, Sidecar
from oz_worker.tree import end_helpers
from tests.engines.census import audit_back_to, census
from tests.engines.client import Client
from tests.engines.images import load_image
from tests.rig import ROOT, SAFETY, until

INSTANCE = f"a{os.getpid()}"
HOLD = '{ : >"$PLACE/reached"; read never <"$PLACE/never"; }'
"""What a wrapper does at the point where its caller is to be met. It starts nothing: a look at the processes in that
moment must find it."""

_UNTIL_GO = 'until [ -e "$PLACE/go" ]; do sleep 0.02; done'
SLOW_COPY = f'[ "$1" != cp ] || {{ {{ head -c 1000; : >"$PLACE/reached"; {_UNTIL_GO}; cat; }} | "$REAL" "$@"; exit; }}'
"""A copy that has begun, and goes on once the file `go` is there."""


def _fail(name: str, error: BaseException) -> None:
    raise AssertionError(f"thread {name} died") from error


class Depot:
    """A place with an engine. What it makes carries a worker id of its own."""

    def __init__(self, place: Path, client: Client, task: str) -> None:
        self.place = place
        self.client = client
        self.task = task
        self.kind = os.path.basename(client.program)
        self.worker = f"sidecars-{os.urandom(4).hex()}"
        self.made: list[str] = []
        self.calls = place / "calls"
        os.mkfifo(place / "never")  # nobody ever writes to it
        self.before = census(client)

    # -- the object under test -----------------------------------------------------------------------------------

    def sidecars(
        self,
        *,
        instance: str = INSTANCE,
        wrapper: str = "",
        timeout: float = SAFETY,
        retention: float = 0,
        calls: float = SAFETY,
        ready: Any = None,
        forget: Any = None,
    ) -> Sidecars:
        """A worker's sidecars; again is what a restarted worker has. *wrapper*: sh that runs before each call."""
        engine = Engine(
            self.kind,
            self._program(wrapper),
            environment={**self.client.env, "PLACE": str(self.place)},
            instance=instance,
            timeout=calls,
        )
        return Sidecars(
            engine,
            ready or self.ready,
            labels={"instance": instance, "worker": self.worker},
            timeout=timeout,
            retention=retention,
            state_file=self.state(instance),
            on_death=_fail,
            **({"forget": forget} if forget else {}),
        )

    def state(self, instance: str = INSTANCE) -> Path:
        """The file that keeps the ages."""
        return self.place / f"{instance}.json"

    def _program(self, wrapper: str) -> str:
        """The engine's program, with every call noted."""
        program = self.place / f"bin-{os.urandom(4).hex()}"
        real = f"REAL={self.client.program}"
        program.write_text(f'#!/bin/sh\n{real}\necho "$*" >>{self.calls}\n{wrapper}\nexec "$REAL" "$@"\n')
        program.chmod(0o755)
        return str(program)

    def ready(self, image: str, unit: Unit) -> ImageFacts:
        """An image that is there."""
        said = self.client.cli("image", "inspect", "--format", "{{.Id}}", image, check=False)
        if said.returncode:
            raise ImageUnusable(f"there is no image {image}; load it")
        identity = said.stdout.decode().strip()
        return ImageFacts(image, identity, identity.removeprefix("sha256:"), "linux/amd64")

    def unit(self) -> Unit:
        """A unit of its own."""
        return Unit(os.urandom(8).hex(), INSTANCE, Key("task", "run"))

    # -- a process that can be killed ----------------------------------------------------------------------------

    def process(self, image: str, *, instance: str = INSTANCE, wrapper: str = "", private: bool = False) -> Any:
        """A process that asks for a mount at /agent and prints it. Every instance is one word of its command line."""
        about = {"instance": instance, "wrapper": wrapper, "image": image, "private": private}
        about.update(place=str(self.place), program=self.client.program, env=self.client.env)
        about.update(mark=self.client.mark, worker=self.worker)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.containers.depot", json.dumps(about)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )

    def reached(self) -> None:
        """Block until a wrapper is where it holds."""
        until(lambda: (self.place / "reached").exists(), "the point in the filling")

    def restart(self, instance: str = INSTANCE) -> Sidecars:
        """What a worker does that comes after a kill -9."""
        end_helpers(instance)
        sidecars = self.sidecars(instance=instance)
        sidecars.remove_unfinished()
        return sidecars

    # -- looking -------------------------------------------------------------------------------------------------

    def image(self, **files: Any) -> str:
        """Load an image FROM scratch whose content is like no other's: no shell, no tar. Default: one big file."""
        nonce = os.urandom(6).hex()
        tag = f"oz-test/side:{nonce}"
        chosen = files.pop("files", None) or {"entry": (0o755, b"runs"), "nonce": (0o644, nonce.encode())}
        name = load_image(self.client, tag, base=False, files=chosen, cmd=("/entry",), **files)
        self.made.append(name)
        return name

    def said(self, mount: str, script: str, *more: str) -> str:
        """What a task prints that has *mount*."""
        mounts = [word for one in (mount, *more) for word in ("--volume", one)]
        return self.client.read("run", "--rm", "--network", "none", *mounts, self.task, "sh", "-c", script)

    def named(self, role: str) -> list[str]:
        """The names of our containers with a role."""
        return self._ours("ps", "--all", "--format", "{{.Names}}", "--filter", f"label=oz-worker.role={role}")

    def volumes(self) -> list[str]:
        """The names of our volumes."""
        return self._ours("volume", "ls", "--quiet")

    def _ours(self, *words: str) -> list[str]:
        return sorted(self.client.ids(*words, "--filter", f"label=oz-worker.worker={self.worker}"))

    def called(self, beginning: str) -> int:
        """How many calls began so."""
        text = self.calls.read_text() if self.calls.exists() else ""
        return sum(line.startswith(beginning) for line in text.splitlines())

    def nothing_is_left(self) -> None:
        """The engine is as it was, not even a mark is there."""
        audit_back_to(self.client, self.before)

    def close(self) -> None:
        """Marks may be there and their volumes; nothing else."""
        if marks := self.named("mark"):
            self.client.cli("rm", "--force", "--volumes", *marks)
        if volumes := self.volumes():
            self.client.cli("volume", "rm", *volumes)
        if self.made:
            self.client.cli("rmi", "--force", *self.made, check=False)
        audit_back_to(self.client, self.before)


class Asking:
    """A thread that asks for one mount."""

    def __init__(self, act: Callable[[], str]) -> None:
        self.mount = ""
        self.error: Exception | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.mount = self._act()
        except Exception as error:
            self.error = error

    def end(self) -> Asking:
        """Block until it has its answer."""
        self._thread.join(SAFETY)
        assert not self._thread.is_alive()
        return self


def ask(sidecars: Sidecars, image: str, unit: Unit, path: str = "/agent", *, write: bool = False) -> str:
    """One mount."""
    return sidecars.mounts([Sidecar(image, path, write)], unit)[0]


def both(*mounts: Sequence[str]) -> list[str]:
    """The volumes of mounts."""
    return [one.split(":")[0] for some in mounts for one in some]


def main(about: dict[str, Any]) -> None:
    """Ask for one mount and print it."""
    client = Client(about["program"], about["env"], about["mark"])
    depot = Depot.__new__(Depot)
    depot.place, depot.client, depot.worker = Path(about["place"]), client, about["worker"]
    depot.kind, depot.calls = os.path.basename(client.program), depot.place / "calls"
    sidecars = depot.sidecars(instance=about["instance"], wrapper=about["wrapper"])
    print(ask(sidecars, about["image"], depot.unit(), write=about["private"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
