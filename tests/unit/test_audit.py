"""The audit that every test ends with can fail: whatever is leaked on purpose is found, and by whose place."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest

from tests.audit import Guard, guarded
from tests.hosting import eventually
from tests.rig import ROOT, SAFETY

SECRET = 'S3cret/"of a test"+'
WAYS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "capitals": lambda value: value.upper().encode(),
    "inside base64": lambda value: base64.b64encode(b"user:" + value.encode()),
    "hex": lambda value: value.encode().hex().upper().encode(),
    "JSON in JSON": lambda value: json.dumps(json.dumps({"k": value})).encode(),
}


def said(place: Path, leak: Callable[[Guard], object], secret: str = SECRET) -> str:
    """What the audit says of a test that does *leak*; "" for nothing."""
    try:
        with guarded() as guard:
            guard.keep(place, secret)
            leak(guard)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("way", WAYS)
def test_a_secret_in_a_file_is_found_but_where_it_may_stand(tmp_path: Path, way: str) -> None:
    file = tmp_path / "deep" / "file"
    file.parent.mkdir()
    file.write_bytes(b"before " + WAYS[way](SECRET) + b" behind")
    assert "deep/file holds the secret" in said(tmp_path, lambda _guard: None)
    assert said(tmp_path, lambda guard: guard.allow(file)) == ""
    file.rename(tmp_path / "file")  # that very place was allowed, and no other of the name
    assert "holds the secret" in said(tmp_path, lambda guard: guard.allow(file))


def test_a_secret_in_the_log_in_arguments_or_in_a_name_and_an_audit_that_is_owed_are_found(tmp_path: Path) -> None:
    logger = logging.getLogger("oz_worker.anything")
    assert "the log shows a secret" in said(tmp_path, lambda _guard: logger.warning("it is %s", SECRET))
    assert "the log shows a secret" in said(tmp_path, lambda _guard: logger.warning("no", exc_info=OSError(SECRET)))

    def started(guard: Guard) -> None:
        assert guard.arguments is not None
        seen = guard.arguments.seen
        with subprocess.Popen(["/bin/sh", "-c", "read line", SECRET], stdin=subprocess.PIPE) as process:
            eventually(lambda: any(SECRET.encode() in one for one in list(seen)))
            process.communicate(b"\n")

    def started_lawfully(guard: Guard) -> None:
        started(guard)
        guard.in_arguments.add(SECRET)

    assert "among its arguments" in said(tmp_path, started)
    assert said(tmp_path, started_lawfully) == ""
    (tmp_path / "token-0123456").touch()
    assert "token-0123456 holds a secret" in said(tmp_path, lambda _guard: None, "token-0123456")
    assert "never audited" in said(tmp_path, lambda guard: guard.owes("a rig", lambda: False))


LEAKY = """
from tests.hosting import Stage, run

def test_that_leaks(tmp_path):
    stage = Stage(tmp_path)
    stage.agent('echo "$PRIVATE_TOKEN" > $NOTES/leak')
    run(stage.direct(), stage.unit())
    stage.close()

def test_that_does_not(tmp_path):
    stage = Stage(tmp_path)
    run(stage.direct(), stage.unit())
    stage.close()
"""


def test_a_test_that_knows_nothing_of_the_audit_is_reported_when_its_task_leaks(tmp_path: Path) -> None:
    """The fixture is everybody's, and units have a secret of their own."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import no_secret_leaks as no_secret_leaks\n")
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    done = subprocess.run(
        [*words, f"--basetemp={tmp_path / 'base'}", "test_leaky.py"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=SAFETY * 2,
        check=False,
    )
    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "ERROR test_leaky.py::test_that_leaks" in done.stdout
    assert "leak holds the secret b'token-" in done.stdout
