"""The pod of a task: what the worker needs in it, laid over the operator's `pod_template`. Pure.

Order of the init containers: the template's up to its last native sidecar (`restartPolicy: Always`), so that a mesh or
a proxy is there for what follows; the copies of the task's sidecars; `setup`; the rest of the template's.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from oz_worker.backends import job_scripts
from oz_worker.backends.container_order import WORKSPACE
from oz_worker.backends.job_env import MCP_VARIABLE, Hidden, arguments, escaped, variables
from oz_worker.backends.job_template import TASK, Object, free, mount_path, own_container, template_of
from oz_worker.backends.resolution import image_of, sidecars_of
from oz_worker.backends.sidecar_asked import Asked, SidecarUnusable, asked
from oz_worker.model import InstanceShape, TaskSpec
from oz_worker.settings import KubernetesOptions

SETUP, COPY = "setup", "copy-sidecar"
"""Names of our init containers; COPY is followed by a number."""
_SHELL = "/bin/sh"
_PLAIN_RESOURCES = ("cpu", "memory", "ephemeral-storage")


class Mounted(NamedTuple):
    """One of the task's sidecars: its volume, where the task sees it, and what fills it (None: an image volume)."""

    volume: Object
    mount: Object
    filler: Object | None


def pod(options: KubernetesOptions, spec: TaskSpec, *, secret_name: str, away: Hidden) -> Object:
    """The PodSpec of a task; what is *away* is in the Secret *secret_name*.

    Raises SidecarUnusable for a sidecar that cannot be given, ValueError for anything else that cannot; both with one
    sentence that names it.
    """
    template = template_of(options)
    own = own_container(template)
    taken = {volume.get("name") for volume in template["volumes"]}
    workspace = free("workspace", taken)
    resources = _resources(own.get("resources", {}), spec.shape)
    image = image_of(spec, options.default_image)
    sidecars = [
        _mounted(options, number, sidecar, taken, _plain(resources))
        for number, sidecar in enumerate(_asked(options, spec, own))
    ]
    mounts = [{"name": workspace, "mountPath": WORKSPACE}, *(sidecar.mount for sidecar in sidecars)]
    env = variables(options, spec, away, secret_name)
    task = _task(options, spec, own, image, mounts, env, away, resources)
    ours = [sidecar.filler for sidecar in sidecars if sidecar.filler is not None]
    if options.setup_command:
        ours.append(_setup(options.setup_command, task, _plain(resources)))
    early, late = _around(template["initContainers"])
    return {
        **template,
        "restartPolicy": "Never",
        "volumes": [
            *template["volumes"],
            {"name": workspace, "emptyDir": _limited(options.workspace_size_limit)},
            *(sidecar.volume for sidecar in sidecars),
        ],
        "initContainers": [*early, *_renamed(ours, [*early, *late, *template["containers"]]), *late],
        "containers": _with_task(template["containers"], task),
    }


def as_root() -> Object:
    """What a container needs that copies files with their owners, and nothing more."""
    return {
        "runAsUser": 0,
        "runAsGroup": 0,
        "runAsNonRoot": False,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID"]},
    }


def image_volume(name: str, image: str, policy: str) -> Object:
    """A volume that is an image (Kubernetes 1.33 with its feature gate, 1.35 without)."""
    return {"name": name, "image": {"reference": image, "pullPolicy": policy}}


def _task(
    options: KubernetesOptions,
    spec: TaskSpec,
    own: Mapping[str, Any],
    image: str,
    mounts: Sequence[Object],
    env: Sequence[Object],
    away: Hidden,
    resources: Object,
) -> Object:
    """The container of the agent. The template's variables come last, so that they may refer to the task's."""
    script = job_scripts.wrapper(options.teardown_command, forget=MCP_VARIABLE if MCP_VARIABLE in away.keys else "")
    names = {entry["name"] for entry in env}
    others = [entry for entry in own.get("env", ()) if entry.get("name") not in names]
    return {
        **own,
        "name": TASK,
        "image": image,
        "imagePullPolicy": own.get("imagePullPolicy") or options.image_pull_policy,
        "command": [_SHELL, "-c", escaped(script), "oz-task"],
        "args": arguments(spec, away),
        "workingDir": WORKSPACE,
        "env": [*env, *others],
        "volumeMounts": [*own.get("volumeMounts", ()), *mounts],
        "resources": resources,
    }


