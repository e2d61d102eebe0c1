"""What an engine's program may print, and how many of it run at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.turns import Turns
from oz_worker.engine_words import EngineDown, EngineError, Event, NoSuch
from oz_worker.errors import Stopped
from oz_worker.model import Cause, Key
from tests.containers.fake_docker import fake_engine


@pytest.mark.parametrize(
    "line",
    [b"", b"[1]", b"nonsense", b'{"Action": "die", "Actor": [1]}', b'{"Action": "die", "Actor": {"Attributes": 7}}'],
)
def test_an_odd_event_is_none(tmp_path: Path, line: bytes) -> None:
    assert fake_engine(tmp_path, "exit 0").event(line) is None


def test_events_of_both_engines(tmp_path: Path) -> None:
    docker, podman = fake_engine(tmp_path, "exit 0"), fake_engine(tmp_path, "exit 0", kind="podman")
    died = b'{"Action": "die", "Actor": {"ID": "1", "Attributes": {"name": "oz-1", "exitCode": "3"}}}'
    assert docker.event(died) == Event("die", "oz-1", 3)
    assert docker.event(b'{"Action": "die", "Actor": {"Attributes": {"exitCode": "odd"}}}') == Event("die", "", None)
    assert docker.event(b'{"Action": "exec_die", "Actor": {}}') is None
    assert podman.event(b'{"Status": "died", "Name": "oz-1", "ContainerExitCode": 3}') == Event("die", "oz-1", 3)
    assert podman.event(b'{"Status": "remove", "Name": "oz-1"}') == Event("destroy", "oz-1", None)


@pytest.mark.parametrize(
    "printed",
    ["{}", "{no json", '{"id": "1"}', '{"id": "1", "name": "n", "state": [1]}', '{"id": 1, "name": 2, "mounts": 3}'],
)
def test_odd_facts_of_a_container_are_an_error_of_the_engine(tmp_path: Path, printed: str) -> None:
    with pytest.raises(EngineError, match="printed something unreadable"):
        fake_engine(tmp_path, f"printf '%s\\n' '{printed}'").inspect("x")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", EngineDown),
        ("error during connect: Get http://x/info: EOF", EngineDown),
        ("Error response from daemon: Get https://reg: dial tcp: connection refused: cannot connect to", EngineError),
        ("Error response from daemon: dial unix /run/containerd/containerd.sock: connect: refused", EngineDown),
        ("Error: No such container: x", NoSuch),
        ("Error response from daemon: something else", EngineError),
        ("", EngineError),
    ],
)
def test_what_a_refusal_means(tmp_path: Path, words: str, kind: type[EngineError]) -> None:
    engine = fake_engine(tmp_path, f"echo '{words}' >&2; exit 1")
    with pytest.raises(EngineError) as caught:
        engine.call("info")
    assert type(caught.value) is kind


def test_a_program_killed_by_a_signal_has_told_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineDown, match="killed by signal 9"):
        fake_engine(tmp_path, "kill -9 $$").call("run")


def test_turns_are_taken_one_after_the_other_and_a_stop_order_ends_the_wait() -> None:
    turns = Turns(1)
    unit = Unit("u", "i", Key("t"))
    waited = threading.Event()

    def wait() -> None:
        with pytest.raises(Stopped), turns.taken(unit):
            raise AssertionError("the turn is another's")
        waited.set()

    with turns.taken():
        thread = threading.Thread(target=wait)
        thread.start()
        unit.order_stop(Cause.CANCEL, 1.0)
        assert waited.wait(20)
    thread.join()
    with turns.taken(unit):
        pass


def test_half_an_answer_of_a_program_that_was_killed_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineDown, match="killed by signal 9"):
        fake_engine(tmp_path, "echo half of it; kill -9 $$").overview("label=a=b")


@pytest.mark.parametrize("kind", ["docker", "podman"])
def test_what_a_list_says_of_containers(tmp_path: Path, kind: str) -> None:
    """Of those that live nothing is asked, of those that ended each by itself where all together get no answer."""
    rows = [
        ("1", "other/alias,oz-a", "Running"),
        ("2", "oz-b", "exited"),
        ("3", "oz-c", "created"),
        ("4", "oz-d", "dead"),
        ("5", "oz-fill-x", "exited"),
    ]
    form = '{"id": "%s", "name": "%s", "status": "%s", "image": "i", "labels": {"oz-worker.unit": "u"}}'
    printed = "\n".join(form % row for row in rows)
    ended = '{"id":"2","name":"oz-b","state":{"Status":"exited","ExitCode":7,"StartedAt":"2026-01-01"}}'
    body = f"""
case "$*" in
ps*) printf '%s\\n' '{printed}';;
*" 2 4") echo "error during connect: EOF" >&2; exit 1;;
*" 2") echo '{ended}';;
*" 4") echo "error during connect: EOF" >&2; exit 1;;
*) exit 3;;
esac"""
    found = fake_engine(tmp_path, body, kind=kind).overview("label=a=b")
    assert [(one.name, one.status, one.code) for one in found] == [
        ("oz-a", "running", 0),
        ("oz-b", "exited", 7),
        ("oz-c", "created", 0),
        ("oz-d", "unclear", 0),
    ]
    assert [one.lives for one in found] == [True, False, False, True]
    assert [one.fresh for one in found] == [False, False, True, False]
    assert found[0].label("unit") == "u"
