"""What stays of a task's output: bounded, redacted, with one line that says so when something is missing."""

from __future__ import annotations

import base64
import gc
import os
import time
import weakref
from pathlib import Path

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.output import end_with_notice, keep_end
from oz_worker.engine.output import Output, copy_name
from oz_worker.known import Known, in_address, in_environment
from oz_worker.model import Key, TaskSpec
from oz_worker.redact import Redactor
from oz_worker.rows import TaskRow
from tests.scripted import Scripted, World

TOKEN = "t0ken-9d8e7f6a5b4c3d2e"
NOTICE = b"[oz_worker: output over 20000 bytes; what came before is gone]\n"


class Instance:
    """A directory with the raw output of units, and what keeps copies of it."""

    def __init__(self, place: Path, *, longest: int = 20_000, most: int = 1 << 30) -> None:
        self.place = place
        self.output = Output(known=Known(), longest_copy=longest, retention=3600.0, most=most)

    def keep(self, name: str, raw: bytes, secret: str = TOKEN) -> Path:
        """The copy of *raw*."""
        key = Key(name)
        unit = Unit(name, "i", key, TaskSpec(key=key, run_id=name, argv=(), environment={}, secrets=(secret,)))
        row = TaskRow(key, 1, name, "", "direct", "", 0, 0.0)
        file = self.place / "units" / name / "output.log"
        file.parent.mkdir(parents=True)
        file.write_bytes(raw)
        self.output.keep_copy(self.place, unit, row)
        return self.place / "logs" / copy_name(row)


@pytest.mark.parametrize("twice", [False, True])
def test_a_copy_is_bounded_with_one_line_that_says_what_is_missing(tmp_path: Path, twice: bool) -> None:
    raw = b"".join(b"line %d\n" % number for number in range(10_000))
    shown = Instance(tmp_path).keep("t-1", (NOTICE if twice else b"") + raw).read_bytes()
    first, *lines = shown.splitlines()
    assert first + b"\n" == NOTICE
    assert lines == [b"line %d" % number for number in range(10_000 - len(lines), 10_000)]
    assert 19_000 < len(shown) <= 20_000
    assert shown.count(b"[oz_worker:") == 1


def test_an_output_within_its_bound_is_kept_byte_for_byte_and_zero_is_no_bound(tmp_path: Path) -> None:
    raw = b"\xff\xfe no text \0 at all\r\n" * 10_000
    assert Instance(tmp_path, longest=len(raw)).keep("t-1", raw).read_bytes() == raw
    assert Instance(tmp_path, longest=0).keep("t-2", raw).read_bytes() == raw


@pytest.mark.parametrize("cut", ["by the sweep", "at the end"])
def test_no_part_of_a_secret_is_left_where_an_endless_line_was_cut(tmp_path: Path, cut: str) -> None:
    secret = TOKEN.encode()
    for lost in range(len(secret) - 6):
        left = secret[lost:]
        raw = NOTICE + left
        if cut == "at the end":
            raw = b"y" * 40_000 + secret + b"z" * (20_000 - len(NOTICE) - len(left))
        shown = Instance(tmp_path / str(lost)).keep("t-1", raw).read_bytes()
        assert secret[-6:] not in shown
        assert shown.startswith(NOTICE)


def test_the_end_of_a_file_is_kept_in_place_and_of_a_full_one_the_beginning(tmp_path: Path) -> None:
    lines = b"".join(b"%06d\n" % number for number in range(200_000))
    path = tmp_path / "output.log"
    path.write_bytes(lines)
    keep_end(path, 1_000_000)
    assert path.stat().st_size <= 1_000_000
    head, _, rest = path.read_bytes().partition(b"\n")
    assert head.endswith(b"what came before is gone]")
    assert lines.endswith(rest)
    assert len(rest) > 990_000
    path.write_bytes(lines[:1_000_000])
    with path.open("r+b") as file:
        end_with_notice(file.fileno(), 1_000_000)
    *kept, last = path.read_bytes().splitlines(keepends=True)
    assert last == b"[oz_worker: output over 1000000 bytes; what came after is gone]\n"
    assert lines.startswith(b"".join(kept))
    assert 990_000 < path.stat().st_size <= 1_000_000


def test_old_copies_go_by_age_and_the_oldest_by_what_all_take_together(tmp_path: Path) -> None:
    instance = Instance(tmp_path, most=400_000)
    kept = []
    for number in range(30):
        kept.append(instance.keep(f"t-{number:04}", b"x" * 18_000))
        os.utime(kept[-1], (time.time() - 1000 + number,) * 2)
    instance.output.expire(tmp_path)
    left = [path for path in kept if path.exists()]
    assert left == kept[-len(left) :]
    assert sum(path.stat().st_size for path in left) <= 400_000
    assert len(left) >= 10
    os.utime(left[-1], (time.time() - 3700,) * 2)
    instance.output.expire(tmp_path)
    assert not left[-1].exists()
    tiny = Instance(tmp_path / "tiny", most=10)
    only = tiny.keep("t-1", b"all there is\n")
    tiny.output.expire(tmp_path / "tiny")
    assert only.exists(), "the newest one is somebody's only account"


