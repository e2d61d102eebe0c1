"""What an API server answers when it refuses: Status objects with the sentences and reasons of the real one."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

from tests.cluster.resources import Resource

Json = dict[str, Any]


class Cause(NamedTuple):
    """One fault of a field, of an object that is refused as invalid."""

    field: str
    reason: str
    message: str


class Refused(Exception):
    """The request fails with *code*; `status` is the body of the answer, `headers` go with it."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.headers = dict(headers or {})

    @property
    def status(self) -> Json:
        body: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        body["message"] = self.message
        if self.reason:
            body["reason"] = self.reason
        if self.details:
            body["details"] = self.details
        return {**body, "code": self.code}


def _details(resource: Resource, name: str, **more: Any) -> Json:
    details: Json = {"name": name, "group": resource.group, "kind": resource.plural, **more}
    return {key: value for key, value in details.items() if value != ""}


def not_found(resource: Resource, name: str) -> Refused:
    return Refused(404, "NotFound", f'{resource.qualified} "{name}" not found', _details(resource, name))


def no_such_path() -> Refused:
    return Refused(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(resource: Resource, name: str) -> Refused:
    return Refused(409, "AlreadyExists", f'{resource.qualified} "{name}" already exists', _details(resource, name))


def conflict(resource: Resource, name: str, why: str) -> Refused:
    text = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return Refused(409, "Conflict", text, _details(resource, name))


def stale(resource: Resource, name: str) -> Refused:
    """The object has a newer version than the one that was sent."""
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(resource, name, why)


def forbidden(resource: Resource, name: str, why: str) -> Refused:
    named = f' "{name}"' if name else ""
    return Refused(403, "Forbidden", f"{resource.qualified}{named} is forbidden: {why}", _details(resource, name))


def invalid(resource: Resource, name: str, causes: Sequence[Cause]) -> Refused:
    said = [f"{cause.field}: {cause.message}" for cause in causes]
    text = said[0] if len(said) == 1 else f"[{', '.join(said)}]"
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    rows = [{"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes]
    details = {**_details(resource, name, causes=rows), "kind": resource.kind}
    return Refused(422, "Invalid", f'{kind} "{name}" is invalid: {text}', details)


def bad_request(message: str) -> Refused:
    return Refused(400, "BadRequest", message)


def expired(message: str) -> Refused:
    return Refused(410, "Expired", message)


def too_old(asked: int, oldest: int) -> Refused:
    return expired(f"too old resource version: {asked} ({oldest})")


def too_large_version(asked: int, current: int) -> Refused:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    text = f"Timeout: Too large resource version: {asked}, current: {current}"
    return Refused(504, "Timeout", text, {"causes": [cause], "retryAfterSeconds": 1})


def unauthorized() -> Refused:
    return Refused(401, "Unauthorized", "Unauthorized")


def no_such_verb() -> Refused:
    return Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource", {})


def cannot_read(kind: str) -> Refused:
    accepted = "application/json, application/yaml, application/vnd.kubernetes.protobuf"
    return Refused(
        415,
        "UnsupportedMediaType",
        f"the body of the request was in an unknown format - accepted: {accepted}; got {kind}",
    )


def cannot_patch(kind: str) -> Refused:
    forms = ("json-patch+json", "merge-patch+json", "strategic-merge-patch+json", "apply-patch+yaml")
    known = ", ".join(f"application/{form}" for form in forms)
    return Refused(
        415,
        "UnsupportedMediaType",
        f"the body of the request was in an unknown format - accepted media types include: {known} ({kind})",
    )


def internal(why: str) -> Refused:
    cause = {"message": why}
    return Refused(500, "InternalError", f"Internal error occurred: {why}", {"causes": [cause]})
