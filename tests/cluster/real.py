"""A cluster that somebody has, in the place of ours: one namespace of it, made for a test and removed behind it."""

from __future__ import annotations

import json
import secrets
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from tests.cluster.cluster import Census
from tests.engines.client import find_program

VARIABLE = "OZ_TEST_KUBECONFIG"
_KINDS = ("jobs.batch", "pods", "secrets")


class RealCluster:
    """The cluster of *kubeconfig*, its current context. What only our own can do skips the test that asks for it."""

    is_real = True
    task_image = "busybox"

    def __init__(self, kubeconfig: Path, place: Path) -> None:
        self.namespace = f"oz-test-{secrets.token_hex(4)}"
        self._place = place
        self._source = kubeconfig
        self.kubeconfig = self.write_kubeconfig()
        self._kubectl("create", "namespace", self.namespace)

    def _kubectl(self, *argv: str) -> str:
        command = [find_program("kubectl"), f"--kubeconfig={self.kubeconfig}", *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def write_kubeconfig(self) -> Path:
        """A copy of the kubeconfig whose current context has our namespace."""
        found = yaml.safe_load(self._source.read_text())
        for row in found["contexts"]:
            if row["name"] == found["current-context"]:
                row["context"]["namespace"] = self.namespace
        for rows, kind in ((found["clusters"], "cluster"), (found["users"], "user")):
            for row in rows:
                for name in ("certificate-authority", "client-certificate", "client-key"):
                    if name in row[kind]:  # relative to where it stood
                        row[kind][name] = str(self._source.parent / row[kind][name])
        path = self._place / f"kubeconfig-{secrets.token_hex(4)}"
        path.write_text(yaml.safe_dump(found))
        path.chmod(0o600)
        return path

    def census(self) -> Census:
        """What stands in the namespace; processes and watches are beyond us."""
        objects = {}
        for kind in _KINDS:
            found = json.loads(self._kubectl("get", kind, "-o", "json"))["items"]
            if found:
                objects[kind] = len(found)
        return Census(objects, (), 0, 0)

    def close(self) -> None:
        """Remove the namespace and everything in it; not waited for."""
        self._kubectl("delete", "namespace", self.namespace, "--wait=false")

    def __getattr__(self, name: str) -> Any:
        return self._skip(name)

    @staticmethod
    def _skip(name: str) -> NoReturn:
        pytest.skip(f"the cluster of {VARIABLE} has no `{name}`: unset {VARIABLE} to run this test")
