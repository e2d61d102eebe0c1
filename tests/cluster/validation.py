"""What a well-formed object may still not say: names, labels, and the rules of pods and Jobs."""

from __future__ import annotations

import re
from typing import Any, Iterable, Iterator

from tests.cluster.quantities import amount
from tests.cluster.refusals import Cause, Json
from tests.cluster.resources import JOBS, NAMESPACES, PODS, SECRETS, Resource

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_QUALIFIED = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_NAME_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_ANNOTATIONS = 256 * 1024


def _bad(field: str, value: Any, why: str) -> Cause:
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return Cause(field, "FieldValueInvalid", f"Invalid value: {shown}: {why}")


def _missing(field: str, why: str = "") -> Cause:
    return Cause(field, "FieldValueRequired", "Required value" + (f": {why}" if why else ""))


def _unsupported(field: str, value: str, known: Iterable[str]) -> Cause:
    choices = ", ".join(f'"{each}"' for each in sorted(known))
    return Cause(field, "FieldValueNotSupported", f'Unsupported value: "{value}": supported values: {choices}')


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def subdomain(field: str, name: str) -> Iterator[Cause]:
    """A name of most objects."""
    if len(name) > 253:
        yield _bad(field, name, "must be no more than 253 characters")
    if not _matches(_SUBDOMAIN, name):
        yield _bad(field, name, _SUBDOMAIN_RULE)


def label_name(field: str, name: str) -> Iterator[Cause]:
    """A name that must be one label of a host name."""
    if len(name) > 63:
        yield _bad(field, name, "must be no more than 63 characters")
    if not _matches(_LABEL, name):
        yield _bad(field, name, _LABEL_RULE)


def _qualified(field: str, name: str) -> Iterator[Cause]:
    prefix, slash, last = name.rpartition("/")
    if slash and not _matches(_SUBDOMAIN, prefix):
        yield _bad(field, name, f"prefix part {_SUBDOMAIN_RULE}")
    if len(last) > 63:
        yield _bad(field, name, "name part must be no more than 63 characters")
    if not _matches(_QUALIFIED, last):
        yield _bad(field, name, _NAME_RULE)


def labels(field: str, found: Json | None) -> Iterator[Cause]:
    for name, value in (found or {}).items():
        yield from _qualified(field, name)
        if len(value) > 63:
            yield _bad(field, value, "must be no more than 63 characters")
        if value and not _matches(_QUALIFIED, value):
            yield _bad(field, value, _VALUE_RULE)


def metadata(resource: Resource, obj: Json) -> Iterator[Cause]:
    """The rules that all objects share."""
    meta = obj["metadata"]
    name = meta.get("name") or ""
    if not name:
        yield _missing("metadata.name", "name or generateName is required")
    elif resource.plural != "events":
        yield from (label_name if resource == NAMESPACES else subdomain)("metadata.name", name)
    yield from labels("metadata.labels", meta.get("labels"))
    for key in meta.get("annotations") or ():
        yield from _qualified("metadata.annotations", key.lower())
    if sum(len(key) + len(value) for key, value in (meta.get("annotations") or {}).items()) > _ANNOTATIONS:
        yield Cause("metadata.annotations", "FieldValueTooLong", "Too long: may not be more than 262144 bytes")
    for number, owner in enumerate(meta.get("ownerReferences") or ()):
        for part in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(part):
                yield _missing(f"metadata.ownerReferences[{number}].{part}", f"{part} must not be empty")


def _resources(field: str, found: Json) -> Iterator[Cause]:
    for kind in ("limits", "requests"):
        for name, value in (found.get(kind) or {}).items():
            if amount(value) < 0:
                yield _bad(f"{field}.{kind}[{name}]", value, "must be greater than or equal to 0")
    limits = found.get("limits") or {}
    for name, value in (found.get("requests") or {}).items():
        if name in limits and amount(value) > amount(limits[name]):
            yield _bad(f"{field}.requests", value, f"must be less than or equal to {name} limit of {limits[name]}")


