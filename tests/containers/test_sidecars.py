"""Sidecar volumes on real engines: complete or not at all, whoever dies, races, fills the disk or tidies up."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.images import ImageFacts
from oz_worker.backends.sidecars import Sidecars, SidecarUnusable
from oz_worker.containers import EngineDown
from oz_worker.errors import Stopped
from oz_worker.model import Cause, Sidecar
from tests.containers.sidecar_site import HOLD, INSTANCE, Site, both
from tests.engines.census import census
from tests.engines.client import Client
from tests.engines.fixtures import OwnEngine
from tests.engines.images import Images, load_images
from tests.rig import SAFETY, until

DAY = 86400


@pytest.fixture
def site(tmp_path: Path, engine: Client, images: Images) -> Iterator[Site]:
    """Over the Docker Engine of the session."""
    site = Site(tmp_path, engine, images.task)
    yield site
    site.close()


@pytest.fixture(params=["docker", "podman"])
def any_site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """Over each kind of engine."""
    if request.param == "podman":
        client: Client = request.getfixturevalue("podman")
        site = Site(tmp_path, client, load_images(client).task)
    else:
        site = Site(tmp_path, request.getfixturevalue("engine"), request.getfixturevalue("images").task)
    yield site
    site.close()


def ask(sidecars: Sidecars, image: str, unit: Unit, path: str = "/agent", *, write: bool = False) -> str:
    return sidecars.mounts([Sidecar(image, path, write)], unit)[0]


class Asking:
    """A thread that asks for one mount."""

    def __init__(self, act: Callable[[], str]) -> None:
        self.mount = ""
        self.error: Exception | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.mount = self._act()
        except Exception as error:
            self.error = error

    def end(self) -> Asking:
        self._thread.join(SAFETY)
        assert not self._thread.is_alive()
        return self


def odd_layer() -> bytes:
    """Files with owners, modes and links of every kind."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, owner: int = 0, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.linkname = kind, mode, owner, owner, link
            info.size = 5 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"hello"))

        add("own", tarfile.DIRTYPE, 0o750, 1000)
        add("own/suid", mode=0o4755, owner=1000)
        add("own/closed", mode=0o400, owner=65534)
        add("own/hard", tarfile.LNKTYPE, 0o4755, 1000, "own/suid")
        add("soft", tarfile.SYMTYPE, 0o777, link="own/suid")
        add("empty", tarfile.DIRTYPE, 0o1777)
    return stream.getvalue()


# -- what a task gets


def test_files_of_an_image_without_shell_or_tar_keep_modes_owners_and_links(any_site: Site) -> None:
    image = any_site.image(layers=[odd_layer()], Volumes={"/declared": {}})
    sidecars = any_site.sidecars()
    mount = ask(sidecars, image, any_site.unit())
    assert mount.endswith(":/agent:ro")
    assert mount.startswith(f"ozw-oz-test-side-{any_site.ready(image, any_site.unit()).digest[:12]}-")
    looks = "cd /agent; stat -c '%n %a %u:%g' own own/suid own/closed empty; cat own/hard soft"
    assert any_site.said(mount, f"{looks}; [ own/hard -ef own/suid ] && echo one; echo x >nonce || echo refused") == (
        "own 750 1000:1000\nown/suid 4755 1000:1000\nown/closed 400 65534:65534\nempty 1777 0:0\nhellohelloone\nrefused"
    )


def test_what_is_known_costs_no_call(any_site: Site) -> None:
    image, other = any_site.image(), any_site.image()
    sidecars = any_site.sidecars()
    wanted = [Sidecar(image, "/agent"), Sidecar(other, "/mnt/x/")]
    first = sidecars.mounts(wanted, any_site.unit())
    assert [mount.partition(":")[2] for mount in first] == ["/agent:ro", "/mnt/x:ro"]
    count = any_site.called("")
    assert sidecars.mounts(wanted, any_site.unit()) == first
    assert any_site.called("") == count
    again = any_site.sidecars()  # a restarted worker looks, and fills nothing
    assert again.mounts(wanted, any_site.unit()) == first
    assert (any_site.called("export"), any_site.called("") - count) == (2, 4)
    again.note_marks(set(any_site.named("mark")))
    count = any_site.called("")
    assert again.mounts(wanted, any_site.unit()) == first
    assert any_site.called("") == count


