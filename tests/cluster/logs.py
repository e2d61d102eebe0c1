"""What `kubectl logs` reads: the files that the kubelet writes, by line and time, and the refusals of the real one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

from tests.cluster import clock
from tests.cluster.refusals import Json, bad_request

ORDER = ("initContainerStatuses", "containerStatuses")


def path_of(place: Path, uid: str, container: str, attempt: int) -> Path:
    """Where the output of a container's *attempt* stands."""
    return place / uid / "logs" / container / f"{attempt}.log"


def choose(pod: Json, wanted: str) -> str:
    """The container that is meant. Raises Refused."""
    name = pod["metadata"]["name"]
    main = [container["name"] for container in pod["spec"]["containers"]]
    early = [container["name"] for container in pod["spec"].get("initContainers") or ()]
    if wanted:
        if wanted not in (*main, *early):
            raise bad_request(f"container {wanted} is not valid for pod {name}")
        return wanted
    if len(main) == 1 and not early:
        return str(main[0])
    if len(main) == 1:
        return str(main[0])
    others = f" or one of the init containers: [{' '.join(early)}]" if early else ""
    raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{' '.join(main)}]{others}")


def attempt_of(pod: Json, container: str, *, previous: bool) -> int | None:
    """Which attempt's output is meant; None where there is none without this being a fault. Raises Refused."""
    if not pod["spec"].get("nodeName"):
        return None
    name = pod["metadata"]["name"]
    found = [row for kind in ORDER for row in pod["status"].get(kind) or () if row["name"] == container]
    if not found:
        raise bad_request(f'container "{container}" in pod "{name}" is not available')
    row = found[0]
    count = int(row.get("restartCount", 0))
    if previous:
        if not count:
            raise bad_request(f'previous terminated container "{container}" in pod "{name}" not found')
        return count - 1
    waiting = (row.get("state") or {}).get("waiting")
    if waiting is None:
        return count
    if row.get("lastState"):
        return count
    why = waiting.get("reason", "")
    if why in ("ErrImagePull", "ImagePullBackOff"):
        why = "trying and failing to pull image"
    elif why == "InvalidImageName":
        why = "image can't be pulled"
    raise bad_request(f'container "{container}" in pod "{name}" is waiting to start: {why}')


def rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """Time and text of each line; a line that has no end yet comes without its newline."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        head = line.split(b" ", 3)
        if len(head) == 4:
            yield head[0].decode(), head[3] + (b"\n" if head[2] == b"F" else b"")


def _first_second(options: Mapping[str, str], now: float) -> float:
    if "sinceSeconds" in options:
        return now - int(options["sinceSeconds"])
    return clock.seconds(options["sinceTime"]) if "sinceTime" in options else 0.0


def chosen(found: Iterable[tuple[str, bytes]], options: Mapping[str, str]) -> bytes:
    """The text that *options* ask for: since, then the tail, then as many bytes as are allowed."""
    first = _first_second(options, time.time())
    kept = [row for row in found if not first or _when(row[0]) >= first]
    if "tailLines" in options:
        ends = [number for number, row in enumerate(kept) if row[1].endswith(b"\n")]
        lines = len(ends) + (1 if kept and not kept[-1][1].endswith(b"\n") else 0)
        left_out = lines - int(options["tailLines"])
        kept = kept[ends[left_out - 1] + 1 :] if left_out > 0 else kept
    text = b"".join(
        (stamp.encode() + b" " if options.get("timestamps") == "true" else b"") + row for stamp, row in kept
    )
    return text[: int(options["limitBytes"])] if "limitBytes" in options else text


def _when(stamp: str) -> float:
    whole, _, part = stamp.rstrip("Z").partition(".")
    return clock.seconds(whole + "Z") + float(f"0.{part or 0}")


def stream(path: Path, options: Mapping[str, str], over: Callable[[], bool]) -> Iterator[bytes]:
    """The same and what comes later, until *over* and everything is told."""
    sent = len(list(rows(path)))
    yield chosen(list(rows(path))[:sent], options)
    while True:
        ends = over()
        found = list(rows(path))
        if len(found) > sent:
            yield b"".join(row for _, row in found[sent:])
            sent = len(found)
        if ends:
            return
        time.sleep(0.05)
