"""What became of a container, in the words of a report: reason, exit code, and the cure."""

from __future__ import annotations

import errno

from oz_worker.backends.container_order import ENTRYPOINT
from oz_worker.engine_words import Container, EngineError
from oz_worker.model import ExitFacts, Reason
from oz_worker.timing import format_duration

_NOT_FOUND, _KILLED, _LOST = 127, 137, 255
_NEVER_RAN = "the worker stopped before the container was started; run it again"


def of_container(container: Container) -> ExitFacts:
    """Facts of a container that has ended.

    `oom` may also stand for a child that was killed while the main process went on: then its exit code decides, and a
    task that ended well ended well.
    """
    code = container.code
    if code == 0:
        return ExitFacts(code=0)
    if container.oom:
        detail = (
            "The container ran out of memory and the kernel ended a process of it; give the task a larger instance"
            " shape, or raise backend.docker.memory."
        )
        return ExitFacts(code=code, reason=Reason.CONTAINER_OOM, detail=detail, oom=True)
    detail = f"The agent ended with exit code {code}{_hint(code)}; its last output says why."
    return ExitFacts(code=code, reason=Reason.CONTAINER_EXIT, detail=detail)


def _hint(code: int) -> str:
    if code == _NOT_FOUND:
        return ", which is what a shell says of a program that is not in the image, or that needs glibc there"
    if code == _KILLED:
        return ", that is, it was killed from outside, or the host ran out of memory"
    if code == _LOST:
        return ", which is also what an engine says of a container that died with its host"
    return ""


def of_failed_start(error: EngineError, *, created: bool, sidecars: bool) -> ExitFacts:
    """Facts of a container that could not be *created*, or was and could not be started."""
    reason = Reason.CONTAINER_START if created else Reason.CONTAINER_CREATE
    if created and ENTRYPOINT in error.said and "no such file" in error.said.lower():
        cure = (
            "the sidecar mounted at /agent has none, or its interpreter is not in the image"
            if sidecars
            else "the assignment named no sidecar; set backend.docker.sidecar_image"
        )
        detail = f"The container has no usable {ENTRYPOINT}: {cure}. {error.said}"
    else:
        what = "started" if created else "created"
        detail = f"The container could not be {what}: {error.said}; mend that and run the task again."
    return ExitFacts(code=None, reason=reason, detail=detail, agent_started=False)


def not_given(sentence: str) -> ExitFacts:
    """Facts of a task that asks for what no container can be given."""
    return ExitFacts(reason=Reason.CONTAINER_CREATE, detail=sentence, agent_started=False)


def taken(container: Container) -> ExitFacts:
    """Facts of a task whose container's name is in use."""
    owner = container.label("owner")
    whose = f"instance {container.label('instance')} of worker {container.label('worker')}"
    held = f"{whose}, whose own container is {owner[:12]}" if owner else whose
    detail = (
        f"The container {container.name} exists already and belongs to"
        f" {held if container.label('unit') else 'somebody else'}; stop that worker or remove the container, then run"
        " the task again."
    )
    return ExitFacts(reason=Reason.CONTAINER_CREATE, detail=detail, agent_started=False)


def unanswered(why: str, limit: float) -> ExitFacts:
    """Facts of a container that could not be made because the engine was silent all the time."""
    long = format_duration(limit)
    detail = f"The engine did not answer for {long}, so the container could not be made: {why}. Get it to work again."
    return ExitFacts(reason=Reason.CONTAINER_CREATE, detail=detail, agent_started=False)


def no_room(error: OSError) -> ExitFacts:
    """Facts of a unit whose directory cannot be made or written, or for which the worker has no descriptor left."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        detail = f"The worker cannot open a file more ({error.strerror}); raise its limit of open files (LimitNOFILE=)."
    else:
        detail = f"{error.filename or 'the state directory'} cannot be written: {error.strerror}; free space there."
    return ExitFacts(reason=Reason.CONTAINER_CREATE, detail=detail, agent_started=False)


def never_ran() -> ExitFacts:
    """Facts of a container that is proven never to have been started."""
    return ExitFacts(reason=Reason.UNKNOWN, detail=_NEVER_RAN, agent_started=False)


def vanished(name: str, code: int | None) -> ExitFacts:
    """Facts of a container that was removed by somebody else; *code* is what an event still told of."""
    if code == 0:
        return ExitFacts(code=0)
    if code is not None:
        detail = f"The container {name} ended with exit code {code} and was removed from outside; run the task again."
        return ExitFacts(code=code, reason=Reason.CONTAINER_EXIT, detail=detail)
    detail = (
        f"The container {name} is gone and how it ended is not known: it was removed from outside, or the engine lost"
        " it. Look at what the agent had pushed, then run the task again."
    )
    return ExitFacts(reason=Reason.CONTAINER_WAIT, detail=detail)


def not_there(name: str) -> ExitFacts:
    """Facts of a container that was ordered by a worker before this one, and does not exist."""
    detail = (
        f"The worker was ended when the container {name} was ordered, and there is none now: it was never made, or was"
        " removed from outside. Look at what the agent had pushed, then run the task again."
    )
    return ExitFacts(reason=Reason.CONTAINER_WAIT, detail=detail)


def silent(name: str, why: str, limit: float) -> ExitFacts:
    """Facts of a container of which the engine has said nothing for longer than `engine_down_timeout`."""
    detail = (
        f"The engine has not answered for {format_duration(limit)}, so how the container {name} goes on is not known"
        f" ({why}); get the engine to work again, or raise backend.docker.engine_down_timeout."
    )
    remains = f"container {name} on an engine that does not answer"
    return ExitFacts(reason=Reason.CONTAINER_WAIT, detail=detail, remains=remains)
