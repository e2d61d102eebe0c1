"""Sidecar volumes on real engines: complete or not at all, whoever dies, races, fills the disk or tidies up."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time

import pytest

from oz_worker.backends.sidecars import SidecarUnusable
from oz_worker.model import Sidecar
from tests.containers.depot import HOLD, INSTANCE, SLOW_COPY, Asking, Depot, ask, both
from tests.rig import SAFETY, until

DAY = 86400


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


def test_files_of_an_image_without_shell_or_tar_keep_modes_owners_and_links(any_depot: Depot) -> None:
    image = any_depot.image(layers=[odd_layer()], Volumes={"/declared": {}})
    sidecars = any_depot.sidecars()
    mount = ask(sidecars, image, any_depot.unit())
    assert mount.endswith(":/agent:ro")
    assert mount.startswith(f"ozw-oz-test-side-{any_depot.ready(image, any_depot.unit()).digest[:12]}-")
    looks = "cd /agent; stat -c '%n %a %u:%g' own own/suid own/closed empty; cat own/hard soft"
    assert any_depot.said(mount, f"{looks}; [ own/hard -ef own/suid ] && echo one; echo x >nonce || echo refused") == (
        "own 750 1000:1000\nown/suid 4755 1000:1000\nown/closed 400 65534:65534\nempty 1777 0:0\nhellohelloone\nrefused"
    )


def test_what_is_known_costs_no_call(any_depot: Depot) -> None:
    image, other = any_depot.image(), any_depot.image()
    sidecars = any_depot.sidecars()
    wanted = [Sidecar(image, "/agent"), Sidecar(other, "/mnt/x/")]
    first = sidecars.mounts(wanted, any_depot.unit())
    assert [mount.partition(":")[2] for mount in first] == ["/agent:ro", "/mnt/x:ro"]
    count = any_depot.called("")
    assert sidecars.mounts(wanted, any_depot.unit()) == first
    assert any_depot.called("") == count
    again = any_depot.sidecars()  # a restarted worker looks, and fills nothing
    assert again.mounts(wanted, any_depot.unit()) == first
    assert (any_depot.called("export"), any_depot.called("") - count) == (2, 4)
    again.note_marks(set(any_depot.named("mark")))
    count = any_depot.called("")
    assert again.mounts(wanted, any_depot.unit()) == first
    assert any_depot.called("") == count


def test_twenty_units_at_once_fill_once(depot: Depot) -> None:
    image = depot.image()
    sidecars = depot.sidecars(wrapper='[ "$1" != export ] || until [ -e "$PLACE/go" ]; do sleep 0.02; done')
    asking = [Asking(lambda: ask(sidecars, image, depot.unit())) for _ in range(20)]
    (depot.place / "go").touch()
    mounts = {one.end().mount for one in asking}
    assert (len(mounts), depot.called("export"), len(depot.volumes())) == (1, 1, 1)
    assert depot.said(mounts.pop(), "cat /agent/entry") == "runs"


def test_what_a_task_may_write_to_is_its_own_and_goes_with_it(any_depot: Depot) -> None:
    image = any_depot.image()
    sidecars, one, two = any_depot.sidecars(), any_depot.unit(), any_depot.unit()
    both_of_one = sidecars.mounts([Sidecar(image, "/a", True), Sidecar(image, "/b", True)], one)
    of_two = ask(sidecars, image, two, write=True)
    assert len(set(both(both_of_one, [of_two]))) == 3
    assert any_depot.said(both_of_one[0], "echo mine >/a/entry; cat /a/entry /b/entry", both_of_one[1]) == "mine\nruns"
    assert any_depot.said(of_two, "cat /agent/entry") == "runs"
    assert sidecars.drop_private(one) == ""
    assert any_depot.volumes() == both([of_two])
    user = any_depot.client.read("create", "--volume", of_two, any_depot.task, "true")
    assert "was not removed" in sidecars.drop_private(two)
    any_depot.client.cli("rm", user)
    restarted = any_depot.sidecars()
    assert [restarted.drop_private(two) for _ in range(2)] == ["", ""]
    any_depot.nothing_is_left()


def test_content_of_the_task_image_at_the_mount_is_not_copied(any_depot: Depot) -> None:
    mount = ask(any_depot.sidecars(), any_depot.image(), any_depot.unit(), "/etc", write=True)
    assert (
        any_depot.said(mount, "cat /etc/entry; [ -e /etc/passwd ] || echo only the sidecar") == "runsonly the sidecar"
    )
    for name in any_depot.volumes():
        any_depot.client.cli("volume", "rm", name)


# -- several workers


def test_two_workers_that_fill_at_once_use_one_volume(any_depot: Depot) -> None:
    image = any_depot.image()
    meet = (
        'case "$*" in *--name?oz-sidecar-*) : >"$PLACE/here-$OZ_WORKER_HELPER";'
        ' until [ -e "$PLACE/here-one" ] && [ -e "$PLACE/here-two" ]; do sleep 0.02; done;; esac'
    )
    processes = [any_depot.process(image, instance=name, wrapper=meet) for name in ("one", "two")]
    mounts = {process.communicate(timeout=SAFETY)[0] for process in processes}
    assert any_depot.called("export") == 2
    assert (len(mounts), len(any_depot.volumes()), any_depot.named("fill")) == (1, 1, [])
    assert any_depot.said(mounts.pop().decode().strip(), "cat /agent/entry") == "runs"


# -- trust


def test_marks_that_were_pruned_are_not_trusted(depot: Depot) -> None:
    image = depot.image()
    sidecars = depot.sidecars()
    first = ask(sidecars, image, depot.unit())
    (mark,) = depot.named("mark")
    assert "in use" in depot.client.cli("volume", "rm", first.split(":")[0], check=False).stderr.decode()
    depot.client.cli("container", "prune", "--force", "--filter", f"label=oz-worker.worker={depot.worker}")
    sidecars.mark_gone("oz-something-else")
    assert ask(sidecars, image, depot.unit()) == first  # nothing was heard of it so far
    sidecars.mark_gone(mark)
    second = ask(sidecars, image, depot.unit())
    assert second != first
    depot.client.cli("rm", mark)
    sidecars.note_marks(set())
    assert ask(sidecars, image, depot.unit()) not in (first, second)


def test_who_looked_before_a_mark_went_remembers_nothing(depot: Depot) -> None:
    image = depot.image()
    first = ask(depot.sidecars(), image, depot.unit())
    (mark,) = depot.named("mark")
    late = 'case "$*" in "volume inspect"*) [ -e "$PLACE/go" ] || { : >"$PLACE/reached"; until [ -e "$PLACE/go" ];'
    sidecars = depot.sidecars(wrapper=f"{late} do sleep 0.02; done; }};; esac")
    asking = Asking(lambda: ask(sidecars, image, depot.unit()))
    depot.reached()
    depot.client.cli("rm", mark)
    sidecars.mark_gone(mark)
    (depot.place / "go").touch()
    assert asking.end().mount == first
    assert ask(sidecars, image, depot.unit()) != first


def test_a_mark_whose_volume_the_engine_made_in_passing_is_not_believed(any_depot: Depot) -> None:
    image = any_depot.image()
    unit = any_depot.unit()
    mark = f"oz-sidecar-{any_depot.ready(image, unit).digest}"
    label = f"oz-worker.worker={any_depot.worker}"
    late = ["create", "--name", mark, "--label", label, "--label", "oz-worker.role=mark", "--network", "none"]
    any_depot.client.cli(*late, "--volume", "ozw-late:/x", image, "true")
    assert any_depot.said(ask(any_depot.sidecars(), image, unit), "cat /agent/entry") == "runs"
    any_depot.client.cli("volume", "rm", "ozw-late")


def test_a_stranger_with_the_name_of_a_mark_is_named(depot: Depot) -> None:
    image = depot.image()
    name = f"oz-sidecar-{depot.ready(image, depot.unit()).digest}"
    depot.client.cli("create", "--name", name, depot.task, "true")
    with pytest.raises(SidecarUnusable, match=f"the container {name} is none of a worker's; remove it"):
        ask(depot.sidecars(), image, depot.unit())
    depot.client.cli("rm", name)


# -- what is asked for


def test_nothing_is_made_where_one_of_several_cannot_be_had(depot: Depot) -> None:
    image = depot.image()
    sidecars = depot.sidecars()
    with pytest.raises(SidecarUnusable, match=r"sidecar 2 .*mounted at /agent already"):
        sidecars.mounts([Sidecar(image, "/agent", True), Sidecar(image, "/agent/")], depot.unit())
    with pytest.raises(SidecarUnusable, match="the sidecar no/such:1 for /b cannot be had: there is no image"):
        sidecars.mounts([Sidecar(image, "/a", True), Sidecar("no/such:1", "/b")], depot.unit())
    assert depot.called("") == 0
    depot.nothing_is_left()


# -- collecting


def set_ages(depot: Depot, instance: str = INSTANCE, **tables: dict[str, float]) -> None:
    """Write the file of ages, in days ago."""
    now = time.time()
    about = {"used": {}, "bare": {}, **tables}
    text = json.dumps({table: {name: now - days * DAY for name, days in about[table].items()} for table in about})
    depot.state(instance).write_text(text)


def test_what_nobody_used_goes_mark_first_and_volume_a_day_later(any_depot: Depot) -> None:
    old, fresh, busy = (any_depot.image() for _ in range(3))
    sidecars = any_depot.sidecars()
    mounts = {image: ask(sidecars, image, any_depot.unit()) for image in (old, fresh, busy)}
    volumes = {image: mount.split(":")[0] for image, mount in mounts.items()}
    task = any_depot.client.read("create", "--volume", mounts[busy], any_depot.task, "true")  # of whom ever
    set_ages(any_depot, used={volumes[old]: 8, volumes[fresh]: 6, volumes[busy]: 8})
    any_depot.sidecars(retention=0).collect()
    assert len(any_depot.named("mark")) == 3
    any_depot.sidecars(retention=7 * DAY).collect()
    assert (len(any_depot.named("mark")), len(any_depot.volumes())) == (2, 3)
    assert f"oz-sidecar-{any_depot.ready(old, any_depot.unit()).digest}" not in any_depot.named("mark")
    bare = dict.fromkeys(volumes.values(), 2.0)
    set_ages(any_depot, used=dict.fromkeys(bare, 0.0), bare={volumes[old]: 0.9})
    any_depot.sidecars(retention=7 * DAY).collect()
    assert len(any_depot.volumes()) == 3
    set_ages(any_depot, used=dict.fromkeys(bare, 0.0), bare=bare)
    any_depot.sidecars(retention=7 * DAY).collect()
    assert any_depot.volumes() == sorted([volumes[fresh], volumes[busy]])
    any_depot.sidecars(retention=7 * DAY).collect()
    assert set(json.loads(any_depot.state().read_text())["used"]) == {volumes[fresh], volumes[busy]}
    any_depot.client.cli("rm", task)


def test_a_task_that_comes_while_its_volume_is_judged_keeps_it(depot: Depot) -> None:
    image = depot.image()
    volume = ask(depot.sidecars(), image, depot.unit()).split(":")[0]
    set_ages(depot, used={volume: 8})
    late = 'case "$*" in ps*volume=*) : >"$PLACE/reached"; until [ -e "$PLACE/go" ]; do sleep 0.02; done;; esac'
    sidecars = depot.sidecars(retention=7 * DAY, wrapper=late)
    collecting = threading.Thread(target=sidecars.collect)
    collecting.start()
    depot.reached()
    ask(sidecars, image, depot.unit())
    (depot.place / "go").touch()
    collecting.join(SAFETY)
    assert len(depot.named("mark")) == 1


def test_left_overs_of_others_go_after_a_day_and_strangers_stay(depot: Depot) -> None:
    image = depot.image()
    process = depot.process(image, instance="never-back", wrapper=f'[ "$1" != cp ] || {HOLD}')
    depot.reached()
    process.kill()
    process.communicate()
    depot.sidecars(instance="other").remove_unfinished()
    depot.sidecars(instance="other").collect()
    fillers, (volume,) = depot.named("fill"), depot.volumes()
    assert len(fillers) == 2
    depot.client.cli("volume", "create", "--label", "oz-worker.worker=stranger", f"{volume}-stranger")
    set_ages(depot, "other", bare=dict.fromkeys([*fillers, f"{volume}-stranger"], 2.0))
    depot.sidecars(instance="other").collect()
    assert (depot.named("fill"), depot.volumes()) == ([], [])
    depot.client.cli("volume", "rm", f"{volume}-stranger")
    depot.restart("never-back")  # ends its helpers
    depot.nothing_is_left()


def test_a_filling_at_work_is_no_left_over_and_holds_up_nobody(any_depot: Depot) -> None:
    image = any_depot.image()
    late_export = (
        '[ "$1" != export ] || until [ -e "$PLACE/cp" ]; do sleep 0.02; done; [ "$1" != cp ] || : >"$PLACE/cp"'
    )
    sidecars = any_depot.sidecars(wrapper=f"{late_export}; {SLOW_COPY}")
    asking = Asking(lambda: ask(sidecars, image, any_depot.unit()))
    any_depot.reached()
    sidecars.collect()
    assert (len(any_depot.named("fill")), asking.error, asking.mount) == (2, None, "")
    (any_depot.place / "go").touch()
    assert any_depot.said(asking.end().mount, "cat /agent/entry") == "runs"


def test_what_could_not_be_removed_is_removed_later(depot: Depot) -> None:
    cut = '[ "$1" != export ] || exit 1'
    away = (
        'case "$*" in "container rm"*) [ -e "$PLACE/well" ] || { echo error during connect: EOF >&2; exit 1; };; esac'
    )
    sidecars = depot.sidecars(wrapper=f"{cut}; {away}")
    with pytest.raises(SidecarUnusable, match="exit code 1"):
        ask(sidecars, depot.image(), depot.unit())
    assert (len(depot.named("fill")), len(depot.volumes())) == (2, 1)
    (depot.place / "well").touch()
    sidecars.collect()
    depot.nothing_is_left()


def test_the_threads_of_fillings_end(depot: Depot) -> None:
    ask(depot.sidecars(), depot.image(), depot.unit())
    until(lambda: not any(thread.name == "sidecar" for thread in threading.enumerate()), "the end of the threads")
