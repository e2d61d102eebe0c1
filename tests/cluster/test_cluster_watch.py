"""Watches of the suite's API server by `kubectl get --raw`: versions, bookmarks, selectors, and every way to end."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.fixtures import Kubectl, OwnCluster
from tests.cluster.patience import eventually
from tests.cluster.resources import JOBS
from tests.cluster.shapes import container, ended, job, submit

PATH = "/apis/batch/v1/namespaces/default/jobs"


class Stream:
    """A `kubectl get --raw` that watches; `lines` are the events so far."""

    def __init__(self, kubectl: Kubectl, place: Path, query: dict[str, Any]) -> None:
        self.out, self.err = place / "watch.out", place / "watch.err"
        path = f"{PATH}?{urllib.parse.urlencode({'watch': 1, **query})}"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [kubectl.program, "get", "--raw", path]
            self.process = subprocess.Popen(command, env=kubectl.env, stdout=out, stderr=err)

    @property
    def rows(self) -> list[dict[str, Any]]:
        whole = self.out.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def told(self) -> list[str]:
        return [f"{row['type']} {row['object']['metadata'].get('name', '')}".strip() for row in self.rows]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def watch(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Any]:
    made: list[Stream] = []

    def begin(**query: Any) -> Stream:
        before = len(cluster.faults.watches())
        made.append(Stream(kubectl, tmp_path, query))
        eventually(lambda: len(cluster.faults.watches()) > before or made[-1].process.poll() is not None)
        return made[-1]

    try:
        yield begin
    finally:
        for stream in made:
            stream.close()


def paused(name: str, **labels: str) -> Any:
    return job(name, container("true"), meta={"labels": labels or {"a": "b"}}, suspend=True)


def settled(cluster: Cluster, name: str) -> str:
    """The version of a Job to which nothing happens any more."""
    eventually(lambda: "conditions" in (cluster.store.get(JOBS, "default", name) or {})["status"])
    return str(cluster.store.objects(JOBS)[1])


def test_a_watch_goes_on_from_a_version(cluster: Cluster, watch: Any) -> None:
    submit(cluster, paused("a"))
    version = settled(cluster, "a")
    submit(cluster, paused("b"))
    settled(cluster, "b")
    cluster.faults.delete_job("default", "a")
    stream = watch(resourceVersion=version, timeoutSeconds=60)
    eventually(lambda: "DELETED a" in stream.told)
    assert stream.told[0] == "ADDED b"
    assert "ADDED a" not in stream.told
    versions = [int(row["object"]["metadata"]["resourceVersion"]) for row in stream.rows]
    assert versions == sorted(versions)
    assert versions[0] > int(version)


@pytest.mark.parametrize("query", [{}, {"resourceVersion": "0"}], ids=["unset", "zero"])
def test_without_a_version_it_tells_what_is_there(query: dict[str, str], cluster: Cluster, watch: Any) -> None:
    submit(cluster, paused("a"))
    settled(cluster, "a")
    stream = watch(**query)
    eventually(lambda: stream.told == ["ADDED a"])


def test_bookmarks_come_when_allowed_and_the_time_ends_cleanly(own_cluster: OwnCluster, tmp_path: Path) -> None:
    cluster = own_cluster(bookmarks=0.2)
    submit(cluster, paused("a"))
    version = settled(cluster, "a")
    kubectl = Kubectl(cluster.kubeconfig, tmp_path)
    for allowed in ("true", "false"):
        stream = Stream(
            kubectl, tmp_path, {"resourceVersion": version, "timeoutSeconds": 2, "allowWatchBookmarks": allowed}
        )
        assert stream.process.wait(60) == 0
        assert stream.err.read_text() == ""
        assert {row["type"] for row in stream.rows} == ({"BOOKMARK"} if allowed == "true" else set())
        for row in stream.rows:
            assert row["object"]["kind"] == "Job"
            assert row["object"]["metadata"]["resourceVersion"] == version


def test_what_ceases_to_match_is_deleted_for_the_watch(cluster: Cluster, kubectl: Kubectl, watch: Any) -> None:
    submit(cluster, paused("a", who="me"))
    stream = watch(resourceVersion=settled(cluster, "a"), labelSelector="who=me")
    submit(cluster, paused("other", who="you"))
    kubectl("label", "job", "a", "who=you", "--overwrite")
    eventually(lambda: stream.told == ["DELETED a"])
    kubectl("label", "job", "a", "who=me", "--overwrite")
    eventually(lambda: stream.told == ["DELETED a", "ADDED a"])


def test_a_version_that_is_forgotten_is_gone(cluster: Cluster, watch: Any) -> None:
    submit(cluster, paused("a"))
    version = settled(cluster, "a")
    cluster.faults.forget_history()
    stream = watch(resourceVersion=version, timeoutSeconds=60)
    assert stream.process.wait(60) == 0
    (row,) = stream.rows
    assert (row["type"], row["object"]["code"], row["object"]["reason"]) == ("ERROR", 410, "Expired")
    assert "too old resource version" in row["object"]["message"]


@pytest.mark.parametrize("how", ["end", "reset", "gone", "error", "garbage"])
def test_streams_end_as_they_are_told(how: str, cluster: Cluster, watch: Any) -> None:
    submit(cluster, paused("a"))
    stream = watch(resourceVersion=settled(cluster, "a"))
    assert cluster.faults.end_watches(how, "jobs") == 1
    code = stream.process.wait(60)
    text = stream.out.read_bytes()
    assert code == (1 if how == "reset" else 0)
    if how == "gone":
        assert stream.rows[0]["object"]["code"] == 410
    elif how == "error":
        assert stream.rows[0]["object"]["code"] == 500
    elif how == "garbage":
        assert b"not json" in text
    else:
        assert text == b""
        assert ("connection reset by peer" in stream.err.read_text()) is (how == "reset")


def test_a_silent_stream_says_nothing_and_does_not_end(cluster: Cluster, watch: Any) -> None:
    submit(cluster, paused("a"))
    stream = watch(resourceVersion=settled(cluster, "a"), timeoutSeconds=1)
    assert cluster.faults.silence_watches() == 1
    submit(cluster, paused("b"))
    settled(cluster, "b")
    with pytest.raises(subprocess.TimeoutExpired):
        stream.process.wait(3)
    assert stream.rows == []


def test_events_that_are_lost_do_not_come_later(cluster: Cluster, watch: Any) -> None:
    stream = watch()
    with cluster.faults.lose_events(lambda obj: obj["metadata"]["name"] == "a"):
        submit(cluster, paused("a"))
        settled(cluster, "a")
        submit(cluster, paused("b"))
        eventually(lambda: "MODIFIED b" in stream.told)
    assert "ADDED a" not in stream.told


def test_a_watch_that_nobody_reads_is_given_up(cluster: Cluster, watch: Any) -> None:
    stream = watch()
    assert cluster.census().watches == 1
    stream.close()
    eventually(lambda: cluster.census().watches == 0)


def test_kubectl_wait_and_get_w_work(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> None:
    out = tmp_path / "w"
    with out.open("wb") as file:
        process = subprocess.Popen([kubectl.program, "get", "jobs", "-w", "-o", "name"], env=kubectl.env, stdout=file)
    try:
        eventually(lambda: cluster.faults.watches("jobs"))
        submit(cluster, job("a", container("true")))
        kubectl("wait", "--for=condition=Complete", "job/a", "--timeout=60s")
        ended(cluster, "a")
        eventually(lambda: "job.batch/a" in out.read_text())
    finally:
        process.kill()
        process.wait()


def test_requests_fail_as_they_are_told(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, paused("a"))
    get = ("get", "--raw", f"{PATH}/a")
    with cluster.faults.fail(500, "get", "jobs") as fault:
        assert "Internal error occurred: etcdserver: request timed out" in kubectl.refused(*get)
        assert fault.met == 1
    with cluster.faults.fail(503, "get", "jobs", times=1):
        assert "unable to handle the request" in kubectl.refused(*get)
        kubectl(*get)
    with cluster.faults.fail(429, "get", "jobs", times=2, retry_after=1) as fault:
        kubectl(*get)  # asks again by itself, as told
        assert fault.met == 2
    with cluster.faults.cut("get", "jobs"):
        assert "connection reset by peer" in kubectl.refused(*get)
    with cluster.faults.hang("get", "jobs"):
        said = kubectl.refused(*get, "--request-timeout=1s")
        assert "Client.Timeout exceeded" in said or "context deadline exceeded" in said
    with cluster.faults.slow(1.5, "get", "jobs", times=1):
        assert json.loads(kubectl(*get))["metadata"]["name"] == "a"
    with cluster.faults.down():
        assert "was refused - did you specify the right host or port?" in kubectl.refused(*get)
    kubectl(*get)


def test_an_api_that_goes_away_cuts_its_streams(cluster: Cluster, kubectl: Kubectl, watch: Any) -> None:
    submit(cluster, paused("a"))
    stream = watch(resourceVersion=settled(cluster, "a"))
    with cluster.faults.down():
        assert stream.process.wait(60) == 1
        assert "unexpected EOF" in stream.err.read_text()
        eventually(lambda: not cluster.faults.watches())
    kubectl("get", "jobs")
