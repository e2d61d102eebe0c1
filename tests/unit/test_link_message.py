"""Frames into messages, for any split and any order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.link.message import BINARY, CONTINUATION, TEXT, Assembly, Message, Violation, closing

messages = st.lists(
    st.tuples(st.sampled_from([TEXT, BINARY]), st.lists(st.binary(max_size=20), min_size=1, max_size=6)), max_size=6
)


@settings(deadline=None, derandomize=True)
@given(messages)
def test_every_split_of_every_message_is_put_together_again(split: list[tuple[int, list[bytes]]]) -> None:
    assembly = Assembly()
    out = []
    for opcode, parts in split:
        for index, part in enumerate(parts):
            whole = assembly.add(CONTINUATION if index else opcode, index == len(parts) - 1, part)
            assert assembly.open is (whole is None)
            if whole is not None:
                out.append(whole)
    assert out == [Message(opcode, b"".join(parts)) for opcode, parts in split]


frames = st.lists(
    st.tuples(st.sampled_from([CONTINUATION, TEXT, BINARY]), st.booleans(), st.binary(max_size=8)), max_size=30
)


@settings(deadline=None, derandomize=True)
@given(frames)
def test_any_order_of_frames_ends_in_messages_or_in_a_violation(order: list[tuple[int, bool, bytes]]) -> None:
    assembly = Assembly(most_bytes=20, most_fragments=4)
    for opcode, fin, data in order:
        inside = assembly.open
        if inside is not (opcode == CONTINUATION):
            with pytest.raises(Violation, match=r"inside|without"):
                assembly.add(opcode, fin, data)
            return
        try:
            whole = assembly.add(opcode, fin, data)
        except Violation:
            return
        assert whole is None or len(whole.data) <= 20


def test_a_close_frame_without_a_code_is_one_without_a_code() -> None:
    assert closing(b"") == (1005, "")
    assert closing(b"\x03\xe8bye") == (1000, "bye")
    with pytest.raises(Violation):
        closing(b"\x03\xe8\xff")