def _variables(field: str, found: Iterable[Json]) -> Iterator[Cause]:
    for number, variable in enumerate(found):
        place = f"{field}[{number}]"
        if not variable.get("name"):
            yield _missing(f"{place}.name")
        elif "=" in variable["name"]:
            yield _bad(
                f"{place}.name",
                variable["name"],
                "a valid environment variable name must consist only of printable ASCII characters other than '='",
            )
        source = variable.get("valueFrom")
        if source is not None:
            if variable.get("value"):
                yield _bad(f"{place}.valueFrom", "", "may not be specified when `value` is not empty")
            for kind in ("secretKeyRef", "configMapKeyRef"):
                if kind in source and not source[kind].get("key"):
                    yield _missing(f"{place}.valueFrom.{kind}.key")


def _container(field: str, container: Json, volumes: set[str]) -> Iterator[Cause]:
    if not container.get("name"):
        yield _missing(f"{field}.name")
    else:
        yield from label_name(f"{field}.name", container["name"])
    if not container.get("image"):
        yield _missing(f"{field}.image")
    elif container["image"] != container["image"].strip():
        yield _bad(f"{field}.image", container["image"], "must not have leading or trailing whitespace")
    policies = ("Always", "IfNotPresent", "Never")
    if container.get("imagePullPolicy") not in (*policies, None):
        yield _unsupported(f"{field}.imagePullPolicy", container["imagePullPolicy"], policies)
    yield from _variables(f"{field}.env", container.get("env") or ())
    yield from _resources(f"{field}.resources", container.get("resources") or {})
    points: set[str] = set()
    for number, mount in enumerate(container.get("volumeMounts") or ()):
        place = f"{field}.volumeMounts[{number}]"
        if mount.get("name") not in volumes:
            yield Cause(f"{place}.name", "FieldValueNotFound", f'Not found: "{mount.get("name", "")}"')
        if not mount.get("mountPath"):
            yield _missing(f"{place}.mountPath")
        elif mount["mountPath"] in points:
            yield _bad(f"{place}.mountPath", mount["mountPath"], "must be unique")
        points.add(mount.get("mountPath", ""))


def _volumes(field: str, found: Iterable[Json]) -> Iterator[Cause]:
    names: set[str] = set()
    for number, volume in enumerate(found):
        place = f"{field}[{number}]"
        name = volume.get("name", "")
        if not name:
            yield _missing(f"{place}.name")
        else:
            yield from label_name(f"{place}.name", name)
        if name in names:
            yield Cause(f"{place}.name", "FieldValueDuplicate", f'Duplicate value: "{name}"')
        names.add(name)
        kinds = sorted(set(volume) - {"name"})
        if not kinds:
            yield _missing(place, "must specify a volume type")
        for extra in kinds[1:]:
            yield Cause(f"{place}.{extra}", "FieldValueForbidden", "Forbidden: may not specify more than 1 volume type")
        if "secret" in volume and not volume["secret"].get("secretName"):
            yield _missing(f"{place}.secret.secretName")
        if "image" in volume and not volume["image"].get("reference"):
            yield _missing(f"{place}.image.reference")


