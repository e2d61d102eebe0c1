"""Who may do what: tokens, rules, and the answers to `kubectl auth can-i`."""

from __future__ import annotations

from typing import Iterable, NamedTuple

from tests.cluster.refusals import Json, Refused, forbidden
from tests.cluster.resources import Resource


class Rule(NamedTuple):
    """One rule of a role; "*" means all."""

    verbs: tuple[str, ...]
    resources: tuple[str, ...]
    groups: tuple[str, ...] = ("*",)
    names: tuple[str, ...] = ()

    def allows(self, verb: str, group: str, resource: str, name: str) -> bool:
        return (
            _has(self.verbs, verb)
            and _has(self.groups, group)
            and _has(self.resources, resource)
            and (not self.names or name in self.names)
        )


def _has(known: Iterable[str], one: str) -> bool:
    return "*" in known or one in known


EVERYTHING = Rule(("*",), ("*",))


class User(NamedTuple):
    """Who sends a request. *namespace* is where the rules count, "" for everywhere."""

    name: str
    rules: tuple[Rule, ...] = (EVERYTHING,)
    namespace: str = ""

    def may(self, verb: str, group: str, resource: str, namespace: str, name: str = "") -> bool:
        """*resource* may be `pods/log`."""
        if self.namespace and namespace != self.namespace:
            return False
        return any(rule.allows(verb, group, resource, name) for rule in self.rules)


ADMIN = User("kubernetes-admin")


def refusal(user: User, verb: str, resource: Resource, subresource: str, namespace: str, name: str) -> Refused:
    """What is said to a user without the right."""
    asked = f"{resource.plural}/{subresource}" if subresource else resource.plural
    place = f'in the namespace "{namespace}"' if namespace and resource.namespaced else "at the cluster scope"
    why = f'User "{user.name}" cannot {verb} resource "{asked}" in API group "{resource.group}" {place}'
    return forbidden(resource, name, why)


def access_review(user: User, body: Json) -> Json:
    """The answer to a SelfSubjectAccessReview."""
    wanted = (body.get("spec") or {}).get("resourceAttributes") or {}
    resource = wanted.get("resource", "") + (f"/{wanted['subresource']}" if wanted.get("subresource") else "")
    allowed = user.may(
        wanted.get("verb", ""), wanted.get("group", ""), resource, wanted.get("namespace", ""), wanted.get("name", "")
    )
    status: Json = {"allowed": allowed}
    if allowed:
        status["reason"] = f'RBAC: allowed by RoleBinding of User "{user.name}"'
    return {**body, "status": status}


def rules_review(user: User, body: Json) -> Json:
    """The answer to a SelfSubjectRulesReview."""
    namespace = (body.get("spec") or {}).get("namespace", "")
    visible = user.rules if user.namespace in ("", namespace) else ()
    rows = []
    for rule in visible:
        row: Json = {"verbs": [*rule.verbs], "apiGroups": [*rule.groups], "resources": [*rule.resources]}
        rows.append({**row, "resourceNames": [*rule.names]} if rule.names else row)
    return {**body, "status": {"resourceRules": rows, "nonResourceRules": [], "incomplete": False}}
