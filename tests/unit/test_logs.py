"""One record is one line, or a block whose other lines are indented, whatever a server or an agent put into it."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Callable

import pytest

from oz_worker import about
from oz_worker.about import EVERY
from oz_worker.errors import NotUsable
from oz_worker.known import Known
from oz_worker.model import Key
from oz_worker.observe import repeats
from oz_worker.observe.logs import Logs
from oz_worker.observe.repeats import Line, Repeats
from oz_worker.redact import Redactor
from tests.rig import until

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
    message = "".join(ENDS_OF_LINES) + "\x1b[2J\x9b2J" + FORGED
    (line,) = logged(tmp_path, message, form="json").splitlines()
    assert "\x9b" not in line
    assert json.loads(line)["message"] == f"task {message}"


# -- what a line is about


def test_ids_come_from_the_key_that_a_line_names_or_from_what_its_thread_is_busy_with(tmp_path: Path) -> None:
    lines: dict[str, list[str]] = {}
    for form in ("text", "json"):
        file = tmp_path / form
        with Logs(level="info", form=form, file=str(file), redact=Redactor()):
            logger.info("nothing in particular")
            contextvars.copy_context().run(busy)
        lines[form] = file.read_text().splitlines()
    assert [line.partition(" INFO ")[2] for line in lines["text"]] == [
        "nothing in particular",
        "pulling an image (task t-1/e-1)",
        "task t-1/e-1 is fine",
        "task t-2 is rejected",
        "a ping is late (connection c-1)",
    ]
    records = [json.loads(line) for line in lines["json"]]
    assert [tuple(record.get(name) for name in ("task", "execution", "connection")) for record in records] == [
        (None, None, None),
        ("t-1", "e-1", None),
        ("t-1", "e-1", None),
        ("t-2", None, "c-1"),
        (None, None, "c-1"),
    ]
    assert records[1]["message"] == "pulling an image"
    assert all(datetime.fromisoformat(record["time"]).tzinfo for record in records)
    assert all(datetime.fromisoformat(line.split()[0]).tzinfo for line in lines["text"])


def busy() -> None:
    """What a task's thread says, then the one with the connection."""
    about.TASK.set(Key("t-1", "e-1"))
    logger.info("pulling an image")
    logger.info("task %s is fine", Key("t-1", "e-1"))
    about.TASK.set(None)
    about.CONNECTION.set("c-1")
    logger.info("task %s is rejected", Key("t-2"))
    logging.getLogger("oz_worker.link.session").info("a ping is late")


def test_a_secret_in_a_message_or_a_traceback_is_masked_however_the_line_is_shaped(tmp_path: Path) -> None:
    """The second JSON encoding would hide what the first one did from a redactor that comes last."""
    secret = 'pass"word\\1'
    for form in ("text", "json"):
        file = tmp_path / form
        with Logs(level="info", form=form, file=str(file), redact=Redactor([secret])):
            logger.warning("got %s and %s", secret, json.dumps(secret), exc_info=ValueError(repr({"k": secret})))
        text = file.read_text()
        assert "pass" not in text
        assert "word" not in text


# -- lines that repeat


def test_a_line_that_repeats_is_summed_up_and_another_task_s_never_is(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with Logs(level="debug", form="text", file=str(file), redact=Redactor()):
        for number in range(1000):
            logger.warning("refused for the %d. time", number)
            logger.info("task %s ended", Key(f"t-{number}"))
            logger.debug("detail %d", number)
            logger.info("task %s | a line of its output", Key("t-1"), extra=EVERY)
    lines = [line.split(" ", 1)[1] for line in file.read_text().splitlines()]
    assert sum(line.startswith("WARNING refused") for line in lines) == 20
    assert lines[-1] == "WARNING 980 more lines of this kind within a minute, the last: refused for the 999. time"
    assert [sum(part in line for line in lines) for part in (" ended", "detail", "of its output")] == [1000] * 3


def test_a_line_that_is_summed_up_after_its_task_has_no_secret_either(tmp_path: Path) -> None:
    file, known = tmp_path / "log", Known()
    with Logs(level="info", form="json", file=str(file), redact=known.everywhere):
        known.learn_of("unit", ["hunter2-hunter2"])
        for number in range(30):
            logger.warning("refused %d: %s", number, "hunter2-hunter2")
        known.learn_of("unit", [])
    assert "more lines of this kind" in file.read_text()
    assert "hunter2" not in file.read_text()


def test_what_is_counted_of_lines_does_not_grow_with_tasks_while_nobody_sums_it_up() -> None:
    counted = Repeats(lambda: None)
    record = logging.makeLogRecord({"msg": "task %s", "levelno": logging.INFO})
    for number in range(2 * repeats.MOST_KINDS):
        line = Line(0.0, "INFO", "", "", f"line {number}", "", Key(f"t-{number}"), "")
        assert not counted.held(record, line)
    assert len(counted._seen) <= repeats.MOST_KINDS
    held = [counted.held(record, line) for _ in range(100)]
    assert sum(held) == 101 - repeats.FIRST
    assert [count for count, _ in counted.summaries(now=True)] == [sum(held)]


def test_after_a_minute_the_first_ones_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "PERIOD", 0.3)
    file = tmp_path / "log"
    with Logs(level="info", form="text", file=str(file), redact=Redactor()):
        for number in range(30):
            logger.warning("again %d", number)
        until(lambda: "10 more lines" in file.read_text(), "the summary, with no other line to bring it")
        refuse = file.read_text().count("\n")
        logger.warning("again %d", 31)
        until(lambda: file.read_text().count("\n") == refuse + 1, "a line of the next period")
    assert file.read_text().endswith("WARNING again 31\n")


