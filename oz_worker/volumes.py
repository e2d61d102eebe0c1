"""Volumes of a container engine, and how the files of an image get into one: the other leaf of `containers`' door.

What docker and podman do differently with volumes is here. Proven with both: an image FROM scratch, without a shell or
tar, is unpacked by `export` of a container that never runs and `cp` into another; owners, modes and links stay.
"""

from __future__ import annotations

import json
from typing import Any, Mapping, NamedTuple

from oz_worker import pipeline
from oz_worker.containers import Engine, labelled
from oz_worker.engine_words import LABEL, EngineDown, EngineError, Interrupted, NoSuch
from oz_worker.process import SpawnError
from oz_worker.pulls import room
from oz_worker.timing import format_duration

_PLACE = "/.oz-volume"
"""Where a holder mounts its volume: nothing an image has, because engines copy what lies there into an empty volume."""
_END = bytes(1024)
"""The end of every complete tar. An engine that fails midway can end its export cleanly and exit with 0, because its
answer had begun, and `cp` takes a tar that was cut between two files for a whole one, also with exit code 0 [both
measured]: so the end has to be seen."""


class Volume(NamedTuple):
    """One volume and its labels. One that an engine made in passing, for a mount of it, has none."""

    name: str
    labels: Mapping[str, str]

    def label(self, name: str) -> str:
        """One of our labels, "" when it is not there."""
        return self.labels.get(LABEL + name, "")


class Volumes:
    """The volumes of one engine. Holds no state; safe from any thread; raises what `Engine.call` raises.

    *timeout* (0: the engine's) and *interrupt* as there.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, name: str, labels: Mapping[str, str], *, timeout: float = 0, interrupt: int = -1) -> None:
        """Make an empty volume."""
        self._engine.call("volume", "create", *labelled(labels), name, timeout=timeout, interrupt=interrupt)

    def remove(self, name: str) -> None:
        """Remove a volume; nothing to do when it is gone. The engine refuses while any container mounts it, also one
        that never ran: it is the judge, so no check of ours can come too early or too late."""
        try:
            self._engine.call("volume", "rm", name)
        except NoSuch:
            pass

    def find(self, labels: Mapping[str, str]) -> list[Volume]:
        """The volumes that carry all these labels of ours. Compared here: several filters mean "or" to podman."""
        name, value = next(iter(labels.items()))
        said = self._engine.call("volume", "ls", "--quiet", "--filter", f"label={LABEL}{name}={value}", limit=8 << 20)
        found = self.inspect(*said.decode().split())
        return [one for one in found if all(one.label(name) == value for name, value in labels.items())]

    def ending(self, tail: str) -> list[str]:
        """The names of volumes that end so, whoever made them."""
        said = self._engine.call("volume", "ls", "--quiet", "--filter", f"name={tail}", limit=8 << 20)
        return [name for name in said.decode().split() if name.endswith(tail)]

    def inspect(self, *names: str) -> list[Volume]:
        """These volumes, without those that do not exist."""
        found: list[Volume] = []
        for start in range(0, len(names), 100):
            some = names[start : start + 100]
            said = self._engine.call("volume", "inspect", *some, partly=True, limit=8 << 20)
            found += [Volume(str(one["Name"]), one.get("Labels") or {}) for one in _array(said)]
        return found

    def hold(
        self,
        holder: str,
        image: str,
        labels: Mapping[str, str],
        volume: str = "",
        *,
        writable: bool = False,
        timeout: float = 0,
        interrupt: int = -1,
    ) -> None:
        """Make a container *holder* of *image* that is never started and mounts *volume*, if any. Raises NameTaken.

        Exactly one of several that ask for a name at once gets it. `true` need not exist in the image.
        """
        mount = ["--volume", f"{volume}:{_PLACE}" + ("" if writable else ":ro")] if volume else []
        named = ["--pull", "never", "--name", holder, *labelled(labels), "--network", "none"]
        self._engine.call("create", *named, *mount, image, "true", timeout=timeout, interrupt=interrupt)

    def fill(self, source: str, holder: str, *, timeout: float, interrupt: int = -1) -> None:
        """Unpack the files of *source* into the volume that *holder* mounts; complete when this returns.

        Two containers, because docker's `cp` locks the one it copies into before the first byte has come, and an
        export of the same would wait for that lock: both would hang for ever [met in one of five tries].
        What an export carries besides the image's files (`.dockerenv`, empty `dev`, `proc`, `sys`) harms nobody.
        """
        engine = self._engine
        keep_owners = ["--archive=false"] if engine.kind == "podman" else []  # podman gives all to its user otherwise
        try:
            with room(engine) as place:
                flow = pipeline.join(
                    [engine.program, "export", source],
                    [engine.program, "cp", *keep_owners, "-", f"{holder}:{_PLACE}"],
                    environment={**engine.environment, **place},
                    instance=engine.instance,
                    timeout=timeout,
                    last=len(_END),
                    interrupt=interrupt,
                )
        except SpawnError as error:
            raise EngineError(str(error)) from error
        try:
            self._judge(flow, timeout)
        except EngineDown:
            raise
        except EngineError:
            engine.call("version")  # `cp` says "must be a directory" where the engine has just died
            raise

    def _judge(self, flow: pipeline.Flow, timeout: float) -> None:
        """Raises EngineError unless both ended well and the tar is whole."""
        kind = self._engine.kind
        if flow.interrupted:
            raise Interrupted(f"{kind} export was interrupted")
        if flow.source.late:
            raise EngineDown(f"{kind} export and cp did not end within {format_duration(timeout)}")
        if flow.sink.code and flow.sink_failed_first:
            raise self._engine.refusal("cp", flow.sink.code, flow.sink.errors)
        if flow.source.code:
            raise self._engine.refusal("export", flow.source.code, flow.source.errors)
        if flow.source.output != _END:
            raise EngineError(f"{kind} export ended early although it said that all went well")
        if flow.sink.code:
            raise self._engine.refusal("cp", flow.sink.code, flow.sink.errors)


def _array(text: bytes) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or b"[]")
        return [one for one in found if one["Name"]]
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"the engine's program printed something unreadable: {text[:80]!r}") from error
