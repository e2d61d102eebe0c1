"""The kinds of objects that the cluster serves, and what each is called."""

from __future__ import annotations

from typing import NamedTuple

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


class Resource(NamedTuple):
    """One row of discovery."""

    plural: str
    kind: str
    singular: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True
    short: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    subresources: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """The name in messages: `jobs.batch`, `pods`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def prefix(self) -> str:
        return f"apis/{self.group}/{self.version}" if self.group else f"api/{self.version}"

    @property
    def definition(self) -> str:
        """The name of the kind's schema."""
        package = {"": "core", "authorization.k8s.io": "authorization"}.get(self.group, self.group)
        return f"io.k8s.api.{package}.{self.version}.{self.kind}"

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        """The path of the collection, of an object, or of a subresource."""
        parts = [self.prefix, f"namespaces/{namespace}" if self.namespaced and namespace else "", self.plural]
        return "/" + "/".join(part for part in [*parts, name, subresource] if part)


_STATUS = ("status", ("get", "patch", "update"))

NAMESPACES = Resource("namespaces", "Namespace", "namespace", namespaced=False, short=("ns",), subresources=(_STATUS,))
NODES = Resource("nodes", "Node", "node", namespaced=False, short=("no",), subresources=(_STATUS,))
PODS = Resource(
    "pods", "Pod", "pod", short=("po",), subresources=(_STATUS, ("log", ("get",)), ("eviction", ("create",)))
)
SECRETS = Resource("secrets", "Secret", "secret")
CONFIGMAPS = Resource("configmaps", "ConfigMap", "configmap", short=("cm",))
SERVICE_ACCOUNTS = Resource("serviceaccounts", "ServiceAccount", "serviceaccount", short=("sa",))
EVENTS = Resource("events", "Event", "event", short=("ev",))
QUOTAS = Resource("resourcequotas", "ResourceQuota", "resourcequota", short=("quota",), subresources=(_STATUS,))
JOBS = Resource("jobs", "Job", "job", "batch", subresources=(_STATUS,))
ACCESS_REVIEWS = Resource(
    "selfsubjectaccessreviews",
    "SelfSubjectAccessReview",
    "",
    "authorization.k8s.io",
    namespaced=False,
    verbs=("create",),
)
RULES_REVIEWS = Resource(
    "selfsubjectrulesreviews", "SelfSubjectRulesReview", "", "authorization.k8s.io", namespaced=False, verbs=("create",)
)

RESOURCES = (
    *(NAMESPACES, NODES, PODS, SECRETS, CONFIGMAPS, SERVICE_ACCOUNTS, EVENTS, QUOTAS),
    *(JOBS, ACCESS_REVIEWS, RULES_REVIEWS),
)
STORED = tuple(resource for resource in RESOURCES if "list" in resource.verbs)
_BY_PATH = {(resource.group, resource.version, resource.plural): resource for resource in RESOURCES}


def find(group: str, version: str, plural: str) -> Resource | None:
    return _BY_PATH.get((group, version, plural))
