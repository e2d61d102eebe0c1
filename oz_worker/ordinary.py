"""Which values of variables are ordinary words: to mask them would blank out what everybody writes into logs."""

from __future__ import annotations

import re

_WORDS = frozenset(
    (
        *("production", "development", "staging", "testing", "preview", "sandbox", "default", "localhost"),
        *("enabled", "disabled", "enable", "disable", "always", "require", "required", "prefer", "optional"),
        *("warning", "verbose", "critical", "notset", "console", "standard", "noninteractive", "unknown", "release"),
        *("127.0.0.1", "0.0.0.0", "linux/amd64", "linux/arm64", "x86_64", "aarch64", "ubuntu", "debian", "alpine"),
        *("c.utf-8", "en_us.utf-8", "xterm-256color", "truecolor", "/bin/sh", "/bin/bash", "/usr/bin/bash"),
        *("python", "python3", "docker", "podman", "kubernetes", "github", "gitlab", "origin", "master"),
        *("http/protobuf", "prometheus", "http://localhost", "https://localhost"),
    )
)
"""Closed, and compared as a whole: nothing is taken for a word because it looks like one."""

_TELLING = re.compile(
    "pass|pw|secret|token|key|cred|auth|priv|pin|code|cookie|session|sign|salt|seed|cert|phrase|user|login|account"
    "|bearer|jwt|otp|hash|dsn",
    re.IGNORECASE,
)


def is_ordinary(name: str, value: str) -> bool:
    """Whether *value* is one of few known words, and *name* is not that of a secret (`DB_PASSWORD=production` is)."""
    return value.strip().lower() in _WORDS and not _TELLING.search(name)
