"""Images against real engines and registries, and against programs that do what no real engine does on demand."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme

from oz_worker import containers, instruments
from oz_worker.backends.base import Unit
from oz_worker.backends.images import ImageFacts, Images, ImageUnusable
from oz_worker.engine_words import EngineDown
from oz_worker.errors import Stopped
from oz_worker.meters import Meters
from oz_worker.model import Cause, Key
from tests.containers.fake_docker import fake_engine
from tests.engines.bad_registry import BadRegistry, Fault
from tests.engines.census import census
from tests.engines.client import Client
from tests.engines.fixtures import OwnEngine, OwnRegistry
from tests.engines.images import machine_architecture
from tests.engines.podman import Podman
from tests.engines.registry import USER, Registry
from tests.rig import SAFETY, until

HERE = f"linux/{machine_architecture()}"
OTHER = "arm64" if machine_architecture() == "amd64" else "amd64"
MB = 1_000_000


class Waiting(Unit):
    """A unit that says when it waits."""

    def __init__(self, name: str = "unit") -> None:
        super().__init__(name, "instance", Key(name))
        self.waits = threading.Event()

    def wait_until(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        self.waits.set()
        return super().wait_until(predicate, timeout)


class Task(threading.Thread):
    """One task's thread that needs an image."""

    def __init__(self, images: Images, reference: str, name: str = "unit") -> None:
        super().__init__(daemon=True)
        self.unit = Waiting(name)
        self.outcome: ImageFacts | Exception | None = None
        self._images = images
        self._reference = reference
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._images.ready(self._reference, self.unit)
        except Exception as error:  # looked at by the test
            self.outcome = error

    def end(self) -> ImageFacts | Exception | None:
        self.join(SAFETY)
        return self.outcome


def docker(client: Client, timeout: float = 60, program: str = "") -> containers.Engine:
    kind = "podman" if isinstance(client, Podman) else "docker"
    return containers.Engine(
        kind, program or client.program, environment=client.env, instance=f"t{os.getpid()}", timeout=timeout
    )


def images_of(engine: containers.Engine, policy: str = "Always", **options: Any) -> Images:
    chosen: dict[str, Any] = {"pull_timeout": 0, "progress_timeout": 0, "platform": "", "engine_platform": HERE}

    def died(name: str, error: BaseException) -> None:
        raise AssertionError(f"thread {name} died") from error

    return Images(engine, policy=policy, on_death=died, **{**chosen, **options})


def unusable(images: Images, reference: str) -> str:
    with pytest.raises(ImageUnusable) as caught:
        images.ready(reference, Waiting())
    assert "\n" not in str(caught.value)
    return str(caught.value)


_count = iter(range(1_000_000))


def publish(registry: Registry, client: Client, *, size: int = 9, **image: Any) -> str:
    """The name in the registry of a small image of its own, with one layer that nobody else has."""
    name = f"images/{os.getpid()}-{next(_count)}:1"
    registry.publish(client, name, base=False, files={"own": (0o644, os.urandom(size))}, **image)
    return name


def no_helper_of(client: Client) -> bool:
    return not census(client).helpers


# -- policies --------------------------------------------------------------------------------------------------------


def counting(client: Client, place: Path) -> tuple[containers.Engine, Callable[[], list[str]]]:
    """An engine whose program notes the first word of each call, and what it has noted."""
    program = place / "docker"
    program.write_text(f'#!/bin/sh\necho "$1" >>{place}/calls\nexec {client.program} "$@"\n')
    program.chmod(0o755)
    (place / "calls").touch()
    return docker(client, program=str(program)), lambda: (place / "calls").read_text().split()


def test_if_not_present_pulls_once_and_then_asks_nobody(engine: Client, registry: Registry, tmp_path: Path) -> None:
    reference = registry.reference(publish(registry, engine))
    counted, calls = counting(engine, tmp_path)
    images = images_of(counted, "IfNotPresent")
    facts = images.ready(reference, Waiting())
    assert calls() == ["image", "pull", "image"]
    digest = engine.read("image", "inspect", "--format", "{{index .RepoDigests 0}}", reference).rpartition(":")[2]
    assert facts == (reference, f"sha256:{facts.id[7:]}", digest, HERE)
    assert (images.ready(reference, Waiting()), calls()) == (facts, ["image", "pull", "image"])
    engine.cli("rmi", reference)
    images.forget(reference)
    assert (images.ready(reference, Waiting()), calls()[3:]) == (facts, ["image", "pull", "image"])
    engine.cli("rmi", reference)


