"""The one transition table of a task, and the pure step over it.

    accepted -> preparing -> running -> ending -> ended
        \\__________\\__________\\-> cancelling -> ending
                               running -> dispatched        (command backend, final)

What each state guarantees (written before the act it describes):

* accepted: the row is durable, the slot is taken; nothing exists outside.
* preparing: a workspace or a setup command may exist under the unit's name; no agent.
* running: the agent may exist; its identity is with the unit.
* cancelling: the server's cancel is durable: whatever happens now, the report says CANCELLED.
* ending: the outcome and the report are fixed; what follows (teardown, release, removal) may be repeated.
* ended, dispatched: nothing of ours is left to do; final states absorb every event.
"""

from __future__ import annotations

import enum


class State(str, enum.Enum):
    """Where a task is in its life."""

    ACCEPTED = "accepted"
    PREPARING = "preparing"
    RUNNING = "running"
    CANCELLING = "cancelling"
    ENDING = "ending"
    ENDED = "ended"
    DISPATCHED = "dispatched"


class Event(enum.Enum):
    """What can happen to it."""

    PREPARE = "prepare"
    STARTED = "started"
    CANCEL = "cancel"
    HANDED_OVER = "handed over"
    END = "end"
    REMOVED = "removed"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.ACCEPTED: {Event.PREPARE: State.PREPARING, Event.CANCEL: State.CANCELLING, Event.END: State.ENDING},
    State.PREPARING: {Event.STARTED: State.RUNNING, Event.CANCEL: State.CANCELLING, Event.END: State.ENDING},
    State.RUNNING: {Event.CANCEL: State.CANCELLING, Event.HANDED_OVER: State.DISPATCHED, Event.END: State.ENDING},
    State.CANCELLING: {Event.END: State.ENDING},
    State.ENDING: {Event.REMOVED: State.ENDED},
    State.ENDED: {},
    State.DISPATCHED: {},
}

FINAL = frozenset(state for state, exits in TRANSITIONS.items() if not exits)
STARTABLE = frozenset((State.ACCEPTED, State.PREPARING, State.RUNNING))
"""States that a cancel, a deadline or a shutdown can still turn."""


def step(state: State, event: Event) -> State:
    """The state after *event*; the same one where the table has no entry (late and repeated events are absorbed)."""
    return TRANSITIONS[state].get(event, state)