def test_twenty_units_at_once_fill_once(any_site: Site) -> None:
    image = any_site.image()
    sidecars = any_site.sidecars(wrapper='[ "$1" != export ] || until [ -e "$PLACE/go" ]; do sleep 0.02; done')
    asking = [Asking(lambda: ask(sidecars, image, any_site.unit())) for _ in range(20)]
    (any_site.place / "go").touch()
    mounts = {one.end().mount for one in asking}
    assert (len(mounts), any_site.called("export"), len(any_site.volumes())) == (1, 1, 1)
    assert any_site.said(mounts.pop(), "cat /agent/entry") == "runs"


def test_what_a_task_may_write_to_is_its_own_and_goes_with_it(any_site: Site) -> None:
    image = any_site.image()
    sidecars, one, two = any_site.sidecars(), any_site.unit(), any_site.unit()
    both_of_one = sidecars.mounts([Sidecar(image, "/a", True), Sidecar(image, "/b", True)], one)
    of_two = ask(sidecars, image, two, write=True)
    assert len(set(both(both_of_one, [of_two]))) == 3
    assert any_site.said(both_of_one[0], "echo mine >/a/entry; cat /a/entry /b/entry", both_of_one[1]) == "mine\nruns"
    assert any_site.said(of_two, "cat /agent/entry") == "runs"
    assert sidecars.drop_private(one) == ""
    assert any_site.volumes() == both([of_two])
    user = any_site.client.read("create", "--volume", of_two, any_site.task, "true")
    assert "was not removed" in sidecars.drop_private(two)
    any_site.client.cli("rm", user)
    restarted = any_site.sidecars()
    assert [restarted.drop_private(two) for _ in range(2)] == ["", ""]
    any_site.nothing_is_left()


def test_content_of_the_task_image_at_the_mount_is_not_copied(any_site: Site) -> None:
    mount = ask(any_site.sidecars(), any_site.image(), any_site.unit(), "/etc", write=True)
    assert any_site.said(mount, "cat /etc/entry; [ -e /etc/passwd ] || echo only the sidecar") == "runsonly the sidecar"
    for name in any_site.volumes():
        any_site.client.cli("volume", "rm", name)


# -- filling that fails

