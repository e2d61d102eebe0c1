"""The shell scripts that run inside a task's pod: the agent's wrapper, and the copy of a sidecar's files.

They are given to whatever `/bin/sh` an image has (dash, busybox, bash), so they use nothing but POSIX.
"""

from __future__ import annotations

import shlex

from oz_worker.backends.container_order import ENTRYPOINT, WORKSPACE

ENVIRONMENT_FILE = f"{WORKSPACE}/.oz-env"
TARGET = "/target"
"""Where a copying container has the sidecar's volume."""
TEARDOWN_SECONDS = 300
"""How long `teardown_command` may take after an agent that ended by itself; as `direct`'s default."""
_KILL_AFTER_SECONDS = 10
_MISUSE, _NOT_FOUND = 2, 127

_SAY = """\
say() {
  echo "oz-worker: $1" >&2
  if [ -w /dev/termination-log ]; then echo "$1" >/dev/termination-log; fi
}
"""
"""What is said there stands in the pod's status, too, and so in the report of the task."""

_ENVIRONMENT = f"""\
if [ -f "$OZ_ENVIRONMENT_FILE" ]; then
  if ! /bin/sh -n "$OZ_ENVIRONMENT_FILE"; then
    say "$OZ_ENVIRONMENT_FILE is not what a shell can read; correct what setup_command writes there"
    exit {_MISUSE}
  fi
  set -a
  . "$OZ_ENVIRONMENT_FILE"
  set +aeu
fi
if [ ! -x {ENTRYPOINT} ]; then
  say "there is no {ENTRYPOINT} that can be run; name a sidecar image that has one, in backend.kubernetes.sidecar_image"
  exit {_NOT_FOUND}
fi
"""

_EXEC = f'exec {ENTRYPOINT} "$@"\n'

_RELAY = """\
oz_running= oz_early=
relay() {
  if [ -n "$oz_running" ]; then kill -s "$1" "$oz_running" 2>/dev/null; else oz_early=$1; fi
}
for oz_signal in TERM INT HUP QUIT USR1 USR2; do
  trap "relay $oz_signal" "$oz_signal"
done
await() {
  while :; do
    wait "$1"
    oz_code=$?
    if [ "$oz_code" -le 128 ] || ! kill -0 "$1" 2>/dev/null; then return "$oz_code"; fi
  done
}
"""
"""`wait` also returns, with more than 128, when a signal came: then the child is still there and is awaited again."""

_AGENT = f"""\
(
{_ENVIRONMENT}
if env --default-signal=INT,QUIT true 2>/dev/null; then exec env --default-signal=INT,QUIT {ENTRYPOINT} "$@"; fi
{_EXEC}
) &
oz_running=$!
if [ -n "$oz_early" ]; then kill -s "$oz_early" "$oz_running" 2>/dev/null; fi
await "$oz_running"
oz_ended=$?
oz_running=
"""
"""A shell lets its children in the background ignore INT and QUIT, and theirs with them; coreutils can undo that."""

_TEARDOWN = """\
/bin/sh -c {command} &
oz_teardown=$!
(
  sleep {limit} &
  oz_nap=$!
  trap 'kill -s KILL "$oz_nap"; exit' TERM
  wait "$oz_nap" || exit
  kill -s TERM "$oz_teardown"
  sleep {kill_after}
  kill -s KILL "$oz_teardown"
) 2>/dev/null &
oz_watch=$!
await "$oz_teardown"
oz_torn=$?
kill -s TERM "$oz_watch" 2>/dev/null
if [ "$oz_torn" -ne 0 ]; then echo "oz-worker: teardown_command ended with exit code $oz_torn" >&2; fi
exit "$oz_ended"
"""

_COPY = """\
set --
for entry in /* /.[!.]* /..?*; do
  case $entry in {target} | /proc | /sys | /dev) continue ;; esac
  if [ -e "$entry" ] || [ -L "$entry" ]; then set -- "$@" "$entry"; fi
done
if ! cp -a "$@" {target}/; then
  say "the files of this sidecar image could not all be copied; it needs cp, and the volume room for them"
  exit 1
fi
rm -rf {target}/run/secrets
if [ ! -L {target}/var/run ]; then rm -rf {target}/var/run/secrets; fi
"""


def wrapper(teardown_command: str, *, forget: str = "", limit: float = TEARDOWN_SECONDS) -> str:
    """The script that becomes the task's container; its arguments are the agent's.

    It reads what `setup_command` left in $OZ_ENVIRONMENT_FILE, each variable exported, and becomes the agent. With a
    teardown the agent is its child: the teardown runs after it, however it ended, for *limit* seconds at most (after
    a TERM the pod's own grace may end it sooner), with the container's variables; signals reach the agent; the exit
    code is the agent's in every case.
    *forget* is a variable that the agent is not to see.
    """
    start = (f"unset {forget}\n" if forget else "") + _SAY
    if not teardown_command:
        return start + _ENVIRONMENT + _EXEC
    teardown = _TEARDOWN.format(
        command=shlex.quote(teardown_command), limit=f"{limit:g}", kill_after=_KILL_AFTER_SECONDS
    )
    return start + _RELAY + _AGENT + teardown


def copy() -> str:
    """The script that copies the whole image it runs in to TARGET, and fails if any file was not copied.

    The image must have `/bin/sh` and `cp` (coreutils or busybox). One `cp` does it all, so that no error can hide
    behind a pipe and hard links stay. What is mounted into the container as a secret is not part of the image.
    """
    return _SAY + _COPY.format(target=TARGET)