# -- the file


def say(what: str) -> None:
    """A line that is never held back."""
    logger.info(what, extra=EVERY)


@pytest.mark.parametrize("how", ["moved", "removed", "directory", "hup", "truncated"])
def test_a_file_that_somebody_moves_or_removes_is_made_anew(tmp_path: Path, how: str) -> None:
    place, away = tmp_path / "logs", tmp_path / "away"
    place.mkdir()
    file = place / "log"
    with Logs(level="info", form="text", file=str(file), redact=Redactor()) as logs:
        say("first")
        until(lambda: "first" in file.read_text(), "the first line")
        old = os.open(file, os.O_RDONLY)
        if how == "directory":
            place.rename(away)
            until_said(lambda: "cannot be opened anew (No such file" in os.pread(old, 1 << 20, 0).decode())
            place.mkdir()
        elif how == "truncated":  # copytruncate
            os.truncate(file, 0)
        elif how == "removed":
            file.unlink()
        else:
            file.rename(away)
        if how == "hup":
            logs.reopen()
            say("after")
        until_said(lambda: file.exists() and "after" in file.read_text())
    assert "first" not in file.read_text()
    assert "\0" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    os.close(old)


def until_said(seen: Callable[[], object]) -> None:
    """Say something until it is seen."""

    def tried() -> object:
        say("after")
        return seen()

    until(tried, "the line in its place")


def test_what_a_full_disk_swallows_is_counted_and_told_once_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log"
    file.symlink_to("/dev/full")
    with Logs(level="info", form="json", file=str(file), redact=Redactor()) as logs:
        for _ in range(7):
            say("lost")
        until(lambda: logs.dropped_total == 7, "the count")
        file.unlink()
        logs.reopen()
        say("there is room")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["message"] for record in records] == [
        f"7 log lines were dropped: {file} cannot be written (No space left on device)",
        "there is room",
    ]
    (line,) = capfd.readouterr().err.splitlines()  # once, in the log's own form, for who looks why there is no log
    told = f"lines of the log are lost: {file} cannot be written (No space left on device)"
    assert json.loads(line)["message"] == told


def test_what_is_told_on_stderr_waits_for_none_of_its_readers(tmp_path: Path) -> None:
    """Nor does it cut a line of somebody else in two: what a pipe takes whole, or nothing."""
    script = (
        "import sys, logging; from oz_worker.observe.logs import Logs; from oz_worker.redact import Redactor\n"
        "with Logs(level='info', form='text', file=sys.argv[1], redact=Redactor()):\n"
        "    logging.warning('lost')\n"
        "print('done')\n"
    )
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb") as full:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, b"x" * 4096):
                pass
        os.set_blocking(writer, True)
        words = [sys.executable, "-c", script, "/dev/full"]
        root = Path(__file__).parents[2]
        done = subprocess.run(words, cwd=root, stdout=subprocess.PIPE, stderr=full, timeout=60, check=True)
    assert done.stdout == b"done\n"


def test_a_reader_that_stops_holds_nobody_and_costs_a_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oz_worker.observe.logs.MOST_CHARACTERS", 1 << 20)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    big = "x" * (1 << 16)
    with Logs(level="info", form="text", file=str(fifo), redact=Redactor()) as logs:
        for _ in range(40):
            say(big)
        assert 0 < logs.dropped_total < 40  # and we are still here
        for _ in range(20_000):
            say("small")
        assert logs.dropped_total > 9_000
        waiting = ""

        def told() -> bool:
            nonlocal waiting
            with contextlib.suppress(BlockingIOError):
                waiting = waiting[-200:] + os.read(reader, 1 << 20).decode()
            say("more")
            return "log lines were dropped: the reader of the log did not keep up" in waiting

        until(told, "what was dropped")
    os.close(reader)


@pytest.mark.parametrize("path", ["nowhere/log", "a-fifo", "."])
def test_a_log_file_that_cannot_be_opened_is_one_sentence_with_the_cure(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "a-fifo")  # that nobody reads
    logs = Logs(level="info", form="text", file=str(tmp_path / path), redact=Redactor())
    with pytest.raises(NotUsable, match=r"log_file .* cannot be opened .*; name a file"):
        logs.__enter__()


@pytest.mark.parametrize(("form", "coloured"), [("text", True), ("json", False)])
def test_only_text_on_a_terminal_is_coloured(form: str, coloured: bool) -> None:
    ours, terminal = os.openpty()
    program = (
        "import logging\nfrom oz_worker.observe.logs import Logs\nfrom oz_worker.redact import Redactor\n"
        f"with Logs(level='info', form={form!r}, file='', redact=Redactor()):\n    logging.warning('here')\n"
    )
    piped = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=True).stderr
    subprocess.run([sys.executable, "-c", program], stderr=terminal, check=True)
    shown = os.read(ours, 10_000)
    assert (b"\x1b[" in shown) == coloured
    assert b"\x1b" not in piped
    assert b"here" in piped
    assert b"here" in shown
    os.close(ours)
    os.close(terminal)
