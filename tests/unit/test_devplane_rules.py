from __future__ import annotations

import json
from typing import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.devplane import wire
from oz_worker.devplane.rules import Ledger, Violation
from oz_worker.devplane.wire import Key

FULL = Key("t", "e")


def frame(kind: str, key: Key = FULL, **data: object) -> wire.Frame:
    fields: dict[str, object] = {"task_id": key.task_id, **data}
    if key.execution_id:
        fields["execution_id"] = key.execution_id
    return wire.parse(json.dumps({"type": kind, "data": fields}))


Maker = Callable[[Key], wire.Frame]

FRAMES: dict[str, Maker] = {
    "claimed": lambda key: frame(wire.CLAIMED, key, worker_id="w"),
    "rejected": lambda key: frame(wire.REJECTED, key, reason="worker at maximum concurrency"),
    "cancelling": lambda key: frame(wire.REJECTED, key, reason=wire.CANCELLING),
    "completed": lambda key: frame(wire.COMPLETED, key, message="done"),
    "cancelled": lambda key: frame(wire.COMPLETED, key, message="cancelled", task_state="CANCELLED"),
    "failed": lambda key: frame(wire.FAILED, key, message="bad", failure_reason="agent_invocation", exit_code=1),
    "invalid": lambda key: frame(wire.FAILED, key, message="no task", failure_reason="unknown"),
    "closed": lambda key: frame(wire.CLOSED, key),
}


def play(story: str, key: Key = FULL) -> Ledger:
    """Words: assign, cancel, break (a new connection), ack, agent, another-agent, or the name of a frame."""
    ledger, connection = Ledger(key), 1
    for word in story.split():
        if word == "assign":
            ledger.assigned(connection)
        elif word == "cancel":
            ledger.cancelled()
        elif word == "break":
            connection += 1
        elif word == "ack":
            ledger.acknowledged(connection)
        elif word.endswith("agent"):
            ledger.agent(word)
        else:
            ledger.received(FRAMES[word](key), connection)
    return ledger


GOOD = [
    "assign rejected",
    "assign rejected assign claimed completed",
    "assign invalid",
    "assign claimed completed ack",
    "assign agent claimed failed",
    "assign claimed break claimed completed",
    "assign claimed completed break completed",
    "assign claimed completed break claimed completed",
    "assign claimed completed break claimed break claimed completed ack",
    "assign assign claimed claimed completed",
    "assign claimed assign assign claimed claimed completed",
    "assign claimed completed ack assign completed",
    "assign claimed cancel cancelled closed",
    "assign claimed cancel cancelled",
    "assign claimed cancel cancelled closed cancel closed",
    "assign claimed cancel cancelled closed break closed",
    "assign claimed cancel cancelled closed break cancelled closed cancel closed",
    "assign claimed cancel completed closed",
    "assign claimed completed cancel closed",
    "assign cancel claimed cancelled closed",
    "cancel closed",
    "cancel closed cancel closed",
    "cancel closed assign claimed completed",
    "cancel assign closed claimed completed",
    "assign rejected cancel closed",
    "assign break cancel closed assign claimed completed",
    "assign claimed failed ack assign claimed completed",  # its agent never ran: rule 10
    "assign claimed cancel cancelled closed ack assign claimed completed",
    "assign assign rejected claimed completed",  # the redelivery crossed the rejection
]

BAD = [
    "claimed",
    "assign completed",
    "assign failed",
    "assign claimed claimed",
    "assign claimed rejected",
    "assign rejected rejected",
    "assign rejected break rejected",
    "assign rejected claimed",
    "assign claimed completed completed",
    "assign claimed completed failed",
    "assign claimed completed break failed",
    "assign claimed completed claimed",
    "assign claimed completed break completed claimed",
    "assign claimed completed break claimed claimed",
    "assign claimed break claimed claimed",
    "assign claimed assign claimed claimed",
    "assign claimed cancelled",
    "assign claimed cancel closed",
    "assign claimed completed closed",
    "assign claimed cancel cancelled closed closed",
    "assign claimed cancel completed cancelled",
    "closed",
    "cancel closed closed",
    "cancel claimed",
    "assign cancel closed claimed",
    "assign claimed cancel cancelling",
    "assign claimed assign cancelling",
    "assign claimed completed ack assign claimed",  # with an execution id it is not run again
    "assign agent claimed failed ack assign claimed",  # its agent ran
    "assign claimed failed assign claimed",  # not acknowledged
    "assign claimed agent another-agent",
    "assign claimed completed agent",
    "agent",
]

