"""`python -m oz_worker dev`: the local control plane, a worker against it, tasks, and what became of them.

Threads: main waits on one queue, into which everything else puts its edges: the plane's observer (under the plane's
lock, so it only puts), the thread that waits for the worker, the scenario's thread, the signal handlers. Whatever
happens, the worker is stopped, dispatched agents are ended and the temporary directory is removed (`--keep` excepted).
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from oz_worker.errors import ConfigurationError, ExitCode, NotUsable, OzWorkerError

if TYPE_CHECKING:
    from oz_worker.devplane.stage import Stage
    from oz_worker.devplane.tasks import Task

SAMPLE = 'echo "Hello from $(uname -s), in an empty workspace:"; ls -A; date -u'
MOST_TASKS = 100_000
CONNECT_SECONDS = 60.0
CLOSE_SECONDS = 60.0
CANCEL_AGAIN_SECONDS = 0.2
BACKENDS = ("direct", "command", "docker")
LATER = ("kubernetes",)
ENGINES = ("docker", "podman")
QUIET = ("time", "submitted", "sent", "acknowledged", "signal", "worker ended")
SCENARIO_NAMES = ("half-open", "cut", "refuse", "garbage", "slow")


@dataclass(frozen=True)
class DevOptions:
    """The flags of `dev` (names.md). *cancel_after* is seconds from each task's claim, None: never."""

    backend: str = "direct"
    engine: str = ""
    count: int = 1
    cancel_after: float | None = None
    serve: bool = False
    listen: str = "127.0.0.1:0"
    scenario: str = ""
    oz_path: str = ""
    keep: bool = False
    script: tuple[str, ...] = ()


class Edge(NamedTuple):
    """Something happened: what the plane's observer is told, or `signal`, `worker ended`, `scenario`, `time`."""

    what: str
    task: Task | None = None
    detail: str = ""


def dev_command(options: DevOptions) -> int:
    """Do it all; the exit code of names.md. Mistakes end in one sentence on stderr."""
    try:
        host, port = _judge(options)
        _need_websockets()
        return _Run(options, host, port).run()
    except OzWorkerError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)


def _judge(options: DevOptions) -> tuple[str, int]:
    """Host and port to listen on. Raises with every mistake of the options at once."""
    problems = []
    if options.backend in LATER:
        raise NotUsable(
            f"dev --backend {options.backend}: not in this version; use --backend direct, command or docker"
        )
    if options.backend not in BACKENDS:
        problems.append(f"dev --backend {options.backend}: choose one of {', '.join(BACKENDS)}")
    if options.engine and (options.engine not in ENGINES or options.backend != "docker"):
        problems.append(f"dev --engine {options.engine}: choose docker or podman, together with --backend docker")
    if options.oz_path and options.backend == "docker":
        problems.append("dev --oz-path: a container does not have the programs of this machine; leave it out")
    if not 1 <= options.count <= MOST_TASKS:
        problems.append(f"dev --count {options.count}: choose a number from 1 to {MOST_TASKS}")
    if options.scenario and options.scenario not in SCENARIO_NAMES:
        problems.append(f"dev --scenario {options.scenario}: choose one of {', '.join(SCENARIO_NAMES)}")
    if options.scenario and (options.serve or options.script or options.backend != "direct"):
        problems.append("dev --scenario brings its own tasks: leave out --serve, --backend and the script")
    if options.oz_path and shutil.which(options.oz_path) is None:
        problems.append(f"dev --oz-path {options.oz_path}: there is no program that can be started; give its path")
    host, _, port = options.listen.rpartition(":")
    host = host.strip("[]")
    if host not in ("127.0.0.1", "::1", "localhost"):
        problems.append(f"dev --listen {options.listen}: whoever reaches it runs programs here; use 127.0.0.1:PORT")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        problems.append(f"dev --listen {options.listen}: write it as 127.0.0.1:PORT, with port 0 for a free one")
    if problems:
        raise ConfigurationError(problems)
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def _signals() -> list[signal.Signals]:
    """What ends `dev` in order: a terminal that is closed too, unless nohup says otherwise."""
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def _need_websockets() -> None:
    try:
        import websockets.server  # noqa: F401
    except ImportError:
        raise NotUsable(
            "dev needs the websockets package for its control plane: pip install 'oz-worker[dev]'"
        ) from None


