"""What every backend promises (`oz_worker.backends.base.Backend`), tried over each of them.

A backend joins by a `Site` of its own in SITES: how to open it (again), and a spec whose agent does what a script in
sh says. What a backend cannot do is data (`Capabilities`), and the tests read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator, Protocol

import pytest

from oz_worker.backends.base import Backend, Unit
from oz_worker.errors import Stopped, TaskFault
from oz_worker.model import Cause
from tests.containers.docker_site import DockerSite
from tests.engines.images import load_images
from tests.hosting import INSTANCE, PATIENCE, Stage, eventually, marked
from tests.kubernetes.kubernetes_site import KubernetesSite


class Site(Protocol):
    """One backend with a world around it."""

    def open(self) -> Backend:
        """A backend over the same world: the second one is what a restarted worker sees."""

    def unit(self, script: str) -> Unit:
        """A unit whose agent runs *script*."""

    def running(self, unit: Unit) -> bool:
        """Whether anything of the unit runs, seen from outside."""

    def close(self) -> None:
        """End everything."""


class DirectSite:
    """The direct backend; `cgroup` says which way trees are ended."""

    def __init__(self, root: Path, cgroup: str) -> None:
        self.stage = Stage(root)
        self.cgroup = cgroup

    def open(self) -> Backend:
        return self.stage.direct(cgroup=self.cgroup)

    def unit(self, script: str) -> Unit:
        self.stage.agent(script)
        return self.stage.unit(f"task-{len(self.stage.units)}")

    def running(self, unit: Unit) -> bool:
        return bool(marked(self.stage.mark(unit)))

    def close(self) -> None:
        self.stage.close()


class CommandSite(DirectSite):
    """The command backend, whose dispatcher is the agent here."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "off")

    def open(self) -> Backend:
        return self.stage.command(f"exec {self.stage.oz}")


def docker_site(root: Path, request: pytest.FixtureRequest) -> Site:
    """The docker backend over the engine of the session."""
    return DockerSite(root, request.getfixturevalue("engine"), request.getfixturevalue("images"))


def podman_site(root: Path, request: pytest.FixtureRequest) -> Site:
    """The same over podman."""
    podman = request.getfixturevalue("podman")
    return DockerSite(root, podman, load_images(podman), kind="podman")


def kubernetes_site(root: Path, request: pytest.FixtureRequest) -> Site:
    """The kubernetes backend over the cluster of the session."""
    return KubernetesSite(root, request.getfixturevalue("cluster"))


SITES: dict[str, Callable[[Path, pytest.FixtureRequest], Site]] = {
    "direct-cgroup": lambda root, _request: DirectSite(root, "auto"),
    "direct-swept": lambda root, _request: DirectSite(root, "off"),
    "command": lambda root, _request: CommandSite(root),
    "docker": docker_site,
    "podman": podman_site,
    "kubernetes": kubernetes_site,
}


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    site = SITES[request.param](tmp_path, request)
    yield site
    site.close()


def started(backend: Backend, unit: Unit) -> Unit:
    backend.prepare(unit)
    backend.start(unit)
    return unit


def until_end(unit: Unit) -> Unit:
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None
    return unit


def again(unit: Unit) -> Unit:
    return Unit(unit.name, unit.instance, unit.key)


def removed(backend: Backend, unit: Unit) -> bool:
    assert backend.clean_up(unit, keep=False) == ""
    return unit.name not in [found.name for found in backend.units()]


def test_success_has_no_reason_and_leaves_nothing(site: Site) -> None:
    backend = site.open()
    unit = until_end(started(backend, site.unit("echo hello; exit 0")))
    assert unit.facts is not None
    assert unit.facts.code == 0
    assert unit.facts.reason is None
    assert unit.facts.dispatched is backend.capabilities.fire_and_forget
    assert backend.stragglers(unit) == ""
    assert backend.teardown(unit) == ""
    assert backend.tail(unit, 100) == b"hello\n"
    assert removed(backend, unit)
    assert backend.tail(unit, 100) == b""


def test_a_failure_has_its_code_a_reason_and_a_sentence(site: Site) -> None:
    backend = site.open()
    unit = until_end(started(backend, site.unit("exit 7")))
    assert unit.facts is not None
    assert unit.facts.code == 7
    assert unit.facts.reason is not None
    assert "exit code 7" in unit.facts.detail
    assert removed(backend, unit)


def test_a_unit_ordered_to_stop_before_it_starts_never_runs(site: Site, tmp_path: Path) -> None:
    backend = site.open()
    first, second = site.unit(f"touch {tmp_path}/ran"), site.unit(f"touch {tmp_path}/ran")
    first.order_stop(Cause.CANCEL, 10)
    with pytest.raises(Stopped):
        backend.prepare(first)
    backend.prepare(second)
    second.order_stop(Cause.CANCEL, 10)
    with pytest.raises(Stopped):
        backend.start(second)
    for unit in (first, second):
        assert not backend.stop(unit).remains
        assert removed(backend, unit)
    assert not (tmp_path / "ran").exists()