CUTS = {
    "midway, and it says so": ('"$REAL" "$@" | head -c 70000; echo disk on fire >&2; exit 1', "disk on fire"),
    "midway, with exit code 0": ('"$REAL" "$@" | head -c 70000; exit 0', "ended early although it said"),
    "between two files, with exit code 0": ('"$REAL" "$@" | head -c 512; exit 0', "ended early although it said"),
    "by an error in the stream": (
        '"$REAL" "$@" | head -c 512; echo \'{"message":"no"}\'; exit 0',
        "ended early although",
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_an_export_that_is_cut_is_noticed(site: Site, cut: str) -> None:
    image = site.image(files={"big": (0o644, os.urandom(200_000))})
    script, told = CUTS[cut]
    with pytest.raises(SidecarUnusable, match=told):
        ask(site.sidecars(wrapper=f'if [ "$1" = export ]; then {script}; fi'), image, site.unit())
    site.nothing_is_left()
    assert site.said(ask(site.sidecars(), image, site.unit()), "wc -c </agent/big") == "200000"


def test_podman_is_watched_alike(podman: Client, tmp_path: Path) -> None:
    site = Site(tmp_path, podman, load_images(podman).task)
    image = site.image()
    with pytest.raises(SidecarUnusable, match="ended early"):
        ask(site.sidecars(wrapper='[ "$1" != export ] || { "$REAL" "$@" | head -c 512; exit; }'), image, site.unit())
    site.nothing_is_left()
    process = site.process(image, wrapper=f'[ "$1" != cp ] || {HOLD}')
    site.reached()
    process.kill()
    process.communicate()
    assert site.said(ask(site.restart(), image, site.unit()), "cat /agent/entry") == "runs"
    assert (len(site.volumes()), site.named("fill")) == (1, [])
    site.close()


def test_a_full_disk_leaves_nothing_and_says_what_to_do(own_engine: OwnEngine, tmp_path: Path) -> None:
    engine = own_engine(data_mb=40)
    task = load_images(engine).task
    hog = ["run", "--rm", "--network", "none", "--volume", "hog:/hog", task]
    site = Site(tmp_path, engine, task)
    image = site.image(files={"big": (0o644, os.urandom(12 << 20))})
    engine.cli(*hog, "dd", "if=/dev/zero", "of=/hog/it", "bs=1M", "count=16")
    site.before = census(engine)
    sidecars = site.sidecars()
    for write in (False, True):
        with pytest.raises(SidecarUnusable, match=r"no space left on device; free space on the disk where the engine"):
            ask(sidecars, image, site.unit(), write=write)
        site.nothing_is_left()


def test_an_engine_that_dies_midway_is_waited_for_and_leaves_nothing(own_engine: OwnEngine, tmp_path: Path) -> None:
    engine = own_engine()
    site = Site(tmp_path, engine, load_images(engine).task)
    image = site.image(files={"big": (0o644, os.urandom(3 << 20))})
    slow = '[ "$1" != cp ] || { { head -c 1000000; : >"$PLACE/reached"; sleep 1; cat; } | "$REAL" "$@"; exit; }'
    sidecars = site.sidecars(wrapper=slow)
    asking = Asking(lambda: ask(sidecars, image, site.unit()))
    site.reached()
    engine.kill()
    assert isinstance(asking.end().error, EngineDown), asking.error
    engine.start_again()
    assert site.said(ask(sidecars, image, site.unit()), "wc -c </agent/big") == str(3 << 20)
    assert (site.named("fill"), len(site.volumes())) == ([], 1)
    site.close()


def test_a_filling_has_a_limit(site: Site) -> None:
    with pytest.raises(SidecarUnusable, match=r"was not unpacked within 3s .*raise backend\.docker\.pull_timeout"):
        ask(site.sidecars(wrapper='[ "$1" != cp ] || exec sleep 1000', timeout=3), site.image(), site.unit())
    site.nothing_is_left()


@pytest.mark.parametrize("write", [False, True])
def test_a_filling_ends_with_the_last_who_waits(site: Site, write: bool) -> None:
    image, units = site.image(), [site.unit(), site.unit()]
    sidecars = site.sidecars(wrapper=f'[ "$1" != cp ] || {HOLD}')
    asking = [Asking(lambda unit=unit: ask(sidecars, image, unit, write=write)) for unit in units]  # type: ignore[misc]
    site.reached()
    for unit, one in zip(units, asking, strict=True):
        assert (one.error, len(site.volumes()) > 0) == (None, True)
        unit.order_stop(Cause.CANCEL, 0)
        assert isinstance(one.end().error, Stopped)
    site.nothing_is_left()


def test_an_image_that_is_gone_is_got_again(site: Site) -> None:
    image = site.image()
    stale = site.ready(image, site.unit())
    forgotten: list[str] = []
    site.client.cli("rmi", image)

    def ready(name: str, unit: Unit) -> ImageFacts:
        return site.ready(site.image(), unit) if forgotten else stale

    mount = ask(site.sidecars(ready=ready, forget=forgotten.append), image, site.unit())
    assert (forgotten, site.said(mount, "cat /agent/entry")) == ([image], "runs")


# -- kill -9

POINTS = {
    "before the volume": ('"volume create"*', "before"),
    "with the volume": ('"volume create"*', "after"),
    "with the filler": ("*--name?oz-fill-*", "after"),
    "in the middle of the export": ("export*", "midway"),
    "in the middle of the copy": ("cp*", "before"),
    "before the mark": ("*--name?oz-sidecar-*", "before"),
    "with the mark": ("*--name?oz-sidecar-*", "after"),
    "before the filler is removed": ('"container rm"*', "before"),
}
_MOMENTS = {
    "before": HOLD,
    "midway": f'"$REAL" "$@" | {{ head -c 66000; {HOLD}; }}',
    "after": f'"$REAL" "$@" >/dev/null; {HOLD}',
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_nothing_half_filled(site: Site, point: str) -> None:
    image = site.image(files={"big": (0o644, os.urandom(300_000))})
    pattern, moment = POINTS[point]
    process = site.process(image, wrapper=f'case "$*" in {pattern}) {_MOMENTS[moment]};; esac')
    site.reached()
    process.kill()
    process.communicate()
    sidecars = site.restart()
    complete = point in ("with the mark", "before the filler is removed")
    assert (site.named("fill"), len(site.named("mark")), len(site.volumes())) == ([], complete, complete)
    if not complete:
        site.nothing_is_left()
    assert site.said(ask(sidecars, image, site.unit()), "wc -c </agent/big") == "300000"


def test_a_kill_leaves_nothing_private(site: Site) -> None:
    process = site.process(site.image(), wrapper=f'case "$*" in "container rm"*) {HOLD};; esac', private=True)
    site.reached()
    process.kill()
    process.communicate()
    assert len(site.volumes()) == 1
    site.restart()
    site.nothing_is_left()


# -- several workers


def test_two_workers_that_fill_at_once_use_one_volume(any_site: Site) -> None:
    image = any_site.image()
    meet = (
        'case "$*" in *--name?oz-sidecar-*) : >"$PLACE/here-$OZ_WORKER_HELPER";'
        ' until [ -e "$PLACE/here-one" ] && [ -e "$PLACE/here-two" ]; do sleep 0.02; done;; esac'
    )
    processes = [any_site.process(image, instance=name, wrapper=meet) for name in ("one", "two")]
    mounts = {process.communicate(timeout=SAFETY)[0] for process in processes}
    assert any_site.called("export") == 2
    assert (len(mounts), len(any_site.volumes()), any_site.named("fill")) == (1, 1, [])
    assert any_site.said(mounts.pop().decode().strip(), "cat /agent/entry") == "runs"


# -- trust


def test_marks_that_were_pruned_are_not_trusted(site: Site) -> None:
    image = site.image()
    sidecars = site.sidecars()
    first = ask(sidecars, image, site.unit())
    (mark,) = site.named("mark")
    assert "in use" in site.client.cli("volume", "rm", first.split(":")[0], check=False).stderr.decode()
    site.client.cli("container", "prune", "--force", "--filter", f"label=oz-worker.worker={site.worker}")
    sidecars.mark_gone("oz-something-else")
    assert ask(sidecars, image, site.unit()) == first  # nothing was heard of it so far
    sidecars.mark_gone(mark)
    second = ask(sidecars, image, site.unit())
    assert second != first
    site.client.cli("rm", mark)
    sidecars.note_marks(set())
    assert ask(sidecars, image, site.unit()) not in (first, second)


def test_who_looked_before_a_mark_went_remembers_nothing(site: Site) -> None:
    image = site.image()
    first = ask(site.sidecars(), image, site.unit())
    (mark,) = site.named("mark")
    late = 'case "$*" in "volume inspect"*) [ -e "$PLACE/go" ] || { : >"$PLACE/reached"; until [ -e "$PLACE/go" ];'
    sidecars = site.sidecars(wrapper=f"{late} do sleep 0.02; done; }};; esac")
    asking = Asking(lambda: ask(sidecars, image, site.unit()))
    site.reached()
    site.client.cli("rm", mark)
    sidecars.mark_gone(mark)
    (site.place / "go").touch()
    assert asking.end().mount == first
    assert ask(sidecars, image, site.unit()) != first


def test_a_mark_whose_volume_the_engine_made_in_passing_is_not_believed(any_site: Site) -> None:
    image = any_site.image()
    unit = any_site.unit()
    mark = f"oz-sidecar-{any_site.ready(image, unit).digest}"
    label = f"oz-worker.worker={any_site.worker}"
    late = ["create", "--name", mark, "--label", label, "--label", "oz-worker.role=mark", "--network", "none"]
    any_site.client.cli(*late, "--volume", "ozw-late:/x", image, "true")
    assert any_site.said(ask(any_site.sidecars(), image, unit), "cat /agent/entry") == "runs"
    any_site.client.cli("volume", "rm", "ozw-late")


def test_a_stranger_with_the_name_of_a_mark_is_named(site: Site) -> None:
    image = site.image()
    name = f"oz-sidecar-{site.ready(image, site.unit()).digest}"
    site.client.cli("create", "--name", name, site.task, "true")
    with pytest.raises(SidecarUnusable, match=f"the container {name} is none of a worker's; remove it"):
        ask(site.sidecars(), image, site.unit())
    site.client.cli("rm", name)


# -- what is asked for


def test_nothing_is_made_where_one_of_several_cannot_be_had(site: Site) -> None:
    image = site.image()
    sidecars = site.sidecars()
    with pytest.raises(SidecarUnusable, match=r"sidecar 2 .*mounted at /agent already"):
        sidecars.mounts([Sidecar(image, "/agent", True), Sidecar(image, "/agent/")], site.unit())
    with pytest.raises(SidecarUnusable, match="the sidecar no/such:1 for /b cannot be had: there is no image"):
        sidecars.mounts([Sidecar(image, "/a", True), Sidecar("no/such:1", "/b")], site.unit())
    assert site.called("") == 0
    site.nothing_is_left()


# -- collecting


def set_ages(site: Site, instance: str = INSTANCE, **tables: dict[str, float]) -> None:
    """Write the file of ages, in days ago."""
    now = time.time()
    about = {"used": {}, "bare": {}, **tables}
    text = json.dumps({table: {name: now - days * DAY for name, days in about[table].items()} for table in about})
    site.state(instance).write_text(text)


def test_what_nobody_used_goes_mark_first_and_volume_a_day_later(any_site: Site) -> None:
    old, fresh, busy = (any_site.image() for _ in range(3))
    sidecars = any_site.sidecars()
    mounts = {image: ask(sidecars, image, any_site.unit()) for image in (old, fresh, busy)}
    volumes = {image: mount.split(":")[0] for image, mount in mounts.items()}
    task = any_site.client.read("create", "--volume", mounts[busy], any_site.task, "true")  # of whom ever
    set_ages(any_site, used={volumes[old]: 8, volumes[fresh]: 6, volumes[busy]: 8})
    any_site.sidecars(retention=0).collect()
    assert len(any_site.named("mark")) == 3
    any_site.sidecars(retention=7 * DAY).collect()
    assert (len(any_site.named("mark")), len(any_site.volumes())) == (2, 3)
    assert f"oz-sidecar-{any_site.ready(old, any_site.unit()).digest}" not in any_site.named("mark")
    bare = dict.fromkeys(volumes.values(), 2.0)
    set_ages(any_site, used=dict.fromkeys(bare, 0.0), bare={volumes[old]: 0.9})
    any_site.sidecars(retention=7 * DAY).collect()
    assert len(any_site.volumes()) == 3
    set_ages(any_site, used=dict.fromkeys(bare, 0.0), bare=bare)
    any_site.sidecars(retention=7 * DAY).collect()
    assert any_site.volumes() == sorted([volumes[fresh], volumes[busy]])
    any_site.sidecars(retention=7 * DAY).collect()
    assert set(json.loads(any_site.state().read_text())["used"]) == {volumes[fresh], volumes[busy]}
    any_site.client.cli("rm", task)


def test_a_task_that_comes_while_its_volume_is_judged_keeps_it(site: Site) -> None:
    image = site.image()
    volume = ask(site.sidecars(), image, site.unit()).split(":")[0]
    set_ages(site, used={volume: 8})
    late = 'case "$*" in ps*volume=*) : >"$PLACE/reached"; until [ -e "$PLACE/go" ]; do sleep 0.02; done;; esac'
    sidecars = site.sidecars(retention=7 * DAY, wrapper=late)
    collecting = threading.Thread(target=sidecars.collect)
    collecting.start()
    site.reached()
    ask(sidecars, image, site.unit())
    (site.place / "go").touch()
    collecting.join(SAFETY)
    assert len(site.named("mark")) == 1


def test_left_overs_of_others_go_after_a_day_and_strangers_stay(site: Site) -> None:
    image = site.image()
    process = site.process(image, instance="never-back", wrapper=f'[ "$1" != cp ] || {HOLD}')
    site.reached()
    process.kill()
    process.communicate()
    site.sidecars(instance="other").remove_unfinished()
    site.sidecars(instance="other").collect()
    fillers, (volume,) = site.named("fill"), site.volumes()
    assert len(fillers) == 2
    site.client.cli("volume", "create", "--label", "oz-worker.worker=stranger", f"{volume}-stranger")
    set_ages(site, "other", bare=dict.fromkeys([*fillers, f"{volume}-stranger"], 2.0))
    site.sidecars(instance="other").collect()
    assert (site.named("fill"), site.volumes()) == ([], [])
    site.client.cli("volume", "rm", f"{volume}-stranger")
    site.restart("never-back")  # ends its helpers
    site.nothing_is_left()


def test_a_filling_at_work_is_no_left_over(site: Site) -> None:
    image = site.image()
    slow = 'if [ "$1" = cp ]; then : >"$PLACE/reached"; until [ -e "$PLACE/go" ]; do sleep 0.02; done; fi'
    sidecars = site.sidecars(wrapper=slow)
    asking = Asking(lambda: ask(sidecars, image, site.unit()))
    site.reached()
    sidecars.collect()
    (site.place / "go").touch()
    assert site.said(asking.end().mount, "cat /agent/entry") == "runs"


def test_what_could_not_be_removed_is_removed_later(site: Site) -> None:
    cut = '[ "$1" != export ] || exit 1'
    stuck = f'{cut}; case "$*" in "container rm"*) [ -e "$PLACE/well" ] || exec sleep 1000;; esac'
    sidecars = site.sidecars(wrapper=stuck, calls=3)
    with pytest.raises(SidecarUnusable, match="exit code 1"):
        ask(sidecars, site.image(), site.unit())
    assert (len(site.named("fill")), len(site.volumes())) == (2, 1)
    (site.place / "well").touch()
    sidecars.collect()
    site.nothing_is_left()


@pytest.mark.parametrize("damage", ["{", "[]", '{"used": {"a": "x"}, "bare": {}}', '{"used": 1, "bare": {}}'])
def test_a_damaged_file_of_ages_is_forgotten(site: Site, damage: str) -> None:
    image = site.image()
    site.state().write_text(damage)
    ask(site.sidecars(retention=1 * DAY), image, site.unit())
    site.sidecars(retention=1 * DAY).collect()
    assert len(site.named("mark")) == 1
    assert oct(site.state().stat().st_mode)[-3:] == "600"


def test_the_threads_of_fillings_end(site: Site) -> None:
    ask(site.sidecars(), site.image(), site.unit())
    until(lambda: not any(thread.name == "sidecar" for thread in threading.enumerate()), "the end of the threads")
