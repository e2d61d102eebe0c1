"""Fillings that fail, hang or are killed, on real engines: nothing half-filled is mounted, nothing is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.images import ImageFacts
from oz_worker.backends.sidecars import SidecarUnusable
from oz_worker.engine_words import EngineDown
from oz_worker.errors import Stopped
from oz_worker.model import Cause
from tests.containers.depot import HOLD, SLOW_COPY, Asking, Depot, ask
from tests.engines.census import census
from tests.engines.client import Client
from tests.engines.fixtures import OwnEngine
from tests.engines.images import load_images

CUTS = {
    "midway, and it says so": ('"$REAL" "$@" | head -c 70000; echo disk on fire >&2; exit 1', "disk on fire"),
    "midway, with exit code 0": ('"$REAL" "$@" | head -c 70000; exit 0', "ended early although it said"),
    "between two files, with exit code 0": ('"$REAL" "$@" | head -c 512; exit 0', "ended early although it said"),
    "by an error in the stream": (
        '"$REAL" "$@" | head -c 512; echo \'{"message":"no"}\'; exit 0',
        "ended early although",
    ),
}


def test_an_export_that_is_cut_is_noticed(depot: Depot) -> None:
    image = depot.image(files={"big": (0o644, os.urandom(200_000))})
    for script, told in CUTS.values():
        with pytest.raises(SidecarUnusable, match=told):
            ask(depot.sidecars(wrapper=f'if [ "$1" = export ]; then {script}; fi'), image, depot.unit())
    depot.nothing_is_left()
    assert depot.said(ask(depot.sidecars(), image, depot.unit()), "wc -c </agent/big") == "200000"


def test_podman_is_watched_alike(podman: Client, tmp_path: Path) -> None:
    depot = Depot(tmp_path, podman, load_images(podman).task)
    image = depot.image()
    with pytest.raises(SidecarUnusable, match="ended early"):
        ask(depot.sidecars(wrapper='[ "$1" != export ] || { "$REAL" "$@" | head -c 512; exit; }'), image, depot.unit())
    depot.nothing_is_left()
    process = depot.process(image, wrapper=f'[ "$1" != cp ] || {HOLD}')
    depot.reached()
    process.kill()
    process.communicate()
    assert depot.said(ask(depot.restart(), image, depot.unit()), "cat /agent/entry") == "runs"
    assert (len(depot.volumes()), depot.named("fill")) == (1, [])
    depot.close()


def test_a_full_disk_leaves_nothing_and_says_what_to_do(own_engine: OwnEngine, tmp_path: Path) -> None:
    engine = own_engine(data_mb=40)
    task = load_images(engine).task
    hog = ["run", "--rm", "--network", "none", "--volume", "hog:/hog", task]
    depot = Depot(tmp_path, engine, task)
    image = depot.image(files={"big": (0o644, os.urandom(12 << 20))})
    engine.cli(*hog, "dd", "if=/dev/zero", "of=/hog/it", "bs=1M", "count=16")
    depot.before = census(engine)
    sidecars = depot.sidecars()
    for write in (False, True):
        with pytest.raises(SidecarUnusable, match=r"no space left on device; free space on the disk where the engine"):
            ask(sidecars, image, depot.unit(), write=write)
        depot.nothing_is_left()


def test_an_engine_that_dies_midway_is_waited_for_and_leaves_nothing(own_engine: OwnEngine, tmp_path: Path) -> None:
    engine = own_engine()
    depot = Depot(tmp_path, engine, load_images(engine).task)
    image = depot.image(files={"big": (0o644, os.urandom(3 << 20))})
    sidecars = depot.sidecars(wrapper=SLOW_COPY)
    asking = Asking(lambda: ask(sidecars, image, depot.unit()))
    depot.reached()
    engine.kill()
    (depot.place / "go").touch()
    assert isinstance(asking.end().error, EngineDown), asking.error
    engine.start_again()
    assert depot.said(ask(sidecars, image, depot.unit()), "wc -c </agent/big") == str(3 << 20)
    assert (depot.named("fill"), len(depot.volumes())) == ([], 1)
    depot.close()


def test_a_filling_has_a_limit(depot: Depot) -> None:
    with pytest.raises(SidecarUnusable, match=r"was not unpacked within 2s .*raise backend\.docker\.pull_timeout"):
        ask(depot.sidecars(wrapper='[ "$1" != cp ] || exec sleep 1000', timeout=2), depot.image(), depot.unit())
    depot.nothing_is_left()


@pytest.mark.parametrize("write", [False, True])
def test_a_filling_ends_with_the_last_who_waits(depot: Depot, write: bool) -> None:
    image, units = depot.image(), [depot.unit(), depot.unit()]
    sidecars = depot.sidecars(wrapper=f'[ "$1" != cp ] || {HOLD}')
    asking = [Asking(lambda unit=unit: ask(sidecars, image, unit, write=write)) for unit in units]  # type: ignore[misc]
    depot.reached()
    for unit, one in zip(units, asking, strict=True):
        assert (one.error, len(depot.volumes()) > 0) == (None, True)
        unit.order_stop(Cause.CANCEL, 0)
        assert isinstance(one.end().error, Stopped)
    depot.nothing_is_left()


def test_an_image_that_is_gone_is_got_again(depot: Depot) -> None:
    image = depot.image()
    stale = depot.ready(image, depot.unit())
    forgotten: list[str] = []
    depot.client.cli("rmi", image)

    def ready(name: str, unit: Unit) -> ImageFacts:
        return depot.ready(depot.image(), unit) if forgotten else stale

    mount = ask(depot.sidecars(ready=ready, forget=forgotten.append), image, depot.unit())
    assert (forgotten, depot.said(mount, "cat /agent/entry")) == ([image], "runs")


# -- kill -9

POINTS = {
    "with the volume": ('"volume create"*', "after"),
    "with the filler": ("*--name?oz-fill-*", "after"),
    "in the middle of the export": ("export*", "midway"),
    "in the middle of the copy": ("cp*", "before"),
    "before the mark": ("*--name?oz-sidecar-*", "before"),
    "with the mark": ("*--name?oz-sidecar-*", "after"),
}
_MOMENTS = {
    "before": HOLD,
    "midway": f'"$REAL" "$@" | {{ head -c 66000; {HOLD}; }}',
    "after": f'"$REAL" "$@" >/dev/null; {HOLD}',
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_nothing_half_filled(depot: Depot, point: str) -> None:
    image = depot.image(files={"big": (0o644, os.urandom(300_000))})
    pattern, moment = POINTS[point]
    process = depot.process(image, wrapper=f'case "$*" in {pattern}) {_MOMENTS[moment]};; esac')
    depot.reached()
    process.kill()
    process.communicate()
    sidecars = depot.restart()
    complete = point == "with the mark"
    assert (depot.named("fill"), len(depot.named("mark")), len(depot.volumes())) == ([], complete, complete)
    if not complete:
        depot.nothing_is_left()
    assert depot.said(ask(sidecars, image, depot.unit()), "wc -c </agent/big") == "300000"


def test_a_kill_leaves_nothing_private(depot: Depot) -> None:
    process = depot.process(depot.image(), wrapper=f'case "$*" in "container rm"*) {HOLD};; esac', private=True)
    depot.reached()
    process.kill()
    process.communicate()
    assert len(depot.volumes()) == 1
    depot.restart()
    depot.nothing_is_left()
