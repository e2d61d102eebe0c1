"""Frames into messages, by RFC 6455 and within bounds. Pure: no socket, no clock."""

from __future__ import annotations

import struct
from typing import NamedTuple

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_CODE, BAD_DATA, POLICY, TOO_BIG = 1000, 1001, 1002, 1005, 1007, 1008, 1009

MESSAGE_BYTES = 16 * 1024 * 1024
FRAGMENTS = 4096
BUDGET = MESSAGE_BYTES + 14 * FRAGMENTS
"""Everything a message may cost on the wire, headers included: without them a flood of empty fragments is free."""


class Violation(Exception):
    """The peer broke a rule; *code* is what the close frame tells it."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Message(NamedTuple):
    """A whole message; `opcode` is TEXT or BINARY."""

    opcode: int
    data: bytes


class Assembly:
    """Puts the fragments of one message after the other together, one bytearray per message (joining `bytes` takes
    quadratic time)."""

    def __init__(self, *, most_bytes: int = MESSAGE_BYTES, most_fragments: int = FRAGMENTS) -> None:
        self._most_bytes = most_bytes
        self._most_fragments = most_fragments
        self._opcode = 0
        self._data = bytearray()
        self._fragments = 0

    @property
    def open(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._opcode != 0

    def add(self, opcode: int, fin: bool, data: bytes) -> Message | None:
        """Take a data frame; the message when this was its last. Raises Violation."""
        if opcode == CONTINUATION and not self._opcode:
            raise Violation(PROTOCOL_ERROR, "a continuation without a beginning")
        if opcode != CONTINUATION and self._opcode:
            raise Violation(PROTOCOL_ERROR, "a new message inside another one")
        self._opcode = opcode or self._opcode
        self._fragments += 1
        self._data += data
        if len(self._data) > self._most_bytes or self._fragments > self._most_fragments:
            raise Violation(TOO_BIG, f"a message of more than {self._most_bytes} bytes or {self._most_fragments} parts")
        if not fin:
            return None
        message = Message(self._opcode, bytes(self._data))
        self._opcode, self._data, self._fragments = 0, bytearray(), 0
        return message


def text(data: bytes) -> str:
    """The text of a message or of a close frame. Raises Violation when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Violation(BAD_DATA, "text that is not UTF-8") from None


def check_control(fin: bool, data: bytes) -> None:
    """websocket-client checks neither of these on pongs. Raises Violation."""
    if not fin or len(data) > 125:
        raise Violation(PROTOCOL_ERROR, "a control frame that is split or longer than 125 bytes")


def closing(data: bytes) -> tuple[int, str]:
    """Code and reason of a close frame. Raises Violation."""
    if len(data) < 2:
        return NO_CODE, ""
    return int(struct.unpack("!H", data[:2])[0]), text(data[2:])
