from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import trustme
import websocket

from oz_worker.devplane import wire
from oz_worker.devplane.server import ControlPlane

CAPABILITY = "X-Warp-Worker-Capabilities: execution-scoped-cancellation-v1"


class Worker:
    """A bare client that says what a test tells it to."""

    def __init__(self, plane: ControlPlane, *, worker_id: str = "w", key: str | None = None, ca: str = "") -> None:
        self.worker_id = worker_id
        self.socket = websocket.create_connection(
            f"{plane.url}?worker_id={worker_id}",
            header=[f"Authorization: Bearer {key or plane.key}", CAPABILITY],
            timeout=20,
            sslopt={"ca_certs": ca} if ca else None,
        )

    def say(self, kind: str, task: wire.Key | Any, **data: Any) -> None:
        fields = {"task_id": task.task_id, **data}
        if task.execution_id:
            fields["execution_id"] = task.execution_id
        if kind == wire.CLAIMED:
            fields["worker_id"] = self.worker_id
        self.socket.send(json.dumps({"type": kind, "data": fields}))

    def next(self) -> dict[str, Any]:
        frame = json.loads(self.socket.recv())
        assert isinstance(frame, dict)
        return frame

    def barrier(self, payload: bytes = b"p") -> None:
        """Return once the plane has judged everything said so far."""
        self.socket.ping(payload)
        while True:
            opcode, data = self.socket.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG and data == payload:
                return


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as running:
        yield running


Join = Callable[..., Worker]


@pytest.fixture
def join() -> Iterator[Join]:
    """Makes clients that are closed at the end."""
    workers: list[Worker] = []

    def made(plane: ControlPlane, **how: Any) -> Worker:
        workers.append(Worker(plane, **how))
        return workers[-1]

    yield made
    for worker in workers:
        worker.socket.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def secure(tmp_path: Path) -> tuple[ssl.SSLContext, str]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return context, str(tmp_path / "ca.pem")


def run_one_task(plane: ControlPlane, worker: Worker) -> None:
    task = plane.submit("echo hi")
    frame = worker.next()
    assert frame["type"] == "task_assignment"
    assert frame["data"]["task_id"] == task.task_id
    worker.say(wire.CLAIMED, task)
    worker.say(wire.COMPLETED, task, message="Task completed successfully")
    worker.barrier()
    assert task.acknowledged
    assert task.state == "completed"
    plane.check()


def test_a_task_that_is_claimed_and_completed_is_judged_right(plane: ControlPlane, join: Join) -> None:
    run_one_task(plane, join(plane))


def test_the_same_over_tls(secure: tuple[ssl.SSLContext, str], join: Join) -> None:
    with ControlPlane(tls=secure[0]) as plane:
        run_one_task(plane, join(plane, ca=secure[1]))


def test_a_wrong_key_is_refused_with_401(plane: ControlPlane, join: Join) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        join(plane, key="wrong")
    assert caught.value.status_code == 401
    assert [status for _, status in plane.refused] == [401]


def test_the_order_of_what_is_submitted_before_a_worker_came_is_kept(plane: ControlPlane, join: Join) -> None:
    tasks = [plane.submit(f"echo {number}") for number in range(5)]
    worker = join(plane)
    assert [worker.next()["data"]["task_id"] for _ in tasks] == [task.task_id for task in tasks]


