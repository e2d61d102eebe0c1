"""Kinds of values that Kubernetes knows: names, labels, quantities, raw pieces of a pod."""

from __future__ import annotations

import re
from typing import Any

from oz_worker.config.kinds import Kind, map_of, names, script, word
from oz_worker.config.nodes import Items, Node, Scalar, Table, describe
from oz_worker.config.reading import Reading, Wrong, shown, suggest

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_QUANTITY = re.compile(r"\+?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_POD_FIELDS = names(
    "activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks "
    "ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname hostnameOverride imagePullSecrets "
    "initContainers nodeName nodeSelector os overhead preemptionPolicy priority priorityClassName readinessGates "
    "resourceClaims resources restartPolicy runtimeClassName schedulerName schedulingGates securityContext "
    "serviceAccount serviceAccountName setHostnameAsFQDN shareProcessNamespace subdomain "
    "terminationGracePeriodSeconds tolerations topologySpreadConstraints volumes"
)
_CONTAINER_FIELDS = names(
    "args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe resizePolicy "
    "resources restartPolicy restartPolicyRules securityContext startupProbe stdin stdinOnce terminationMessagePath "
    "terminationMessagePolicy tty volumeDevices volumeMounts workingDir"
)
# Where a pod wants text, an unquoted number or true is text: the existing worker read it so.
_TEXT_KEYS = names("name value image key operator effect path mountPath subPath workingDir")
_TEXT_BELOW = names("command args nodeSelector matchLabels")


def namespace(node: Node, reading: Reading) -> str:
    """The name of a namespace; empty means the default."""
    text = word(node, reading)
    if text and not _DNS_LABEL.fullmatch(text):
        raise Wrong(f"{shown(text)} is not a namespace; use lower-case letters, digits and dashes, at most 63")
    return text


def qualified_name(node: Node, reading: Reading) -> str:
    """The key of a label or an annotation: `name` or `prefix/name`."""
    text = word(node, reading)
    prefix, slash, name = text.rpartition("/")
    prefix_fits = not slash or (len(prefix) <= 253 and _SUBDOMAIN.fullmatch(prefix))
    if not prefix_fits or not _NAME.fullmatch(name):
        raise Wrong(f"{shown(text)} is not a key; write it like team or example.com/team, the name at most 63 long")
    return text


def _label_value(node: Node, reading: Reading) -> str:
    text = word(node, reading)
    if text and not _NAME.fullmatch(text):
        raise Wrong(f"{shown(text)} cannot be a label; at most 63 letters, digits, dashes, dots and underscores")
    return text


label_map: Kind = map_of(_label_value, qualified_name)
annotation_map: Kind = map_of(script, qualified_name)


def quantity(node: Node, reading: Reading) -> str:
    """An amount in Kubernetes' notation; empty means not set."""
    text = word(node, reading)
    if text and not _QUANTITY.fullmatch(text):
        raise Wrong(f"{shown(text)} is not a quantity; write it like 10Gi, 512Mi, 2 or 500m")
    return text


def resources(node: Node, reading: Reading) -> dict[str, Any]:
    """`requests` and `limits`, each a map of quantities; other keys are passed on with a warning."""
    table = _table(node)
    found: dict[str, Any] = {}
    for name, entry in table.entries.items():
        if isinstance(entry.value, Scalar) and entry.value.type == "null":
            continue
        if name in ("requests", "limits"):
            found[name] = map_of(quantity, qualified_name)(entry.value, reading)
            continue
        if name != "claims":
            reading.warn(entry.place, f"{shown(name)} is not known in resources{suggest(name, ('requests', 'limits'))}")
        found[name] = plain(entry.value)
    return found


def pod_template(node: Node, reading: Reading) -> dict[str, Any]:
    """A raw PodSpec. Fields that no Kubernetes knows are passed on with a warning: the server would drop them."""
    table = _table(node)
    for name, entry in table.entries.items():
        if name == "metadata":
            reading.warn(
                entry.place, "pod_template is a PodSpec without `metadata`; use extra_labels and extra_annotations"
            )
        elif name == "spec":
            reading.warn(entry.place, "pod_template is the PodSpec itself; move what stands below `spec` one level up")
        elif name not in _POD_FIELDS:
            reading.warn(entry.place, f"no pod has the field {shown(name)}{suggest(name, _POD_FIELDS)}")
        if name in ("containers", "initContainers"):
            _check_containers(name, entry.value, reading)
    return {name: value for name, value in plain(table).items() if name not in ("metadata", "spec")}


def _check_containers(field: str, node: Node, reading: Reading) -> None:
    if isinstance(node, Scalar) and node.type == "null":
        return
    if not isinstance(node, Items):
        reading.problem(node.place, f"{field} must be a list (lines that begin with `- name:`), not {describe(node)}")
        return
    for container in node.values:
        if not isinstance(container, Table):
            reading.problem(container.place, f"a container is a mapping with a name, not {describe(container)}")
            continue
        if "name" not in container.entries:
            reading.problem(container.place, "a container needs a name; the one called `task` is the task's")
        for name, entry in container.entries.items():
            if name not in _CONTAINER_FIELDS:
                reading.warn(entry.place, f"no container has the field {shown(name)}{suggest(name, _CONTAINER_FIELDS)}")


def _table(node: Node) -> Table:
    if not isinstance(node, Table):
        raise Wrong(f"expected a mapping (lines like `name: value`), got {describe(node)}")
    return node


def plain(node: Node, text: bool = False) -> Any:
    """*node* as JSON has it; *text* keeps every scalar below as its source text."""
    if isinstance(node, Table):
        return {
            name: plain(entry.value, text or name in _TEXT_BELOW or (name in _TEXT_KEYS and _is_scalar(entry.value)))
            for name, entry in node.entries.items()
        }
    if isinstance(node, Items):
        return [plain(value, text) for value in node.values]
    return None if node.type == "null" else node.text if text else _json(node)


def _is_scalar(node: Node) -> bool:
    return isinstance(node, Scalar)


def _json(node: Scalar) -> Any:
    bare = node.text.replace("_", "")
    if node.type == "bool":
        return bare.lower() == "true"
    try:
        if node.type == "int":
            return int(bare, 8) if re.fullmatch(r"[-+]?0[0-9]+", bare) else int(bare, 0)
        if node.type == "float" and "n" not in bare.lower():
            return float(bare)
    except (ValueError, OverflowError):
        pass  # 089 and the like: text
    return node.text
