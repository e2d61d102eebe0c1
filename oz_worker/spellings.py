"""How one secret value may be spelled in output: as it is, in base64, hex, URLs, JSON and quotes, also twice over."""

from __future__ import annotations

import base64
import json
import re
import string
import urllib.parse
from typing import Iterator

SHORTEST = 6
"""Shorter values are not masked: `1`, `true` or `main` would blank out ordinary text."""

_LONG = 1024
"""From so many characters on a value is not looked for twice encoded: that costs megabytes of memory for each task, and
what is so long is a file, whose lines are looked for by themselves."""
_BREAKS = b"\r\n"
_SMALL = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")
_URL_SAFE = ("", "/", "!*'()", ";,/?:@&=+$!*'()#")
"""What is left as it is: by Python, Go and `jq` (nothing); in a path; by encodeURIComponent; by encodeURI."""


def encoded(text: str) -> bytes:
    """*text* as a program would print it; also what cannot be printed has bytes, and `decoded` gives it back."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def bare(data: bytes) -> bytes:
    """*data* as it is compared: without line breaks, which wrap and indent, and in small letters.

    Escapes and hex have letters of either case, also mixed in one value; a host or a header loses that of its name.
    """
    return data.translate(_SMALL, _BREAKS)


def spellings(secret: str) -> set[bytes]:
    """Every spelling of *secret* and of its lines, as `bare` makes it: output is compared so too.

    Blanks around the value and around its lines are nobody's secret. What has less than six characters is left out.
    """
    found: set[bytes] = set()
    for part in {secret.strip(), *map(str.strip, secret.splitlines())}:
        if len(part) >= SHORTEST:
            found.update(map(bare, _spellings(part)))
    return {form for form in found if len(form) >= SHORTEST}


def _spellings(text: str) -> Iterator[bytes]:
    raw = encoded(text)
    yield raw
    yield raw.hex().encode()
    inner = {raw}
    if not _PLAIN.fullmatch(text):  # what is plain is spelled as it is everywhere
        yield from map(encoded, _quoted(text))
        inner |= {encoded(json.dumps(text, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (True, False)}
    for form in {form for one in inner for form in _in_base64(one)}:
        yield form
        yield form.replace(b"+", b"%2B").replace(b"/", b"%2F")


def _quoted(text: str) -> set[str]:
    """In URLs, JSON and quotes; in URLs and JSON twice over, as is JSON in URLs and in quotes."""
    in_urls, in_json = {*_in_urls(encoded(text))}, {*_in_json(text)}
    found = {*in_urls, *in_json, *_in_quotes(text)}
    if len(text) >= _LONG:
        return found
    for once in in_urls:
        found.update(urllib.parse.quote(once, safe=safe) for safe in ("", _URL_SAFE[-1]))
    for once in in_json:
        found.update((json.dumps(once)[1:-1], json.dumps(once, ensure_ascii=False)[1:-1]))
        found.update((once.replace("\\", "\\\\").replace("'", "\\'"), urllib.parse.quote(encoded(once), safe="")))
    return found


def _in_urls(raw: bytes) -> Iterator[str]:
    for safe in _URL_SAFE:
        quoted = urllib.parse.quote(raw, safe=safe)
        yield from (quoted, quoted.replace("%20", "+"), quoted.replace("~", "%7E"))


def _in_json(text: str) -> Iterator[str]:
    for ascii_only in (True, False):
        quoted = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        careful = quoted.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        yield from (quoted, quoted.replace("/", "\\/"), careful, careful.replace("'", "\\u0027"))


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
