"""What kubectl prints, and what is made of it: whether to ask again decides over a task."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from oz_worker.backends.job_seen import pruned
from oz_worker.cluster import (
    Cluster,
    ClusterDown,
    ClusterError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    event_of,
    refusal,
)

WORDY = "pods must not do that; " * 200
INVALID = "* spec.template.spec.containers[0].env[{}].name: Invalid value: 'a b': a valid name must consist of letters"
QUOTA = (
    'Operation cannot be fulfilled on resourcequotas "gke-resource-quotas": the object has been modified; please apply'
    " your changes to the latest version and try again"
)
UID = (
    'Operation cannot be fulfilled on jobs.batch "j": Precondition failed: UID in precondition: a,'
    " UID in object meta: b"
)
LARGE = "rpc error: code = ResourceExhausted desc = trying to send message larger than max (2160476 vs. 2097152)"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (f'Error from server (Forbidden): admission webhook "p" denied the request: {WORDY}', Forbidden),
        ('The Job "j" is invalid: ' + "\n".join(map(INVALID.format, range(40))), Invalid),
        (f"Error from server (Conflict): {QUOTA}", ClusterDown),
        (f"Error from server (Conflict): {UID}", Conflict),
        ('Error from server (NotFound): jobs.batch "j" not found', NotFound),
        ("Error from server (NotFound): the server could not find the requested resource", ClusterDown),
        ("Error from server: etcdserver: request is too large", ClusterError),
        (f"Error from server: {LARGE}", ClusterError),
        ("Error from server: etcdserver: leader changed", ClusterDown),
    ],
)
def test_what_a_refusal_is(said: str, kind: type[ClusterError]) -> None:
    error = refusal("kubectl create", 1, said.encode())
    assert type(error) is kind
    assert len(str(error)) < 2000


def test_a_line_that_is_nested_without_end_is_unreadable() -> None:
    with pytest.raises(ClusterDown, match="unreadable"):
        event_of(b'{"type":"ADDED","object":' + b"[" * 100_000)


def test_a_list_is_pruned_page_by_page(tmp_path: Path) -> None:
    """Thousands of failed Jobs may wait for their TTL: a worker holds one page of them at most."""
    page = {"kind": "JobList", "metadata": {"continue": "more"}, "items": [_job(n) for n in range(300)]}
    (tmp_path / "page").write_text(json.dumps(page))
    (tmp_path / "last").write_text(json.dumps({"kind": "JobList", "metadata": {"resourceVersion": "7"}, "items": []}))
    asked = tmp_path / "asked"
    program = tmp_path / "kubectl"
    program.write_text(
        f"#!/bin/sh\necho >> {asked}\n"
        f"[ $(wc -l < {asked}) -gt 6 ] && exec cat {tmp_path}/last\nexec cat {tmp_path}/page\n"
    )
    program.chmod(0o755)
    door = Cluster(str(program), namespace="n", flags=(), environment=dict(os.environ), instance="i", timeout=30.0)
    tracemalloc.start()
    try:
        found = door.find("jobs", keep=pruned)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(found.items), found.version) == (1800, "7")
    assert peak < 16 * (tmp_path / "page").stat().st_size


def _job(number: int) -> dict[str, Any]:
    env = [{"name": f"NAME_{each}", "value": f"{number}-{each}" * 10} for each in range(100)]
    template = {"spec": {"containers": [{"name": "task", "env": env}]}}
    return {"metadata": {"name": f"j{number}", "uid": f"u{number}"}, "spec": {"template": template}, "status": {}}
