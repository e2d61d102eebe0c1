"""What a server or an operator can get wrong, through a real worker on a real engine: one sentence, nothing left."""

from __future__ import annotations

from typing import Any

import pytest

from oz_worker.errors import ExitCode
from tests.containers.conftest import DockerRig
from tests.containers.docker_site import DockerSite
from tests.hosting import INSTANCE, PATIENCE
from tests.prometheus import SERVED, sees

GOOD = "oz-test/none:1"

ODD_IDS = {
    "punctuation": "a,b=c;d \"e\" 'f' $HOME `g` \\ {{.ID}}",
    "lines": "one\ntwo\r\n\tthree",
    "a flag": "--privileged",
    "a path": "../../../etc/passwd",
    "letters": "äöü 漢字 🙂 \u202etxt",
    "long": "x" * 1024,
    "blanks": "  x  ",
}


def sidecar(image: str, path: Any) -> dict[str, Any]:
    return {"additional_sidecars": [{"image": image, "mount_path": path}]}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "image of two words": ({"extra": {"docker_image": "not an image"}}, "image_pull", "no name of an image; write it"),
    "image that is a flag": ({"extra": {"docker_image": "--privileged"}}, "image_pull", "no name of an image"),
    "image of two lines": ({"extra": {"docker_image": "a\nb"}}, "image_pull", "no name of an image"),
    "long image": ({"extra": {"docker_image": "x" * 100_000}}, "image_pull", "no name of an image; write it"),
    "image with NUL": ({"extra": {"docker_image": "a\0b"}}, "unknown", "docker_image contains a NUL"),
    "image that is a number": ({"extra": {"docker_image": 7}}, "unknown", "docker_image is"),
    "no sidecar image": ({"extra": sidecar(" ", "/x")}, "sidecar_prep", "names no image; give it one"),
    "bad sidecar image": ({"extra": sidecar("UPPER", "/x")}, "sidecar_prep", "no name of an image; write it"),
    "relative path": ({"extra": sidecar(GOOD, "x")}, "sidecar_prep", "a mount path is absolute"),
    "the root": ({"extra": sidecar(GOOD, "/x/..")}, "sidecar_prep", "the whole file system; choose a path"),
    "path taken": (
        {"extra": {"additional_sidecars": [{"image": GOOD, "mount_path": path} for path in ("/x", "//x/.")]}},
        "sidecar_prep",
        "mounted at /x already; give each",
    ),
    "path of a volume": ({"extra": {}}, "container_create", "mounted at the same place"),
    "path with a mode": ({"extra": sidecar(GOOD, "/x:rw")}, "sidecar_prep", "cannot have ':' in it"),
    "long path": ({"extra": sidecar(GOOD, "/x" * 40_000)}, "sidecar_prep", "choose a shorter one"),
    "path of a wrong type": ({"extra": sidecar(GOOD, ["/x"])}, "unknown", "additional_sidecars[0].mount_path is"),
    "nameless variable": ({"env_vars": {"": "x"}}, "unknown", "is no name of an environment variable"),
    "variable with =": ({"env_vars": {"A=B": "x"}}, "unknown", "is no name of an environment variable"),
    "variable with NUL": ({"env_vars": {"A": "x\0y"}}, "unknown", "contains a NUL"),
    "long variable": ({"env_vars": {"A": "x\n" * 70_000}}, "container_create", "the variable A is longer than"),
    "variable of docker": ({"env_vars": {"DOCKER_HOST": "a\nb"}}, "container_create", "the variable DOCKER_HOST"),
    "long argument": ({"extra": {"additional_oz_args": ["x" * 131_072]}}, "unknown", "additional_oz_args[0] is longer"),
    "many arguments": (
        {"extra": {"additional_oz_args": ["x" * 100_000] * 30}},
        "container_create",
        "arguments and variables, or one of them, are longer than this system takes; pass long ones in files",
    ),
    "processors": ({"extra": {"instance_shape": {"vcpus": 100_000}}}, "container_create", "CPUs"),
}


def test_what_a_task_cannot_mean_is_its_report_and_leaves_nothing(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start(env=SERVED)
    tasks = {}
    for name, (more, _, _) in BAD.items():
        if name == "path of a volume":
            more = {"extra": sidecar(str(rig.docker["sidecar_image"]), f"{rig.place}/.")}
        tasks[name] = rig.submit("touch $HOME/ran", **more)
    rig.plane.wait_acknowledged(*tasks.values())
    for name, (_, reason, told) in BAD.items():
        assert (name, tasks[name].terminal.reason) == (name, reason), tasks[name].terminal.message
        assert told in tasks[name].terminal.message, (name, tasks[name].terminal.message)
    sees(
        worker,
        'oz_worker_task_failures_total{phase="backend",reason="sidecar_prep"}',
        'oz_worker_task_failures_total{phase="backend",reason="container_create"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="sidecar_prep"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="container_create"}',
    )
    assert not (rig.place / "ran").exists()
    assert rig.containers() == []
    good = rig.submit("exit 0")
    rig.plane.wait_acknowledged(good)
    assert good.state == "completed"
    assert worker.stop() == 0
    rig.audit()


def test_ids_of_any_form_are_labels_and_survive_a_lost_database(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start()
    hold = 'echo up > "$HOME/up-$N"; while [ ! -e $HOME/go ]; do sleep 0.1; done; exit 3'
    tasks = [
        rig.submit(hold, task_id=odd, execution_id=odd, run_id="plain", env_vars={"N": str(number)})
        for number, odd in enumerate(ODD_IDS.values())
    ]
    for number in range(len(tasks)):
        rig.written(f"up-{number}")
    worker.kill()
    for path in rig.instance_dirs()[0].glob("state.db*"):
        path.unlink()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks)
    assert {task.terminal.exit_code for task in tasks} == {3}
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("worker", ["  padded ", "a,b=c \"d\" 'e'"])
def test_a_worker_id_of_any_form_finds_its_containers(site: DockerSite, worker: str) -> None:
    backend = site.open(worker=worker)
    unit = site.unit("sleep 1; exit 3")
    backend.prepare(unit)
    backend.start(unit)
    assert unit.name in [found.name for found in backend.units()]
    backend._watch.look()
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None
    assert unit.facts.code == 3
    assert backend.clean_up(unit, keep=False) == ""
    mine = ("--filter", f"label=oz-worker.instance={INSTANCE}")
    for name in site.engine.ids("ps", "--all", "--quiet", *mine):
        site.engine.cli("rm", name)
    for name in site.engine.ids("volume", "ls", "--quiet", *mine):
        site.engine.cli("volume", "rm", name)


WINDOWS = '{"OSType": "windows", "Architecture": "x86_64", "SystemTime": "t"}'


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (f"echo '{WINDOWS}'", "the docker engine runs windows/amd64 containers; agents need linux/amd64 or"),
        ("echo 'Cannot connect to the Docker daemon. Is the docker daemon running?' >&2; exit 1", "Start the engine"),
        ("echo gibberish", "unreadable"),
    ],
)
def test_an_engine_that_is_of_no_use_is_exit_3_and_said(docker_rig: DockerRig, program: str, told: str) -> None:
    rig = docker_rig
    (rig.place / "docker").write_text(f"#!/bin/sh\n{program}\n")
    (rig.place / "docker").chmod(0o755)
    worker = rig.start(connected=False, env={"PATH": f"{rig.place}:{rig.env['PATH']}"})
    assert worker.exit_code() == ExitCode.NOT_USABLE
    assert told in worker.log
    rig.audit()
