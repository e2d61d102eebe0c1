"""The flags of each command, one parser each, made when needed. Values are checked in `load`, all at once."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple, NoReturn, Sequence

from oz_worker.config.reading import suggest
from oz_worker.errors import ConfigurationError

COMMANDS = {
    "run": "connect and run tasks (the default)",
    "check": "try everything out: configuration, network, key, backend, disk; exit 0, 2 or 3",
    "status": "show what runs",
    "drain": "let a running worker finish its tasks and exit",
    "logs": "print the output of a task",
    "dev": "try this machine out against a local control plane",
}
_BOOLEANS = ("no-cleanup", "one-shot", "exit-on-refusal")


class _Flag(NamedTuple):
    names: tuple[str, ...]
    help: str
    metavar: str = ""  # "" is a switch
    repeat: bool = False
    hidden: bool = False
    optional: bool = False  # it may stand without its value, which then is ""


_FILE = _Flag(("--config-file",), "configuration in YAML (see config.example.yaml)", "PATH")
_WORKER = _Flag(("--worker-id",), "the name runs are routed to; must not begin with `warp`", "ID")
_STATE = _Flag(("--state-dir",), "where the worker keeps its state", "DIR")
_INSTANCE = _Flag(("--instance-id",), "which of several workers with one id", "ID")

RUN = (
    _FILE,
    _WORKER,
    _Flag(("--backend",), "docker, kubernetes, direct or command", "NAME"),
    _Flag(("--api-key",), "the API key; WARP_API_KEY and --api-key-file do not show it to other users", "KEY"),
    _Flag(("--api-key-file",), "a file that holds the API key", "PATH"),
    _Flag(
        ("-e", "--env"), "a variable for tasks: NAME=VALUE, or NAME to copy it; again for more", "NAME[=VALUE]", True
    ),
    _Flag(("-v", "--volumes"), "a mount for docker tasks; again for more", "HOST:CONTAINER[:MODE]", True),
    _Flag(("--target-dir",), "direct: work in this directory instead of a workspace for each task", "DIR"),
    _Flag(("--engine",), "docker or podman", "NAME"),
    _Flag(("--max-concurrent-tasks",), "how many tasks at once; 0 is unlimited, also against the file", "N"),
    _Flag(("--idle-on-complete",), "how long an agent waits for follow-ups, like 45m", "DURATION"),
    _Flag(("--no-cleanup",), "keep containers, Jobs and workspaces"),
    _Flag(("--task-timeout",), "end a task that takes longer", "DURATION"),
    _Flag(("--one-shot",), "run one task, then exit"),
    _Flag(("--exit-after-tasks",), "drain and exit after so many tasks", "N"),
    _Flag(("--exit-after-idle",), "drain and exit after so long without a task", "DURATION"),
    _Flag(("--exit-after-uptime",), "drain and exit after so long", "DURATION"),
    _Flag(("--exit-on-refusal",), "exit with 77 when the server refuses the key or the address"),
    _Flag(("--on-shutdown",), "what TERM does to tasks: cancel, drain or preserve", "HOW"),
    _Flag(("--stop-grace",), "time between TERM and KILL of a task", "DURATION"),
    _Flag(("--drain-timeout",), "how long a drain may take; 0 is unlimited", "DURATION"),
    _STATE,
    _INSTANCE,
    _Flag(("--log-level",), "debug, info, warn or error", "LEVEL"),
    _Flag(("--log-format",), "text or json", "FORMAT"),
    _Flag(("--log-file",), "log to this file instead of stderr", "PATH"),
    _Flag(("--ca-file",), "certificates to trust, PEM", "PATH"),
    _Flag(("--health-listen",), "serve health here, like 127.0.0.1:8080", "HOST:PORT"),
    _Flag(("--control-plane",), "oz or cropscode", "NAME"),
    _Flag(("--web-socket-url",), "", "URL", hidden=True),
    _Flag(("--server-root-url",), "", "URL", hidden=True),
    _Flag(("--session-sharing-server-url",), "", "URL", hidden=True),
)
_LOOKING = (
    _FILE,
    _WORKER,
    _STATE,
    _INSTANCE,
    _Flag(("--all",), "every instance, also those that do not run"),
    _Flag(("--json",), "for programs"),
)
_PER_COMMAND = {
    "run": RUN,
    "check": (
        *RUN,
        _Flag(("--print-config",), "print the merged configuration, secrets masked, with origins, and try nothing"),
        _Flag(("--json",), "for programs"),
    ),
    "status": (
        *_LOOKING,
        _Flag(
            ("--explain",),
            "why it takes no task, and what it rejected; or what a task waits for",
            "TASK",
            optional=True,
        ),
    ),
    "drain": (*_LOOKING, _Flag(("--wait",), "wait until it has exited, at most so long", "DURATION")),
    "logs": _LOOKING[:4],
    "dev": (
        _Flag(("--backend",), "direct, command or docker", "NAME"),
        _Flag(("--engine",), "docker or podman, for --backend docker", "NAME"),
        _Flag(("--count",), "how many tasks", "N"),
        _Flag(("--cancel-after",), "cancel each task after so long", "DURATION"),
        _Flag(("--serve",), "keep the control plane up until a signal"),
        _Flag(("--listen",), "where the control plane listens", "HOST:PORT"),
        _Flag(("--scenario",), "half-open, cut, refuse, garbage or slow", "NAME"),
        _Flag(("--oz-path",), "use this agent instead of the sample one", "PATH"),
        _Flag(("--keep",), "keep the temporary directory"),
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError([f"{message}; `{self.prog} --help` shows what is possible"])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags as text under their names, `command` and `script` beside them. ConfigurationError for a usage error."""
    words = list(argv)
    command = words.pop(0) if words and words[0] in COMMANDS else "run"
    script: list[str] = []
    if command == "dev" and "--" in words:
        cut = words.index("--")
        words, script = words[:cut], words[cut + 1 :]
    parser = _parser(command)
    arguments, rest = parser.parse_known_args(_switches(words))
    if rest:
        raise ConfigurationError([_unknown(word, command) for word in rest])
    arguments.command = command
    arguments.script = tuple(script)
    return arguments


