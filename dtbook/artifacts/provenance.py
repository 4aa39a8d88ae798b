"""What made a thing: a digest of the meaning of the code behind it, and the versions of its libraries and of Python.

The meaning of code is its parsed definitions without docstrings, comments, positions and annotations. The code behind
a function is that function and all definitions of dtbook that it refers to, directly or through others, wherever they
stand. So moving a function, tidying it or describing it better changes nothing; changing what it computes does.
"""

import ast
import copy
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
Code = str | Callable[..., Any]
"""A definition or a module of dtbook: the object, or its dotted name."""


def imported_names(source: str) -> set[str]:
    """Return the dotted names that Python `source` imports, those inside functions included."""
    return set(_imports(ast.parse(source)).values())


def code_behind(code: Iterable[Code]) -> dict[str, Any]:
    """Return the digest of the code behind some definitions, the versions of its libraries, Python and the platform.

    A module stands for all its definitions. The digest is the same with and without git, and does not change with a
    definition that has no part in it. Scripts and styles beside a definition's module count as its code.
    Raises ValueError for a name of dtbook that is not there.
    """
    behind = _behind(code)
    return {
        "code": digest([sorted(behind.meanings.values()), _other_files(behind.meanings)]),
        "libraries": library_versions(behind.libraries),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _behind(code: Iterable[Code]) -> "_Behind":
    files = tuple((file, file.stat().st_mtime_ns) for file in sorted(PACKAGE.rglob("*.py")))
    return _all_behind(PACKAGE, files, tuple(sorted(map(dotted_name, code))))


@lru_cache(maxsize=256)
def _all_behind(package: Path, files: tuple[tuple[Path, int], ...], names: tuple[str, ...]) -> "_Behind":
    behind = _Behind(_load(package, files))
    for name in names:
        if not behind.add(name):
            raise ValueError(f"code must name definitions or modules of dtbook, not {name!r}")
    return behind


def dotted_name(code: Code) -> str:
    """Return the dotted name of a function or class, also of one with some arguments given, or of what is one."""
    if isinstance(code, str):
        return code
    plain = getattr(code, "func", code)
    return f"{plain.__module__}.{plain.__qualname__}"


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed libraries that the dotted `names` belong to."""
    versions = {}
    for library in sorted({name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "dtbook"}):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def digest(value: object) -> str:
    """Return the sha256 of a value's JSON with sorted keys: the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class _Module:
    """A parsed module: what defines each of its names, where others come from, and what it does when imported."""

    name: str
    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, str]

    def target(self, reference: list[str]) -> str | None:
        """Return the dotted name that a reference in this module means, or None for one of another kind."""
        if reference[0] in self.definitions:
            return f"{self.name}.{reference[0]}"
        if reference[0] in self.imports:
            return ".".join([self.imports[reference[0]], *reference[1:]])
        return None

    @cache  # noqa: B019 - a module is parsed once and kept as long as the process
    def meaning(self, name: str) -> tuple[str, list[str]]:
        """Return what a name means, as text, and the dotted names that this refers to."""
        bare = [_Bare().visit(copy.deepcopy(each)) for each in self.definitions[name]]
        used, named = self._targets(bare), self._targets(self.definitions[name])
        targets = used + [target for target in named if not target.startswith(RUNNING)]
        plain = _Plain(self)
        return "\n".join(ast.dump(plain.visit(each)) for each in bare), targets

    def _targets(self, statements: list[ast.stmt]) -> list[str]:
        references = [reference for statement in statements for reference in _references(statement)]
        return list(dict.fromkeys(target for target in map(self.target, references) if target))

    __hash__ = object.__hash__


RUNNING = "dtbook.pipeline."
"""What runs a stage: where only an annotation names it, it is not behind what the stage makes."""
IMPORT = "<import>"
"""The name under which a module's definitions hold what it does when it is imported."""