def test_always_sees_a_tag_that_moved(engine: Client, registry: Registry) -> None:
    name = publish(registry, engine)
    images = images_of(docker(engine))
    first = images.ready(registry.reference(name), Waiting())
    engine.cli("rmi", registry.reference(name))
    registry.publish(engine, name, base=False, files={"own": (0o644, b"another")})
    second = images.ready(registry.reference(name), Waiting())
    assert first.digest != second.digest
    engine.cli("rmi", registry.reference(name))


def test_never_pulls_nothing(engine: Client, registry: Registry) -> None:
    reference = registry.reference(publish(registry, engine))
    images = images_of(docker(engine), "Never")
    sentence = unusable(images, reference)
    assert "image_pull_policy is Never; pull it with `docker pull`" in sentence
    engine.cli("pull", reference)
    assert images.ready(reference, Waiting()).reference == reference
    by_digest = engine.read("image", "inspect", "--format", "{{index .RepoDigests 0}}", reference)
    assert images.ready(by_digest, Waiting()).digest == by_digest.rpartition(":")[2]
    engine.cli("rmi", reference)


def test_an_image_without_a_digest_has_that_of_its_id(engine: Client, images: Any) -> None:
    facts = images_of(docker(engine), "Never").ready(images.task, Waiting())
    assert (len(facts.digest), facts.id) == (64, f"sha256:{facts.digest}")


# -- shared ----------------------------------------------------------------------------------------------------------


def test_fifty_tasks_of_one_image_make_one_pull(engine: Client, registry: Registry, bad_registry: BadRegistry) -> None:
    name = publish(registry, engine)
    images = images_of(docker(engine))
    bad_registry.fault = Fault(hang="manifests")
    tasks = [Task(images, bad_registry.reference(name), f"u{number}") for number in range(50)]
    assert all(task.unit.waits.wait(SAFETY) for task in tasks)
    bad_registry.fault = Fault()
    ends = {task.end() for task in tasks}
    assert [type(end) for end in ends] == [ImageFacts]
    blobs = [asked.reference for asked in bad_registry.asked if (asked.kind, asked.method) == ("blobs", "GET")]
    assert len(blobs) == len(set(blobs)) == 2  # the configuration and one layer
    engine.cli("rmi", bad_registry.reference(name))


def test_different_images_are_pulled_at_the_same_time(
    engine: Client, registry: Registry, bad_registry: BadRegistry
) -> None:
    names = [publish(registry, engine) for _ in range(3)]
    images = images_of(docker(engine))
    bad_registry.fault = Fault(hang="manifests")
    tasks = [Task(images, bad_registry.reference(name)) for name in names]
    until(lambda: len({asked.repository for asked in bad_registry.asked}) == 3, "three pulls under way")
    bad_registry.fault = Fault()
    assert [type(task.end()) for task in tasks] == [ImageFacts] * 3
    engine.cli("rmi", *map(bad_registry.reference, names))