def test_what_the_worker_knows_of_its_own_comes_from_its_environment() -> None:
    found = set(
        in_environment(
            {
                "WARP_API_KEY": "wk-key\n",
                "https_proxy": "http://me:pro%40xy-pass@proxy:3128",
                "NO_PROXY": "internal.example,other.example",
                "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "authorization=Bearer%20otel-token,x-team=team-token",
                "PATH": "/usr/bin",
            }
        )
    )
    assert {"wk-key", "pro@xy-pass", "pro%40xy-pass", "Bearer otel-token", "otel-token", "team-token"} <= found
    assert "malf0rmed" in set(in_environment({"OTEL_EXPORTER_OTLP_HEADERS": "Authorization: Bearer malf0rmed"}))
    assert not [text for text in found if "proxy:3128" in text or "example" in text or "/usr" in text]
    assert {"registry-pass"} <= set(in_address("me:registry-pass@registry.example/image:tag"))
    for image in ("image:22.04-tagged", "image:22.04-tagged@sha256:" + "0a" * 32, "registry:5000/image"):
        assert not [text for text in in_address(image) if len(text) >= 6]


def test_another_task_s_values_are_masked_in_the_log_while_it_runs_and_never_the_ids() -> None:
    known = Known(["worker-key"])
    known.learn_of("u1", ["task-one-value", "t-000001"], shown=("t-000001", ""))
    known.learn_of("u2", ["shared-value", "task-one-value"])
    known.learn_of("u1", ["task-one-value", "written-by-setup"])
    known.learn("next-worker-key")
    known.learn("next-worker-key")
    line = "t-000001 task-one-value written-by-setup shared-value worker-key next-worker-key"
    assert known.everywhere(line) == "t-000001 *** *** *** *** ***"
    assert known.redactor_of(known, ["shared-value"])(line) == "t-000001 task-one-value written-by-setup *** *** ***"
    known.learn_of("u1", ())
    assert known.everywhere(line) == "t-000001 *** written-by-setup *** *** ***"
    known.learn_of("u2", ())
    assert known.everywhere(line) == "t-000001 task-one-value written-by-setup shared-value *** ***"


class Ended(Scripted):
    """Gives *raw* as the end of every output."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(World())
        self._raw = raw

    def tail(self, unit: Unit, limit: int) -> bytes:
        return self._raw[-limit:]


def test_of_a_wrapped_secret_that_was_cut_between_its_lines_nothing_is_shown(tmp_path: Path) -> None:
    """Engines and clusters give the last lines, so that what is left begins with a whole line."""
    secret = "".join(f"{number:x}" for number in range(1000, 1300))
    lines = base64.encodebytes(secret.encode()).splitlines(keepends=True)
    key = Key("t-1")
    unit = Unit("unit", "i", key, TaskSpec(key=key, run_id="t-1", argv=(), environment={}, secrets=(secret,)))
    output = Output(known=Known(), longest_copy=0, retention=60.0)
    for lost in range(1, len(lines)):
        left = b"".join(lines[lost:]) + b"the end\n"
        heading = b"--- container side ---\n"
        for raw in (left, heading + left + heading + left):
            shown = output.tail(Ended(raw), unit)
            assert [line for line in lines[lost:-1] if line.decode()[:60] in shown] == [], shown
            assert [shown.count(word) for word in ("the end", "--- container side ---")] in ([1, 0], [2, 2])
        place = tmp_path / str(lost)
        assert lines[-2].strip() not in Instance(place).keep("t-1", left, secret).read_bytes()
        after = NOTICE.replace(b"before", b"after")
        cut = b"the beginning\n" + b"".join(lines[:lost]) + after
        assert Instance(place).keep("t-2", cut, secret).read_bytes() == b"the beginning\n***" + after


def test_a_unit_has_one_redactor_until_what_it_holds_changes_and_none_when_it_is_gone() -> None:
    """For its sentences, its tail and its copy; a key that the worker learns meanwhile is masked too."""
    known, key = Known(["0wn-secret"]), Key("task-1", "run-1")
    unit = Unit("u", "i", key, TaskSpec(key=key, run_id="r", argv=(), environment={}, secrets=(TOKEN, "task-1")))

    def redactor(unit: Unit) -> Redactor:
        return known.redactor_of(unit, unit.secrets or (), shown=unit.key)

    first = redactor(unit)
    assert redactor(unit) is first
    assert first(f"{TOKEN} 0wn-secret of task-1") == "*** *** of task-1"
    known.learn("new-key-77")
    unit.secrets = (TOKEN, "from-a-hook")
    assert redactor(unit)(f"{TOKEN} new-key-77 from-a-hook") == "*** *** ***"
    gone = weakref.ref(redactor(unit))
    del unit
    gc.collect()
    assert gone() is None
