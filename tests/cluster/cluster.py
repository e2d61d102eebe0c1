"""A whole cluster in this process: the API server, its store, and the parts that bring objects to life."""

from __future__ import annotations

import secrets
import shutil
import ssl
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Iterable, Mapping, NamedTuple

import yaml

from tests.cluster.access import Rule, User
from tests.cluster.admission import Hook, Webhook
from tests.cluster.api import Api
from tests.cluster.collector import Collector
from tests.cluster.containers import Containers
from tests.cluster.images import BUSYBOX, SIDECAR, Images
from tests.cluster.job_controller import JobController
from tests.cluster.kubelet import Kubelet, Times
from tests.cluster.loop import Loop
from tests.cluster.refusals import Json
from tests.cluster.requests import Journal
from tests.cluster.resources import CONFIGMAPS, NAMESPACES, NODES, QUOTAS, SERVICE_ACCOUNTS, Resource
from tests.cluster.rest import Rest
from tests.cluster.scheduler import Scheduler, node
from tests.cluster.schemas import Schemas
from tests.cluster.server import Server
from tests.cluster.store import Change, Store
from tests.cluster.weather import Weather
from tests.memory import memory


class Tls(NamedTuple):
    """A server's certificate and the file of the authority that its clients must trust."""

    server: ssl.SSLContext
    ca_file: str


class Census(NamedTuple):
    """What there is now; two of them are compared."""

    objects: Mapping[str, int]
    """How many of each kind, without events."""
    processes: tuple[str, ...]
    """Containers and hooks that run, as uid/container/attempt."""
    directories: int
    """Pods that have files on a node."""
    watches: int


