"""What proves that a frame has been read, and what does not."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.link.acks import PINGS, Barrier, Origin, Written, digest, talks_past

CONNECTION = "0123456789abcdef"


def test_a_pong_proves_exactly_what_was_sent_before_its_ping() -> None:
    barrier = Barrier(CONNECTION)
    first, second = barrier.ping(3, 0.0), barrier.ping(7, 1.0)
    assert first != second
    assert re.fullmatch(rb"0123456789abcdef:\d+", first)
    assert barrier.pong(first) == 3
    assert barrier.pong(first) is None
    assert barrier.pong(second) == 7
    assert barrier.oldest is None


def test_a_pong_to_the_newest_ping_answers_the_older_ones() -> None:
    barrier = Barrier(CONNECTION)
    old, new = barrier.ping(3, 0.0), barrier.ping(7, 1.0)
    assert barrier.pong(new) == 7
    assert barrier.pong(old) is None


def test_forged_pongs_prove_nothing() -> None:
    barrier = Barrier(CONNECTION)
    barrier.ping(3, 0.0)
    number = int(barrier.ping(5, 0.0).split(b":")[1])
    another = Barrier("f" * 16).ping(5, 0.0)
    forged = [
        b"", b"5", b"999999999999", CONNECTION.encode(), f"{CONNECTION}:{number + 1}".encode(), another,
        f"{CONNECTION}:0{number}".encode(), f" {CONNECTION}:{number}".encode(), b"\xff" * 125,
    ]  # fmt: skip
    assert [barrier.pong(payload) for payload in forged] == [None] * len(forged)
    assert not barrier.matched
    assert barrier.covers == 5


def test_what_is_remembered_of_unanswered_pings_is_bounded() -> None:
    barrier = Barrier(CONNECTION)
    payloads = [barrier.ping(n, float(n)) for n in range(10 * PINGS)]
    assert barrier.pong(payloads[0]) is None
    assert barrier.pong(payloads[-1]) == 10 * PINGS - 1


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 5), st.sampled_from(["ping", "pong", "forge"])), max_size=60))
def test_no_sequence_acknowledges_a_frame_that_no_answered_ping_stands_behind(steps: list[int | str]) -> None:
    barrier = Barrier(CONNECTION)
    sent, asked = 0, [(b"", 0)]
    for step in steps:
        if isinstance(step, int):
            sent += step
        elif step == "ping":
            asked.append((barrier.ping(sent, 0.0), sent))
        elif step == "forge":
            assert barrier.pong(f"{CONNECTION}:{10**6}".encode()) is None
        else:
            payload, covered = asked[-1]
            assert barrier.pong(payload) in (covered, None)
            asked[-1] = (payload, covered)


def test_only_a_peer_that_talks_on_for_long_is_taken_for_one_that_does_not_echo() -> None:
    assert talks_past(asked=100, last_frame=139, now=140, dead_after=40)
    assert not talks_past(asked=100, last_frame=101, now=150, dead_after=40)  # it was in flight when the line broke
    assert not talks_past(asked=100, last_frame=139, now=139.9, dead_after=40)
    assert not talks_past(asked=100, last_frame=90, now=200, dead_after=40)


def test_written_frames_count_as_read_only_after_their_time() -> None:
    written = Written(5.0, 30.0)
    written.add(2, 100.0)
    written.add(3, 104.0)
    assert written.due(False) == 105.0
    assert written.read(104.9, False) is None
    assert written.read(105.0, False) == 2
    assert written.read(110.0, True) is None
    assert written.read(134.0, True) == 3
    assert written.due(False) is None


def test_a_frame_sent_on_two_connections_is_known_again_and_only_in_front() -> None:
    origin = Origin()
    a, b, new = digest("a"), digest("b"), digest("new")
    assert origin.ended([a, b]) == 0
    assert origin.ended([a, new, b]) == 1
    assert origin.ended([a, new, b]) == 3
    assert origin.ended([]) == 0
    assert origin.ended([a]) == 0
