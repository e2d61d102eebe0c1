"""`check`: what can be tried out before a worker starts, or beside one that runs.

Nothing of it disturbs a worker with the same id or leaves anything behind: directories are tried under other names and
removed, the server is not dialled a second time under the id of a worker that runs here, and what is only asked for
its version or its date hears no secret.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Any, Mapping, Sequence

from oz_worker.checks import backend, host, network, places, programs, show
from oz_worker.checks.probe import Finding, Outcome, Probe, Result, work
from oz_worker.config.load import Loaded
from oz_worker.errors import ConfigurationError, ExitCode
from oz_worker.own_secrets import own_secrets
from oz_worker.redact import Redactor
from oz_worker.tree import end_helpers
from oz_worker.unreadable import Unreadable


def check_command(loaded: Loaded, *, as_json: bool) -> int:
    """Try everything out and say how it went: a line for each test as it ends, or all as JSON. The exit code."""
    logging.getLogger("oz_worker").addHandler(logging.NullHandler())  # what the parts log is not for here
    signal.signal(signal.SIGTERM, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` set that; else its terminal is gone
        signal.signal(signal.SIGHUP, _leave)
    settings, environ, results = loaded.settings, os.environ, list[Result]()
    hide = Redactor(own_secrets(settings, environ))  # whoever says it: a server may repeat what it was sent
    with contextlib.ExitStack() as stack:
        stack.callback(_end_programs)
        for result in work(_probes(loaded, environ, stack)):
            results.append(result)
            if not as_json:
                _say(show.row(result, hide))
    failed = any(result.outcome is Outcome.FAILED for result in results)
    code = int(ExitCode.NOT_USABLE if failed else ExitCode.STOPPED)
    ids = {"worker_id": settings.worker_id, "backend": settings.backend}
    _say(show.document(results, code, **ids, hide=hide) if as_json else show.summary(results))
    return code


def say_wrong_configuration(error: ConfigurationError) -> None:
    """The same document where the configuration does not even parse: one test, which failed."""
    cure = "do what each of these lines says"
    result = Result("configuration", Outcome.FAILED, 0.0, str(error), cure)
    _say(show.document([result], int(error.exit_code), worker_id="", backend="", hide=Redactor(())))


def _probes(loaded: Loaded, environ: Mapping[str, str], stack: contextlib.ExitStack) -> Sequence[Probe]:
    settings = loaded.settings
    return [
        Probe("configuration", lambda: _configuration(loaded)),
        *host.probes(settings, environ),
        *places.probes(settings, environ, loaded.origins["api_key"]),
        *backend.probes(settings, environ, stack),
        *stack.enter_context(network.Road(settings, environ)).probes(),
    ]


def _configuration(loaded: Loaded) -> Finding:
    if loaded.warnings:
        return Finding("; ".join(loaded.warnings), Outcome.WARNING, "write what is meant, and the warning goes")
    return Finding(f"worker {loaded.settings.worker_id}, backend {loaded.settings.backend}")


def _leave(number: int, _frame: Any) -> None:
    """What a test has made is removed on the way out."""
    raise SystemExit(128 + number)


def _end_programs() -> None:
    """Each test ends its own; but `_leave` may come before the one that was just started has an owner."""
    with contextlib.suppress(Unreadable):
        end_helpers(programs.instance())


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
