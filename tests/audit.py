"""What every test of a worker ends with: no secret in what it wrote, in what it told the server, or in arguments.

Has its own idea of how a secret may be spelled, so that the redactor and its judge cannot share a mistake.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import urllib.parse
from pathlib import Path
from typing import Iterable

LOOK_SECONDS = 0.05
SHORTEST = 6


def spelled(secret: str) -> set[bytes]:
    """How a secret, and each line of it, may stand in a file: as it is, in URLs, JSON and base64."""
    found: set[bytes] = set()
    for text in {secret, *secret.splitlines()}:
        text = text.strip()
        if len(text) < SHORTEST:
            continue
        raw = text.encode()
        encodings = [text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]
        for quoted in (urllib.parse.quote(text), urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text)):
            encodings += [quoted, "".join(part.lower() if n else part for n, part in enumerate_escapes(quoted))]
        found.update(one.encode() for one in encodings)
        found.update(_base64(raw))
    return found


def enumerate_escapes(quoted: str) -> Iterable[tuple[bool, str]]:
    """The parts of a quoted text, each with whether it is the code of an escape."""
    first, *others = quoted.split("%")
    yield False, first
    for part in others:
        yield False, "%"
        yield True, part[:2]
        yield False, part[2:]


def _base64(raw: bytes) -> Iterable[bytes]:
    """The whole groups of three bytes of *raw*, wherever it begins in what was encoded; 8 characters at least."""
    for skipped in range(3):
        whole = raw[skipped : skipped + (len(raw) - skipped) // 3 * 3]
        if len(whole) >= SHORTEST:
            yield base64.b64encode(whole)
            yield base64.urlsafe_b64encode(whole)


def secrets_in(data: bytes, secrets: Iterable[str]) -> list[bytes]:
    """The spellings that stand in *data*."""
    return sorted({form for secret in secrets for form in spelled(secret) if form in data})


def audit_files(place: Path, secrets: Iterable[str], *, but: Iterable[str] = ()) -> None:
    """No secret stands in any file below *place*, nor in the name of one, but for those files named *but*."""
    forms = {form for secret in secrets for form in spelled(secret)}
    for path in place.rglob("*"):
        if path.name in but:
            continue
        assert not [form for form in forms if form in os.fsencode(path.name)], f"the name {path} holds a secret"
        if not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # it was somebody's for a moment
            continue
        found = [form for form in forms if form in data]
        assert not found, f"{path} holds the secret {found[0]!r}: {around(data, found[0])!r}"


def around(data: bytes, found: bytes) -> bytes:
    """Where it stands, for whoever reads the failure."""
    place = data.index(found)
    return data[max(0, place - 100) : place + len(found) + 40]


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
