"""One record is one line, or a block whose other lines are indented, whatever a server or an agent put into it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from oz_worker.about import EVERY
from oz_worker.observe.logs import Logs
from oz_worker.redact import Redactor

logger = logging.getLogger("oz_worker.tests")
FORGED = "2026-01-01T00:00:00.000+00:00 INFO task t-2 succeeded"
ENDS_OF_LINES = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
A_LINE = re.compile(r"\d{4}-\d\d-\d\dT\S+ (DEBUG|INFO|WARNING|ERROR) ")


def logged(place: Path, *messages: str, form: str = "text", fault: Exception | None = None) -> str:
    """What stands in the file after *messages*."""
    file = place / "worker.log"
    with Logs(level="info", form=form, file=str(file), redact=Redactor(["wk-secret"])):
        for message in messages:
            logger.info("task %s", message, exc_info=fault, extra=EVERY)
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("end", ENDS_OF_LINES, ids=ascii)
def test_no_text_in_a_message_can_be_taken_for_a_line_of_the_log(tmp_path: Path, end: str) -> None:
    first, *others = logged(tmp_path, f"t-1{end}{FORGED}").splitlines()
    assert A_LINE.match(first)
    assert [line for line in others if not line.startswith("  ")] == []


def test_control_characters_are_shown_and_not_sent_to_the_terminal(tmp_path: Path) -> None:
    controls = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"]
    text = logged(tmp_path, *(f"<{control}>" for control in controls))
    assert [control for control in controls if control in text] == []
    assert [line.rpartition("task ")[2] for line in text.splitlines()] == [f"<\\x{ord(c):02x}>" for c in controls]


def test_what_is_harmless_stays_as_it_is(tmp_path: Path) -> None:
    assert logged(tmp_path, "a\tb ü 漢字 \\x1b").endswith("INFO task a\tb ü 漢字 \\x1b\n")


def test_the_lines_of_a_block_are_kept_and_indented(tmp_path: Path) -> None:
    assert logged(tmp_path, "t-1 last output:\none\n\n  two\n").split(" INFO ")[1] == (
        "task t-1 last output:\n  one\n  \n    two\n"
    )


def test_a_traceback_carries_nothing_that_looks_like_a_line_of_the_log(tmp_path: Path) -> None:
    text = logged(tmp_path, "t-1", fault=ValueError(f"bad\r\n{FORGED}\nwk-secret"))
    assert len(A_LINE.findall("\n".join(line for line in text.splitlines() if line[0] != " "))) == 1
    assert "ValueError: bad" in text
    assert "wk-secret" not in text


def test_json_is_one_object_on_one_line_and_holds_the_text_itself(tmp_path: Path) -> None:
    message = "".join(ENDS_OF_LINES[:2]) + "\x1b[2J" + FORGED
    (line,) = logged(tmp_path, message, form="json").split("\n")[:-1]
    assert json.loads(line)["message"] == f"task {message}"
