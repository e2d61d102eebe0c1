"""The shape of docs/architecture.md, checked by reading the imports: lower layers never import higher ones."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "oz_worker"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("errors", "timing", "spellings", "ordinary", "redact", "known", "threads", "meters", "vitals", "tracing"),
    ("model", "lifecycle", "settings", "instruments", "about"),
    (
        "unreadable",
        "process",
        "limits",
        "errand",
        "nameless",
        "pipeline",
        "progress",
        "cgroup",
        "watcher",
        "tree",
        "detached",
        "store",
        "rows",
        "slots",
        "dial",
        "proxy",
        "pulse",
        "reply",
        "resolver",
        "trust",
    ),
    ("engine_words", "containers", "engines", "volumes", "pulls", "cluster", "clusters"),
    ("backends",),
    ("engine", "link"),
    ("dialects",),
    ("observe",),
    ("signals", "stopping", "portions", "own_secrets", "measuring", "opening", "daemon"),
    ("config", "cli", "check", "checks", "devplane", "__main__"),
)
"""Lowest first. A name stands for the module or the whole package; the longest name that fits counts."""

SIBLINGS = {"engine": "link", "link": "engine"}
"""Packages of one layer that do not know each other."""

OWN_WIRE = ("model", "lifecycle", "rows", "store", "backends", "engine", "link", "dialects", "dial", "daemon")
"""What devplane must not import: judge and codec could share a mistake (design: it has its own copy of the wire)."""

LATE = ("psutil", "requests", "http.server", "websockets", "oz_worker.devplane", "oz_worker.config.flags")
"""Not imported by the composition root: each costs time before the first dial (psutil and http.server come later)."""

LONG_FILES: dict[str, str] = {
    "oz_worker/engine/admission.py": "every decision about an assignment or a cancel, which must be seen side by side",
    "oz_worker/backends/docker.py": "the contract of a backend, a short method for each of its promises",
    "oz_worker/engine/task.py": "one task's thread from start to end, whose order is what there is to read",
}
"""Files over 400 lines, with the reason."""
MOST_LINES = 400

LONG_FUNCTIONS: dict[str, str] = {
    "oz_worker/daemon.py:_run": "starts the parts one by one; the order is what there is to read",
}
"""Functions over 60 lines without their docstring, with the reason."""
MOST_FUNCTION_LINES = 60


class Import(NamedTuple):
    """One import of a module of ours by another, relative to the package."""

    importer: str
    imported: str
    line: int


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _modules() -> dict[str, Path]:
    return {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _ranked(module: str) -> tuple[int, str]:
    """The layer of a module, and the name in LAYERS that decided it."""
    fitting = [
        (name, rank)
        for rank, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert fitting, f"oz_worker.{module} stands in no layer; add it to LAYERS and to docs/architecture.md"
    name, rank = max(fitting, key=lambda pair: len(pair[0]))
    return rank, name


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those below `if TYPE_CHECKING`, which runs nothing."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node)


def _imports(modules: dict[str, Path]) -> Iterator[Import]:
    for importer, path in modules.items():
        for node in _nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the layer; write it out"
                # `from package import module` and `from module import name` look alike: a module of ours wins.
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name.removeprefix("oz_worker.") in modules else str(node.module) for name in full]
            else:
                continue
            for name in names:
                if name == "oz_worker" or name.startswith("oz_worker."):
                    yield Import(importer, name.removeprefix("oz_worker").lstrip(".") or "__init__", node.lineno)


@functools.cache
def imports() -> tuple[Import, ...]:
    """All of the package; read by the tests and not while they are collected, which every process of a run does."""
    return tuple(_imports(_modules()))


def test_there_are_imports_to_check() -> None:
    assert len(imports()) > 100


def test_a_module_imports_only_its_own_layer_and_lower_ones() -> None:
    wrong = []
    for found in imports():
        rank, name = _ranked(found.importer)
        other_rank, other_name = _ranked(found.imported)
        if other_rank > rank or SIBLINGS.get(name) == other_name:
            wrong.append(f"oz_worker.{found.importer} line {found.line} imports {found.imported}")
    assert wrong == []


def test_the_control_plane_shares_no_wire_code_with_the_worker() -> None:
    shared = [
        f"{found.importer} line {found.line}: {found.imported}"
        for found in imports()
        if found.importer.startswith("devplane") and _ranked(found.imported)[1] in OWN_WIRE
    ]
    assert shared == []


def test_the_start_imports_nothing_that_can_come_later() -> None:
    script = (
        "import sys, oz_worker.daemon, oz_worker.config.load\n"
        f"print('\\n'.join(name for name in {LATE!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout.split(), done.stderr) == ([], "")


def test_files_fit_a_reader() -> None:
    long = {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > MOST_LINES}
    assert long - set(LONG_FILES) == set()


def test_functions_fit_a_screen() -> None:
    long = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                spoken = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno
                if (node.end_lineno or 0) - (spoken or 0) > MOST_FUNCTION_LINES:
                    long.add(f"{path.relative_to(ROOT)}:{node.name}")
    assert long - set(LONG_FUNCTIONS) == set()
