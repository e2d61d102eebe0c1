"""The fields that an API server fills in where the sender left them out."""

from __future__ import annotations

from tests.cluster.refusals import Json


def _fill(place: Json, **values: object) -> None:
    for key, value in values.items():
        if place.get(key) is None:
            place[key] = value


def _container(container: Json) -> None:
    tagged = ":" in container.get("image", "").rpartition("/")[2]
    latest = container.get("image", "").endswith(":latest") or not tagged
    pinned = "@" in container.get("image", "")
    _fill(
        container,
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
        imagePullPolicy="Always" if latest and not pinned else "IfNotPresent",
        resources={},
    )
    limits = container["resources"].get("limits")
    if limits:
        container["resources"]["requests"] = {**limits, **(container["resources"].get("requests") or {})}
    for port in container.get("ports") or ():
        _fill(port, protocol="TCP")
    for variable in container.get("env") or ():
        if ref := (variable.get("valueFrom") or {}).get("fieldRef"):
            _fill(ref, apiVersion="v1")


def _volume(volume: Json) -> None:
    if not set(volume) - {"name"}:
        volume["emptyDir"] = {}
    for kind in ("secret", "configMap", "downwardAPI", "projected"):
        if kind in volume:
            _fill(volume[kind], defaultMode=0o644)
    if "image" in volume:
        reference = volume["image"].get("reference", "")
        tagged = ":" in reference.rpartition("/")[2] and not reference.endswith(":latest")
        _fill(volume["image"], pullPolicy="IfNotPresent" if tagged or "@" in reference else "Always")


def pod_spec(spec: Json) -> None:
    """Fill in a pod's spec, in place."""
    _fill(
        spec,
        restartPolicy="Always",
        terminationGracePeriodSeconds=30,
        dnsPolicy="ClusterFirst",
        securityContext={},
        schedulerName="default-scheduler",
    )
    if name := spec.get("serviceAccountName") or spec.get("serviceAccount"):
        spec["serviceAccountName"] = spec["serviceAccount"] = name
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        _container(container)
    for volume in spec.get("volumes") or ():
        _volume(volume)


def pod(obj: Json) -> None:
    """Fill in a pod, in place."""
    pod_spec(obj["spec"])
    _fill(obj["spec"], enableServiceLinks=True)


def job(obj: Json) -> None:
    """Fill in a Job, in place; its pods' labels become its own if it has none."""
    spec = obj["spec"]
    template = spec["template"]
    if not obj["metadata"].get("labels") and (template.get("metadata") or {}).get("labels"):
        obj["metadata"]["labels"] = dict(template["metadata"]["labels"])
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = spec["parallelism"] = 1
    _fill(
        spec,
        parallelism=1,
        backoffLimit=6,
        completionMode="NonIndexed",
        suspend=False,
        podReplacementPolicy="TerminatingOrFailed",
    )
    template.setdefault("metadata", {})
    pod_spec(template["spec"])
    template["spec"].pop("enableServiceLinks", None)


def job_identity(obj: Json) -> None:
    """The selector and labels by which a Job knows its pods; made once, from its uid."""
    uid, name = obj["metadata"]["uid"], obj["metadata"]["name"]
    if obj["spec"].get("manualSelector"):
        return
    obj["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    labels = obj["spec"]["template"].setdefault("metadata", {}).setdefault("labels", {})
    labels.update({"batch.kubernetes.io/controller-uid": uid, "controller-uid": uid})
    labels.update({"batch.kubernetes.io/job-name": name, "job-name": name})


def quality(obj: Json) -> str:
    """The class of service that follows from a pod's resources."""
    containers = [*obj["spec"]["containers"], *(obj["spec"].get("initContainers") or ())]
    resources = [container.get("resources") or {} for container in containers]
    if not any(each.get("requests") or each.get("limits") for each in resources):
        return "BestEffort"
    exact = all(
        {"cpu", "memory"} <= (each.get("limits") or {}).keys() and each["limits"] == each.get("requests")
        for each in resources
    )
    return "Guaranteed" if exact else "Burstable"