def test_a_pull_ends_with_its_last_waiter(engine: Client, registry: Registry, bad_registry: BadRegistry) -> None:
    reference = bad_registry.reference(publish(registry, engine, size=MB))
    images = images_of(docker(engine))
    bad_registry.fault = Fault(stall_at=MB // 2)
    one, two = Task(images, reference, "one"), Task(images, reference, "two")
    assert one.unit.waits.wait(SAFETY)
    assert two.unit.waits.wait(SAFETY)
    until(lambda: not no_helper_of(engine), "the pull")
    for task in (one, two):
        until(lambda task=task: "B/1" in task.unit.waits_for(), "the progress")  # type: ignore[misc]
        assert task.unit.waits_for().startswith(f"the image {reference}, which is being pulled: ")
    one.unit.order_stop(Cause.CANCEL, 0)
    assert isinstance(one.end(), Stopped)
    assert two.is_alive()
    assert not no_helper_of(engine)
    two.unit.order_stop(Cause.CANCEL, 0)
    assert isinstance(two.end(), Stopped)
    assert one.unit.waits_for() == two.unit.waits_for() == ""
    until(lambda: no_helper_of(engine), "the end of the pull")
    until(lambda: "image" not in [thread.name for thread in threading.enumerate()], "the end of the thread")
    assert engine.cli("image", "inspect", reference, check=False).returncode == 1


def test_a_pull_goes_on_when_one_of_two_leaves(engine: Client, registry: Registry, bad_registry: BadRegistry) -> None:
    reference = bad_registry.reference(publish(registry, engine, size=MB))
    images = images_of(docker(engine))
    bad_registry.fault = Fault(stall_at=MB // 2)
    one, two = Task(images, reference, "one"), Task(images, reference, "two")
    assert one.unit.waits.wait(SAFETY)
    assert two.unit.waits.wait(SAFETY)
    one.unit.order_stop(Cause.CANCEL, 0)
    assert isinstance(one.end(), Stopped)
    bad_registry.fault = Fault()
    assert isinstance(two.end(), ImageFacts)
    assert bad_registry.count("blobs") == 2
    engine.cli("rmi", reference)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_slow_pull_that_moves_is_let_go_on(engine: Client, registry: Registry, bad_registry: BadRegistry) -> None:
    reference = bad_registry.reference(publish(registry, engine, size=MB))
    bad_registry.fault = Fault(bytes_per_second=MB // 4)
    images = images_of(docker(engine), progress_timeout=1.5, pull_timeout=SAFETY)
    assert images.ready(reference, Waiting()).reference == reference
    engine.cli("rmi", reference)


def test_a_pull_that_stalls_is_ended_and_the_local_copy_serves(
    engine: Client, registry: Registry, bad_registry: BadRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    reference = bad_registry.reference(publish(registry, engine, size=MB))
    images = images_of(docker(engine), progress_timeout=0.7)
    bad_registry.fault = Fault(stall_at=MB // 2)
    sentence = unusable(images, reference)
    assert f"image {reference}: the transfer stalled; check the network" in sentence
    assert "no progress for 0.7s (last: " in sentence
    assert "Downloading" in sentence
    until(lambda: no_helper_of(engine), "the end of the pull")
    bad_registry.fault = Fault()
    facts = images.ready(reference, Waiting())
    bad_registry.fault = Fault(hang="manifests")
    with caplog.at_level(logging.WARNING):
        assert [images.ready(reference, Waiting()) for _ in range(2)] == [facts] * 2
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]
    assert f"the copy of image {reference} that is here is used" in caplog.text
    engine.cli("rmi", reference)


def test_a_pull_that_takes_too_long_is_ended(engine: Client, registry: Registry, bad_registry: BadRegistry) -> None:
    reference = bad_registry.reference(publish(registry, engine))
    bad_registry.fault = Fault(hang="manifests")
    sentence = unusable(images_of(docker(engine), pull_timeout=0.5), reference)
    assert "the pull took too long; " in sentence
    assert "raise backend.docker.pull_timeout (longer than 0.5s)" in sentence


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "says", "falls_back"),
    [
        (401, "the registry refused the user name and password, or wants some", False),
        (404, "the pull failed", False),
        (429, "the registry's rate limit is reached", True),
        (500, "the registry cannot be reached", True),
    ],
)
def test_refusals_have_their_sentence_and_outages_fall_back(
    engine: Client, registry: Registry, bad_registry: BadRegistry, status: int, says: str, falls_back: bool
) -> None:
    reference = bad_registry.reference(publish(registry, engine))
    meters = Meters(instruments.CATALOGUE)
    images = images_of(docker(engine), meters=meters)
    bad_registry.fault = Fault(status=status, only="manifests")
    assert f"image {reference}: {says}; " in unusable(images, reference)
    bad_registry.fault = Fault()
    facts = images.ready(reference, Waiting())
    bad_registry.fault = Fault(status=status, only="manifests")
    if falls_back:
        assert images.ready(reference, Waiting()) == facts
    else:
        assert says in unusable(images, reference)
    pulls = next(each for each in meters.snapshot() if each.instrument.name == "oz_worker_image_pull_seconds")
    assert {each.labels[0][1]: each.number for each in pulls.distributions} == {"failed": 2, "succeeded": 1}
    engine.cli("rmi", reference)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("127.0.0.1:1/t/a:1", "the registry cannot be reached"),
        ("nowhere.invalid/t/a:1", "the registry cannot be reached"),
        ("BAD::x", "that is no name of an image"),
        ("-x", "that is no name of an image"),
        ("", "that is no name of an image"),
        ("http://alice:s3cret@127.0.0.1/x", "that is no name of an image"),
        ("a\0b", "that is no name of an image"),
        ("a\nb", "'a\\nb': that is no name of an image"),
        ("a b", "that is no name of an image"),
        ("x" * 100_000, "that is no name of an image; write it like"),
    ],
)
def test_names_that_cannot_be_pulled(engine: Client, reference: str, says: str) -> None:
    sentence = unusable(images_of(docker(engine)), reference)
    assert says in sentence
    assert "s3cret" not in sentence
    if "no name" in says:
        assert unusable(images_of(docker(engine), policy="Never"), reference) == sentence