def pod_spec(field: str, spec: Json) -> Iterator[Cause]:
    """The rules of a pod's spec, wherever it stands."""
    volumes = spec.get("volumes") or []
    yield from _volumes(f"{field}.volumes", volumes)
    known = {volume.get("name", "") for volume in volumes}
    if not spec.get("containers"):
        yield _missing(f"{field}.containers")
    seen: set[str] = set()
    for kind in ("containers", "initContainers"):
        for number, container in enumerate(spec.get(kind) or ()):
            place = f"{field}.{kind}[{number}]"
            yield from _container(place, container, known)
            if container.get("name") in seen:
                yield Cause(f"{place}.name", "FieldValueDuplicate", f'Duplicate value: "{container["name"]}"')
            seen.add(container.get("name", ""))
            early = kind == "initContainers"
            if container.get("restartPolicy") is not None and not early:
                yield Cause(
                    f"{place}.restartPolicy", "FieldValueForbidden", "Forbidden: may not be set for non-init containers"
                )
            if early and container.get("restartPolicy") not in (None, "Always"):
                yield _unsupported(f"{place}.restartPolicy", container["restartPolicy"], ("Always",))
            if early and container.get("lifecycle") and container.get("restartPolicy") != "Always":
                yield Cause(
                    f"{place}.lifecycle",
                    "FieldValueForbidden",
                    "Forbidden: may not be set for init containers without restartPolicy=Always",
                )
    policies = ("Always", "OnFailure", "Never")
    if spec.get("restartPolicy") not in policies:
        yield _unsupported(f"{field}.restartPolicy", spec.get("restartPolicy", ""), policies)
    if (deadline := spec.get("activeDeadlineSeconds")) is not None and not 1 <= deadline <= 2**31 - 1:
        yield _bad(f"{field}.activeDeadlineSeconds", deadline, "must be between 1 and 2147483647, inclusive")
    if spec.get("terminationGracePeriodSeconds", 0) < 0:
        yield _bad(
            f"{field}.terminationGracePeriodSeconds",
            spec["terminationGracePeriodSeconds"],
            "must be greater than or equal to 0",
        )
    yield from labels(f"{field}.nodeSelector", spec.get("nodeSelector"))


def job_spec(obj: Json) -> Iterator[Cause]:
    """The rules of a Job."""
    spec = obj["spec"]
    for number in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        if spec.get(number) is not None and spec[number] < 0:
            yield _bad(f"spec.{number}", spec[number], "must be greater than or equal to 0")
    template = spec["template"]
    yield from labels("spec.template.labels", (template.get("metadata") or {}).get("labels"))
    for key in (template.get("metadata") or {}).get("annotations") or ():
        yield from _qualified("spec.template.annotations", key.lower())
    yield from pod_spec("spec.template.spec", template["spec"])
    if template["spec"].get("restartPolicy") == "Always":
        said = 'Required value: valid values: "OnFailure", "Never"'
        yield Cause("spec.template.spec.restartPolicy", "FieldValueRequired", said)


_JOB_FIXED = ("completions", "selector", "template", "completionMode", "podFailurePolicy")
_POD_FREE = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds")


def update(resource: Resource, old: Json, new: Json) -> Iterator[Cause]:
    """What may not be changed any more."""
    if resource == JOBS:
        for field in _JOB_FIXED:
            resumable = (
                field == "template" and old["spec"].get("suspend") and not (old.get("status") or {}).get("startTime")
            )
            if old["spec"].get(field) != new["spec"].get(field) and not resumable:
                yield _bad(f"spec.{field}", "...", "field is immutable")
    if resource == PODS and {k: v for k, v in old["spec"].items() if k not in _POD_FREE} != {
        k: v for k, v in new["spec"].items() if k not in _POD_FREE
    }:
        images = [[c.get("image") for c in each["spec"]["containers"]] for each in (old, new)]
        if images[0] == images[1]:
            said = "Forbidden: pod updates may not change fields other than the image, the deadline and tolerations"
            yield Cause("spec", "FieldValueForbidden", said)
    if resource == SECRETS and old.get("immutable") and old.get("data") != new.get("data"):
        yield Cause("data", "FieldValueForbidden", "Forbidden: field is immutable when `immutable` is set")


def rules(resource: Resource, obj: Json) -> list[Cause]:
    """Everything that is wrong with an object."""
    causes = list(metadata(resource, obj))
    if resource in (PODS, JOBS) and not isinstance(obj.get("spec"), dict):
        return [*causes, _missing("spec")]
    if resource == PODS:
        causes += pod_spec("spec", obj["spec"])
    elif resource == JOBS:
        causes += job_spec(obj)
    elif resource == SECRETS:
        for key in obj.get("data") or ():
            if not _matches(r"[-._a-zA-Z0-9]+", key) or len(key) > 253:
                rule = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                causes.append(_bad(f"data[{key}]", key, rule))
    return causes
