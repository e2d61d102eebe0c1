"""The API key: where it comes from, and what cannot be one."""

from __future__ import annotations

import os
import re
import stat
from typing import NamedTuple

from oz_worker.config.reading import Reading
from oz_worker.redact import Secret

_LARGEST = 64 * 1024


class ApiKey(NamedTuple):
    """The key, the file to read it from anew at each dial ("" when it does not come from one), and its origin."""

    secret: Secret
    file: str
    origin: str


def find(flag: str, flag_file: str, file: str, file_origin: str, reading: Reading) -> ApiKey:
    """The key by its order: `--api-key` or `--api-key-file`, `WARP_API_KEY`, `api_key_file`. Mistakes are noted;
    none at all is an empty origin.

    Trimmed; an empty one is a missing one. No sentence ever holds a part of it.
    """
    variable = reading.environ.get("WARP_API_KEY", "").strip()
    if flag.strip() and flag_file:
        reading.problem("--api-key", "stands beside --api-key-file; give one of the two")
        return ApiKey(Secret(""), "", "--api-key")
    if flag.strip():
        reading.warn("--api-key", "shows the key to every user of this machine; use WARP_API_KEY or --api-key-file")
        return _checked(flag.strip(), "", "--api-key", reading)
    if flag_file:
        return _from_file(reading.path(flag_file), "--api-key-file", reading)
    if variable:
        return _checked(variable, "", "$WARP_API_KEY", reading)
    if file:
        return _from_file(file, file_origin, reading)
    return ApiKey(Secret(""), "", "")


def _from_file(path: str, origin: str, reading: Reading) -> ApiKey:
    try:
        with open(path, "rb") as source:
            # A pipe (`--api-key-file <(...)`) can be read only once.
            again = path if stat.S_ISREG(os.fstat(source.fileno()).st_mode) else ""
            data = source.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        reading.problem(origin, f"the key file {path} cannot be read ({cause}); check its path and permissions")
        return ApiKey(Secret(""), "", origin)
    text = data.decode("utf-8", "replace").strip()
    if len(data) > _LARGEST or not text:
        what = "is empty" if not text else "is too large for a key"
        reading.problem(origin, f"the key file {path} {what}; write the key into it, alone")
        return ApiKey(Secret(""), "", origin)
    return _checked(text, again, origin, reading)


def _checked(text: str, file: str, origin: str, reading: Reading) -> ApiKey:
    strange = re.search(r"[^\x20-\x7e]", text)
    if strange:
        reading.problem(
            origin,
            f"the API key has a character at position {strange.start() + 1} that no key has (a line break, a quote "
            "from a document); copy the key again",
        )
        return ApiKey(Secret(""), "", origin)
    return ApiKey(Secret(text), file, origin)