def test_a_missing_tag(engine: Client, registry: Registry) -> None:
    name = publish(registry, engine).replace(":1", ":nope")
    assert "the registry has no such image or tag; check its name and tag" in unusable(
        images_of(docker(engine)), registry.reference(name)
    )


def test_passwords_are_the_cli_s_business(
    own_engine: OwnEngine, own_registry: OwnRegistry, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    own = own_engine()
    registry = own_registry(password="s3cret-word")
    registry.log_in(own)
    reference = registry.reference(publish(registry, own))
    config = Path(own.env["DOCKER_CONFIG"]) / "config.json"
    right = config.read_text()
    images = images_of(docker(own))
    with caplog.at_level(logging.DEBUG):
        config.write_text("{}")
        sentence = unusable(images, reference)
        assert (
            f"denied access, or has no such image; check the name, and log in with `docker login {registry.address}`"
            in sentence
        )
        wrong = base64.b64encode(f"{USER}:wr0ng-word".encode()).decode()
        config.write_text(json.dumps({"auths": {registry.address: {"auth": wrong}}}))
        refused = unusable(images, reference)
        assert "refused the user name and password" in refused
        config.write_text(right)
        assert images.ready(reference, Waiting()).reference == reference
        own.cli("rmi", reference)
        helper = tmp_path / "docker-credential-ours"
        helper.write_text(f'#!/bin/sh\ncat >&2; printf \'{{"Username":"{USER}","Secret":"s3cret-word"}}\'\n')
        helper.chmod(0o755)
        config.write_text('{"credsStore": "ours"}')
        helped = docker(own)
        helped.environment = {**own.env, "PATH": f"{tmp_path}:{own.env['PATH']}"}
        assert images_of(helped).ready(reference, Waiting()).reference == reference
    assert not any(
        word in text for word in ("s3cret-word", "wr0ng-word", wrong) for text in (sentence, refused, caplog.text)
    )


def test_a_certificate_that_the_engine_does_not_trust(
    own_engine: OwnEngine, own_registry: OwnRegistry, tmp_path: Path
) -> None:
    authority = trustme.CA()
    registry = own_registry(certificate=authority.issue_cert("reg.test"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    stranger = own_engine(hosts={"reg.test": "::1"})
    sentence = unusable(images_of(docker(stranger)), registry.reference("t/a:1"))
    assert "the registry's certificate is not trusted by the engine; " in sentence
    friend = own_engine(hosts={"reg.test": "::1"}, certs={registry.address: tmp_path / "ca.crt"})
    reference = registry.reference(publish(registry, friend))
    assert images_of(docker(friend)).ready(reference, Waiting()).reference == reference


def test_an_engine_whose_disk_is_full(own_engine: OwnEngine, engine: Client, registry: Registry) -> None:
    reference = registry.reference(publish(registry, engine, size=24 * MB))
    small = own_engine(data_mb=16)
    sentence = unusable(images_of(docker(small)), reference)
    assert "the engine's disk is full; free space where the engine keeps its images" in sentence


# -- platforms -------------------------------------------------------------------------------------------------------


def test_an_image_of_another_platform(engine: Client, registry: Registry) -> None:
    reference = registry.reference(publish(registry, engine, architecture=OTHER))
    sentence = unusable(images_of(docker(engine)), reference)
    assert f"is built for linux/{OTHER}" in sentence
    assert f", but {HERE} is wanted here; use an image built for it, or set backend.docker.platform" in sentence
    asked = images_of(docker(engine), platform=f"linux/{OTHER}")
    assert asked.ready(reference, Waiting()).platform.startswith(f"linux/{OTHER}")
    engine.cli("rmi", reference)


def test_an_image_that_the_registry_has_for_others_alone(engine: Client, registry: Registry) -> None:
    name = publish(registry, engine)
    repository, _, tag = name.partition(":")
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    line = http.client.HTTPConnection(registry.address, timeout=SAFETY)
    line.request("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": kind})
    answer = line.getresponse()
    one = {"mediaType": kind, "size": len(answer.read()), "digest": answer.headers["Docker-Content-Digest"]}
    kinds = "application/vnd.docker.distribution.manifest.list.v2+json"
    listed: dict[str, Any] = {"schemaVersion": 2, "mediaType": kinds}
    listed["manifests"] = [{**one, "platform": {"os": "linux", "architecture": "s390x"}}]
    line.request("PUT", f"/v2/{repository}/manifests/all", json.dumps(listed), {"Content-Type": kinds})
    assert line.getresponse().status == 201
    line.close()
    sentence = unusable(images_of(docker(engine)), registry.reference(f"{repository}:all"))
    assert f"the registry has it for no platform that is wanted here; use an image built for {HERE}" in sentence


@pytest.mark.parametrize(
    ("has", "wanted", "fits"),
    [
        (("linux", "arm64", "v8"), "linux/arm64", True),
        (("linux", "arm64", ""), "linux/arm64/v8", True),
        (("linux", "arm", "v6"), "linux/arm/v7", True),
        (("linux", "arm", "v7"), "linux/arm/v6", False),
        (("linux", "arm64", "v8"), "aarch64", True),
        (("linux", "amd64", ""), "linux/x86_64", True),
        (("linux", "arm64", ""), "linux", True),
        (("", "", ""), "linux/amd64", True),
        (("windows", "amd64", ""), "linux/amd64", False),
        (("linux", "386", ""), "linux/amd64", False),
    ],
)
def test_platforms_that_fit(tmp_path: Path, has: tuple[str, str, str], wanted: str, fits: bool) -> None:
    about = {"Id": "sha256:" + "a" * 64, "Os": has[0], "Architecture": has[1], "Variant": has[2]}
    images = images_of(fake_engine(tmp_path, f"echo '{json.dumps(about)}'"), "Never", engine_platform=wanted)
    if fits:
        assert images.ready("a", Waiting()).digest == "a" * 64
    else:
        assert f"but {wanted} is wanted" in unusable(images, "a")


def test_the_one_of_several_platforms_that_was_asked_for(tmp_path: Path) -> None:
    script = """case "$*" in
      *"--platform linux/arm64"*) echo '{"Id": "sha256:b", "Os": "linux", "Architecture": "arm64"}';;
      *) echo '{"Id": "sha256:a", "Os": "linux", "Architecture": "amd64"}';;
    esac"""
    images = images_of(fake_engine(tmp_path, script), "Never", platform="linux/arm64")
    assert images.ready("a", Waiting())[1:] == ("sha256:b", "", "linux/arm64")


# -- engines ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_dies_in_the_middle_is_no_failure_of_the_image(
    own_engine: OwnEngine, engine: Client, registry: Registry, bad_registry: BadRegistry
) -> None:
    reference = bad_registry.reference(publish(registry, engine, size=MB))
    own = own_engine()
    images = images_of(docker(own))
    bad_registry.fault = Fault(stall_at=MB // 2)
    task = Task(images, reference)
    until(lambda: bad_registry.count("blobs") == 2, "the transfer")
    own.kill()
    assert isinstance(task.end(), EngineDown)
    bad_registry.fault = Fault()
    own.start()
    assert images.ready(reference, Waiting()).reference == reference


def test_an_engine_that_hangs_is_no_registry_that_does(own_engine: OwnEngine) -> None:
    own = own_engine()
    own.freeze()
    images = images_of(docker(own, timeout=0.5), progress_timeout=0.5)
    with pytest.raises(EngineDown, match="did not answer"):
        images.ready("127.0.0.1:1/a", Waiting())
    own.thaw()


@pytest.mark.soak
def test_a_registry_that_breaks_every_transfer_off(
    own_engine: OwnEngine, engine: Client, registry: Registry, bad_registry: BadRegistry
) -> None:
    reference = bad_registry.reference(publish(registry, engine, size=MB))
    own = own_engine("--max-download-attempts=1")
    images = images_of(docker(own))
    bad_registry.fault = Fault(cut_at=MB // 2)
    assert "the transfer broke off; check the network" in unusable(images, reference)
    layers = [asked for asked in bad_registry.asked if (asked.kind, asked.method) == ("blobs", "GET")]
    assert len(layers) >= 3  # tried twice
    bad_registry.fault = Fault()
    facts = images.ready(reference, Waiting())
    assert facts.reference == reference


# -- what no real engine does on demand --------------------------------------------------------------------------------


def test_an_error_inside_the_stream_with_exit_code_0(tmp_path: Path) -> None:
    script = 'case $1 in pull) echo "error: broken";; *) echo "No such image: a" >&2; exit 1;; esac'
    sentence = unusable(images_of(fake_engine(tmp_path, script)), "a")
    assert "it was pulled without an error, but is not there" in sentence


def test_a_pull_that_hangs_for_ever_and_shows_always_the_same(tmp_path: Path) -> None:
    script = """case $1 in
      pull) sleep 1000 & echo $! >$HERE/pid
        while sleep .05; do printf '14720aa8fb4e: Downloading 1kB/9kB \\r'; done;;
      *) echo "No such image: a" >&2; exit 1;;
    esac"""
    sentence = unusable(images_of(fake_engine(tmp_path, script), progress_timeout=0.5), "a")
    assert "no progress for 0.5s (last: 14720aa8fb4e: Downloading 1kB/9kB)" in sentence
    child = int((tmp_path / "pid").read_text())
    until(lambda: not alive(child), "the end of its child")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in b"ZX"
    except OSError:
        return False


def test_a_transfer_that_breaks_off_is_tried_once_more(tmp_path: Path) -> None:
    script = """case $1 in
      pull) echo . >>$HERE/pulls; echo "unexpected EOF" >&2;;
      *) echo "No such image: a" >&2;;
    esac; exit 1"""
    sentence = unusable(images_of(fake_engine(tmp_path, script)), "a")
    assert "image a: the transfer broke off; check the network between the engine and the registry" in sentence
    assert (tmp_path / "pulls").read_text() == ".\n" * 2


def test_a_program_that_is_missing(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, "exit 1")
    Path(engine.program).unlink()
    assert f"{engine.program} does not exist; install it" in unusable(images_of(engine), "a")


# -- podman ----------------------------------------------------------------------------------------------------------


def test_podman_pulls_from_the_same_registry_and_leaves_nothing(
    podman: Podman, registry: Registry, bad_registry: BadRegistry
) -> None:
    podman.allow_plain(registry.address)
    podman.allow_plain(bad_registry.address)
    name = publish(registry, podman, size=3 * MB)
    images = images_of(docker(podman), progress_timeout=1.5)
    reference = bad_registry.reference(name)
    before = sorted((podman.place / "tmp").iterdir())
    bad_registry.fault = Fault(stall_at=MB)
    sentence = unusable(images, reference)
    assert "the transfer stalled" in sentence
    assert "Copying blob" in sentence
    task = Task(images_of(docker(podman)), reference)
    until(lambda: not no_helper_of(podman), "the pull")
    task.unit.order_stop(Cause.CANCEL, 0)
    assert isinstance(task.end(), Stopped)
    until(lambda: no_helper_of(podman), "the end of the pull")
    until(lambda: sorted((podman.place / "tmp").iterdir()) == before, "the removal of half-read layers")
    bad_registry.fault = Fault()
    facts = images.ready(reference, Waiting())
    assert (facts.reference, len(facts.digest), facts.platform) == (reference, 64, HERE)
    bad_registry.fault = Fault(status=500, only="manifests")
    assert images.ready(reference, Waiting()) == facts
    bad_registry.fault = Fault(cut_at=MB)
    assert "the transfer broke off" in unusable(images, bad_registry.reference(publish(registry, podman, size=2 * MB)))
    podman.cli("tag", reference, "localhost/short:1")
    assert images_of(docker(podman), "Never").ready("short:1", Waiting()).id == facts.id
    assert "has no such image or tag" in unusable(images, registry.reference(name.replace(":1", ":nope")))
    podman.cli("rmi", "--force", facts.id)


def test_podman_says_what_a_password_is_missing(podman: Podman, own_registry: OwnRegistry) -> None:
    registry = own_registry(password="s3cret-word")
    podman.allow_plain(registry.address)
    sentence = unusable(images_of(docker(podman)), registry.reference("t/a:1"))
    assert f"or wants some; log in again with `podman login {registry.address}` as the user" in sentence
    assert "REGISTRY_AUTH_FILE" in sentence
