"""Images made on the spot and loaded into an engine, of any architecture, with a shell or with a few files alone."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from oz_worker.devplane.image import SEARCH_PATH, Files, make_layer, pack
from tests.engines.client import Client, find_program

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_PASSWD = (
    b"root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
)
_GROUP = b"root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n"
OZ_PROGRAM = Path(__file__).resolve().parent.parent / "bin" / "oz"

ENTRYPOINT = b"""#!/bin/sh
# The agent of a test: refuses what the real command line refuses, then runs FAKE_OZ_SCRIPT with its arguments.
FAKE_OZ_SCRIPT= FAKE_OZ_FILE= /bin/sh "${0%/*}/oz" "$@" || exit
[ -z "$FAKE_OZ_SCRIPT" ] || exec /bin/sh -c "$FAKE_OZ_SCRIPT" "$0" "$@"
"""


class Images(NamedTuple):
    """The names of the two images that most tests need."""

    task: str
    """Busybox: `sh` and its programs, a writable /tmp, users root, agent (1000) and nobody."""
    sidecar: str
    """Nothing but /entrypoint.sh and the `oz` it asks: no shell, no tar. Mounted at /agent of a task's container it
    runs the shell text in FAKE_OZ_SCRIPT, whose `$@` are the arguments of the agent; without it, it exits with 0."""


def machine_architecture() -> str:
    """The name that images have for the processor of this machine."""
    return _MACHINES.get(platform.machine(), platform.machine())


@functools.cache
def busybox_layer() -> bytes:
    """A root file system of this machine's static busybox."""
    program = find_program("busybox")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    return make_layer(
        {
            "bin/busybox": (0o755, Path(program).read_bytes()),
            "etc/passwd": (0o644, _PASSWD),
            "etc/group": (0o644, _GROUP),
        },
        {f"bin/{applet}": "busybox" for applet in applets if applet != "busybox"},  # a link to itself replaces it
        {"tmp": 0o1777, "root": 0o700, "dev": 0o755, "proc": 0o755, "sys": 0o755},
    )


def busybox_is_static() -> bool:
    """Whether the machine's busybox runs in an image that holds nothing else."""
    program = find_program("busybox")
    return bool(program) and b"/lib/ld-" not in (data := Path(program).read_bytes()) and b"/lib64/ld-" not in data


def load_image(
    client: Client,
    name: str,
    *,
    base: bool = True,
    files: Files | None = None,
    layers: Sequence[bytes] = (),
    architecture: str = "",
    env: Sequence[str] = (),
    entrypoint: Sequence[str] = (),
    cmd: Sequence[str] = ("/bin/sh",),
    **config: Any,
) -> str:
    """Load an image `repository:tag`, and return that name.

    From below: busybox (*base*; False is FROM scratch), *layers*, *files*. *env* are `NAME=value`. *config*: further
    keys of the image's configuration as the engine spells them (User, WorkingDir, Labels, Volumes).
    """
    own = [make_layer(files)] if files else []
    settings = {"Env": [f"PATH={SEARCH_PATH}", *env], "Cmd": [*cmd], "Entrypoint": [*entrypoint] or None, **config}
    stack = [*([busybox_layer()] if base else []), *layers, *own]
    client.cli("load", stdin=pack(name, stack, settings, architecture or machine_architecture()))
    return name


def agent_files(folder: str = "") -> Files:
    """What an agent of a test is made of; in *folder* `agent/` a task's image has it itself and needs no sidecar."""
    return {f"{folder}entrypoint.sh": (0o755, ENTRYPOINT), f"{folder}oz": (0o755, OZ_PROGRAM.read_bytes())}


def load_images(client: Client, tag: str = "1") -> Images:
    """Load the two images that most tests need."""
    return Images(
        load_image(client, f"oz-test/task:{tag}"),
        load_image(client, f"oz-test/sidecar:{tag}", base=False, files=agent_files(), cmd=("/entrypoint.sh",)),
    )