def test_stop_ends_what_runs_and_may_be_repeated(site: Site) -> None:
    backend = site.open()
    unit = started(backend, site.unit("echo up; trap '' TERM; while :; do sleep 60; done"))
    eventually(lambda: backend.tail(unit, 10))
    unit.order_stop(Cause.SHUTDOWN, 0.2)
    first = backend.stop(unit)
    assert first.remains == ""
    assert not site.running(unit)
    assert backend.stop(unit).remains == ""
    assert unit.facts is not None
    assert removed(backend, unit)


def test_stop_of_what_has_ended_is_safe(site: Site) -> None:
    backend = site.open()
    unit = until_end(started(backend, site.unit("exit 0")))
    unit.order_stop(Cause.CANCEL, 10)
    assert backend.stop(unit).remains == ""
    assert removed(backend, unit)


def test_a_second_worker_finds_a_running_unit_and_learns_its_true_end(site: Site, tmp_path: Path) -> None:
    first = site.open()
    unit = started(first, site.unit(f"echo up; while [ ! -e {tmp_path}/done ]; do sleep 0.02; done; exit 9"))
    eventually(lambda: first.tail(unit, 10))
    second = site.open()
    assert [(found.name, found.key) for found in second.recover()] == [(unit.name, unit.key)]
    assert unit.facts is None
    taken = again(unit)
    second.attach(taken)
    assert taken.facts is None
    (tmp_path / "done").touch()
    facts = until_end(taken).facts
    assert facts is not None
    assert facts.code == 9
    until_end(unit)
    assert removed(second, taken)


def test_an_end_while_nobody_watched_is_learned_from_its_trace(site: Site) -> None:
    first = site.open()
    unit = until_end(started(first, site.unit("exit 4")))
    second = site.open()
    taken = again(unit)
    second.attach(taken)
    facts = until_end(taken).facts
    assert facts is not None
    assert facts.code == 4
    assert facts.agent_started is (unit.facts is not None and unit.facts.agent_started)
    assert removed(second, taken)
    assert removed(first, unit)


def test_a_unit_that_was_prepared_and_not_started_is_proven_never_to_have_run(site: Site) -> None:
    first = site.open()
    unit = site.unit("exit 0")
    first.prepare(unit)
    second = site.open()
    assert [found.name for found in second.recover()] == [unit.name]
    taken = again(unit)
    second.attach(taken)
    assert taken.facts is not None
    assert not taken.facts.agent_started
    assert "run it again" in taken.facts.detail
    assert removed(second, taken)


def test_a_unit_without_any_trace_never_ran(site: Site) -> None:
    backend = site.open()
    unit = again(site.unit("exit 0"))
    backend.attach(unit)
    assert unit.facts is not None
    assert not unit.facts.agent_started
    assert removed(backend, unit)
    assert removed(backend, unit)


def test_a_stop_after_a_restart_ends_the_unit(site: Site) -> None:
    first = site.open()
    unit = started(first, site.unit("echo up; exec sleep 60"))
    eventually(lambda: first.tail(unit, 10))
    second = site.open()
    taken = again(unit)
    second.attach(taken)
    taken.order_stop(Cause.SHUTDOWN, 10)
    assert second.stop(taken).remains == ""
    assert not site.running(unit)
    assert removed(second, taken)


def test_what_is_kept_is_kept_and_can_be_removed_later(site: Site) -> None:
    backend = site.open()
    unit = until_end(started(backend, site.unit("echo kept; exit 1")))
    assert backend.clean_up(unit, keep=True) == ""
    assert backend.tail(unit, 100) == b"kept\n"
    assert removed(site.open(), again(unit))


def test_units_side_by_side_do_not_touch_each_other(site: Site) -> None:
    backend = site.open()
    units = [started(backend, site.unit("echo up; exec sleep 60")) for _ in range(3)]
    for unit in units:
        eventually(lambda unit=unit: backend.tail(unit, 10))  # type: ignore[misc]
    units[1].order_stop(Cause.SHUTDOWN, 10)
    backend.stop(units[1])
    assert [site.running(unit) for unit in units] == [True, False, True]
    assert [unit.facts is None for unit in units] == [True, False, True]
    for unit in (units[0], units[2]):
        unit.order_stop(Cause.SHUTDOWN, 10)
        backend.stop(unit)
    assert all(removed(backend, unit) for unit in units)


def test_a_fault_before_the_start_is_cleaned_up_like_an_end(site: Site, tmp_path: Path) -> None:
    backend = site.open()
    unit = site.unit("exit 0")
    state = tmp_path / "state" / INSTANCE / "units"
    if not state.exists():
        pytest.fail("this backend keeps no unit directory; give its site a way to fail a prepare")
    state.rmdir()
    state.write_text("in the way")
    with pytest.raises(TaskFault) as caught:
        backend.prepare(unit)
    assert not caught.value.facts.agent_started
    state.unlink()
    state.mkdir()
    assert removed(backend, unit)
