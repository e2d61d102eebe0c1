"""Kinds of values that container engines know: images, mounts, hosts."""

from __future__ import annotations

import os
import re

from oz_worker.config.kinds import matching, names, word
from oz_worker.config.nodes import Node
from oz_worker.config.reading import Reading, Wrong, shown
from oz_worker.model import plain_path

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])"
_IMAGE = re.compile(
    rf"(?:{_HOST}(?::[0-9]+)?/)?{_COMPONENT}(?:/{_COMPONENT})*(?::\w[\w.-]{{0,127}})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)
_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_MODES = names(
    "ro rw z Z U O copy nocopy shared slave private rshared rslave rprivate consistent cached delegated "
    "exec noexec dev nodev suid nosuid bind rbind idmap"
)
_SECURITY = names(
    "no-new-privileges label seccomp apparmor systempaths writable-cgroups mask unmask proc-opts credentialspec"
)

platform = matching(r"linux/[a-z0-9_]+(/[a-z0-9.]+)?", "linux/amd64")
user = matching(r"[^\s:]+(:[^\s:]+)?", "1000:1000")
network = matching(r"[^\s]+", "a network's name")
memory = matching(r"(?i)\d+(\.\d+)?\s?([kmgt]i?)?b?", "512m or 4g")
cpus = matching(r"\d+(\.\d+)?|\.\d+", "2 or 0.5")


def image(node: Node, reading: Reading) -> str:
    """A reference to an image; empty means not set."""
    text = word(node, reading)
    if text and not _IMAGE.fullmatch(text):
        lower = "; repository names are lower case" if _IMAGE.fullmatch(text.lower()) else ""
        raise Wrong(f"{shown(text)} is not an image; write it like registry.example/team/image:tag{lower}")
    return text


def volume(node: Node, reading: Reading) -> str:
    """`HOST:CONTAINER[:MODE]`, as the engine takes it."""
    text = word(node, reading)
    parts = text.split(":")
    if len(parts) == 1 and text.startswith("/") and text.strip("/"):
        reading.warn(node.place, f"{shown(text)} is an anonymous volume; write HOST:CONTAINER to mount a directory")
        return text
    if len(parts) not in (2, 3) or not all(parts):
        raise Wrong(f"{shown(text)} is not of the form HOST:CONTAINER or HOST:CONTAINER:ro")
    if "," in parts[1]:
        raise Wrong(f"{shown(text)} has a comma in the container's path; give each mount an entry of its own")
    host, inside, mode = parts[0], parts[1], parts[2] if len(parts) == 3 else ""
    if not host.startswith("/") and not _VOLUME_NAME.fullmatch(host):
        raise Wrong(f"{shown(host)} is neither an absolute path of the host nor the name of a volume")
    if not inside.startswith("/") or plain_path(inside) == "/":
        raise Wrong(f"{shown(inside)} is not a place in the container; write an absolute path below /")
    unknown = [name for name in mode.split(",") if mode and name not in _MODES]
    if unknown:
        raise Wrong(f"{shown(unknown[0])} is not a mode of a mount; write ro or rw")
    return text


def extra_host(node: Node, reading: Reading) -> str:
    """`NAME:ADDRESS`, or `NAME:host-gateway`."""
    import ipaddress  # rarely needed

    text = word(node, reading)
    parts = re.fullmatch(r"([^\s:=]+)[:=](.+)", text)
    try:
        if parts is None:
            raise ValueError
        if parts[2] != "host-gateway":
            ipaddress.ip_address(parts[2].strip("[]"))
    except ValueError:
        raise Wrong(f"{shown(text)} is not of the form name:192.0.2.1 or name:host-gateway") from None
    return text


def security_option(node: Node, reading: Reading) -> str:
    """What stands behind `--security-opt`; a warning when no engine is known to take it.

    The profile of `seccomp` may be a file: a relative path is relative to the worker's directory.
    """
    text = word(node, reading)
    name, sign, value = re.split("([:=])", text, maxsplit=1) if re.search("[:=]", text) else (text, "", "")
    if name not in _SECURITY:
        reading.warn(node.place, f"no engine is known to take the security option {shown(text)}")
    if name == "seccomp" and os.path.isfile(value):
        return f"{name}{sign}{os.path.abspath(value)}"
    return text
