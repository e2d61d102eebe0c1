"""An HTTP reply as far as it came: what a proxy or a server said instead of opening the connection."""

from __future__ import annotations

import re
from typing import Mapping, NamedTuple

EXCERPT = 200
"""Characters of a body that may stand in a sentence."""


class Reply(NamedTuple):
    """Status, headers (lower-cased names, the last one wins) and the first bytes of the body."""

    status: int
    phrase: str
    headers: Mapping[str, str]
    body: bytes

    def excerpt(self) -> str:
        """The body as one short printable line: HTML without its tags, control characters as blanks."""
        text = self.body[:4096].decode("utf-8", "replace")
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text)
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= EXCERPT else line[: EXCERPT - 3] + "..."


def parse(data: bytes) -> Reply | None:
    """The reply in *data*, which may be cut anywhere behind the first line; None when it is not HTTP."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    first = re.fullmatch(r"HTTP/1\.[01] (\d{3})(?: (.*))?", lines[0])
    if first is None or b"\r\n" not in data:
        return None
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return Reply(int(first[1]), printable(first[2] or ""), headers, body)


def printable(text: str) -> str:
    """*text* for a log line: bounded, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:EXCERPT])
