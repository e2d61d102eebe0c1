"""The merged configuration for people: YAML that loads again, secrets masked, with where each value came from."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Mapping

import yaml

from oz_worker.config.load import DEFAULT, Loaded
from oz_worker.redact import MASK
from oz_worker.timing import format_duration

_SIZES = ("task_log_max", "min_free_disk")
_HIDDEN = ("environment",)


def show(loaded: Loaded) -> str:
    """`check --print-config`: every key, its value, its origin behind `#`."""
    return "".join(f"{line}\n" for line in _lines(loaded))


def _lines(loaded: Loaded) -> Iterator[str]:
    settings, origins = loaded.settings, loaded.origins
    yield f"# api_key: {settings.api_key or 'missing'}  # {origins.get('api_key', DEFAULT)}"
    groups = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("link", "exit_after"):
            groups.append((field.name, value))
        elif field.name not in ("api_key", "backend", "options"):
            yield from _key(field, value, field.name, origins, indent="")
    for name, options in groups:
        yield f"{name}:"
        for field in dataclasses.fields(options):
            yield from _key(field, getattr(options, field.name), f"{name}.{field.name}", origins, indent="  ")
    yield f"backend:  # {origins.get('backend', DEFAULT)}"
    yield f"  {settings.backend}:"
    for field in dataclasses.fields(settings.options):
        dotted = f"backend.{settings.backend}.{field.name}"
        value = getattr(settings.options, field.name)
        if settings.backend == "kubernetes" and field.name == "environment":
            # Not a key of the file: these come from -e alone.
            if value:
                yield f"    # -e: {', '.join(sorted(value))}"
            continue
        yield from _key(field, value, dotted, origins, indent="    ")


def _key(field: Any, value: Any, dotted: str, origins: Mapping[str, str], *, indent: str) -> Iterator[str]:
    origin = origins.get(dotted, DEFAULT)
    if value is None:
        yield f"{indent}# {field.name}: not set  # {origin}"
        return
    shown = _masked(field.name, _written(field, value))
    if isinstance(shown, (dict, list)) and shown:
        yield f"{indent}{field.name}:  # {origin}"
        text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=1000)
        for line in text.splitlines():
            yield f"{indent}  {line}"
        return
    # JSON's quoting is YAML's too, and keeps every text on one line.
    text = yaml.safe_dump(shown, default_flow_style=True, allow_unicode=True, width=10**9).removesuffix("...\n").strip()
    if "\n" in text or (isinstance(shown, str) and text[:1] not in "'\""):
        text = yaml.safe_dump(shown, default_style='"', allow_unicode=True, width=10**9).strip()
    yield f"{indent}{field.name}: {text}  # {origin}"


def _written(field: Any, value: Any) -> Any:
    """*value* as the file spells it."""
    if isinstance(value, float):
        return format_duration(value)
    if field.name in _SIZES:
        return f"{value // 2**20}MiB" if value % 2**20 == 0 else value
    if field.name == "environment":
        return [{"name": name, "value": text} for name, text in value.items()]
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _masked(name: str, value: Any) -> Any:
    """Values of variables may be secrets, also those inside a pod_template."""
    if name not in ("environment", "pod_template"):
        return value
    if isinstance(value, dict):
        return {
            key: MASK if key == "value" and isinstance(part, str) else _masked(name, part)
            for key, part in value.items()
        }
    return [_masked(name, part) for part in value] if isinstance(value, list) else value
