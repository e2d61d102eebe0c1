"""Which cluster there is: the program, where it will look for its configuration, and whether the cluster answers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Mapping

from oz_worker.cluster import Cluster, ClusterDown, ClusterError, Unauthorized
from oz_worker.errors import NotUsable
from oz_worker.settings import KubernetesOptions

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"
_CONFIGURATION = ("does not exist", "config file", "no such file", "yaml:", "invalid configuration", "exec plugin")


def find_program(path: str, environment: Mapping[str, str]) -> str:
    """`kubectl`: *path* if given, else the one on PATH. Raises NotUsable."""
    if path:
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise NotUsable(f"backend.kubernetes.kubectl_path {path} is no program that may be run; correct the path")
        return os.path.abspath(path)
    found = shutil.which("kubectl", path=environment.get("PATH", os.defpath))
    if not found:
        raise NotUsable("no program kubectl on PATH; install it, or set backend.kubernetes.kubectl_path")
    return found


def endpoint_of(options: KubernetesOptions, environment: Mapping[str, str]) -> str:
    """Which cluster and namespace the program will talk to, as far as words go (design 12, rule 2)."""
    files = options.kubeconfig or environment.get("KUBECONFIG", "")
    if not files and in_cluster(environment):
        where = f"{environment['KUBERNETES_SERVICE_HOST']}, the cluster of this pod"
    else:
        where = f"{files or 'the default kubeconfig'}{f', context {options.context}' if options.context else ''}"
    return f"kubernetes namespace {options.namespace or 'default'} of {where}"


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is a pod with an account, which kubectl uses when it finds no kubeconfig."""
    return bool(environment.get("KUBERNETES_SERVICE_HOST")) and os.path.exists(_ACCOUNT)


def cluster_for(
    options: KubernetesOptions, environment: Mapping[str, str], *, instance: str, instance_dir: Path
) -> Cluster:
    """The door to the cluster that *options* name; nothing is asked yet. Raises NotUsable."""
    program = find_program(options.kubectl_path, environment)
    if options.kubeconfig and not os.access(options.kubeconfig, os.R_OK):
        why = "cannot be read" if os.path.exists(options.kubeconfig) else "does not exist"
        raise NotUsable(f"backend.kubernetes.kubeconfig {options.kubeconfig} {why}; correct the path or its mode")
    flags = [f"--cache-dir={instance_dir / 'kubectl'}"]  # HOME may be read-only, or nowhere
    flags += [f"--kubeconfig={options.kubeconfig}"] if options.kubeconfig else []
    flags += [f"--context={options.context}"] if options.context else []
    return Cluster(
        program,
        namespace=options.namespace or "default",
        flags=flags,
        environment=environment,
        instance=instance,
        timeout=options.api_timeout,
    )


def version_of(cluster: Cluster, endpoint: str) -> str:
    """The server's version. Raises NotUsable, which says whether file, network or token is at fault."""
    try:
        return cluster.version()
    except Unauthorized as error:
        raise NotUsable(f"{endpoint}: {error}") from error
    except ClusterDown as error:
        if any(word in error.said for word in _CONFIGURATION):
            cure = "correct backend.kubernetes.kubeconfig or backend.kubernetes.context"
        else:
            cure = "check that its API server runs and can be reached from here"
        raise NotUsable(f"{endpoint} cannot be used: {error.said}; {cure}") from error
    except ClusterError as error:
        raise NotUsable(f"{endpoint} cannot be used: {error}") from error
