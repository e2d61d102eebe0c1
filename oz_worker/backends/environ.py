"""Which variables a task, a hook and a dispatcher see (oz.md 7), and which of them are nobody's secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Sequence

from oz_worker.detached import ODD
from oz_worker.ordinary import is_ordinary
from oz_worker.process import HELPER, arguments_of, environment_of
from oz_worker.redact import held_in
from oz_worker.tree import MARK

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
HOST_NAMES = (
    *("HOME", "TMPDIR", "PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *_PROXIES,
    *(name.lower() for name in _PROXIES),
)
"""What an agent on the host inherits without being asked; `inherit_environment` adds to it."""

_WORKERS_OWN = (
    *("WARP_API_KEY", MARK, HELPER, "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)
"""What no child inherits: the worker's key, and what is addressed to this one process."""

HARNESS_DIRECTORIES = {"claude": ("CLAUDE_CONFIG_DIR", ".claude"), "codex": ("CODEX_HOME", ".codex")}

_OPEN = frozenset(
    (
        *("TASK_ID", "GIT_TERMINAL_PROMPT", "GH_PROMPT_DISABLED", "WARP_SERVER_ROOT_URL", "GIT_CONFIG_GLOBAL"),
        *("PWD", "OLDPWD", "SHLVL", "_", MARK),
        *(name for name, _ in HARNESS_DIRECTORIES.values()),
        *HOST_NAMES[:8],  # without the proxies: their URLs may hold a password
    )
)


def inherited(host: Mapping[str, str], extra: Iterable[str]) -> dict[str, str]:
    """The part of the host's environment that an agent gets."""
    return {name: host[name] for name in (*HOST_NAMES, *extra) if name in host}


def worker_environment(host: Mapping[str, str]) -> dict[str, str]:
    """The worker's own environment, for the operator's hooks and dispatchers, without its key."""
    return {name: value for name, value in host.items() if name not in _WORKERS_OWN}


def doubled(variables: Mapping[str, str]) -> dict[str, str]:
    """Each `OZ_` variable that the worker sets, also under its newer name `WARP_` (oz.md 24)."""
    newer = {"WARP_" + name[3:]: value for name, value in variables.items() if name.startswith("OZ_")}
    return {**variables, **newer}


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values in a task's environment that must not be shown: all but those of few names, and ordinary words."""
    given = ((name, value) for name, value in environment.items() if value and name not in _OPEN)
    return tuple(value for name, value in given if not is_ordinary(name, value))


def secrets_of(pid: int) -> tuple[str, ...] | None:
    """The secrets of a running agent, read from the recorder that carries its environment and arguments."""
    environment = environment_of(pid)
    if environment is None:
        return None
    odd = {name: value for name, value in json.loads(environment.pop(ODD, "{}")).items() if value}
    return secrets_in({**environment, **odd}, arguments_of(pid))


def secrets_in(environment: Mapping[str, str], arguments: Sequence[str]) -> tuple[str, ...]:
    """The secrets among the environment and the arguments that an agent was given."""
    mcp = list(arguments[arguments.index("--mcp") + 1 :][:1]) if "--mcp" in arguments else []
    return (*secret_values(environment), *(secret for text in mcp for secret in _secrets_in(text)))


def _secrets_in(text: str) -> Iterator[str]:
    """The secrets inside a JSON text, or inside the file that it names."""
    yield text
    try:
        yield from held_in(json.loads(Path(text).read_text() if text.startswith("/") else text))
    except (OSError, ValueError):
        return