class Cluster:
    """Runs from the moment it is made until `close`; needs root. Any thread may call any method.

    *release* is the version of Kubernetes, and of the schemas it decodes by. *tls*: by https, and only with tokens that
    were made by `token`; else by http, where who has no token is the admin. *aggregated*, *image_volumes*: whether it
    has the newer form of discovery, and image volumes. *bookmarks*: seconds from one bookmark to the next.
    """

    is_real = False
    namespace = "default"
    """Where tests put their objects; also that of the context in `kubeconfig`."""
    task_image = BUSYBOX
    sidecar_image = SIDECAR
    """Nothing but /entrypoint.sh and the `oz` it asks, as in `tests.engines.images`: no shell, no tar."""

    def __init__(
        self,
        release: str = "1.32",
        *,
        tls: Tls | None = None,
        port: int = 0,
        aggregated: bool = True,
        image_volumes: bool = True,
        bookmarks: float = 60.0,
        nodes: Iterable[str] = ("node-1",),
        times: Times | None = None,
    ) -> None:
        schemas = Schemas(release)  # first: it may raise
        self.place = Path(tempfile.mkdtemp(prefix="ozk-", dir=memory()))
        self.release = release
        self.times = times or Times()
        self._tls = tls
        self.store = Store()
        self.api = Api(self.store, schemas, image_volumes=image_volumes)
        self.images = Images(self.place / "images")
        self._loop = Loop("cluster-loop")
        self._containers = Containers(self.place, self._loop)
        pods = self.place / "pods"
        pods.mkdir()
        self._scheduler = Scheduler(self.api, self._loop, self.times.retry)
        self._services: dict[str, str] = {}
        self._kubelet = Kubelet(
            self.api,
            self._loop,
            self._containers,
            self.images,
            pods,
            release=release,
            times=self.times,
            services=self._services,
            token=self._token_of,
        )
        Collector(self.api, self._loop)
        JobController(self.api, self._loop, back_off=self.times.job_back_off, release=release)
        answers = Rest(
            self.api, pods, release, aggregated=aggregated, reachable=lambda name: name not in self._kubelet.lost
        )
        self.faults: Weather

        def faults(front: object) -> Weather:
            self.faults = Weather(self.api, front, self._kubelet, self._scheduler)  # type: ignore[arg-type]
            return self.faults

        self._server = Server(
            self.api, answers, faults, port=port, tls=tls.server if tls else None, bookmark_every=bookmarks
        )
        self._say_where()
        self.store.listeners.append(self._furnish)
        for name in nodes:
            self.add_node(name)
        for name in ("default", "kube-system"):
            self.add_namespace(name)
        self.kubeconfig = self.write_kubeconfig()

    # Addresses and rights

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._server.front.port}"

    @property
    def journal(self) -> Journal:
        """All requests so far."""
        return self._server.journal

    def _say_where(self) -> None:
        port = str(self._server.front.port)
        names = {"SERVICE_HOST": "127.0.0.1", "SERVICE_PORT": port, "SERVICE_PORT_HTTPS": port}
        names |= {"PORT": f"tcp://127.0.0.1:{port}", "PORT_443_TCP_ADDR": "127.0.0.1", "PORT_443_TCP_PORT": port}
        self._services.update({f"KUBERNETES_{name}": value for name, value in names.items()})

    def token(self, *rules: Rule, user: str = "system:serviceaccount:default:worker", namespace: str = "") -> str:
        """A new bearer token; *rules* count in *namespace*, "" for everywhere. No rules: no rights."""
        made = secrets.token_hex(16)
        self._server.users[made] = User(user, tuple(rules), namespace)
        return made

    def grant(self, token: str, *rules: Rule) -> None:
        """Let *rules* be those of a token from now on."""
        self._server.users[token] = self._server.users[token]._replace(rules=tuple(rules))

    def _token_of(self, pod: Json) -> str:
        """The token of a pod's service account: it has no rights."""
        namespace, account = pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]
        return self.token(user=f"system:serviceaccount:{namespace}:{account}")

    def write_kubeconfig(
        self, token: str = "", *, namespace: str = "default", context: str = "test", name: str = ""
    ) -> Path:
        """A kubeconfig with one context; without a *token* for the admin."""
        if token and not self._tls:
            raise ValueError("kubectl sends no token over plain http: make the cluster with `tls`")
        if self._tls and not token:
            token = self.token(Rule(("*",), ("*",)), user="kubernetes-admin")
        cluster = {"server": self.url, **({"certificate-authority": self._tls.ca_file} if self._tls else {})}
        found = {"apiVersion": "v1", "kind": "Config", "current-context": context}
        found["clusters"] = [{"name": context, "cluster": cluster}]  # type: ignore[assignment]
        found["users"] = [{"name": context, "user": {"token": token} if token else {}}]  # type: ignore[assignment]
        bound = {"cluster": context, "user": context, "namespace": namespace}
        found["contexts"] = [{"name": context, "context": bound}]  # type: ignore[assignment]
        path = self.place / (name or f"kubeconfig-{secrets.token_hex(4)}")
        path.write_text(yaml.safe_dump(found))
        path.chmod(0o600)
        return path

    # Furniture

    def add_namespace(self, name: str) -> str:
        self._create(NAMESPACES, "", {"metadata": {"name": name}})
        return name

    def _furnish(self, change: Change) -> None:
        """A new namespace gets its service account and the authority's certificate, as controllers give them."""
        if change.resource != NAMESPACES or change.type != "ADDED":
            return
        name = change.object["metadata"]["name"]
        ca = Path(self._tls.ca_file).read_text() if self._tls else ""
        self._create(SERVICE_ACCOUNTS, name, {"metadata": {"name": "default"}})
        self._create(CONFIGMAPS, name, {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": ca}})

    def add_node(self, name: str, *, labels: Mapping[str, str] | None = None, **capacity: str) -> None:
        """A node with 64 cpus, 256Gi and room for 1000 pods, unless *capacity* says otherwise."""
        ready = node(name, labels or {}, capacity, self._kubelet.address(name))
        self._create(NODES, "", ready)

    def add_quota(self, namespace: str, **hard: str) -> None:
        """A ResourceQuota; `_` in a name stands for `.` and `__` for `/`: `count__jobs_batch="1"`, `pods="3"`."""
        rows = {name.replace("__", "/").replace("_", "."): value for name, value in hard.items()}
        self._create(QUOTAS, namespace, {"metadata": {"name": "quota"}, "spec": {"hard": rows}})

    def add_webhook(self, name: str, hook: Hook, *, code: int = 400) -> Webhook:
        """An admission webhook; take it out of `api.webhooks` to end it."""
        self.api.webhooks.append(Webhook(name, hook, code))
        return self.api.webhooks[-1]

    def _create(self, resource: Resource, namespace: str, obj: Json) -> Json:
        return self.api.create(resource, namespace, {"kind": resource.kind, "apiVersion": resource.api_version, **obj})

    # To the end

    def census(self) -> Census:
        """Count now."""
        objects = {kind: count for kind, count in self.store.count().items() if kind != "events"}
        running, directories = self._loop.ask(lambda: (self._containers.running, len(self._kubelet.pods)))
        return Census(objects, tuple(running), directories, len(self.faults.watches()))

    @property
    def mistakes(self) -> list[str]:
        """Defects of the cluster itself, as tracebacks; a fixture fails when there are any."""
        return [*self._loop.mistakes, *self._server.mistakes]

    def close(self) -> None:
        """End every process and thread, and remove every file."""
        self.store.close()
        self._server.close()
        self._loop.close()
        self._containers.close()
        shutil.rmtree(self.place, ignore_errors=True)  # the runtime has done so already

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
