"""Images made on the spot, as an engine's `load` takes them, and what this machine can put into one.

An image needs no registry and no build: it is a tar of a configuration and of layers, and a layer is a tar of files.
The files of `machine_files` are this machine's own, at their own paths, so that its programs find their libraries and
its Python its modules where they always do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

from oz_worker.errors import NotUsable

Files = Mapping[str, tuple[int, bytes]]
"""Path in the image to its mode and content; directories above it are made."""

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH in an image."""
PROGRAMS = """
sh awk basename cat chmod cp cut date df dirname du echo env expr false find grep head hostname id kill ln
ls mkdir mktemp mv nproc od printenv printf pwd readlink rm rmdir sed seq sha256sum sleep sort stat tail tee test
touch tr true uname uniq wc which whoami xargs
"""

_EPOCH = "2020-01-01T00:00:00Z"
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
_LEFT_OUT |= {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo"}
_LEFT_OUT_FILES = re.compile(r"_tkinter\.|_test|_ctypes_test|xx.*\.so$|.*\.pyc$")
_NAMED_BY_LDD = re.compile(r"^\s+(.+?) (?:=> (/.+) )?\(0x", re.MULTILINE)
_ELF = b"\x7fELF"
_LDD_SECONDS = 60.0


class MachineFiles(NamedTuple):
    """Files and symbolic links (path to target) of an image that runs what this machine runs."""

    files: Files
    links: Mapping[str, str]
    python: str
    """Where its interpreter is."""


def make_layer(
    files: Files, links: Mapping[str, str] | None = None, directories: Mapping[str, int] | None = None
) -> bytes:
    """A layer: a tar of *files*, symbolic *links* (path to target) and *directories* (path to mode), owned by root.

    The same input gives the same bytes, so that an engine keeps equal layers once.
    """
    stream = io.BytesIO()
    done: set[PurePosixPath] = {PurePosixPath(".")}
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(path: str, kind: bytes, mode: int, data: bytes = b"", target: str = "") -> None:
            name = PurePosixPath(path.lstrip("/"))
            for above in [*reversed(name.parents)]:
                if above not in done:
                    add(str(above), tarfile.DIRTYPE, 0o755)
            done.add(name)
            info = tarfile.TarInfo(str(name))
            info.type, info.mode, info.size, info.linkname = kind, mode, len(data), target
            tar.addfile(info, io.BytesIO(data))

        for path, directory_mode in (directories or {}).items():
            add(path, tarfile.DIRTYPE, directory_mode)
        for path, (mode, data) in files.items():
            add(path, tarfile.REGTYPE, mode, data)
        for path, target in (links or {}).items():
            add(path, tarfile.SYMTYPE, 0o777, target=target)
    return stream.getvalue()


def pack(name: str, layers: Sequence[bytes], config: Mapping[str, Any], architecture: str) -> bytes:
    """The archive that `load` takes, with *config* as the image's own part of its configuration."""
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    image: dict[str, Any] = {"architecture": architecture, "os": "linux", "created": _EPOCH, "config": dict(config)}
    if architecture == "arm64":
        image["variant"] = "v8"
    image["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]}
    image["history"] = [{"created": _EPOCH, "created_by": "oz-worker"} for _ in layers]
    text = json.dumps(image).encode()
    members = {f"{hashlib.sha256(text).hexdigest()}.json": text}
    manifest = {
        "Config": next(iter(members)),
        "RepoTags": [name],
        "Layers": [f"{digest}/layer.tar" for digest in digests],
    }
    members.update({f"{digest}/layer.tar": layer for digest, layer in zip(digests, layers, strict=True)})
    members["manifest.json"] = json.dumps([manifest]).encode()
    return make_layer({path: (0o644, data) for path, data in members.items()})


def machine_files() -> MachineFiles:
    """This machine's Python without its packages, its shell and small programs, and the libraries of all these.

    Raises NotUsable where they cannot be read or told.
    """
    python = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    programs = {name: path for name in PROGRAMS.split() if (path := _program(name))}
    if "sh" not in programs:
        raise NotUsable("an image cannot be made on this machine: its sh is no program of its own; use another backend")
    modules = [*_modules()]
    binaries = [python, *programs.values(), *(path for path in modules if ".so" in os.path.basename(path))]
    try:
        named = [*binaries, *modules, *_libraries(binaries), "/etc/ld.so.cache"]
        files = {path: _read(path) for path in dict.fromkeys(named) if os.path.exists(path)}
    except OSError as error:
        raise NotUsable(f"an image cannot be made of this machine's programs: {error}") from error
    links = {"/usr/local/bin/python3": python, **{f"/bin/{name}": path for name, path in programs.items()}}
    return MachineFiles(files, {path: target for path, target in links.items() if path not in files}, python)


def _program(name: str) -> str:
    """The file behind a command; "" for what is missing, or a script that would need more than itself."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SEARCH_PATH}")
    path = os.path.realpath(found) if found else ""
    try:
        with open(path, "rb") as file:
            return path if file.read(len(_ELF)) == _ELF else ""
    except OSError:
        return ""


def _modules() -> Iterator[str]:
    """The files of the standard library, whose compiled part may lie apart from it (lib64)."""
    places = {os.path.dirname(os.__file__), *(place for place in sys.path if place.endswith("/lib-dynload"))}
    for place in sorted(os.path.realpath(place) for place in places):
        for directory, below, names in os.walk(place):
            below[:] = [name for name in below if name not in _LEFT_OUT and not name.startswith("config-")]
            yield from (os.path.join(directory, name) for name in names if not _LEFT_OUT_FILES.match(name))


def _libraries(binaries: Iterable[str]) -> Iterator[str]:
    """The shared libraries of *binaries*, and the loader."""
    ldd = shutil.which("ldd", path=f"{os.environ.get('PATH', '')}:{SEARCH_PATH}")
    if not ldd:
        raise NotUsable("an image cannot be made on this machine: there is no ldd, which tells what a program needs")
    try:
        said = subprocess.run([ldd, *binaries], capture_output=True, text=True, timeout=_LDD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotUsable(f"an image cannot be made on this machine: ldd took over {_LDD_SECONDS:g} s") from None
    for pair in _NAMED_BY_LDD.findall(said.stdout):
        yield from (os.path.normpath(path) for path in pair if path.startswith("/"))


def _read(path: str) -> tuple[int, bytes]:
    return (0o755 if os.access(path, os.X_OK) else 0o644), Path(path).read_bytes()
