"""Label and field selectors, as requests spell them."""

from __future__ import annotations

import re
from typing import Callable, Iterable

from tests.cluster.refusals import Json, bad_request
from tests.cluster.resources import Resource

Matches = Callable[[Json], bool]

_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^()]*)\)$")
_KEY = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")

_FIELDS = {
    "pods": (
        *("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "spec.hostNetwork"),
        *("status.phase", "status.podIP", "status.nominatedNodeName"),
    ),
    "events": (
        *("involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid"),
        *("involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath"),
        *("reason", "reportingComponent", "source", "type"),
    ),
    "jobs": ("status.successful",),
    "secrets": ("type",),
    "namespaces": ("status.phase",),
    "nodes": ("spec.unschedulable",),
}
_PLACES = {"source": ("source", "component"), "status.successful": ("status", "succeeded")}


def _split(text: str) -> Iterable[str]:
    """At commas outside parentheses."""
    return (part.strip() for part in re.split(r",(?![^()]*\))", text))


def _label(requirement: str) -> Matches:
    key, wanted, negative, exists = requirement, None, False, False
    if match := _SET.match(requirement):
        key, negative = match[1], match[2] == "notin"
        wanted = {value.strip() for value in match[3].split(",")}
    elif "!=" in requirement:
        key, _, value = requirement.partition("!=")
        wanted, negative = {value.strip()}, True
    elif "=" in requirement:
        key, _, value = requirement.partition("=")
        wanted = {value.removeprefix("=").strip()}
    else:
        exists = True
        negative = key.startswith("!")
        key = key.removeprefix("!")
    key = key.strip()
    if not _KEY.match(key) or any(not _VALUE.match(value) or len(value) > 63 for value in wanted or ()):
        raise bad_request(f"unable to parse requirement: invalid label in {requirement!r}")

    def matches(obj: Json) -> bool:
        labels = obj["metadata"].get("labels") or {}
        found = key in labels if exists or wanted is None else labels.get(key) in wanted
        return found is not negative

    return matches


def labels_match(selector: str) -> Matches:
    """A test of objects for a label selector; raises Refused (400) for what is none."""
    tests = [_label(part) for part in _split(selector)] if selector.strip() else []
    return lambda obj: all(test(obj) for test in tests)


def _value_at(obj: Json, field: str) -> str:
    value: object = obj
    for step in _PLACES.get(field, field.split(".")):
        value = value.get(step) if isinstance(value, dict) else None
    if value is None or isinstance(value, bool):
        return "true" if value else "false" if field in ("spec.hostNetwork", "spec.unschedulable") else ""
    return str(value)


def fields_match(resource: Resource, selector: str) -> Matches:
    """A test of objects for a field selector; raises Refused (400) for a field that cannot be selected by."""
    tests: list[tuple[str, bool, str]] = []
    for part in filter(None, _split(selector)):
        field, operator, value = re.match(r"([^!=]*)(!=|==|=)?(.*)", part).groups()  # type: ignore[union-attr]
        if not operator:
            raise bad_request(f"invalid selector: '{selector}'; can't understand '{part}'")
        known = ("metadata.name", "metadata.namespace", *_FIELDS.get(resource.plural, ()))
        if field not in known:
            raise bad_request(
                f'Unable to find "{resource.api_version}, Resource={resource.plural}" that match label selector "", '
                f'field selector "{selector}": field label not supported: {field}'
            )
        tests.append((field, operator != "!=", value))
    return lambda obj: all((_value_at(obj, field) == value) is positive for field, positive, value in tests)
