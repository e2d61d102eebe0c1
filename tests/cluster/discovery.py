"""What the server says about itself: version, groups and resources in both forms, and what kubectl needs of OpenAPI."""

from __future__ import annotations

from tests.cluster.refusals import Json
from tests.cluster.resources import RESOURCES, Resource

_AGGREGATED = "application/json;g=apidiscovery.k8s.io;v={};as=APIGroupDiscoveryList"
_PREFIXES = tuple(dict.fromkeys(resource.prefix for resource in RESOURCES))


def version(release: str) -> Json:
    major, minor = release.split(".")
    names = {"gitVersion": f"v{release}.0", "gitCommit": "0" * 40, "gitTreeState": "clean"}
    names |= {"buildDate": "2024-01-01T00:00:00Z", "goVersion": "go1.23.0", "compiler": "gc", "platform": "linux/amd64"}
    return {"major": major, "minor": minor, **names}


def _in(prefix: str) -> list[Resource]:
    return [resource for resource in RESOURCES if resource.prefix == prefix]


def _kind(resource: Resource) -> Json:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _groups(core: bool) -> list[str]:
    return [prefix for prefix in _PREFIXES if prefix.startswith("api/") is core]


def _resource_list(prefix: str) -> Json:
    rows: list[Json] = []
    for each in _in(prefix):
        row: Json = {
            "name": each.plural,
            "singularName": each.singular,
            "namespaced": each.namespaced,
            "kind": each.kind,
        }
        row["verbs"] = [*each.verbs]
        rows.append({**row, "shortNames": [*each.short]} if each.short else row)
        for name, verbs in each.subresources:
            inner = {"name": f"{each.plural}/{name}", "singularName": "", "namespaced": each.namespaced}
            rows.append({**inner, "kind": each.kind, "verbs": [*verbs]})
    version_name = prefix.partition("/")[2]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version_name, "resources": rows}


def _discovery(core: bool, form: str) -> Json:
    items = []
    for prefix in _groups(core):
        rows: list[Json] = []
        for each in _in(prefix):
            row: Json = {
                "resource": each.plural,
                "responseKind": _kind(each),
                "scope": "Namespaced" if each.namespaced else "Cluster",
            }
            row |= {"singularResource": each.singular, "verbs": [*each.verbs]}
            if each.short:
                row["shortNames"] = [*each.short]
            inner = [
                {"subresource": name, "responseKind": _kind(each), "verbs": [*verbs]}
                for name, verbs in each.subresources
            ]
            rows.append({**row, "subresources": inner} if inner else row)
        group = _in(prefix)[0]
        meta = {"creationTimestamp": None, **({"name": group.group} if group.group else {})}
        items.append(
            {"metadata": meta, "versions": [{"version": group.version, "resources": rows, "freshness": "Current"}]}
        )
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{form}",
        "metadata": {},
        "items": items,
    }


def _group_list() -> Json:
    groups = []
    for prefix in _groups(core=False):
        name = _in(prefix)[0].group
        row = {"groupVersion": f"{name}/v1", "version": "v1"}
        groups.append({"name": name, "versions": [row], "preferredVersion": row})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _openapi(prefix: str) -> Json:
    paths = {}
    for each in _in(prefix):
        verb = "patch" if "patch" in each.verbs else "post"
        parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
        operation = {"x-kubernetes-group-version-kind": _kind(each), "parameters": parameters, "responses": {}}
        place = each.path("{namespace}", "{name}" if verb == "patch" else "")
        paths[place] = {verb: operation}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "unversioned"}, "paths": paths}


def answer(path: str, accept: str, release: str, *, aggregated: bool) -> tuple[Json, str] | None:
    """The document at *path* and its type, None when there is none. *aggregated* is the form that came with 1.26."""
    found: Json | None = None
    if path == "/version":
        found = version(release)
    elif path in ("/api", "/apis"):
        core = path == "/api"
        for form in ("v2", "v2beta1") if aggregated else ():
            if f"v={form};" in accept:
                return _discovery(core, form), _AGGREGATED.format(form)
        found = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []} if core else _group_list()
    elif path.strip("/") in _PREFIXES:
        found = _resource_list(path.strip("/"))
    elif path == "/openapi/v3":
        found = {"paths": {prefix: {"serverRelativeURL": f"/openapi/v3/{prefix}?hash=0"} for prefix in _PREFIXES}}
    elif path.startswith("/openapi/v3/") and path.removeprefix("/openapi/v3/") in _PREFIXES:
        found = _openapi(path.removeprefix("/openapi/v3/"))
    return None if found is None else (found, "application/json")
