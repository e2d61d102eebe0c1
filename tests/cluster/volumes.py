"""A pod's volumes as directories of the host, and where its containers see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

from tests.cluster.containers import Mount
from tests.cluster.environment import Find, data_of, field
from tests.cluster.images import Images
from tests.cluster.refusals import Json
from tests.cluster.resources import CONFIGMAPS, SECRETS, Resource


class MountFault(Exception):
    """The volume cannot be set up now; the kubelet tries again."""


def _write(directory: Path, files: Mapping[str, bytes], rows: list[Json] | None, mode: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    chosen = (
        [(row["key"], row["path"], row.get("mode", mode)) for row in rows]
        if rows
        else [(key, key, mode) for key in files]
    )
    for key, path, bits in chosen:
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(files[key])
        place.chmod(bits)


def _named(find: Find, resource: Resource, name: str, volume: str, optional: bool) -> dict[str, bytes]:
    obj = find(resource, name)
    if obj is None:
        if optional:
            return {}
        raise MountFault(f'MountVolume.SetUp failed for volume "{volume}" : {resource.singular} "{name}" not found')
    return data_of(resource, obj)


def _project(
    directory: Path, source: Json, pod: Json, find: Find, volume: str, token: Callable[[Json], str], mode: int
) -> None:
    for each in source.get("sources") or ():
        if "serviceAccountToken" in each:
            _write(directory, {each["serviceAccountToken"]["path"]: token(pod).encode()}, None, mode)
        for kind, resource in (("secret", SECRETS), ("configMap", CONFIGMAPS)):
            if kind in each:
                found = _named(find, resource, each[kind]["name"], volume, bool(each[kind].get("optional")))
                _write(directory, found, each[kind].get("items"), mode)
        if "downwardAPI" in each:
            _downward(directory, each["downwardAPI"], pod, mode)


def _downward(directory: Path, source: Json, pod: Json, mode: int) -> None:
    rows = source.get("items") or ()
    _write(directory, {row["path"]: field(pod, row["fieldRef"]["fieldPath"]).encode() for row in rows}, None, mode)


def set_up(volume: Json, directory: Path, pod: Json, find: Find, token: Callable[[Json], str]) -> Path | None:
    """The host's directory of a volume; None for an image volume, which comes with its image. Raises MountFault."""
    name = volume["name"]
    if "image" in volume:
        return None
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    directory.mkdir(parents=True, exist_ok=True)
    if "emptyDir" in volume:
        directory.chmod(0o777)
    elif "secret" in volume:
        source = volume["secret"]
        found = _named(find, SECRETS, source["secretName"], name, bool(source.get("optional")))
        _check_items(source, found, name, source["secretName"])
        _write(directory, found, source.get("items"), source["defaultMode"])
    elif "configMap" in volume:
        source = volume["configMap"]
        found = _named(find, CONFIGMAPS, source["name"], name, bool(source.get("optional")))
        _check_items(source, found, name, source["name"])
        _write(directory, found, source.get("items"), source["defaultMode"])
    elif "projected" in volume:
        _project(directory, volume["projected"], pod, find, name, token, volume["projected"]["defaultMode"])
    elif "downwardAPI" in volume:
        _downward(directory, volume["downwardAPI"], pod, volume["downwardAPI"]["defaultMode"])
    else:
        kind = next(iter(set(volume) - {"name"}))
        raise MountFault(f'MountVolume.SetUp failed for volume "{name}" : this cluster has no {kind}')
    return directory


def _check_items(source: Json, found: Mapping[str, bytes], volume: str, name: str) -> None:
    for row in source.get("items") or ():
        if row["key"] not in found and not source.get("optional"):
            why = f"references non-existent secret key: {row['key']} of {name}"
            raise MountFault(f'MountVolume.SetUp failed for volume "{volume}" : {why}')


def image_names(container: Json, spec: Json) -> list[tuple[str, str]]:
    """Name and pull policy of the image volumes that a container mounts."""
    wanted = {mount["name"] for mount in container.get("volumeMounts") or ()}
    volumes = [volume for volume in spec.get("volumes") or () if volume["name"] in wanted and "image" in volume]
    return [(volume["image"]["reference"], volume["image"]["pullPolicy"]) for volume in volumes]


def mounts(container: Json, spec: Json, directories: Mapping[str, Path], images: Images) -> list[Mount]:
    """What a container sees where."""
    kinds: dict[str, Any] = {volume["name"]: volume for volume in spec.get("volumes") or ()}
    found = []
    for row in container.get("volumeMounts") or ():
        volume = kinds[row["name"]]
        read_only = bool(row.get("readOnly")) or bool(
            {"secret", "configMap", "projected", "downwardAPI", "image"} & set(volume)
        )
        if "image" in volume:
            image = images.local(volume["image"]["reference"])
            assert image is not None
            source = image.root
        else:
            source = directories[row["name"]]
        if row.get("subPath"):
            source = source / row["subPath"]
            if not source.exists():
                source.mkdir(parents=True)
        found.append(Mount(source, row["mountPath"], read_only))
    return found
