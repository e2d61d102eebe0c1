"""What each further signal does, and what leads to an end without one."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import pytest

from oz_worker.link.traffic import Phase
from oz_worker.model import Refusal
from oz_worker.stopping import Step, StopOptions, Stopping

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@dataclass
class Tasks:
    """The engine as the decision sees it: plain facts, and the orders it was given."""

    busy: bool = True
    begins: bool = False
    accepted: int = 0
    ended: int = 0
    last_end: float = 0.0
    orders: list[str] = field(default_factory=list)

    def close_intake(self, refusal: Refusal | None) -> None:
        self.orders.append(f"closed {refusal.label if refusal else ''}")

    def stop_all(self, grace: float) -> None:
        self.orders.append(f"stop {grace:g}")

    def hurry_all(self) -> None:
        self.orders.append("kill")

    def idle(self) -> bool:
        return not self.busy

    def starting(self) -> bool:
        return self.begins


def options(on_shutdown: str, **more: float) -> StopOptions:
    return StopOptions(on_shutdown, stop_grace=10.0, drain_timeout=0.0, flush_timeout=5.0, **more)  # type: ignore[arg-type]


def test_cancel_terminates_then_kills_then_leaves() -> None:
    tasks = Tasks()
    stop = Stopping(options("cancel"), tasks)
    stop.signalled(TERM)
    assert tasks.orders == ["closed draining", "stop 10"]
    assert stop.decide().phase is Phase.RUN
    stop.signalled(INT)
    assert tasks.orders[-1] == "kill"
    stop.signalled(TERM)
    assert stop.decide().phase is Phase.LEAVE
    assert stop.exit_code == 143


def test_drain_waits_then_terminates_then_leaves() -> None:
    tasks = Tasks()
    stop = Stopping(options("drain"), tasks)
    stop.signalled(INT)
    assert tasks.orders == ["closed draining"]
    stop.signalled(INT)
    assert tasks.orders[-1] == "stop 10"
    stop.signalled(INT)
    assert stop.decide().phase is Phase.LEAVE
    assert stop.exit_code == 130


def test_preserve_waits_for_what_is_starting_and_touches_no_task() -> None:
    tasks = Tasks(begins=True)
    stop = Stopping(options("preserve"), tasks)
    stop.signalled(TERM)
    assert stop.decide().phase is Phase.RUN
    assert stop.decide().call_again < float("inf")
    tasks.begins = False
    assert stop.decide().phase is Phase.FLUSH
    assert tasks.orders == ["closed draining"] * 2
    assert stop.exit_code == 0


@pytest.mark.parametrize("on_shutdown", ["cancel", "drain", "preserve"])
def test_with_nothing_left_to_kill_a_further_signal_means_leave(on_shutdown: str) -> None:
    tasks = Tasks(busy=False)
    stop = Stopping(options(on_shutdown), tasks)
    stop.signalled(TERM)
    assert stop.decide().phase is Phase.FLUSH
    stop.signalled(TERM)
    assert stop.decide().phase is Phase.LEAVE
    assert stop.exit_code == 143


@pytest.mark.parametrize("on_shutdown", ["cancel", "drain", "preserve"])
def test_usr1_drains_and_exits_with_0(on_shutdown: str) -> None:
    tasks = Tasks()
    stop = Stopping(options(on_shutdown), tasks)
    stop.signalled(USR1)
    stop.signalled(USR1)
    assert tasks.orders == ["closed draining"]
    assert stop.decide().phase is Phase.RUN
    tasks.busy = False
    assert stop.decide().phase is Phase.FLUSH
    assert stop.exit_code == 0


def test_drain_timeout_ends_the_tasks() -> None:
    tasks = Tasks()
    stop = Stopping(StopOptions("drain", 10.0, 1e-6, 5.0), tasks)
    stop.signalled(TERM)
    stop.decide()
    assert tasks.orders[-1] == "stop 10"
    assert stop.step is Step.ENDING


def test_one_shot_leaves_once_its_task_is_done() -> None:
    tasks = Tasks(busy=False)
    stop = Stopping(options("cancel", one_shot=True), tasks)
    assert stop.decide().phase is Phase.RUN
    tasks.accepted, tasks.busy = 1, True
    assert stop.decide().phase is Phase.RUN
    tasks.busy = False
    assert stop.decide().phase is Phase.FLUSH
    assert tasks.orders[0] == "closed one_shot"
    assert stop.exit_code == 0


def test_exit_after_tasks_drains_after_the_last_one() -> None:
    tasks = Tasks(accepted=3)
    stop = Stopping(options("cancel", exit_tasks=3), tasks)
    stop.decide()
    assert tasks.orders == ["closed draining"]


def test_exit_after_idle_counts_only_while_idle() -> None:
    tasks = Tasks(busy=True, last_end=-1e9)
    stop = Stopping(options("cancel", exit_idle=5.0), tasks)
    assert stop.decide().phase is Phase.RUN
    tasks.busy = False
    assert stop.decide().phase is Phase.FLUSH


def test_a_dead_part_means_exit_1_and_no_task_is_touched() -> None:
    tasks = Tasks()
    stop = Stopping(options("cancel"), tasks)
    stop.part_died("store")
    assert stop.decide().phase is Phase.FLUSH
    assert stop.exit_code == 1
    assert not any(order.startswith(("stop", "kill")) for order in tasks.orders)


def test_a_refusal_for_good_is_exit_77() -> None:
    stop = Stopping(options("cancel"), Tasks(busy=False))
    stop.refused("the key is wrong")
    assert stop.decide().phase is Phase.FLUSH
    assert stop.exit_code == 77
