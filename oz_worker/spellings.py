"""How one secret value may be spelled in output: as it is, in base64, in URLs, in JSON, in quotes."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from typing import Iterator

SHORTEST = 6
"""Shorter values are not masked: `1`, `true` or `main` would blank out ordinary text."""

_BREAKS = b"\r\n"
_URL_SAFE = ("", "/", "!*'()", ";,/?:@&=+$!*'()#")
"""What is left as it is: by Python, Go and `jq` (nothing); in a path; by encodeURIComponent; by encodeURI."""
_HEX = re.compile("%[0-9A-F]{2}")
_UNICODE = re.compile(r"\\u[0-9a-f]{4}")


def encoded(text: str) -> bytes:
    """*text* as a program would print it; also what cannot be printed has bytes, and `decoded` gives it back."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def spellings(secret: str) -> set[bytes]:
    """Every spelling of *secret* and of its lines, without line breaks: output is compared without them too.

    Blanks around the value and around its lines are nobody's secret. What has less than six characters is left out.
    """
    found: set[bytes] = set()
    for part in {secret.strip(), *map(str.strip, secret.splitlines())}:
        if len(part) >= SHORTEST:
            found.update(form.translate(None, _BREAKS) for form in _spellings(part))
    return {form for form in found if len(form) >= SHORTEST}


def _spellings(text: str) -> Iterator[bytes]:
    raw = encoded(text)
    yield raw
    for spelled in {*_in_urls(raw), *_in_json(text), *_in_quotes(text)}:
        yield encoded(spelled)
    yield from _in_base64(raw)


def _in_urls(raw: bytes) -> Iterator[str]:
    for safe in _URL_SAFE:
        quoted = urllib.parse.quote(raw, safe=safe)
        for spelled in (quoted, quoted.replace("%20", "+"), quoted.replace("~", "%7E")):
            yield spelled
            yield _HEX.sub(lambda code: code[0].lower(), spelled)


def _in_json(text: str) -> Iterator[str]:
    for ascii_only in (True, False):
        try:
            quoted = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        except ValueError:  # pragma: no cover (json takes any str)
            continue
        careful = quoted.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        for spelled in (quoted, quoted.replace("/", "\\/"), careful, careful.replace("'", "\\u0027")):
            yield spelled
            yield _UNICODE.sub(lambda code: "\\u" + code[0][2:].upper(), spelled)


def _in_quotes(text: str) -> Iterator[str]:
    """As Python shows it, and as shells take it."""
    yield repr(text)[1:-1]
    yield repr(text + "'\"")[1:-4]
    yield text.replace("'", "'\"'\"'")
    yield text.replace("'", "'\\''")


def _in_base64(raw: bytes) -> Iterator[bytes]:
    """Inside a longer text a value begins at one of three places of a group of three bytes; the characters that it
    shares with its neighbours are not its own. Alone it is a whole encoding, with padding or without.
    """
    whole = base64.b64encode(raw).rstrip(b"=")
    for form in (whole, *(_own_characters(raw, place) for place in range(3))):
        yield form
        yield form.translate(bytes.maketrans(b"+/", b"-_"))


def _own_characters(raw: bytes, place: int) -> bytes:
    return base64.b64encode(b"\0" * place + raw)[-(-8 * place // 6) : 8 * (place + len(raw)) // 6]