def _setup(command: str, task: Mapping[str, Any], resources: Object) -> Object:
    """The container of `setup_command`: the same image, user, variables and files as the agent's."""
    alike = ("image", "imagePullPolicy", "workingDir", "envFrom", "volumeMounts", "securityContext")
    return {
        "name": SETUP,
        **{name: task[name] for name in alike if task.get(name)},
        "env": [entry for entry in task["env"] if entry.get("name") != MCP_VARIABLE],
        "command": [_SHELL, "-c", escaped(command)],
        "resources": resources,
    }


def _asked(options: KubernetesOptions, spec: TaskSpec, own: Mapping[str, Any]) -> list[Asked]:
    """The task's sidecars, checked."""
    used = {mount_path(mount): mount.get("name") for mount in own.get("volumeMounts", ())}
    sidecars = asked(sidecars_of(spec, options.sidecar_image, options.coding_cli_sidecars))
    for number, sidecar in enumerate(sidecars, 1):
        entry = f"sidecar {number} ({sidecar.image} at {sidecar.path!r})"
        if sidecar.path == WORKSPACE:
            raise SidecarUnusable(f"{entry}: {WORKSPACE} is the task's working directory; choose another path")
        if sidecar.path in used:
            raise SidecarUnusable(
                f"{entry}: pod_template mounts the volume {used[sidecar.path]} there already; choose another path"
            )
        if sidecar.read_write and options.use_image_volumes:
            raise SidecarUnusable(
                f"{entry} wants to be written to, which an image volume cannot be; set"
                " backend.kubernetes.use_image_volumes to false, or ask for it read-only"
            )
    return sidecars


def _mounted(options: KubernetesOptions, number: int, sidecar: Asked, taken: set[Any], resources: Object) -> Mounted:
    mount = {"mountPath": sidecar.path, "readOnly": not sidecar.read_write}
    if options.use_image_volumes:
        name = free(f"sidecar-{number}-image", taken)
        return Mounted(image_volume(name, sidecar.image, options.image_pull_policy), {"name": name, **mount}, None)
    name = free(f"sidecar-{number}-data", taken)
    filler = {
        "name": f"{COPY}-{number}",
        "image": sidecar.image,
        "imagePullPolicy": options.image_pull_policy,
        "command": [_SHELL, "-c", escaped(job_scripts.copy())],
        "workingDir": "/",
        "securityContext": as_root(),
        "volumeMounts": [{"name": name, "mountPath": job_scripts.TARGET}],
        "resources": resources,
    }
    return Mounted({"name": name, "emptyDir": {}}, {"name": name, **mount}, filler)


def _resources(template: Object, shape: InstanceShape) -> Object:
    """The template's, with requests and limits of the instance shape where that has a size."""
    sizes = {"cpu": (shape.vcpus, ""), "memory": (shape.memory_gb, "Gi")}
    chosen = {name: f"{size}{suffix}" for name, (size, suffix) in sizes.items() if size > 0}
    axes = {axis: {**template.get(axis, {}), **chosen} for axis in ("requests", "limits")}
    return {**template, **(axes if chosen else {})}


def _plain(resources: Mapping[str, Any]) -> Object:
    """Resources for a container that runs before the task's: the same, which a quota may demand, at no cost.

    Without what exists only once, like a GPU or a claim.
    """
    axes = {axis: resources.get(axis) or {} for axis in ("requests", "limits")}
    return {
        axis: {name: sizes[name] for name in _PLAIN_RESOURCES if name in sizes}
        for axis, sizes in axes.items()
        if any(name in sizes for name in _PLAIN_RESOURCES)
    }


def _around(containers: Sequence[Object]) -> tuple[Sequence[Object], Sequence[Object]]:
    """The template's init containers that go before ours, and those that go behind."""
    natives = [at for at, entry in enumerate(containers, 1) if entry.get("restartPolicy") == "Always"]
    cut = max(natives, default=0)
    return containers[:cut], containers[cut:]


def _renamed(ours: Iterable[Object], others: Iterable[Object]) -> list[Object]:
    taken = {entry.get("name") for entry in others}
    return [{**entry, "name": free(entry["name"], taken)} for entry in ours]


def _with_task(containers: Sequence[Object], task: Object) -> list[Object]:
    if all(entry.get("name") != TASK for entry in containers):
        return [*containers, task]
    return [task if entry.get("name") == TASK else entry for entry in containers]


def _limited(size: str) -> Object:
    return {"sizeLimit": size} if size else {}
