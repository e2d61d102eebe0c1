"""What every test ends with: no secret in what was written, logged, told to the server, or given as an argument.

Whoever makes a secret says so (`Guard.keep`, of the `guard()` of the test that runs); the autouse fixture
`no_secret_leaks` of tests/conftest.py looks when the test and all its fixtures are over. A worker's rig looks by
itself, while its control plane still lives, and owes it to the guard. Has its own idea of how a secret may be spelled,
so that the redactor and its judge cannot share a mistake.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import threading
import traceback
import urllib.parse
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

LOOK_SECONDS = 0.05
SHORTEST = 6


def spelled(secret: str) -> set[bytes]:
    """How a secret, and each line of it, may stand in a file, in small letters: plain, hex, base64, URLs, JSON."""
    found: set[bytes] = set()
    for text in {secret, *secret.splitlines()}:
        text = text.strip()
        if len(text) < SHORTEST:
            continue
        encodings = {text, *_encoded(text)}
        encodings.update(twice for once in list(encodings) for twice in _encoded(once))
        found.update(one.encode().lower() for one in encodings)
        found.update(form.lower() for form in _base64(text.encode()))
        found.add(text.encode().hex().encode())
    return found


def _encoded(text: str) -> Iterable[str]:
    yield from (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    yield from (urllib.parse.quote(text), urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text))


def _base64(raw: bytes) -> Iterable[bytes]:
    """The whole groups of three bytes of *raw*, wherever it begins in what was encoded; 8 characters at least."""
    for skipped in range(3):
        whole = raw[skipped : skipped + (len(raw) - skipped) // 3 * 3]
        if len(whole) >= SHORTEST:
            yield base64.b64encode(whole)
            yield base64.urlsafe_b64encode(whole)


def secrets_in(data: bytes, secrets: Iterable[str]) -> list[bytes]:
    """The spellings that stand in *data*."""
    small = data.lower()
    return sorted({form for secret in secrets for form in spelled(secret) if form in small})


def audit_files(place: Path, secrets: Iterable[str], *, but: Iterable[str] = ()) -> None:
    """No secret stands in any file below *place*, nor in the name of one, but for names and paths in *but*."""
    forms = {form for secret in secrets for form in spelled(secret)}
    for path in place.rglob("*"):
        if path.name in but or str(path) in but:
            continue
        assert not [form for form in forms if form in os.fsencode(path.name).lower()], f"the name {path} holds a secret"
        if not path.is_file():
            continue
        try:
            data = path.read_bytes().lower()
        except FileNotFoundError:  # it was somebody's for a moment
            continue
        found = [form for form in forms if form in data]
        assert not found, f"{path} holds the secret {found[0]!r}: {around(data, found[0])!r}"


def around(data: bytes, found: bytes) -> bytes:
    """Where it stands, for whoever reads the failure."""
    place = data.index(found)
    return data[max(0, place - 100) : place + len(found) + 40]


_TELLING = re.compile("TOKEN|SECRET|PASSWORD|KEY")


class Guard:
    """What one test has that nobody may see, and where. Used by the thread of the test."""

    def __init__(self) -> None:
        self.secrets: set[str] = set()
        self.in_arguments: set[str] = set()
        """Secrets that lawfully stand in arguments: the test says why."""
        self._places: set[Path] = set()
        self._allowed: set[str] = set()
        self._owed: list[tuple[str, Callable[[], bool]]] = []
        self.arguments: Arguments | None = None
        self._said = _Said()

    def keep(self, place: Path | None, *secrets: str) -> None:
        """From now on no file below *place*, no line of the log and no process of the machine may show *secrets*."""
        self.secrets.update(filter(None, secrets))
        self._places |= {place} if place else set()
        if self.arguments is None:
            self.arguments = Arguments()
            logging.getLogger().addHandler(self._said)

    def keep_of(self, place: Path, environment: Mapping[str, str]) -> dict[str, str]:
        """*environment* of a task with a secret of the guard's own; that, and what its names tell of, is kept."""
        planted = {"PRIVATE_TOKEN": f"token-{os.urandom(8).hex()}", **environment}
        self.keep(place, *(value for name, value in planted.items() if _TELLING.search(name)))
        return planted

    def allow(self, *files: Path) -> None:
        """These very files may hold secrets at the end: the test, or its agent, has written them there on purpose."""
        self._allowed.update(map(str, files))

    def owes(self, what: str, paid: Callable[[], bool]) -> None:
        """Somebody looks by itself: at the end of the test it must have."""
        self._owed.append((what, paid))

    def audit(self) -> None:
        """End of the test. Raises AssertionError with what shows a secret, and where."""
        if self.arguments is not None:
            self.arguments.stop()
            logging.getLogger().removeHandler(self._said)
            self.arguments.audit(self.secrets - self.in_arguments)
            for place in self._places:
                audit_files(place, self.secrets, but=self._allowed)
            log = "\n".join(self._said.lines).encode(errors="replace").lower()
            shown = secrets_in(log, self.secrets)
            assert not shown, f"the log shows a secret: {around(log, shown[0])!r}"
        assert [what for what, paid in self._owed if not paid()] == [], "these were never audited"


class _Said(logging.Handler):
    """All that was logged, with tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        trace = traceback.format_exception(record.exc_info[1]) if record.exc_info and record.exc_info[1] else []
        self.lines.append(record.getMessage() + "".join(trace))


_guards: list[Guard] = []


def guard() -> Guard:
    """That of the test that runs; outside of tests one that nobody asks."""
    return _guards[-1] if _guards else Guard()


@contextlib.contextmanager
def guarded() -> Iterator[Guard]:
    """A guard for the time of a test, and its audit."""
    own = Guard()
    _guards.append(own)
    try:
        yield own
    finally:
        _guards.remove(own)
        own.audit()


class Arguments:
    """Everything that processes of this machine had as arguments while a test ran, looked at 20 times a second.

    A thread of its own; `stop` ends it. Processes that were there before are left out.
    """

    def __init__(self) -> None:
        self._before = set(_processes())
        self.seen: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit of arguments", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def audit(self, secrets: Iterable[str]) -> None:
        """None of *secrets* was among them."""
        found = secrets_in(b"\n".join(self.seen), secrets)
        assert not found, f"a process had the secret {found[0]!r} among its arguments"

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            for process in set(_processes()) - self._before:
                try:
                    with open(f"/proc/{process}/cmdline", "rb") as file:
                        self.seen.add(file.read())
                except OSError:  # it has ended
                    continue


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]
