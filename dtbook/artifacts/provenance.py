"""What made a thing: the rooms of dtbook behind it, the digest of their sources, and the library versions."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def imported_names(source: str) -> set[str]:
    """Return the dotted names that Python `source` imports, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["dtbook" if node.level else "", node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def package_sources(names: Iterable[str]) -> dict[str, str]:
    """Return the source of every room of dtbook behind the dotted `names`, what those import included."""
    sources: dict[str, str] = {}
    queue = sorted(names)
    while queue:
        package, _, rest = queue.pop().partition(".")
        room = rest.partition(".")[0]
        if package == "dtbook" and room not in sources and (PACKAGE / f"{room}.py").is_file():
            sources[room] = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
            queue += sorted(imported_names(sources[room]))
    return dict(sorted(sources.items()))


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed libraries that the dotted `names` belong to."""
    versions = {}
    for library in sorted({name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "dtbook"}):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def code_behind(names: Iterable[str]) -> dict[str, Any]:
    """Return the rooms of dtbook behind the dotted `names`, their digest, library versions, Python, platform.

    The digest covers the sources of those rooms and of all that they import from dtbook, and nothing else: it
    is the same with and without git, and does not change with a room that had no part in it.
    """
    imports = set(names)
    sources = package_sources(imports)
    imports = imports.union(*map(imported_names, sources.values()))
    return {
        "code": {"rooms": list(sources), "sha256": digest(sources)},
        "libraries": library_versions(imports),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def code_version(rooms: Iterable[str]) -> dict[str, Any]:
    """Return `code_behind` the rooms of dtbook so named; raise ValueError for a name that is no room."""
    unknown = sorted(room for room in rooms if not (PACKAGE / f"{room}.py").is_file())
    if unknown:
        raise ValueError(f"rooms must name modules of dtbook, not {', '.join(map(repr, unknown))}")
    return code_behind(f"dtbook.{room}" for room in rooms)


def digest(value: object) -> str:
    """Return the sha256 of a value's JSON with sorted keys: the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
