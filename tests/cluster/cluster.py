"""A whole cluster in this process: the API server, its store, and the parts that bring objects to life."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import yaml

from tests.cluster.access import Rule, User
from tests.cluster.api import Api
from tests.cluster.refusals import Json
from tests.cluster.resources import CONFIGMAPS, NAMESPACES, SERVICE_ACCOUNTS
from tests.cluster.rest import Rest
from tests.cluster.schemas import Schemas
from tests.cluster.server import Server
from tests.cluster.store import Store


class Cluster:
    def __init__(self, release: str = "1.32") -> None:
        self.place = Path(tempfile.mkdtemp(prefix="ozk-"))
        self.store = Store()
        self.api = Api(self.store, Schemas(release))
        self.server = Server(self.api, Rest(self.api, self.place, release))
        self.namespace("default")
        self.kubeconfig = self.place / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self.config()))

    def namespace(self, name: str) -> None:
        self.api.create(NAMESPACES, "", {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}})
        self.api.create(SERVICE_ACCOUNTS, name, {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": "default"}})

    def config(self) -> Json:
        return {"apiVersion": "v1", "kind": "Config", "current-context": "c", "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server.front.port}"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}}], "users": [{"name": "u", "user": {}}]}

    def close(self) -> None:
        self.store.close()
        self.server.close()
        shutil.rmtree(self.place)
