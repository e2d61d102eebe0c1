"""The sample agent: stands in for `oz`, asks the control plane for its task's prompt and runs it as a shell script.

Started by a two-line wrapper as `python -I -S agent.py agent run --task-id ... --server-root-url ...`; only the
standard library, and nothing of oz_worker, so that it starts quickly and from anywhere. It refuses the arguments that
the real command line refuses (oz.md 20) with exit 2. What the script prints goes to its own output and, in pieces, to
the control plane; its exit code is the script's. It leaves nothing in its working directory.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from typing import Sequence
from urllib.parse import urlsplit

BARE = """sandboxed computer-use no-computer-use no-snapshot skip-initial-turn debug strict-mcp-startup
configure-git-credentials-with-github"""
OPTIONAL = "share idle-on-complete idle-on-fail"
VALUED = """task-id prompt saved-prompt file skill server-root-url session-sharing-server-url ws-server-url
output-format api-key model profile mcp harness environment cwd name conversation bedrock-inference-role
bedrock-role-region snapshot-upload-timeout snapshot-script-timeout mcp-startup-timeout"""
KINDS = {
    f"--{name}": kind
    for kind, names in (("bare", BARE), ("optional", OPTIONAL), ("valued", VALUED))
    for name in names.split()
}
SHORT = {"-C": "--cwd", "-e": "--environment", "-p": "--prompt"}
DURATIONS = (
    "--idle-on-complete",
    "--idle-on-fail",
    "--snapshot-upload-timeout",
    "--snapshot-script-timeout",
    "--mcp-startup-timeout",
)
HARNESSES = ("oz", "claude", "claude-code", "codex", "gemini", "opencode")
TOGETHER = (("--bedrock-inference-role", "--bedrock-role-region"),)
APART = (
    ("--task-id", "--prompt"),
    ("--task-id", "--saved-prompt"),
    ("--task-id", "--file"),
    ("--computer-use", "--no-computer-use"),
)
UNITS = """nsec ns usec us msec ms seconds second sec s minutes minute min m hours hour hr h days day d weeks week w
months month M years year y"""
DURATION = re.compile(rf"(?: *[0-9]+ *(?:{'|'.join(UNITS.split())}))+ *")
SHARE = re.compile(r"(?:team|public|[^@:\s]+@[^@:\s]+)(?::view|:edit)?")
TRIES = 20
HELD_SECONDS = 0.2


class Usage(Exception):
    """The real command line would refuse these arguments."""


def parse(argv: Sequence[str]) -> dict[str, str]:
    """The last value of each flag given. Raises Usage like the real command line."""
    if list(argv[:2]) != ["agent", "run"]:
        raise Usage(f"unrecognized subcommand '{' '.join(argv[:2])}'")
    given: dict[str, str] = {}
    rest = list(argv[2:])
    while rest:
        flag, joined, value = rest.pop(0).partition("=")
        flag = SHORT.get(flag, flag)
        kind = KINDS.get(flag)
        if kind is None:
            raise Usage(f"unexpected argument '{flag}' found")
        if kind == "bare" and joined:
            raise Usage(f"unexpected value '{value}' for '{flag}' found; no more were expected")
        follows = bool(rest) and not rest[0].startswith("-" if kind == "optional" else "--")
        if kind != "bare" and not joined and follows:
            value = rest.pop(0)
        elif kind == "valued" and not joined:
            raise Usage(f"a value is required for '{flag}' but none was supplied")
        if flag in given and flag not in ("--share", "--mcp"):
            raise Usage(f"the argument '{flag}' cannot be used multiple times")
        _judge(flag, value)
        given[flag] = value
    _together(given)
    return given


def _judge(flag: str, value: str) -> None:
    """Raise Usage for a value that the flag does not take; an optional one that is left out is empty."""
    if flag in DURATIONS and (value or KINDS[flag] == "valued") and not DURATION.fullmatch(value):
        raise Usage(f"invalid value '{value}' for '{flag}': not a duration like 10m, 1h 30m or 90s")
    if flag == "--harness" and value not in HARNESSES:
        raise Usage(f"invalid value '{value}' for '--harness' [possible values: {', '.join(HARNESSES)}]")
    if flag == "--share" and value and not SHARE.fullmatch(value):
        raise Usage(f"invalid value '{value}' for '--share': team, public or an address, with :view or :edit")
    if flag in ("--task-id", "--mcp") and not value:
        raise Usage(f"a value is required for '{flag}' but none was supplied")


def _together(given: dict[str, str]) -> None:
    if not {"--prompt", "--saved-prompt", "--task-id", "--skill"} & set(given):
        raise Usage("one of --prompt, --saved-prompt, --task-id or --skill is required")
    for one, other in APART:
        if one in given and other in given:
            raise Usage(f"the argument '{one}' cannot be used with '{other}'")
    for one, other in TOGETHER:
        if (one in given) != (other in given):
            raise Usage(f"the arguments '{one}' and '{other}' require each other")
    if "--skip-initial-turn" in given and not {"--task-id", "--idle-on-complete"} <= set(given):
        raise Usage("the argument '--skip-initial-turn' requires '--task-id' and '--idle-on-complete'")


class Plane:
    """The control plane's side for agents: one kept-alive HTTP connection, opened again when it broke."""

    def __init__(self, root: str, task_id: str, key: str) -> None:
        url = urlsplit(root)
        self._address = (url.hostname or "", url.port)
        self._secure = url.scheme == "https"
        self._path = f"{url.path.rstrip('/')}/agent/tasks/{task_id}"
        self._headers = {"Authorization": f"Bearer {key}", "X-Oz-Agent-Run": os.urandom(8).hex()}
        self._connection: HTTPConnection | None = None

    def prompt(self) -> str:
        """The task's prompt; tries again for some seconds while the control plane is away."""
        for attempt in range(TRIES):
            try:
                return self._ask("GET", "/prompt", b"", {}).decode()
            except (OSError, HTTPException):
                if attempt == TRIES - 1:
                    raise
                time.sleep(0.25)
        raise AssertionError("unreachable")

    def tell(self, output: bytes, ended: int | None = None) -> None:
        """Send a piece of output, or the end. What cannot be sent is lost here, not in the agent's own output."""
        headers = {} if ended is None else {"X-Oz-Exit-Code": str(ended)}
        for _ in range(2):
            try:
                self._ask("POST", "/output", output, headers)
                return
            except (OSError, HTTPException):
                continue  # a kept-alive connection that was closed meanwhile; the second try opens a new one

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        try:
            if self._connection is None:
                self._connection = self._opened()
            self._connection.request(method, self._path + path, body or None, {**self._headers, **headers})
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, HTTPException):
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise
        if response.status >= 300:
            raise SystemExit(
                f"oz: the server answered {response.status} to {path}: {content.decode('utf-8', 'replace')}"
            )
        return content

    def _opened(self) -> HTTPConnection:
        host, port = self._address
        if self._secure:
            from http.client import HTTPSConnection

            return HTTPSConnection(host, port, timeout=30)
        return HTTPConnection(host, port, timeout=30)


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(script: str, plane: Plane, stopped: list[int]) -> int:
    """Run *script* in the working directory, pass on what it prints, return its code (signals as 128 + n).

    *stopped* collects the signals that come before there is anything to pass them on to.
    """
    if stopped:
        return 128 + stopped[0]
    child = subprocess.Popen(
        ["/bin/sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for number in STOPS:
        signal.signal(number, lambda number, _: child.send_signal(number))
    for early in stopped:
        child.send_signal(early)
    assert child.stdout is not None
    output = child.stdout.fileno()
    poller = select.poll()
    poller.register(output, select.POLLIN)
    gone_at = 0.0
    while True:
        if poller.poll(100):
            data = os.read(output, 64 * 1024)
            if not data:
                break
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            plane.tell(data)
        elif child.poll() is not None:
            gone_at = gone_at or time.monotonic()
            if time.monotonic() - gone_at >= HELD_SECONDS:
                break  # something in the background holds the pipe; the script itself is over
    code = child.wait()
    return code if code >= 0 else 128 - code


def main(argv: Sequence[str]) -> int:
    """The agent's life: refuse, ask, run, end."""
    stopped: list[int] = []
    for number in STOPS:  # before anything that takes time: an agent that is stopped must still tell its end
        signal.signal(number, lambda number, _: stopped.append(number))
    try:
        given = parse(argv)
    except Usage as error:
        sys.stderr.write(f"error: {error}\n\nFor more information, try '--help'.\n")
        return 2
    root = given.get("--server-root-url") or os.environ.get("WARP_SERVER_ROOT_URL", "")
    key = given.get("--api-key") or os.environ.get("WARP_API_KEY", "")
    if not root or not key or "--task-id" not in given:
        sys.stderr.write("oz: the sample agent needs --task-id, --server-root-url and WARP_API_KEY\n")
        return 1
    plane = Plane(root, given["--task-id"], key)
    try:
        script = plane.prompt()
    except (OSError, HTTPException) as error:
        sys.stderr.write(f"oz: cannot reach {root}: {error}\n")
        return 1
    code = run(script, plane, stopped)
    plane.tell(b"", code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
