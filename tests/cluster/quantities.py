"""Amounts of cpu and memory as Kubernetes spells them."""

from __future__ import annotations

from decimal import Decimal
from typing import Iterable

from tests.cluster.refusals import Json

_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}


def amount(text: str) -> Decimal:
    """The number that a quantity means."""
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if text.endswith(suffix) and text[: -len(suffix)]:
            return Decimal(text[: -len(suffix)]) * _SUFFIXES[suffix]
    return Decimal(text)


def spelt(value: Decimal) -> str:
    """A quantity for a number, in thousandths where it is no whole one."""
    return f"{int(value)}" if value == int(value) else f"{int((value * 1000).to_integral_value())}m"


def _of(containers: Iterable[Json], kind: str, what: str) -> list[Decimal]:
    found = (((container.get("resources") or {}).get(kind) or {}).get(what) for container in containers)
    return [amount(each) for each in found if each]


def asked(pod: Json, what: str, kind: str = "requests") -> Decimal:
    """What a pod asks for: all its containers and native sidecars together, or one init container if that is more."""
    spec = pod["spec"]
    early = spec.get("initContainers") or []
    sidecars = [container for container in early if container.get("restartPolicy") == "Always"]
    together = sum(_of([*spec["containers"], *sidecars], kind, what), Decimal(0))
    return max([together, *_of(early, kind, what)])
