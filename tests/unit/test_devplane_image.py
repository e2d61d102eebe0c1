from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from oz_worker.devplane.image import machine_files, make_layer
from tests.engines.client import find_program

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="images are made of Linux programs")


@linux
def test_the_machine_s_own_files_run_where_nothing_else_is(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("a root directory of its own: run as root")
    found = machine_files()
    layer = make_layer(found.files, found.links)
    subprocess.run(["tar", "--extract", "--directory", str(tmp_path)], input=layer, check=True, timeout=60)
    script = "import http.client, select, subprocess, sys; print(sys.version); print(subprocess.getoutput('echo hi'))"
    inside = [find_program("chroot"), str(tmp_path), found.python, "-I", "-S", "-c", script]
    ended = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{sys.version}\nhi\n"
    assert not [path for path in found.files if "site-packages" in path or path.endswith(".pyc")]


def test_equal_files_make_equal_layers() -> None:
    files = {"/a/b": (0o644, b"c"), "/a/d": (0o755, b"")}
    layer = make_layer(files, {"/e": "/a/b"}, {"/tmp": 0o1777})
    assert layer == make_layer(files, {"/e": "/a/b"}, {"/tmp": 0o1777})
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        members = [(one.name, oct(one.mode), one.uid, one.mtime) for one in tar.getmembers()]
    assert members == [
        ("tmp", "0o1777", 0, 0),
        ("a", "0o755", 0, 0),
        ("a/b", "0o644", 0, 0),
        ("a/d", "0o755", 0, 0),
        ("e", "0o777", 0, 0),
    ]
