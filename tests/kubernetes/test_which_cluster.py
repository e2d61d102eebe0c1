"""Which cluster, and where in it: by file, variable, context and namespace, and from a pod by its own account."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from oz_worker.backends.job_object import job_name
from oz_worker.devplane.server import ControlPlane
from tests.cluster.access import Rule
from tests.cluster.resources import JOBS
from tests.kubernetes.kubernetes_site import KubernetesSite, ended
from tests.kubernetes.test_preflight import role
from tests.rig import ROOT

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
IN_A_POD = 'mount -t tmpfs none "$(realpath /var/run)" && mkdir -p "$1" && cp "$2"/* "$1"/ && shift 2 && exec "$@"'
"""What makes a process believe that it is in a pod: the files of its account, in a mount namespace of its own."""


def runs_a_task(site: KubernetesSite, **options: Any) -> str:
    """Run one; the name of its Job."""
    backend = site.open(**options)
    unit = site.started(backend, "exit 7")
    assert ended(unit).code == 7
    assert backend.clean_up(unit, keep=False) == ""
    return job_name(unit.key)


def test_a_context_that_is_not_the_current_one(site: KubernetesSite) -> None:
    found = yaml.safe_load(Path(site.cluster.kubeconfig).read_text())
    found["clusters"].append({"name": "away", "cluster": {"server": "http://127.0.0.1:1"}})
    found["contexts"].append({"name": "away", "context": {"cluster": "away", "user": "test", "namespace": "x"}})
    found["current-context"] = "away"
    path = site.root / "two-contexts"
    path.write_text(yaml.safe_dump(found))
    runs_a_task(site, kubeconfig=str(path), context="test")


def test_the_program_s_own_rules_hold_where_nothing_is_said(site: KubernetesSite) -> None:
    path = {"PATH": os.environ["PATH"]}
    by_variable = {**path, "HOME": "/nonexistent", "KUBECONFIG": str(site.cluster.kubeconfig)}
    runs_a_task(site, kubeconfig="", environ=by_variable)
    (site.root / ".kube").mkdir()
    (site.root / ".kube/config").write_text(Path(site.cluster.kubeconfig).read_text())
    runs_a_task(site, kubeconfig="", environ={**path, "HOME": str(site.root)})


def test_only_the_namespace_is_touched(guarded: KubernetesSite) -> None:
    site = guarded
    site.cluster.add_namespace("agents")
    site.before = site.cluster.census()
    token = site.cluster.token(*role(), namespace="agents")  # what a Role and its binding there give
    options = {"namespace": "agents", "kubeconfig": str(site.cluster.write_kubeconfig(token)), "preflight": True}
    name = runs_a_task(site, **options)
    assert site.jobs() == []
    kept = site.cluster.store.objects(JOBS, "agents")[0]
    assert [job["metadata"]["name"] for job in kept] == [name]
    site.cluster.api.delete(JOBS, "agents", name, {"propagationPolicy": "Foreground"})


def test_from_a_pod_by_its_own_account(guarded: KubernetesSite) -> None:
    """Without any kubeconfig, as the chart's worker runs; the real kubectl finds address, token and authority."""
    site = guarded
    url = site.cluster.url.removeprefix("https://")
    host, _, port = url.partition(":")
    account = site.root / "account"
    account.mkdir()
    config = yaml.safe_load(Path(site.cluster.kubeconfig).read_text())
    authority = Path(config["clusters"][0]["cluster"]["certificate-authority"]).read_text()
    for name, text in (("token", site.cluster.token(*role())), ("ca.crt", authority), ("namespace", "elsewhere")):
        (account / name).write_text(text)
    options = {"preflight_image": "busybox", "preflight_timeout": "20s"}
    inside = ["unshare", "--mount", "sh", "-c", IN_A_POD, "sh", str(ACCOUNT), str(account)]
    command = [*inside, sys.executable, "-m", "oz_worker", "check", "--config-file", str(site.root / "config.yaml")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(site.root), "PYTHONPATH": str(ROOT)}
    environment |= {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}

    def check(code: int) -> dict[str, str]:
        """What is said of each test."""
        with ControlPlane() as plane:
            chosen = {"worker_id": "w", "web_socket_url": plane.url, "backend": {"kubernetes": options}}
            (site.root / "config.yaml").write_text(yaml.safe_dump(chosen))
            env = {**environment, "WARP_API_KEY": plane.key}
            done = subprocess.run(
                [*command, "--json"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
            )
        assert (done.returncode, done.stderr) == (code, ""), done.stdout
        return {test["name"]: test["said"] for test in json.loads(done.stdout)["tests"]}

    said = check(0)
    assert f"namespace default of {host}, the cluster of this pod" in said["cluster"]
    assert said["permissions"] == "all that is needed"
    assert "busybox was pulled and run as root" in said["image"]
    denied = Rule(("get",), ("pods",))
    (account / "token").write_text(site.cluster.token(denied))
    assert "this account may not create jobs" in check(3)["permissions"]
