from __future__ import annotations

import contextlib
import select
import threading

from oz_worker.backends.base import Unit
from oz_worker.backends.shared import Shared
from oz_worker.errors import Stopped
from oz_worker.model import Cause, Key


def a_unit(name: str) -> Unit:
    return Unit(name, "instance", Key(name, ""))


def test_what_nobody_waits_for_any_more_is_let_tidy_up() -> None:
    began, may_tidy, tidied = threading.Event(), threading.Event(), threading.Event()

    def work(_key: str, interrupt: int) -> str:
        began.set()
        select.select([interrupt], [], [])
        may_tidy.wait()
        tidied.set()
        return ""

    shared: Shared[str, str] = Shared("work", work, lambda name, error: None)
    unit = a_unit("u")

    def wait() -> None:
        with contextlib.suppress(Stopped):
            shared.get("key", unit)

    waiting = threading.Thread(target=wait)
    waiting.start()
    began.wait()
    unit.order_stop(Cause.CANCEL, 0.0)
    waiting.join()
    shared.settle(0.05)
    assert not tidied.is_set(), "no longer than it was told to"
    may_tidy.set()
    shared.settle(60)
    assert tidied.is_set()
