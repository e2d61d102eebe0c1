"""Where the API key comes from at each dial."""

from __future__ import annotations

from typing import Callable

from oz_worker.redact import Secret

KEY_BYTES = 16 * 1024
"""A key file that is longer holds something else."""


class KeySource:
    """The key itself, or the file it is read from anew at each dial, on the resolver thread.

    What the file holds goes to *learn* first, key or not: from then on the log masks it. *origin*: the flag or variable
    that gave the key where no file did.

    Calling it raises OSError when the file cannot be read, ValueError with a sentence when what it holds is no key.
    """

    def __init__(
        self, key: Secret, path: str = "", learn: Callable[[str], None] = lambda _text: None, origin: str = ""
    ) -> None:
        self._key = key
        self._origin = origin.lstrip("$")
        self._path = path
        self._learn = learn

    def __call__(self) -> Secret:
        """The key, trimmed."""
        text = self._key.reveal() if self._key or not self._path else self._read()
        text = text.strip()
        self._learn(text)
        where = self._path or "the API key"
        if not text:
            raise ValueError(f"{where} is empty; put the worker's API key there")
        if not all(" " < c < "\x7f" for c in text):
            raise ValueError(f"{where} holds blanks or characters that no API key has; put the key alone there")
        return Secret(text)

    def account(self) -> str:
        """Where the key comes from, and what a new one takes; for a server that does not want this one."""
        if self._path:
            return f"the key is read from {self._path} anew at each dial"
        return (
            f"the key came from {self._origin}: a new one there needs a restart of the worker" if self._origin else ""
        )

    def _read(self) -> str:
        with open(self._path, "rb") as file:
            data = file.read(KEY_BYTES + 1)
        if len(data) > KEY_BYTES:
            raise ValueError(f"{self._path} is too long for a key file; put the worker's API key alone there")
        return data.decode("utf-8", "replace")