BARE_GOOD = [
    "assign claimed completed ack assign claimed failed",
    "assign agent claimed completed ack assign claimed another-agent failed",
    "assign agent claimed completed ack assign another-agent claimed failed",
    "assign claimed completed ack assign rejected assign claimed completed",
    "assign claimed cancel assign cancelling cancelled ack assign claimed completed",
    "assign claimed cancel cancelled closed",
    "assign claimed completed ack assign cancel claimed cancelled",
]

BARE_BAD = [
    "assign claimed completed assign claimed",  # the first report was not acknowledged
    "assign claimed completed ack claimed",
    "assign claimed cancel assign cancelling cancelling",
    "assign claimed assign cancelling",
    "assign claimed cancel completed ack assign claimed cancelled",  # that cancel was for the attempt before
    "cancel closed",
    "assign agent claimed completed ack assign claimed another-agent third-agent",
]


@pytest.mark.parametrize("story", GOOD)
def test_what_the_rules_allow_is_taken(story: str) -> None:
    play(story)


@pytest.mark.parametrize("story", BAD)
def test_what_the_rules_forbid_is_a_violation(story: str) -> None:
    with pytest.raises(Violation):
        play(story)


@pytest.mark.parametrize("story", BARE_GOOD)
def test_without_an_execution_id_an_acknowledged_end_may_be_followed_by_a_new_run(story: str) -> None:
    play(story, Key("t"))


@pytest.mark.parametrize("story", BARE_BAD)
def test_without_an_execution_id_the_other_rules_hold_too(story: str) -> None:
    with pytest.raises(Violation):
        play(story, Key("t"))


@pytest.mark.parametrize("story", BAD + BARE_BAD)
def test_only_the_last_word_of_a_forbidden_story_is_at_fault(story: str) -> None:
    play(story.rpartition(" ")[0], Key("t") if story in BARE_BAD else FULL)


def test_a_repeated_claim_must_be_identical() -> None:
    ledger = play("assign claimed assign")
    with pytest.raises(Violation, match="differs"):
        ledger.received(frame(wire.CLAIMED, worker_id="other"), 1)


def test_what_a_lost_disk_forgot_may_be_closed_as_unknown() -> None:
    ledger = play("assign claimed cancel")
    ledger.abandoned()
    ledger.received(frame(wire.CLOSED), 2)


WORDS = ["assign", "cancel", "break", "ack", *FRAMES]


REFUSALS = {
    "assign rejected": "rejected",
    "assign assign rejected": "open",
    "assign assign rejected rejected": "rejected",
    "assign break assign rejected": "rejected",  # the first one was lost with its connection
    "assign break assign assign rejected": "open",
    "assign break assign assign rejected rejected": "rejected",
    "assign rejected assign break assign rejected": "rejected",
}


@pytest.mark.parametrize("story", REFUSALS)
def test_a_rejection_leaves_open_only_what_was_sent_on_its_connection_after_what_it_answers(story: str) -> None:
    assert play(story).state == REFUSALS[story]


@given(st.lists(st.sampled_from(WORDS), max_size=25), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_forbidden_frame_changes_nothing_and_one_attempt_has_one_end(words: list[str], bare: bool) -> None:
    key = Key("t", "" if bare else "e")
    ledger, connection = Ledger(key), 1
    for word in words:
        if word in FRAMES:
            before = [(a.number, a.state, a.claim, a.terminal, a.closed) for a in ledger.attempts]
            try:
                ledger.received(FRAMES[word](key), connection)
            except Violation:
                assert before == [(a.number, a.state, a.claim, a.terminal, a.closed) for a in ledger.attempts]
                continue
            ends = [attempt.terminal for attempt in ledger.attempts[: len(before)]]
            assert all(old[3] in (None, now) for old, now in zip(before, ends, strict=False))
        elif word == "break":
            connection += 1
        elif word == "ack":
            ledger.acknowledged(connection)
        else:
            {"assign": ledger.assigned, "cancel": ledger.cancelled}[word]()
    for attempt in ledger.attempts:
        assert attempt.terminal is None or attempt.claim is not None or attempt.terminal.reason == "unknown"
        assert attempt.rejection is None or attempt.claim is None
