"""Imports point one way, as docs/develop.md says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import usf_kernels

PACKAGE = Path(usf_kernels.__file__).parent
ROOMS = ("_core", "kernels", "ops", "nn", "models", "integrations")  # each may import those before it


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "usf_kernels":
            yield from (f"usf_kernels.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms() -> dict[str, set[str]]:
    """Of each folder or file at the top of the package, those that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names = [name.split(".") for name in imported(path) if name.startswith("usf_kernels.")]
        found.setdefault(room, set()).update(name[1] for name in names if name[1] != room)
    return found


def test_no_room_imports_itself_through_others():
    graph = {room: others for room, others in rooms().items() if room != "__init__"}
    TopologicalSorter(graph).prepare()  # raises for a cycle, naming it
    for i, room in enumerate(ROOMS[1:], 1):
        assert graph[room].isdisjoint(ROOMS[i:]), room


def test_only_kernels_import_triton():
    importing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "triton" for name in imported(path))
    }
    assert importing == {"kernels"}
