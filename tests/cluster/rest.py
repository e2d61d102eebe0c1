"""What each request means: rights, then the verb on the resource, then its answer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

import yaml

from tests.cluster import access, deletion, discovery, logs, openapi_v2, protobuf
from tests.cluster.access import User
from tests.cluster.api import Api
from tests.cluster.conditions import disrupted
from tests.cluster.refusals import (
    Cause,
    Json,
    Refused,
    bad_request,
    cannot_read,
    internal,
    invalid,
    no_such_path,
    no_such_verb,
)
from tests.cluster.requests import Request
from tests.cluster.resources import ACCESS_REVIEWS, PODS, RULES_REVIEWS, Resource
from tests.cluster.selectors import Matches, fields_match, labels_match
from tests.cluster.watching import Asked

_LONGEST_WATCH = 1800.0


class Answer(NamedTuple):
    """A whole answer: *text* as it is, else *body* as JSON."""

    code: int
    body: Json | None = None
    text: bytes | None = None
    kind: str = "application/json"
    headers: Mapping[str, str] = {}
    warnings: Sequence[str] = ()


class Stream(NamedTuple):
    """An answer that goes on: a watch, or parts of a text."""

    asked: Asked | None
    parts: Iterator[bytes] = iter(())


class Rest:
    """Answers requests; any thread may ask. *place* is where the kubelet keeps its pods."""

    def __init__(
        self,
        api: Api,
        place: Path,
        release: str,
        *,
        aggregated: bool = True,
        reachable: Callable[[str], bool] = lambda node: True,
    ) -> None:
        self.api = api
        self._place = place
        self._release = release
        self._aggregated = aggregated
        self._reachable = reachable

    def answer(self, request: Request, user: User) -> Answer | Stream:
        """Raises Refused."""
        target = request.target
        if target.resource is None:
            return self._no_resource(request)
        resource = target.resource
        known = dict(resource.subresources).get(target.subresource) if target.subresource else resource.verbs
        if known is None:
            raise no_such_path()
        if target.verb not in known:
            raise no_such_verb()
        if resource in (ACCESS_REVIEWS, RULES_REVIEWS):
            body, _ = self._decoded(request, resource)
            review = access.access_review if resource == ACCESS_REVIEWS else access.rules_review
            return Answer(201, review(user, body))
        asked = f"{resource.plural}/{target.subresource}" if target.subresource else resource.plural
        if not user.may(target.verb, resource.group, asked, target.namespace, target.name):
            raise access.refusal(user, target.verb, resource, target.subresource, target.namespace, target.name)
        if target.subresource == "log":
            return self._log(request)
        if target.subresource == "eviction":
            return self._evict(request)
        verbs: dict[str, Callable[[Request, Resource], Answer | Stream]] = {
            "get": self._get,
            "list": self._list,
            "watch": self._watch,
            "create": self._create,
            "update": self._update,
            "patch": self._patch,
            "delete": self._delete,
            "deletecollection": self._delete_all,
        }
        return verbs[target.verb](request, resource)

    def _no_resource(self, request: Request) -> Answer:
        if request.path in ("/healthz", "/readyz", "/livez"):
            return Answer(200, text=b"ok", kind="text/plain")
        accept = request.headers.get("accept", "")
        if request.path == "/openapi/v2":
            return Answer(200, text=openapi_v2.document(self._release), kind=openapi_v2.MEDIA_TYPE)
        found = discovery.answer(request.path, accept, self._release, aggregated=self._aggregated)
        if found is None or request.method != "GET":
            raise no_such_path()
        return Answer(200, found[0], kind=found[1])

    def _get(self, request: Request, resource: Resource) -> Answer:
        return Answer(200, self.api.get(resource, request.target.namespace, request.target.name))

    @staticmethod
    def _selected(request: Request, resource: Resource) -> Matches:
        labels = labels_match(request.query.get("labelSelector", ""))
        fields = fields_match(resource, request.query.get("fieldSelector", ""))
        return lambda obj: labels(obj) and fields(obj)

    def _list(self, request: Request, resource: Resource) -> Answer:
        query = request.query
        limit, after, at = _number(query, "limit"), "", 0
        if query.get("continue"):
            at, after = _position(query["continue"])
        elif query.get("resourceVersionMatch") == "Exact":
            at = _number(query, "resourceVersion")
        else:
            self._not_older(query)
        objects, version = self.api.store.objects(resource, request.target.namespace, at)
        matches = self._selected(request, resource)
        found = [obj for obj in objects if matches(obj) and _order(obj) > after]
        meta: Json = {"resourceVersion": str(version)}
        if limit and len(found) > limit:
            meta["continue"] = _token(version, _order(found[limit - 1]))
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                meta["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        body = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": meta, "items": found}
        return Answer(200, body)

    def _not_older(self, query: Mapping[str, str]) -> None:
        version = _number(query, "resourceVersion")
        if version > self.api.store.version:
            self.api.store.objects(PODS, at=version)  # says that it is too large

    def _watch(self, request: Request, resource: Resource) -> Stream:
        query = request.query
        if request.flag("sendInitialEvents"):
            cause = Cause(
                "sendInitialEvents",
                "FieldValueForbidden",
                "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            )
            raise invalid(Resource("", "ListOptions", "", "meta.k8s.io"), "", [cause])
        version = _number(query, "resourceVersion") or None
        seconds = float(_number(query, "timeoutSeconds") or _LONGEST_WATCH)
        matches = self._selected(request, resource)
        if request.target.name:
            name = request.target.name
            return Stream(
                Asked(
                    resource,
                    request.target.namespace,
                    lambda obj: obj["metadata"]["name"] == name,
                    version,
                    False,
                    seconds,
                )
            )
        bookmarks = request.flag("allowWatchBookmarks")
        return Stream(Asked(resource, request.target.namespace, matches, version, bookmarks, seconds))

    def _decoded(self, request: Request, resource: Resource) -> tuple[Json, list[str]]:
        kind, body = request.content_type, request.body
        if kind == protobuf.MEDIA_TYPE:
            return self.api.schemas.decoded(protobuf.decoded(body), resource, "Ignore")
        if kind == "application/yaml":
            body = json.dumps(yaml.safe_load(body)).encode()
        elif kind not in ("application/json", ""):
            raise cannot_read(kind)
        return self.api.schemas.decode(body, resource, request.query.get("fieldValidation") or "Warn")

    def _create(self, request: Request, resource: Resource) -> Answer:
        if request.target.name:
            raise no_such_verb()
        obj, said = self._decoded(request, resource)
        made = self.api.create(resource, request.target.namespace, obj, dry_run=bool(request.query.get("dryRun")))
        return Answer(201, made, warnings=said)

    def _update(self, request: Request, resource: Resource) -> Answer:
        target = request.target
        obj, said = self._decoded(request, resource)
        if (obj.get("metadata") or {}).get("name") != target.name:
            raise bad_request("the name of the object does not match the name on the URL")
        return Answer(
            200, self.api.update(resource, target.namespace, target.name, obj, target.subresource), warnings=said
        )

    def _patch(self, request: Request, resource: Resource) -> Answer:
        target = request.target
        mode = request.query.get("fieldValidation") or "Warn"
        found, said = self.api.patch(
            resource,
            target.namespace,
            target.name,
            request.content_type,
            request.body,
            mode=mode,
            subresource=target.subresource,
            dry_run=bool(request.query.get("dryRun")),
        )
        return Answer(200, found, warnings=said)

    @staticmethod
    def _delete_options(request: Request) -> Json:
        options: Json = {}
        if request.body:
            try:
                binary = request.content_type == protobuf.MEDIA_TYPE
                options = protobuf.decoded(request.body) if binary else json.loads(request.body)
            except ValueError as error:
                raise bad_request(f"couldn't get version/kind; json parse error: {error}") from None
            if not isinstance(options, dict):
                raise bad_request("couldn't get version/kind; json parse error: no object")
        for name in ("propagationPolicy", "dryRun"):
            if request.query.get(name):
                options.setdefault(name, request.query[name])
        if request.query.get("gracePeriodSeconds"):
            options.setdefault("gracePeriodSeconds", _number(request.query, "gracePeriodSeconds"))
        if request.query.get("orphanDependents"):
            options.setdefault("orphanDependents", request.flag("orphanDependents"))
        return options

    def _delete(self, request: Request, resource: Resource) -> Answer:
        options = self._delete_options(request)
        target = request.target
        said = deletion.warning(resource, options)
        return Answer(
            200, self.api.delete(resource, target.namespace, target.name, options), warnings=[said] if said else []
        )

    def _delete_all(self, request: Request, resource: Resource) -> Answer:
        options = self._delete_options(request)
        matches = self._selected(request, resource)
        objects, version = self.api.store.objects(resource, request.target.namespace)
        gone = []
        for obj in filter(matches, objects):
            try:
                self.api.delete(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], options)
            except Refused as refused:
                if refused.code != 404:
                    raise
            gone.append(obj)
        meta = {"resourceVersion": str(version)}
        return Answer(
            200, {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": meta, "items": gone}
        )

    def _evict(self, request: Request) -> Answer:
        target = request.target
        body = json.loads(request.body or b"{}")
        self.api.change(
            PODS, target.namespace, target.name, disrupted("EvictionByEvictionAPI", "Eviction API: evicting")
        )
        self.api.delete(PODS, target.namespace, target.name, body.get("deleteOptions") or {})
        return Answer(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})

    def _log(self, request: Request) -> Answer | Stream:
        target, query = request.target, request.query
        pod = self.api.get(PODS, target.namespace, target.name)
        container = logs.choose(pod, query.get("container", ""))
        for name in ("tailLines", "limitBytes", "sinceSeconds"):
            if name in query and _number(query, name) < (0 if name == "tailLines" else 1):
                rule = "must be greater than or equal to 0" if name == "tailLines" else "must be greater than 0"
                cause = Cause(name, "FieldValueInvalid", f"Invalid value: {query[name]}: {rule}")
                raise invalid(Resource("", "PodLogOptions", ""), target.name, [cause])
        attempt = logs.attempt_of(pod, container, previous=request.flag("previous"))
        if attempt is None:
            return Answer(200, text=b"", kind="text/plain")
        if not self._reachable(pod["spec"]["nodeName"]):
            address = f"https://10.0.0.1:10250/containerLogs/{target.namespace}/{target.name}/{container}"
            raise internal(f'Get "{address}": dial tcp 10.0.0.1:10250: connect: no route to host')
        path = logs.path_of(self._place, pod["metadata"]["uid"], container, attempt)
        if not request.flag("follow"):
            return Answer(200, text=logs.chosen(logs.rows(path), query), kind="text/plain")

        def over() -> bool:
            now = self.api.store.get(PODS, target.namespace, target.name)
            rows = [row for kind in logs.ORDER for row in ((now or {}).get("status") or {}).get(kind) or ()]
            return self.api.store.closed or not any(
                "running" in row["state"] for row in rows if row["name"] == container
            )

        return Stream(None, logs.stream(path, query, over))


def _number(query: Mapping[str, str], name: str) -> int:
    """Raises Refused (400) for what is none."""
    text = query.get(name) or "0"
    try:
        return int(text)
    except ValueError:
        raise bad_request(
            f'{name}: Invalid value: "{text}": strconv.ParseInt: parsing "{text}": invalid syntax'
        ) from None


def _order(obj: Json) -> str:
    return f"{obj['metadata'].get('namespace', '')}/{obj['metadata']['name']}"


def _token(version: int, last: str) -> str:
    return base64.urlsafe_b64encode(json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": last}).encode()).decode()


def _position(token: str) -> tuple[int, str]:
    try:
        found = json.loads(base64.urlsafe_b64decode(token))
        return int(found["rv"]), str(found["start"])
    except (ValueError, KeyError):
        raise bad_request("continue key is not valid") from None
