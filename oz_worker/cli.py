"""The command line: parse, dispatch, errors to sentences and exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Iterable, Sequence

from oz_worker.errors import ConfigurationError, ExitCode, OzWorkerError

if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code. What a user or a server can cause ends in sentences on stderr."""
    _open_closed_streams()
    try:
        try:
            code = _dispatch(argv)
        except OzWorkerError as error:
            _say(str(error).splitlines())
            code = int(error.exit_code)
        sys.stdout.flush()  # what nobody takes must be noticed here, where it is handled
        return code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            where = f"{error.filename} cannot be used" if error.filename else "the output cannot be written"
            _say([f"{where} ({error.strerror or error}); make room there, or name another place"])
        # The interpreter must not complain about it again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAULT)


def _open_closed_streams() -> None:
    """Whoever started us may have closed 0, 1 or 2: the next file that we open would get that number, and our log
    would be written into it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    with contextlib.suppress(AttributeError):  # a test's own stream
        # Ids are the server's: the encoding of this terminal may have no sign for them.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _dispatch(argv: Sequence[str]) -> int:
    from oz_worker.config import flags

    arguments = flags.parse(argv)
    if arguments.command == "run":
        return _version() if arguments.version else _run(arguments)
    commands = {"check": _check, "status": _status, "drain": _drain, "logs": _logs, "dev": _dev}
    return commands[arguments.command](arguments)


def _version() -> int:
    from oz_worker import __version__

    sys.stdout.write(f"oz-worker {__version__}\n")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from oz_worker.config.load import load

    loaded = load(arguments, os.environ)
    from oz_worker.daemon import run

    code = run(loaded.settings, loaded.warnings, loaded.origins["api_key"])
    # Not by the interpreter's own exit: it waits for, or trips over, threads that nothing can wake (see `daemon`).
    os._exit(code)


def _check(arguments: argparse.Namespace) -> int:
    from oz_worker.config.load import load
    from oz_worker.config.reading import Reading

    reading = Reading(os.environ)
    try:
        loaded = load(arguments, os.environ, reading)
    except ConfigurationError as error:
        if arguments.json:
            from oz_worker.check import say_wrong_configuration

            say_wrong_configuration(error)
        raise
    finally:
        _say(f"warning: {warning}" for warning in reading.warnings)
    if arguments.print_config:
        from oz_worker.config.show import show

        sys.stdout.write(show(loaded))
    else:
        from oz_worker.check import check_command

        return check_command(loaded, as_json=arguments.json)
    return int(ExitCode.STOPPED)


def _status(arguments: argparse.Namespace) -> int:
    from oz_worker.config.commands import place

    state_dirs, instance_id = place(arguments, os.environ)
    from oz_worker.observe.status import explain_command, status_command

    if arguments.explain:
        return explain_command(state_dirs, task_id=arguments.explain, instance_id=instance_id, as_json=arguments.json)
    return status_command(
        state_dirs,
        instance_id=instance_id,
        all_instances=arguments.all,
        as_json=arguments.json,
        explained=arguments.explain is not None,
    )


def _drain(arguments: argparse.Namespace) -> int:
    from oz_worker.config.commands import place, waiting_time

    state_dirs, instance_id = place(arguments, os.environ)
    wait = waiting_time(arguments.wait, os.environ)
    from oz_worker.observe.status import drain_command

    return drain_command(
        state_dirs, instance_id=instance_id, all_instances=arguments.all, as_json=arguments.json, wait=wait
    )


def _logs(arguments: argparse.Namespace) -> int:
    from oz_worker.config.commands import place

    state_dirs, instance_id = place(arguments, os.environ)
    from oz_worker.observe.status import logs_command

    return logs_command(state_dirs, task_id=arguments.task, instance_id=instance_id)


def _dev(arguments: argparse.Namespace) -> int:
    from oz_worker.config.commands import dev_values

    values = dev_values(arguments, os.environ)
    from oz_worker.devplane.run import DevOptions, dev_command

    return dev_command(DevOptions(**values))


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stderr.write(f"oz_worker: {line}\n")
