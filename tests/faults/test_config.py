"""Configurations through the real process (fault 47, failures 69 and 70)."""

from __future__ import annotations

import pytest
import yaml

from tests.rig import Rig

WORKER = "worker_id: w\nbackend: {direct: {}}\n"
MANY = """worker_id: w
wroker: 1
stop_grace: soon
max_concurrent_tasks: [1]
backend:
  direct:
    workspace_rot: /x
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MANY, ["c.yaml:2:1", "did you mean", "c.yaml:3:13", "c.yaml:4:23", "c.yaml:7:5", "'workspace_root'"]),
        (WORKER + "\tstop_grace: 1s\n", ["c.yaml:3:1", "tab"]),
        (WORKER + "worker_id: v\n", ["c.yaml:3:1", "worker_id"]),
        (WORKER + "stop_grace: *nowhere\n", ["c.yaml:3:13", "nowhere"]),
        (WORKER + "backend: {direct: {}, command: {}}\n", ["c.yaml"]),
        ("worker_id: w\nbackend:\n  direct:\n    environment: [{name: NOT_SET_ANYWHERE}]\n", []),
        (None, ["c.yaml: cannot be read"]),
    ],
    ids=["all at once", "tab", "duplicate", "alias", "two backends", "unset variable", "unreadable"],
)
def test_a_mistake_is_exit_2_with_its_place_before_anything_is_touched(
    rig: Rig, text: str | None, said: list[str]
) -> None:
    """Fault 47: sentences with file:line:column, all at once; nothing was dialled, nothing made on disk."""
    path = rig.place / "c.yaml"
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    done = rig.run_command(
        "--config-file", str(path), "--web-socket-url", "nonsense", "--state-dir", str(rig.state_dir)
    )
    assert done.returncode == 2, done.stderr
    for part in said:
        assert part in done.stderr
    assert "--web-socket-url" in done.stderr, "mistakes of the command line are told with those of the file"
    assert "Traceback" not in done.stderr
    assert rig.plane.key not in done.stderr
    assert not rig.state_dir.exists()
    rig.audit()


def test_variables_of_the_command_line_reach_the_agent_to_the_letter(rig: Rig) -> None:
    """Failure 69; and like those of a task they are masked in what it prints."""
    wanted = {"NO_PROXY": "a,b", "J": '{"a":1,"b":[2,"\\\\"]}', "EMPTY": "", "SIGNS": "x=y, z=$HOME"}
    flags = [word for name, value in wanted.items() for word in ("-e", f"{name}={value}")]
    worker = rig.start(*flags, "-e", "INHERITED", env={"INHERITED": "from the host"})
    names = [*wanted, "INHERITED"]
    script = "".join(f'printf "%s|" "${name}"; ' for name in names)
    task = rig.submit(f"{{ {script} echo; }} | tee $HOME/variables; exit 1")
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    kept = rig.run_command("logs", task.task_id, "--state-dir", str(rig.state_dir))
    assert kept.stdout == "a,b|***||***|***|\n"
    assert (rig.place / "variables").read_text() == "|".join([*wanted.values(), "from the host"]) + "|\n"
    rig.audit()


def test_a_configuration_with_anchors_and_a_second_document_runs_with_a_warning(rig: Rig) -> None:
    """Accepted because it works with the existing worker, and said because it was probably not meant."""
    rig.config["backend"]["direct"]["environment"] = []
    variables = "environment:\n    - &e {name: A, value: one}\n    - {<<: *e, name: B}"
    text = yaml.safe_dump(rig.config).replace("environment: []", variables) + "---\nnever: [read\n"
    worker = rig.start(text=text)
    task = rig.submit('test "$A$B" = oneone')
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert worker.stop() == 0
    assert "WARNING" in worker.log
    rig.audit()