class _Behind:
    """The definitions behind those that were added, by dotted name, and the dotted names of other libraries."""

    def __init__(self, modules: dict[str, _Module]) -> None:
        self.modules = modules
        self.meanings: dict[str, str] = {}
        self.libraries: set[str] = set()

    def add(self, name: str) -> bool:
        """Add a dotted name and all behind it; return whether there is something of that name."""
        module, rest = _split(name, self.modules)
        if not module:
            self.libraries.add(name)
            return True
        for defined in [rest[0]] if rest else module.definitions:
            if defined in module.imports:
                return self.add(".".join([module.imports[defined], *rest[1:]]))
            if defined not in module.definitions:
                return False
            self._mean(module, defined)
        return True

    def _mean(self, module: _Module, name: str) -> None:
        if f"{module.name}.{name}" in self.meanings:
            return
        self.meanings[f"{module.name}.{name}"], targets = module.meaning(name)
        for target in targets:
            self.add(target)
        for part in self._together(module):
            if IMPORT in part.definitions:
                self._mean(part, IMPORT)

    def _together(self, module: _Module) -> list[_Module]:
        """Return a module and those that its room imports with it."""
        room = ".".join(module.name.split(".")[:2])
        others = {_split(name, self.modules)[0] for name in self.modules[room].imports.values()}
        return [module, *(other for other in others if other and other.name.startswith(f"{room}."))]


class _Bare(ast.NodeTransformer):
    """Leaves out, in place, texts that stand alone, and annotations of functions."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if _is_text(node) else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node


class _Plain(ast.NodeTransformer):
    """Leaves out, in place, the module of each name."""

    def __init__(self, module: _Module) -> None:
        self.module = module

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._short(node) or self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._short(node) or node

    def _short(self, node: ast.expr) -> ast.Name | None:
        """Return the last name of what is imported from dtbook, or None."""
        reference = _reference(node)
        target = self.module.target(reference) if reference else None
        if target and target.startswith("dtbook."):
            return ast.Name(target.rpartition(".")[2], ast.Load())
        return None


def _references(node: ast.AST) -> Iterator[list[str]]:
    """Yield the names that a node refers to, each with its attributes: ["np", "mean"] for `np.mean`."""
    if isinstance(node, ast.expr) and (reference := _reference(node)):
        yield reference
        return
    for child in ast.iter_child_nodes(node):
        yield from _references(child)


def _reference(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := _reference(node.value)):
        return [*before, node.attr]
    return []


def _split(name: str, modules: dict[str, _Module]) -> tuple[_Module | None, list[str]]:
    """Return the module of dtbook that a dotted name begins with, None for another library's, and the rest of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if module := modules.get(".".join(parts[:length])):
            return module, parts[length:]
    return None, parts


@lru_cache(maxsize=4)
def _load(package: Path, files: tuple[tuple[Path, int], ...]) -> dict[str, _Module]:
    """Return the package's modules by dotted name; files come with the time of their last change."""
    modules = {}
    for file, _ in files:
        parts = ["dtbook", *file.relative_to(package).with_suffix("").parts]
        name = ".".join(parts).removesuffix(".__init__")
        modules[name] = _parse(name, ast.parse(file.read_text(encoding="utf-8")))
    return modules


def _parse(name: str, tree: ast.Module) -> _Module:
    module = _Module(name, {}, _imports(tree))
    for statement in tree.body:
        names = _defined(statement)
        if not (names or _is_inert(statement)) or _is_registered(statement, module):
            names = [*names, IMPORT]
        for each in names:
            module.definitions.setdefault(each, []).append(statement)
    return module


def _defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement of a module binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def _is_registered(statement: ast.stmt, module: _Module) -> bool:
    """Return whether a function is handed to a decorator of dtbook's that takes arguments, as `@claim("C01")` does."""
    decorators = statement.decorator_list if isinstance(statement, ast.FunctionDef) else []
    calls = [_reference(each.func) for each in decorators if isinstance(each, ast.Call)]
    return any((module.target(call) or "").startswith("dtbook.") for call in calls if call)


def _is_inert(statement: ast.stmt) -> bool:
    """Return whether a statement only imports, also where types are checked, or is a text that stands alone."""
    if isinstance(statement, ast.If):
        return all(map(_is_inert, [*statement.body, *statement.orelse]))
    return isinstance(statement, ast.Import | ast.ImportFrom) or _is_text(statement)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _imports(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _other_files(definitions: Iterable[str]) -> dict[str, str]:
    """Return the scripts and styles that lie in the rooms of some definitions, by their names."""
    rooms = {name.split(".")[1] for name in definitions}
    files = sorted(file for room in rooms for file in (PACKAGE / room).glob("*.*"))
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.suffix in (".js", ".css")}