def test_a_rejected_task_is_offered_again_when_another_one_ended(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    first, second = plane.submit("1"), plane.submit("2")
    worker.next(), worker.next()
    worker.say(wire.CLAIMED, first)
    worker.say(wire.REJECTED, second, reason="worker at maximum concurrency")
    worker.barrier()
    assert second.state == "rejected"
    worker.say(wire.COMPLETED, first, message="done")
    assert worker.next()["data"]["task_id"] == second.task_id
    worker.say(wire.CLAIMED, second)
    worker.barrier()
    assert second.state == "claimed"
    plane.check()


def test_a_rejected_task_is_offered_again_on_a_new_connection(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    task = plane.submit("1")
    worker.next()
    worker.say(wire.REJECTED, task, reason="worker is shutting down")
    worker.barrier()
    worker.socket.close()
    assert join(plane).next()["data"]["task_id"] == task.task_id
    assert task.deliveries == 2


def test_a_rejected_task_is_offered_again_after_a_while_where_that_was_asked_for(join: Join) -> None:
    with ControlPlane(requeue_after=0.01) as plane:
        worker = join(plane)
        tasks = [plane.submit("1"), plane.submit("2")]
        for task in tasks:
            worker.say(wire.REJECTED, task, reason="backend unavailable")
        order = [worker.next()["data"]["task_id"] for _ in range(4)]
        assert order == [task.task_id for task in tasks] * 2
        plane.check()


def test_what_was_not_answered_is_sent_again_only_where_that_was_asked_for(join: Join) -> None:
    for asked in (True, False):
        with ControlPlane(redeliver_unclaimed=asked) as plane:
            task = plane.submit("1")
            first = join(plane)
            first.next()
            plane.cut()
            join(plane).barrier()
            assert task.deliveries == (2 if asked else 1)


def test_a_cancel_of_what_nobody_knows_may_be_answered_with_closed(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    plane.cancel("nobody", "e")
    assert worker.next() == {"type": "task_cancellation", "data": {"task_id": "nobody", "execution_id": "e"}}
    worker.say(wire.CLOSED, wire.Key("nobody", "e"))
    worker.barrier()
    plane.check()


def test_an_execution_id_that_was_not_assigned_is_a_violation_that_names_the_right_one(
    plane: ControlPlane, join: Join
) -> None:
    worker = join(plane)
    task = plane.submit("1")
    worker.say(wire.CLAIMED, wire.Key(task.task_id))
    worker.barrier()
    assert task.execution_id in plane.violations[0]


def test_what_breaks_the_rules_is_a_violation_and_check_raises_it(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    task = plane.submit("1")
    worker.say(wire.COMPLETED, task, message="never claimed")
    worker.barrier()
    with pytest.raises(AssertionError, match="which was not claimed"):
        plane.check()


@pytest.mark.parametrize(
    ("send", "words"),
    [
        (lambda worker: worker.socket.send("{"), "not JSON"),
        (lambda worker: worker.socket.send_binary(b"{}"), "binary"),
        (lambda worker: worker.socket.send(b"\xff\xfe", websocket.ABNF.OPCODE_TEXT), "utf-8"),
        (lambda worker: worker.socket.sock.sendall(b"\x83\x80\0\0\0\0"), "WebSocket protocol"),
        (lambda worker: worker.say(wire.CLAIMED, wire.Key("nobody")), "never named"),
    ],
)
def test_what_is_no_frame_is_a_violation(
    plane: ControlPlane, send: Callable[[Worker], None], words: str, join: Join
) -> None:
    send(join(plane))
    plane.wait_for(lambda: plane.violations, strict=False)
    assert words in plane.violations[0]


def test_a_cut_on_a_frame_leaves_it_unacknowledged(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    task = plane.submit("1")
    plane.cut_on(lambda frame: frame.kind == wire.COMPLETED)
    worker.say(wire.CLAIMED, task)
    worker.say(wire.COMPLETED, task, message="done")
    plane.wait_ended(task)
    plane.wait_for(lambda: plane.connections[0].closed_at)
    assert not task.acknowledged
    again = join(plane)
    again.say(wire.COMPLETED, task, message="done")
    again.barrier()
    plane.wait_acknowledged(task, timeout=1)
    plane.check()


def test_an_unread_frame_was_never_judged(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    task = plane.submit("1")
    plane.cut_on(lambda frame: frame.kind == wire.CLAIMED, unread=True)
    worker.say(wire.CLAIMED, task)
    plane.wait_for(lambda: plane.connections[0].closed_at)
    assert not plane.received


@pytest.mark.parametrize("how", ["reset", "eof", "close"])
def test_a_cut_ends_the_connection_in_the_way_asked_for(plane: ControlPlane, how: str, join: Join) -> None:
    worker = join(plane)
    plane.cut(how)
    if how == "reset":
        with pytest.raises(ConnectionResetError):
            worker.socket.recv()
    elif how == "eof":
        with pytest.raises(websocket.WebSocketConnectionClosedException):
            worker.socket.recv()
    else:
        assert worker.socket.recv_data()[0] == websocket.ABNF.OPCODE_CLOSE
        worker.socket.close()
    plane.wait_for(lambda: plane.connections[0].closed_at)


@pytest.mark.parametrize(("pongs", "answer"), [("empty", b""), ("wrong", b"xp")])
def test_pings_are_answered_as_told(plane: ControlPlane, pongs: str, answer: bytes, join: Join) -> None:
    plane.pongs = pongs
    worker = join(plane)
    worker.socket.ping(b"p")
    assert worker.socket.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_PONG, answer)


def test_a_stalled_connection_says_nothing_until_it_is_resumed(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    plane.stall()
    worker.socket.ping(b"p")
    worker.socket.settimeout(0.2)
    with pytest.raises(websocket.WebSocketTimeoutException):
        worker.socket.recv_data(control_frame=True)
    worker.socket.settimeout(20)
    plane.resume()
    worker.barrier(b"q")


def test_refusals_are_counted_and_end(plane: ControlPlane, join: Join) -> None:
    plane.refuse(503, headers={"Retry-After": "7"}, body="busy", times=2)
    for _ in range(2):
        with pytest.raises(websocket.WebSocketBadStatusException) as caught:
            join(plane)
        assert caught.value.status_code == 503
        assert caught.value.resp_headers is not None
        assert caught.value.resp_headers["retry-after"] == "7"
    join(plane).barrier()


def test_down_refuses_dialling_and_up_takes_the_same_port(plane: ControlPlane, join: Join) -> None:
    url = plane.url
    plane.down()
    with pytest.raises(ConnectionRefusedError):
        join(plane)
    plane.up()
    assert plane.url == url
    join(plane).barrier()


def test_slow_bytes_arrive_all(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    plane.slow_down(0.0005)
    task = plane.submit("echo slow", env_vars={"A": "b"})
    assert worker.next()["data"]["task_id"] == task.task_id
    worker.say(wire.CLAIMED, task)
    plane.wait_for(lambda: task.claimed)


def test_raw_bytes_and_frames_reach_the_worker_as_they_are(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    plane.send_bytes(b"\x81\x02ab")
    assert worker.socket.recv() == "ab"
    plane.send_text("no json")
    assert worker.socket.recv() == "no json"
    task = plane.submit(task_id="t", execution_id="e", frame="anything")
    assert worker.socket.recv() == "anything"
    assert task.key == wire.Key("t", "e")


def test_a_large_message_arrives_whole(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    plane.send_text("x" * 3_000_000)
    assert len(worker.socket.recv()) == 3_000_000


def test_waiting_in_vain_says_for_what(plane: ControlPlane) -> None:
    plane.submit("1", task_id="t1")
    with pytest.raises(TimeoutError, match=r"a moon.*t1.*queued"):
        plane.wait_for(lambda: False, 0.05, "a moon")


def test_stop_ends_every_thread_with_clients_of_every_kind_left(plane: ControlPlane, join: Join) -> None:
    worker = join(plane)
    host, port = plane.root_url.removeprefix("http://").split(":")
    half = socket.create_connection((host, int(port)))
    half.sendall(b"GET /tasks HTTP/1.1\r\n")
    plane.refuse(silent=True)
    silent = socket.create_connection((host, int(port)))
    silent.sendall(b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
    plane.wait_for(lambda: plane.refused)
    plane.stop()
    assert not plane.port.threads()
    for sock in (half, silent, worker.socket):
        sock.close()