def _parser(command: str) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="oz_worker" if command == "run" else f"oz_worker {command}",
        description=COMMANDS[command] + ".",
        epilog=f"commands:\n{listed}" if command == "run" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag in _PER_COMMAND[command]:
        text = argparse.SUPPRESS if flag.hidden else flag.help
        if not flag.metavar:
            parser.add_argument(*flag.names, action="store_true", help=text)
        elif flag.optional:
            parser.add_argument(*flag.names, nargs="?", const="", metavar=flag.metavar, help=text)
        else:
            action = "append" if flag.repeat else "store"
            parser.add_argument(*flag.names, action=action, metavar=flag.metavar, help=text)
    if command == "run":
        parser.add_argument("--version", action="store_true", help="print the version")
    if command in ("run", "check"):
        # A flag that the existing worker has gained; `load` says once that it means nothing here.
        parser.add_argument("--collect-task-logs", nargs="?", const="true", help=argparse.SUPPRESS)
    if command == "logs":
        parser.add_argument("task", metavar="TASK", help="the task's id")
    return parser


def _switches(words: Sequence[str]) -> list[str]:
    """`--no-cleanup=true` and `=false`, which the existing worker's parser takes, as switches."""
    kept = []
    for text in words:
        given = re.fullmatch(rf"--({'|'.join(_BOOLEANS)})=(true|false)", text)
        if given is None:
            kept.append(text)
        elif given[2] == "true":
            kept.append(f"--{given[1]}")
    return kept


def _unknown(text: str, command: str) -> str:
    """A sentence about an argument nobody knows. A value behind `=` may be a secret and is not repeated."""
    name = text.split("=")[0]
    if name.startswith("-"):
        flags = [name for flag in _PER_COMMAND[command] for name in flag.names]
        return f"unknown flag {name}{suggest(name, flags) or '; --help lists all flags'}"
    return f"unexpected argument {name!r}{suggest(name, COMMANDS) or '; --help shows what is possible'}"
