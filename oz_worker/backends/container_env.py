"""A task's environment on its way into a container: never in arguments, never in the way of the engine's program.

Two ways exist (design 12, rule 22). `--env-file /dev/stdin` is exact for one-line values and cannot disturb the
program; `-e NAME` lets the program copy the value from its own environment, which takes any value, but a name like
PATH or DOCKER_HOST would then mean something to the program itself.
"""

from __future__ import annotations

import re
from typing import Mapping, NamedTuple

_PROGRAMS_OWN = re.compile(
    r"(?i)PATH|HOME|TMPDIR|(LD_|DOCKER_|_?CONTAINER|GO|OTEL_|SSL_|SSH_|XDG_|OZ_WORKER_).*|.*_PROXY"
    r"|(PODMAN_|STORAGE_|BUILDAH_|LISTEN_|DBUS_|REGISTR).*|NOTIFY_SOCKET"
)
"""Names that mean something to docker, to podman, to what they are written in, or to us."""
_QUOTED = re.compile(r"""["'\\#]|^\s|\s$""")
"""What podman's newer versions may read as more than itself."""
_LONGEST_LINE = 60_000
_LONGEST_VARIABLE = 128 * 1024 - 1
"""What the kernel lets a single string of an environment be (MAX_ARG_STRLEN), without its final NUL."""


class Transport(NamedTuple):
    """`file` is for the program's stdin, `passed` joins its environment; each name of `passed` stands behind `-e`."""

    file: bytes
    passed: Mapping[str, str]

    def arguments(self) -> list[str]:
        """What the command line says of it: names, never values."""
        named = [part for name in self.passed for part in ("-e", name)]
        return [*(["--env-file", "/dev/stdin"] if self.file else []), *named]


def transport(environment: Mapping[str, str], *, podman: bool) -> Transport:
    """Send each variable the way that is exact for it. Raises ValueError with a sentence naming one that has none.

    podman's newer versions read quotes in the file, so there values with any take the other way where the name allows.
    """
    lines: list[bytes] = []
    passed: dict[str, str] = {}
    for name, value in environment.items():
        line = f"{name}={value}".encode("utf-8", "surrogateescape")
        own = _PROGRAMS_OWN.fullmatch(name) is not None
        if _fits_a_line(name, value, line) and (own or not podman or not _QUOTED.search(value)):
            lines.append(line)
        elif own or (podman and "*" in name):
            raise ValueError(
                f"the variable {name} cannot be given to a container with this value: {_why(value)}, and by the other"
                " way it would reach the engine's own program; rename it or encode its value"
            )
        elif len(line) > _LONGEST_VARIABLE:
            raise ValueError(f"the variable {name} is longer than the 128 KiB a process may be given; put it in a file")
        else:
            passed[name] = value
    return Transport(b"".join(line + b"\n" for line in lines), passed)


def _fits_a_line(name: str, value: str, line: bytes) -> bool:
    if name.startswith("#") or any(character.isspace() for character in name):
        return False
    if "\n" in value or value.endswith("\r") or len(line) >= _LONGEST_LINE:
        return False
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _why(value: str) -> str:
    if "\n" in value or "\r" in value:
        return "it has more than one line"
    return "it is not valid UTF-8, or is too long"
