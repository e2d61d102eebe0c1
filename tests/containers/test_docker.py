"""One container's life: how it ends, what it is given, and what is left (faults 36 to 39)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.docker import Docker
from oz_worker.errors import NotUsable, TaskFault
from oz_worker.model import Cause, ExitFacts, InstanceShape, Reason, Sidecar
from tests.containers.docker_site import DockerSite
from tests.engines.images import load_image
from tests.hosting import INSTANCE, PATIENCE, eventually, written


def facts(backend: Docker, unit: Unit) -> ExitFacts:
    """Run a unit to its end and remove it."""
    begin(backend, unit)
    return ended(backend, unit)


def ended(backend: Docker, unit: Unit) -> ExitFacts:
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None
    assert backend.clean_up(unit, keep=False) == ""
    return unit.facts


def fault(backend: Docker, unit: Unit) -> ExitFacts:
    """The facts with which a unit could not be started; what it left is removed."""
    with pytest.raises(TaskFault) as caught:
        begin(backend, unit)
    assert backend.clean_up(unit, keep=False) == ""
    assert not caught.value.facts.agent_started
    return caught.value.facts


def begin(backend: Docker, unit: Unit) -> None:
    backend.prepare(unit)
    backend.start(unit)


def test_an_agent_that_runs_out_of_memory_is_told_apart(site: DockerSite) -> None:
    backend = site.open(memory="32m")
    killed = site.unit("dd if=/dev/zero of=/dev/null bs=200M count=1")
    found = facts(backend, killed)
    assert (found.reason, found.oom) == (Reason.CONTAINER_OOM, True)
    assert "raise backend.docker.memory" in found.detail


def test_a_child_that_runs_out_of_memory_costs_an_agent_that_ends_well_nothing(site: DockerSite) -> None:
    script = "dd if=/dev/zero of=/dev/null bs=200M count=1; exit 0"
    assert facts(site.open(memory="32m"), site.unit(script)) == ExitFacts(code=0)


def test_killed_from_outside(site: DockerSite) -> None:
    backend = site.open()
    unit = site.unit("echo up; sleep 1000")
    begin(backend, unit)
    eventually(lambda: backend.tail(unit, 10))
    site.engine.cli("kill", "--signal", "KILL", f"oz-{unit.name}")
    found = ended(backend, unit)
    assert (found.code, found.reason) == (137, Reason.CONTAINER_EXIT)
    assert "killed from outside" in found.detail


def test_a_program_that_is_not_in_the_image(site: DockerSite) -> None:
    found = facts(site.open(), site.unit("/lib64/none/agent"))
    assert (found.code, found.reason) == (127, Reason.CONTAINER_EXIT)
    assert "not in the image, or that needs glibc" in found.detail


def test_what_an_image_declares_as_volumes_goes_with_its_container(site: DockerSite) -> None:
    """Fault 38: an anonymous volume for each task and each sidecar would pile up."""
    task = load_image(site.engine, "oz-test/volume:1", Volumes={"/data": {}})
    extra = load_image(site.engine, "oz-test/volume-too:1", files={"x": (0o644, b"")}, Volumes={"/more": {}})
    before = site.engine.ids("volume", "ls", "--quiet")
    backend = site.open()
    sidecars = (Sidecar(site.images.sidecar, "/agent"), Sidecar(extra, "/extra", read_write=True))
    unit = site.unit(
        f"touch /data/x /extra/y; echo up > {site.root}/up; sleep 1000", docker_image=task, sidecars=sidecars
    )
    begin(backend, unit)
    written(site.root / "up")
    form = '{{range .Mounts}}{{if eq .Destination "/data"}}{{.Type}}{{end}}{{end}}'
    assert site.engine.read("inspect", "--format", form, f"oz-{unit.name}") == "volume"
    unit.order_stop(Cause.CANCEL, 0.1)
    assert backend.stop(unit).remains == ""
    assert backend.clean_up(unit, keep=False) == ""
    assert facts(backend, site.unit("exit 1", docker_image=task)).code == 1
    shared = {name for name in site.engine.ids("volume", "ls", "--quiet") - before if name.startswith("ozw-")}
    eventually(lambda: site.engine.ids("volume", "ls", "--quiet") - before == shared)
    assert len(shared) == 1, "the sidecar that every task shares"
    for image in (task, extra):
        site.engine.cli("rmi", "--force", image, check=False)


def test_removed_by_hand(site: DockerSite) -> None:
    backend = site.open()
    unit = site.unit("sleep 1000")
    begin(backend, unit)
    site.engine.cli("rm", "--force", "--volumes", f"oz-{unit.name}")
    found = ended(backend, unit)
    assert found.reason in (Reason.CONTAINER_EXIT, Reason.CONTAINER_WAIT)
    assert found.code in (137, None)


def test_removed_by_hand_while_no_worker_ran(site: DockerSite) -> None:
    first = site.open()
    unit = site.unit("sleep 1000")
    begin(first, unit)
    first.close()
    site.engine.cli("rm", "--force", "--volumes", f"oz-{unit.name}")
    second = site.open()
    assert [found.name for found in second.recover()] == [unit.name]
    taken = Unit(unit.name, unit.instance, unit.key)
    second.attach(taken)
    found = ended(second, taken)
    assert (found.reason, found.code, found.agent_started) == (Reason.CONTAINER_WAIT, None, True)
    assert "removed from outside" in found.detail


def test_the_entrypoint_of_the_image_does_not_matter(site: DockerSite) -> None:
    odd = load_image(site.engine, "oz-test/odd:1", entrypoint=("/bin/false",))
    unit = site.unit("echo ran; exit 4", docker_image=odd)
    backend = site.open()
    assert facts(backend, unit).code == 4
    site.engine.cli("rmi", "--force", odd)


def test_without_a_sidecar_the_failure_says_what_to_set(site: DockerSite) -> None:
    found = fault(site.open(sidecar_image=""), site.unit("exit 0"))
    assert found.reason is Reason.CONTAINER_START
    assert "set backend.docker.sidecar_image" in found.detail


def test_a_network_that_does_not_exist(site: DockerSite) -> None:
    found = fault(site.open(network="nowhere"), site.unit("exit 0"))
    assert found.reason in (Reason.CONTAINER_CREATE, Reason.CONTAINER_START)
    assert "nowhere" in found.detail


def test_an_image_that_is_not_there(site: DockerSite) -> None:
    found = fault(site.open(), site.unit("exit 0", docker_image="oz-test/none:1"))
    assert found.reason is Reason.IMAGE_PULL
    assert "oz-test/none:1" in found.detail


def test_an_image_removed_since_it_was_looked_at(site: DockerSite) -> None:
    backend = site.open()
    name = load_image(site.engine, "oz-test/brief:1")
    assert facts(backend, site.unit("exit 0", docker_image=name)).code == 0
    site.engine.cli("rmi", "--force", name)
    found = fault(backend, site.unit("exit 0", docker_image=name))
    assert found.reason is Reason.IMAGE_PULL
    load_image(site.engine, name)
    assert facts(backend, site.unit("exit 0", docker_image=name)).code == 0
    site.engine.cli("rmi", "--force", name)


ONE, TWO = f"one-{INSTANCE}", f"two-{INSTANCE}"
ODD = {
    "PATH": "/bin:/odd",
    "HOME": "/odd home",
    "DOCKER_HOST": "tcp://192.0.2.1:1",
    "https_proxy": "http://u:p@192.0.2.1:2",
    "QUOTES": "a \"b\" 'c' $d `e` \\ #",
    "LINES": "one\n two\n",
    "SPACES": "  x  ",
    "EMPTY": "",
    "LONG": "y" * 70_000,
}


def test_the_environment_arrives_exactly_and_stands_in_no_arguments(site: DockerSite) -> None:
    seen = site.root / "arguments"
    backend = site.open(path=site.fake_docker(f'for a; do printf "%s\\n" "$a"; done >> {seen}'))
    names = " ".join(ODD)
    script = f'for n in {names}; do eval "printf %s \\"\\$$n\\"" > {site.root}/$n; done'
    unit = site.unit(script, environment={**ODD, "SECRET": "s3cret-value", "SECRETS": "s3cret\nvalue"})
    begin(backend, unit)
    assert ended(backend, unit).code == 0
    assert {name: (site.root / name).read_text() for name in ODD} == ODD
    shown = seen.read_text()
    assert "--env-file\n/dev/stdin\n" in shown
    assert not [value for value in (*ODD.values(), "s3cret", script) if len(value) > 5 and value in shown]


def test_a_name_that_cannot_be_given_is_named(site: DockerSite) -> None:
    found = fault(site.open(), site.unit("exit 0", environment={"DOCKER_HOST": "a\nb"}))
    assert found.reason is Reason.CONTAINER_CREATE
    assert "DOCKER_HOST" in found.detail


def test_the_secrets_of_a_container_are_known_again_after_a_restart(site: DockerSite) -> None:
    first = site.open()
    unit = site.unit("echo up; sleep 1000", environment={"TOKEN": "s3cret-value"})
    begin(first, unit)
    first.close()
    second = site.open()
    taken = Unit(unit.name, unit.instance, unit.key)
    second.attach(taken)
    assert taken.secrets is not None
    assert "s3cret-value" in taken.secrets
    assert not any(secret.startswith("/bin") for secret in taken.secrets), "what the image brings is nobody's secret"
    taken.order_stop(Cause.SHUTDOWN, 0.1)
    assert second.stop(taken).remains == ""
    assert second.clean_up(taken, keep=False) == ""


def test_the_instance_shape_and_options_bind(site: DockerSite) -> None:
    backend = site.open(user="1000:1000", security_opt=("no-new-privileges",), extra_hosts=("db:192.0.2.7",))
    unit = site.unit(f"id -u > {site.root}/id", shape=InstanceShape(vcpus=1, memory_gb=1))
    site.root.chmod(0o777)
    begin(backend, unit)
    form = "{{.HostConfig.NanoCpus}} {{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.ExtraHosts}}"
    shown = site.engine.read("inspect", "--format", form, f"oz-{unit.name}")
    assert shown == f"{10**9} {1 << 30} {1 << 30} [db:192.0.2.7]"
    assert ended(backend, unit).code == 0
    assert (site.root / "id").read_text() == "1000\n"


@pytest.mark.parametrize(
    ("sidecar", "named"),
    [
        (Sidecar("", "/x"), "image"),
        (Sidecar("oz-test/none:1", "relative"), "relative"),
        (Sidecar("oz-test/none:1", "/"), "/"),
        (Sidecar("oz-test/none:1", "/agent/"), "/agent"),
        (Sidecar("Not An Image", "/x"), "Not An Image"),
    ],
    ids=lambda value: str(value),
)
def test_a_sidecar_of_a_wrong_form_is_refused_at_the_task(site: DockerSite, sidecar: Sidecar, named: str) -> None:
    given = (Sidecar(site.images.sidecar, "/agent"), sidecar)
    found = fault(site.open(), site.unit("exit 0", sidecars=given))
    assert found.reason is Reason.SIDECAR_PREP
    assert named in found.detail


def test_a_configured_volume_over_a_sidecar_is_refused(site: DockerSite) -> None:
    found = fault(site.open(volumes=(f"{site.root}:/agent",)), site.unit("exit 0"))
    assert found.reason is Reason.CONTAINER_CREATE
    assert "/agent" in found.detail


def test_the_output_is_fetched_at_the_end_and_cut(site: DockerSite) -> None:
    backend = site.open()
    unit = site.unit("echo first; yes 0123456789abcdef | head -c 3000000; echo last; exit 1")
    begin(backend, unit)
    unit.wait_for_end_or_stop(PATIENCE)
    assert backend.tail(unit, 5) == b"last\n"
    assert backend.collect(unit) == ""
    output = site.root / "state" / INSTANCE / "units" / unit.name / "output.log"
    assert output.stat().st_mode & 0o777 == 0o600
    assert 0 < output.stat().st_size <= 1 << 20
    assert backend.clean_up(unit, keep=False) == ""
    assert not output.exists()


def test_a_rm_that_hangs_costs_no_other_unit(site: DockerSite) -> None:
    hung = site.unit("exit 0")
    name = '"$REAL" container inspect --format "{{.Name}}" "$last" 2>/dev/null'
    hang = f'for last; do :; done; case "$({name})" in /oz-{hung.name}) exec sleep 1000;; esac'
    body = f'case "$*" in *"rm --force"*) {hang};; esac'
    backend = site.open(path=site.fake_docker(body), command_timeout=2.0)
    begin(backend, hung)
    hung.wait_for_end_or_stop(PATIENCE)
    assert "was not removed: docker container did not answer within 2s" in backend.clean_up(hung, keep=False)
    assert facts(backend, site.unit("exit 0")).code == 0
    assert site.open().clean_up(hung, keep=False) == ""


def test_a_program_that_dies_once_the_container_is_made_costs_nothing(site: DockerSite) -> None:
    once = site.root / "once"
    body = f'case "$1" in run) [ -e {once} ] || {{ touch {once}; "$REAL" "$@" >/dev/null; kill -9 $$; }};; esac'
    backend = site.open(path=site.fake_docker(body))
    unit = site.unit(f"echo ran >> {site.root}/runs; exit 5")
    assert facts(backend, unit).code == 5
    assert (site.root / "runs").read_text() == "ran\n"


def test_a_program_that_dies_between_create_and_start_costs_nothing(site: DockerSite) -> None:
    once = site.root / "once"
    create = (
        'shift; args=; for a do case "$a" in --detach) ;; *) set -- "$@" "$a";; esac; shift; done; "$REAL" create "$@"'
    )
    body = f'case "$1" in run) [ -e {once} ] || {{ touch {once}; {create} >/dev/null; kill -9 $$; }};; esac'
    backend = site.open(path=site.fake_docker(body))
    unit = site.unit(f"echo ran >> {site.root}/runs; exit 6")
    assert facts(backend, unit).code == 6
    assert (site.root / "runs").read_text() == "ran\n"


def test_a_container_that_was_only_created_is_fenced_at_the_next_start(site: DockerSite) -> None:
    first = site.open()
    unit = site.unit("exit 0")
    first.prepare(unit)
    labels = {"instance": unit.instance, "worker": "x", "task": "t", "execution": "e", "unit": unit.name}
    words = [word for name, value in labels.items() for word in ("--label", f"oz-worker.{name}={value}")]
    site.engine.cli(
        "create", "--name", f"oz-{unit.name}", "--label", "oz-worker.role=task", *words, site.images.task, "true"
    )
    taken = Unit(unit.name, unit.instance, unit.key)
    first.attach(taken)
    assert taken.facts is not None
    assert not taken.facts.agent_started
    assert site.state(unit) == ""
    assert first.clean_up(taken, keep=False) == ""


def test_a_name_taken_by_somebody_else_is_said_and_left_alone(site: DockerSite) -> None:
    unit = site.unit("exit 0")
    site.engine.cli("create", "--name", f"oz-{unit.name}", site.images.task, "true")
    backend = site.open()
    with pytest.raises(TaskFault) as caught:
        begin(backend, unit)
    assert caught.value.facts.reason is Reason.CONTAINER_CREATE
    assert "somebody else" in caught.value.facts.detail
    assert site.state(unit) == "created"
    site.engine.cli("rm", f"oz-{unit.name}")


def test_two_workers_on_one_engine_touch_only_their_own(site: DockerSite) -> None:
    stranger = site.engine.read("run", "--detach", "--network", "none", site.images.task, "sleep", "1000")
    one, two = site.open(instance=ONE), site.open(instance=TWO)
    mine = site.unit(f"echo up > {site.root}/one; sleep 1000", instance=ONE)
    other = site.unit(f"echo up > {site.root}/two; sleep 1000", instance=TWO)
    for backend, unit in ((one, mine), (two, other)):
        begin(backend, unit)
    written(site.root / "one")
    written(site.root / "two")
    assert [found.name for found in one.recover()] == [mine.name]
    assert [found.name for found in two.recover()] == [other.name]
    mine.order_stop(Cause.CANCEL, 0.1)
    assert one.stop(mine).remains == ""
    assert one.clean_up(mine, keep=False) == ""
    assert site.running(other)
    assert other.facts is None
    other.order_stop(Cause.CANCEL, 0.1)
    assert two.stop(other).remains == ""
    assert two.clean_up(other, keep=False) == ""
    assert site.engine.read("inspect", "--format", "{{.State.Running}}", stranger) == "true"
    site.engine.cli("rm", "--force", stranger)


def test_a_unit_that_was_refused_because_another_has_it_leaves_that_one_alone(site: DockerSite) -> None:
    mine, theirs = site.open(instance=ONE), site.open(instance=TWO)
    first = site.unit(f"echo up > {site.root}/up; sleep 1000", instance=ONE)
    begin(mine, first)
    written(site.root / "up")
    second = Unit(first.name, TWO, first.key, first.spec)
    with pytest.raises(TaskFault, match="belongs to instance one"):
        begin(theirs, second)
    assert theirs.clean_up(second, keep=False) == ""
    second.order_stop(Cause.CANCEL, 0.1)
    assert theirs.stop(second).remains == ""
    assert site.running(first)
    assert first.facts is None
    first.order_stop(Cause.CANCEL, 0.1)
    assert mine.stop(first).remains == ""
    assert mine.clean_up(first, keep=False) == ""


def test_a_key_that_goes_to_another_worker_later_is_not_taken_for_a_late_container(site: DockerSite) -> None:
    mine, theirs = site.open(instance=ONE), site.open(instance=TWO)
    first = site.unit("exit 0", instance=ONE)
    assert facts(mine, first).code == 0
    spec = first.spec
    assert spec is not None
    script = f"echo up > {site.root}/up; while [ ! -e {site.root}/go ]; do sleep 0.05; done; exit 5"
    again = dataclasses.replace(spec, environment={**spec.environment, "AGENT_SCRIPT": script})
    second = Unit(first.name, TWO, first.key, again)
    begin(theirs, second)
    written(site.root / "up")
    mine._watch.look()
    assert facts(mine, site.unit("exit 0", instance=ONE)).code == 0, "its watch has seen the other one by now"
    (site.root / "go").touch()
    assert ended(theirs, second).code == 5


def test_a_container_that_never_ran_and_cannot_be_removed_is_a_failed_start(site: DockerSite) -> None:
    once = site.root / "once"
    create = 'shift; for a do case "$a" in --detach) ;; *) set -- "$@" "$a";; esac; shift; done; "$REAL" create "$@"'
    refuse = 'echo "Error response from daemon: device or resource busy" >&2; exit 1'
    body = f"""case "$1 $2" in
    "run --detach") touch {once}; {create} >/dev/null; echo "Error response from daemon: passing" >&2; exit 125;;
    "container rm") [ "$3" = --force ] || {{ {refuse}; }};;
    esac"""
    backend = site.open(path=site.fake_docker(body))
    unit = site.unit("exit 0")
    with pytest.raises(TaskFault, match="could not be started"):
        begin(backend, unit)
    assert site.state(unit) == "created"
    assert backend.clean_up(unit, keep=False) == ""
    assert site.state(unit) == ""


def test_an_engine_that_cannot_be_used_is_said_with_the_cure(site: DockerSite, tmp_path: Path) -> None:
    cases = {
        'echo "{\\"OSType\\": \\"windows\\", \\"Architecture\\": \\"x86_64\\", \\"SystemTime\\": \\"t\\"}"; exit 0': (
            "the docker engine runs windows/amd64 containers; agents need linux/amd64 or linux/arm64"
        ),
        'echo "permission denied while trying to connect to the Docker daemon socket" >&2; exit 1': "group (docker)",
        'echo "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?" >&2; exit 1': (
            "Start the engine"
        ),
        "echo gibberish; exit 0": "unreadable",
    }
    for body, said in cases.items():
        with pytest.raises(NotUsable, match=re.escape(said)):
            site.open(path=site.fake_docker(body))
    with pytest.raises(NotUsable, match=r"engine_path /nowhere/docker is no program that may be run"):
        site.open(engine_path="/nowhere/docker")