class _Run:
    """One call of `dev`. Everything here runs on the main thread except `_observe` and the scenario."""

    def __init__(self, options: DevOptions, host: str, port: int) -> None:
        from oz_worker.devplane.server import ControlPlane

        self._options = options
        self._edges: queue.SimpleQueue[Edge] = queue.SimpleQueue()
        self._plane = ControlPlane(
            host=host, port=port, requeue_after=1.0, redeliver_unclaimed=True, observer=self._observe
        )
        self._stage: Stage | None = None
        self._cancel_at: dict[Task, float] = {}
        self._tasks: list[Task] = []
        self._open: set[Task] = set()
        self._signal = 0

    def run(self) -> int:
        """Start everything, wait for the end, stop everything, judge."""
        before = {number: signal.signal(number, self._signalled) for number in _signals()}
        stage, clean = None, True
        try:
            self._listen()
            stage = self._stage = self._staged()
            _say(f"control plane on {self._plane.root_url}, worker log in {stage.log}")
            if stage.guest is not None:
                stage.guest.arrive(self._plane.root_url, _say)
            if self._signal:
                code = self._interrupted()
            else:
                stage.start(self._plane.url, self._plane.root_url, self._plane.key, self._worker_ended)
                code = self._judged(self._follow())
        finally:
            if stage is not None:
                stage.stop()
                clean = stage.clean_up(_say, keep=self._options.keep)
            self._plane.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        return code or int(ExitCode.STOPPED if clean else ExitCode.FAULT)

    def _listen(self) -> None:
        try:
            self._plane.start()
        except OSError as error:
            raise NotUsable(f"dev --listen {self._options.listen}: {error.strerror}; choose another port") from None

    def _staged(self) -> Stage:
        from oz_worker.devplane.guest import Guest
        from oz_worker.devplane.stage import Stage

        guest = Guest(self._options.engine or "docker") if self._options.backend == "docker" else None
        path = shutil.which(self._options.oz_path) if self._options.oz_path else None
        try:
            return Stage(
                backend=self._options.backend,
                oz_path=os.path.abspath(path) if path else "",
                quick=bool(self._options.scenario),
                guest=guest,
            )
        except OSError as error:
            raise NotUsable(f"dev needs a temporary directory: {error}; make room or set TMPDIR") from None

    def _follow(self) -> int:
        """Submit, then follow the edges until everything has ended, the worker has, or a signal came."""
        if self._options.scenario:
            self._play()
        else:
            self._submit()
        connect_by = time.monotonic() + CONNECT_SECONDS
        while True:
            edge = self._next(connect_by)
            if edge.what == "signal":
                return self._interrupted()
            if edge.what == "worker ended":
                return int(ExitCode.FAULT)
            if edge.what.startswith("scenario"):
                _say(f"{edge.what}: {edge.detail}")
                return 0 if edge.what == "scenario passed" else int(ExitCode.FAULT)
            if edge.what == "time" and not self._plane.connections and time.monotonic() >= connect_by:
                _say(f"the worker did not connect within {CONNECT_SECONDS:g} s")
                return int(ExitCode.FAULT)
            self._tell(edge)
            if self._advance(edge):
                self._tell_the_rest()
                return 0

    def _interrupted(self) -> int:
        return 0 if self._options.serve else 128 + self._signal

    def _advance(self, edge: Edge) -> bool:
        """Send the cancels that are due; whether everything has ended."""
        with self._plane.lock:
            self._cancel_due(edge)
            looked_at = {edge.task} & self._open if edge.task else self._open if edge.what == "time" else set()
            self._open = self._open - {task for task in looked_at if self._task_over(task)}
            if self._options.serve or self._options.scenario:
                return False
            return bool(self._plane.violations) or not self._open

    def _submit(self) -> None:
        script = " ".join(self._options.script)
        if self._options.serve:
            root = self._plane.root_url
            _say("submit:  curl -s " + root + """/tasks -d '{"script": "echo hi"}'""")
            _say(f"list:    curl -s {root}/tasks        show: {root}/tasks/ID")
            _say(f"cancel:  curl -s -X POST {root}/tasks/ID/cancel -d '{{}}'        stop: Ctrl-C")
            if not script:
                return
        with self._plane.lock:
            self._tasks = [self._plane.submit(script or SAMPLE) for _ in range(self._options.count)]
            self._open = set(self._tasks)

    def _play(self) -> None:
        from oz_worker.devplane.scenarios import SCENARIOS

        scenario = SCENARIOS[self._options.scenario]
        _say(f"scenario {self._options.scenario}: the control plane {scenario.about}")

        def play() -> None:
            try:
                self._edges.put(Edge("scenario passed", None, scenario.play(self._plane)))
            except (AssertionError, TimeoutError, ConnectionError) as error:
                self._edges.put(Edge("scenario FAILED", None, str(error)))

        threading.Thread(target=play, name="dev-scenario", daemon=True).start()

    def _next(self, connect_by: float) -> Edge:
        """The next edge, or `time` when a moment has come: to cancel, or to give up on a connection."""
        moments = list(self._cancel_at.values())
        if not self._plane.connections:
            moments.append(connect_by)
        try:
            # A wait without a timeout cannot be interrupted by a signal's handler everywhere.
            return self._edges.get(timeout=max(0.0, min([*moments, time.monotonic() + 1.0]) - time.monotonic()))
        except queue.Empty:
            return Edge("time")

    def _tell(self, edge: Edge) -> None:
        """Show one edge; a task's output line by line."""
        name = edge.task.task_id if edge.task else ""
        if edge.what == "output":
            for line in edge.detail.splitlines():
                _say(f"{name} | {_plain(line)}")
        elif edge.what not in QUIET:
            words = edge.what.replace("task_", "").replace("_", " ")
            _say(" ".join(filter(None, (name, f"{words}: {_plain(edge.detail)}" if edge.detail else words))))

    def _tell_the_rest(self) -> None:
        """Show the edges that led to the end and still wait."""
        while True:
            try:
                self._tell(self._edges.get_nowait())
            except queue.Empty:
                return

    def _cancel_due(self, edge: Edge) -> None:
        """Requires holding the plane's lock."""
        now, after, task = time.monotonic(), self._options.cancel_after, edge.task
        if edge.what == "task_claimed" and task is not None and after is not None and task not in self._cancel_at:
            self._cancel_at[task] = now + after
        for due in [due for due, at in self._cancel_at.items() if at <= now]:
            self._cancel_at[due] = math.inf
            if not due.ended:
                try:
                    self._plane.cancel(due)
                except ConnectionError:
                    self._cancel_at[due] = now + CANCEL_AGAIN_SECONDS  # between two connections

    def _task_over(self, task: Task) -> bool:
        """Whether nothing more is to come of a task. Requires holding the plane's lock."""
        if task.ended:
            close_by = (task.ended_at or 0.0) + CLOSE_SECONDS
            closed = task.closed or task.state != "cancelled" or time.monotonic() >= close_by
            return task.acknowledged and closed
        if self._options.backend != "command" or not task.claimed:
            return False
        late = task.cancelled_at is not None and time.monotonic() >= task.cancelled_at + CLOSE_SECONDS
        return task.agent_code is not None or self._agent_gone(task) or late

    def _agent_gone(self, task: Task) -> bool:
        """Whether a dispatched agent was seen to end by its cancel, perhaps before it could say a word."""
        stage = self._stage
        return task.cancelled_at is not None and stage is not None and stage.cancelled(task.task_id, task.execution_id)

    def _judged(self, code: int) -> int:
        """Stop the worker and say what became of everything."""
        stage = self._stage
        assert stage is not None
        early = stage.ended
        status = stage.stop()
        with self._plane.lock:
            broken = list(self._plane.violations)
            wrong = [task for task in self._tasks if not self._as_asked(task)]
        for sentence in broken:
            _say(f"PROTOCOL BROKEN: {_plain(sentence)}")
        if broken:
            return int(ExitCode.PROTOCOL_BROKEN)
        if code >= 128 or (self._options.serve and code == 0):
            return code
        for task in wrong:
            _say(f"{task.task_id}: {task.state}, which is not what was asked for")
        if early or status != 0 or not self._plane.connections:
            _say(f"the worker ended {'by itself ' * early}with exit code {status}; the end of its log:")
            sys.stdout.write(stage.log_tail())
        left = [] if code or status else stage.leftovers()
        if left:
            _say(f"the worker left workspaces or containers behind: {', '.join(left[:5])}")
        if code or wrong or status != 0 or left:
            return int(ExitCode.FAULT)
        if not self._options.scenario:
            count = len(self._tasks)
            _say("done: the task ended as asked" if count == 1 else f"done: all {count} tasks ended as asked")
        return 0

    def _as_asked(self, task: Task) -> bool:
        if self._options.backend == "command" and task.claimed and not task.ended:
            if task.cancelled_at is None:
                return task.agent_code == 0
            return task.agent_code is not None or self._agent_gone(task)
        if task.cancelled_at is not None and task.state == "cancelled":
            return task.closed
        return task.state == "completed"

    def _observe(self, what: str, task: Task | None, detail: str) -> None:
        self._edges.put(Edge(what, task, detail))

    def _worker_ended(self, code: int) -> None:
        self._edges.put(Edge("worker ended", None, str(code)))

    def _signalled(self, number: int, frame: object) -> None:
        self._signal = number
        self._edges.put(Edge("signal", None, str(number)))


def _plain(text: str) -> str:
    """Text of an agent or a worker, safe for a terminal: control characters shown, not obeyed."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def _say(line: str) -> None:
    try:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        sys.stdout.flush()
    except OSError:
        # `dev | head`, or a closed terminal: nobody listens any more, which is no reason to leave a worker behind.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
