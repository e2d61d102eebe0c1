"""The images of the cluster: directories under names, and a registry that can be told to be slow, bare or closed."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from oz_worker.devplane.image import SEARCH_PATH, Files, make_layer
from tests.engines.images import ENTRYPOINT, OZ_PROGRAM, busybox_layer

BUSYBOX = "busybox"
SIDECAR = "oz-test/sidecar:1"
_NAME = re.compile(
    r"^([A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)


class Image(NamedTuple):
    """An unpacked image and what its configuration says."""

    root: Path
    env: Mapping[str, str]
    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    cwd: str = "/"
    user: tuple[int, int] = (0, 0)


class PullFails(Exception):
    """The registry does not give the image."""


def is_name(name: str) -> bool:
    """Whether *name* can be the name of an image."""
    return _NAME.match(name) is not None


def full_name(name: str) -> str:
    """A name as runtimes complete it."""
    first, slash, _ = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        name = f"docker.io/{name if slash else f'library/{name}'}"
    return name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"


class Images:
    """What the registry has, and what is on the nodes. Tests call from their thread, the kubelet reads on its own:
    every step is one assignment or look-up."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._known: dict[str, Image] = {}
        self._present: set[str] = set()
        self._delays: dict[str, float] = {}
        self._faults: dict[str, str] = {}
        self.create_faults: dict[str, str] = {}
        """Images of which no container can be created, and why: CreateContainerError."""
        self.pulls: list[str] = []
        """The names that were asked for, in order."""
        self.add(BUSYBOX)
        agent = {"entrypoint.sh": (0o755, ENTRYPOINT), "oz": (0o755, OZ_PROGRAM.read_bytes())}
        self.add(SIDECAR, base=False, files=agent, cmd=("/entrypoint.sh",))

    def add(
        self,
        name: str,
        *,
        base: bool = True,
        files: Files | None = None,
        layers: Sequence[bytes] = (),
        env: Mapping[str, str] | None = None,
        entrypoint: Sequence[str] = (),
        cmd: Sequence[str] = ("sh",),
        cwd: str = "/",
        user: tuple[int, int] = (0, 0),
        present: bool = False,
    ) -> str:
        """Put an image into the registry: busybox unless not *base*, *layers*, *files*. *present*: on the nodes too."""
        root = self._place / str(len(self._known))
        root.mkdir(parents=True)
        stack = [*([busybox_layer()] if base else []), *layers, *([make_layer(files)] if files else [])]
        for layer in stack:
            with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
                if hasattr(tarfile, "fully_trusted_filter"):
                    tar.extraction_filter = tarfile.fully_trusted_filter  # ours, and without it a warning
                tar.extractall(root)
        self._known[full_name(name)] = Image(root, {"PATH": SEARCH_PATH, **(env or {})}, entrypoint, cmd, cwd, user)
        if present:
            self._present.add(full_name(name))
        return name

    def missing(self, name: str, why: str = "") -> None:
        """Let the registry refuse *name* until `heal`."""
        self._faults[full_name(name)] = why or "not found"

    def slow(self, name: str, seconds: float) -> None:
        """Let a pull of *name* take that long."""
        self._delays[full_name(name)] = seconds

    def heal(self, name: str) -> None:
        self._faults.pop(full_name(name), None)
        self._delays.pop(full_name(name), None)
        self.create_faults.pop(full_name(name), None)

    def forget_local(self, name: str) -> None:
        """Take *name* off the nodes."""
        self._present.discard(full_name(name))

    def local(self, name: str) -> Image | None:
        """The image if it is on the nodes."""
        return self._known.get(full_name(name)) if full_name(name) in self._present else None

    def delay(self, name: str) -> float:
        return self._delays.get(full_name(name), 0.0)

    def pull(self, name: str) -> Image:
        """Fetch it. Raises PullFails with the words of a runtime."""
        full = full_name(name)
        self.pulls.append(name)
        begin = f'failed to pull and unpack image "{full}": failed to resolve reference "{full}": '
        if full in self._faults:
            why = self._faults[full]
            raise PullFails(begin + (f"{full}: not found" if why == "not found" else why))
        if full not in self._known:
            denied = "pull access denied, repository does not exist or may require authorization: server message: "
            raise PullFails(f"{begin}{denied}insufficient_scope: authorization failed")
        self._present.add(full)
        return self._known[full]
