"""The limit of open files: high for us, as it was for our children."""

from __future__ import annotations

_soft_limit: int | None = None


def raise_open_files() -> None:
    """Raise our own soft limit of open files to the hard one; children get the old one back (rule 29)."""
    global _soft_limit
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS says infinity and means something smaller
        return
    _soft_limit = soft


def soft_limit_for_children() -> int | None:
    """The soft limit that children should have, None when ours was never raised."""
    return _soft_limit


def restore_open_files(pid: int) -> None:
    """Give a child that was just started the soft limit which we were started with."""
    if _soft_limit is None:
        return
    import resource

    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_soft_limit, hard))
    except (AttributeError, OSError, ValueError):
        pass  # it ended already, or this system cannot: a higher limit harms only programs that close them all
