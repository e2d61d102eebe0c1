"""What a worker may say about one attempt, and when: a pure state machine that judges, without clock or I/O.

    rejected | failed(invalid) | claimed+ (completed | failed) closed?      the command backend may end with claimed+

* The same frame again, to the byte, only on another connection or as the answer to a redelivery; `closed` also as the
  answer to a repeated cancel. On one connection the order claimed, terminal, closed holds.
* `closed` alone answers a cancel, with an execution id, of an execution that is unknown or ended (design 12, rule 16).
* `rejected` after `claimed` only answers a redelivery without execution id that was sent while the task was being
  cancelled (design 3.2).
* A second attempt of a key begins only by a redelivery sent after the first one's report was acknowledged, and only
  without an execution id (3.2) or where no agent was started (rule 10). A rejected key may be assigned anew freely.
* Two different terminal reports for one attempt never (rule 13). CANCELLED only when somebody cancelled.

Nothing is ever due at a certain time here: whether an answer came at all is asked by `Ledger.state`.
Not thread-safe: its one caller holds the control plane's lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from oz_worker.devplane.wire import CANCELLING, CLAIMED, CLOSED, FAILED, REJECTED, Frame, Key

OPEN, RUNNING, ENDED, REFUSED, GONE = "open", "running", "ended", "rejected", "gone"


class Violation(Exception):
    """The worker broke the protocol; `str()` says how."""


@dataclass
class Attempt:
    """One run of a key, from the assignment that began it. `gone`: closed although it was never claimed."""

    number: int
    claim: Frame | None = None
    terminal: Frame | None = None
    rejection: Frame | None = None
    closed: Frame | None = None
    gone: bool = False
    acknowledged: bool = False
    agents: set[str] = field(default_factory=set)
    seen_on: set[tuple[str, int]] = field(default_factory=set)

    @property
    def state(self) -> str:
        """open, running, ended, rejected or gone."""
        if self.rejection is not None:
            return REFUSED
        if self.terminal is not None:
            return ENDED
        if self.gone:
            return GONE
        return RUNNING if self.claim is not None else OPEN


class Ledger:
    """Everything said about one key. `attempts` begins with number 0, which stands for the time before the first.

    Counted are what the worker may still answer: `answers`, redeliveries; `refusals`, redeliveries that it may reject
    although it claimed the task; `closings`, cancels and redeliveries as far as `execution_closed` answers them;
    `owed`, closings from before the current assignment. `cancels` make CANCELLED and `closed` legitimate;
    `fresh_cancels` are those since the last redelivery that may begin a new attempt (then `renewable`). `early` is an
    agent of that attempt that was quicker than its claim. `unrefused` counts the assignments that went out on
    `connection`, the latest that had one, less the rejections that came on it.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.attempts = [Attempt(0, gone=True)]
        self.answers = self.refusals = self.closings = self.owed = self.cancels = self.fresh_cancels = 0
        self.connection = self.unrefused = 0
        self.renewable = False
        self.early: set[str] = set()

    @property
    def attempt(self) -> Attempt:
        """The current attempt."""
        return self.attempts[-1]

    @property
    def state(self) -> str:
        """State of the current attempt; "" when the key was never assigned."""
        return self.attempt.state if self.attempt.number else ""

    def assigned(self, connection: int = 1) -> None:
        """An assignment of this key goes out on *connection*."""
        if connection != self.connection:
            self.connection, self.unrefused = connection, 0
        self.unrefused += 1
        attempt = self.attempt
        if attempt.state in (REFUSED, GONE):
            self.owed, self.closings, self.cancels = self.owed + self.closings, 0, 0
            self._begin()
            return
        self.answers += 1
        self.closings += 1
        if attempt.terminal is None:
            if self.cancels and not self.key.execution_id:
                self.refusals += 1
        elif attempt.acknowledged and (not self.key.execution_id or _agentless(attempt)):
            self.renewable = True
            self.fresh_cancels = 0

    def cancelled(self) -> None:
        """A cancel that covers this key goes out."""
        self.cancels += 1
        self.fresh_cancels += 1
        self.closings += 1

    def abandoned(self) -> None:
        """The worker lost its state directory (a new disk): what it had claimed is nobody's any more."""
        if self.attempt.terminal is None:
            self.attempt.gone, self.attempt.claim = True, None

    def agent(self, run: str) -> None:
        """An agent process, told apart by *run*, started for this key. Raises Violation when it is one too many."""
        attempt = self.attempt
        if attempt.state in (REFUSED, GONE):
            raise Violation(f"an agent of {self.key} started, but the task is not assigned to this worker")
        agents = self.early if attempt.terminal is not None and self.renewable else attempt.agents
        if run in attempt.agents or run in agents:
            return
        if attempt.terminal is not None and not self.renewable:
            raise Violation(f"an agent of {self.key} started after its end was reported")
        if agents:
            raise Violation(f"{self.key} ran twice: a second agent started in attempt {attempt.number}")
        agents.add(run)

    def received(self, frame: Frame, connection: int) -> None:
        """Judge *frame* and take it over. Raises Violation and changes nothing when the rules forbid it."""
        if frame.kind != CLOSED and not self.attempt.number:
            raise Violation(f"{frame.kind} for {self.key}, which was never assigned")
        judge = {CLAIMED: self._claimed, REJECTED: self._rejected, CLOSED: self._closed}.get(frame.kind, self._ended)
        judge(frame, connection)
        self.attempt.seen_on.add((frame.kind, connection))

    def acknowledged(self, connection: int) -> bool:
        """The worker was told that what it sent on *connection* was read; True if that is news of a report."""
        attempt = self.attempt
        if attempt.terminal is None or (attempt.terminal.kind, connection) not in attempt.seen_on:
            return False
        news, attempt.acknowledged = not attempt.acknowledged, True
        return news

    def _claimed(self, frame: Frame, connection: int) -> None:
        attempt = self.attempt
        if attempt.state in (REFUSED, GONE):
            raise Violation(f"{self.key} was claimed after it was {_past(attempt)}, without a new assignment")
        if attempt.claim is not None and attempt.claim.text != frame.text:
            raise Violation(f"the repeated claim of {self.key} differs from the first: {frame.text}")
        if attempt.terminal is not None:
            if self.renewable:
                self._renew()
            elif (attempt.terminal.kind, connection) in attempt.seen_on or (CLAIMED, connection) in attempt.seen_on:
                raise Violation(f"{self.key} was claimed again after its end was reported")
        elif attempt.claim is not None and not self._again(frame, connection):
            raise Violation(f"{self.key} was claimed twice on one connection without a redelivery")
        self.attempt.claim = self.attempt.claim or frame

    def _rejected(self, frame: Frame, connection: int) -> None:
        if frame.reason == CANCELLING:
            if not self.refusals or self.attempt.state not in (OPEN, RUNNING):
                raise Violation(f"{self.key} was rejected as still being cancelled, but not redelivered while it was")
            self.refusals -= 1
            self.answers = max(0, self.answers - 1)
            return
        if self.attempt.terminal is not None and self.renewable:
            self._renew()
        if self.attempt.state != OPEN:
            raise Violation(f"{self.key} was rejected after it was {_past(self.attempt)}")
        self.attempt.rejection = frame
        if connection == self.connection:
            self.unrefused -= 1
        if self.answers and self.unrefused > 0:  # a redelivery crossed the rejection: it asks anew
            self.answers -= 1
            self._begin()
        else:  # rejections die with their connection, so what was sent on earlier ones is lost
            self.answers = 0

    def _ended(self, frame: Frame, connection: int) -> None:
        attempt = self.attempt
        if attempt.state in (REFUSED, GONE):
            raise Violation(f"the end of {self.key} was reported after it was {_past(attempt)}")
        if attempt.claim is None and (frame.kind != FAILED or frame.reason != "unknown"):
            raise Violation(f"{frame.kind} for {self.key}, which was not claimed")
        if frame.cancelled and not self.cancels:
            raise Violation(f"{self.key} was reported as CANCELLED, but nobody cancelled it")
        if attempt.terminal is None:
            attempt.terminal = frame
        elif attempt.terminal.text != frame.text:
            raise Violation(f"two different ends of {self.key}: {attempt.terminal.text} and then {frame.text}")
        elif not self._again(frame, connection):
            raise Violation(f"the end of {self.key} was reported twice on one connection without a redelivery")

    def _closed(self, frame: Frame, connection: int) -> None:
        attempt = self.attempt
        if self.owed:  # the answer to a cancel from before this assignment
            self.owed -= 1
            return
        if not self.cancels:
            raise Violation(f"{self.key} was closed, but nobody cancelled it")
        if attempt.state == RUNNING:
            raise Violation(f"{self.key} was closed before its end was reported")
        if attempt.state != ENDED and not self.key.execution_id:
            raise Violation(f"{self.key} was closed without an execution id, although it did not run")
        if attempt.closed is not None and attempt.closed.text != frame.text:
            raise Violation(f"the repeated {CLOSED} of {self.key} differs from the first: {frame.text}")
        if attempt.closed is None or (CLOSED, connection) in attempt.seen_on:
            if not self.closings:
                raise Violation(f"{self.key} was closed more often than it was cancelled")
            self.closings -= 1
        attempt.closed = attempt.closed or frame
        attempt.gone = attempt.gone or attempt.state == OPEN

    def _again(self, frame: Frame, connection: int) -> bool:
        """Whether a repeat is allowed here; uses up a redelivery where the connection alone does not allow it."""
        if (frame.kind, connection) not in self.attempt.seen_on:
            return True
        if self.answers:
            self.answers -= 1
            return True
        return False

    def _renew(self) -> None:
        """Begin the attempt that a redelivery asked for, with the cancels since then."""
        self.cancels = self.fresh_cancels
        self.answers = max(0, self.answers - 1)
        self._begin()

    def _begin(self) -> None:
        self.attempts.append(Attempt(self.attempt.number + 1, agents=self.early))
        self.early, self.renewable = set(), False


def _agentless(attempt: Attempt) -> bool:
    """Whether the attempt may have ended without its agent having started: then it does not count as ended."""
    end = attempt.terminal
    return not attempt.agents and end is not None and (end.kind == FAILED or end.cancelled)


def _past(attempt: Attempt) -> str:
    return {RUNNING: "claimed", ENDED: "reported as ended", REFUSED: "rejected", GONE: "closed", OPEN: ""}[
        attempt.state
    ]
