"""The directive `api`: the package's rooms, or one room's modules and the public names of each, from the sources.

It reads the sources and imports nothing, so the pages need no torch, and an odd character in a docstring is text.
"""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

Definition = ast.FunctionDef | ast.ClassDef


class Api(SphinxDirective):
    """Of the package, the list of its rooms; of a room, a section for each of its modules.

    A room has its page at book/api/ROOM.md.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the list, or the sections."""
        name = self.arguments[0]
        if "." not in name:
            return [self.rooms(name)]
        if (self.path_of(name) / "__init__.py").exists():
            return self.folder(name)
        tree = self.parse(name)
        return [*described(tree), *self.entries(name, tree)]

    def path_of(self, name: str) -> Path:
        """Return where a dotted name lies, without a suffix."""
        return Path(self.env.srcdir, *name.split("."))

    def parse(self, name: str) -> ast.Module:
        """Return the source of a module or a folder; the page is made anew when it changes."""
        path = self.path_of(name)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.env.note_dependency(str(path))
        return ast.parse(path.read_text(encoding="utf-8"))

    def rooms(self, package: str) -> nodes.bullet_list:
        """Return the rooms of the package from the lowest to the highest, each with a link to its page."""
        listed = nodes.bullet_list()
        project = Path(self.env.srcdir) / "pyproject.toml"
        self.env.note_dependency(str(project))
        for room in rooms_of(project):
            name, page = f"{package}.{room}", f"book/api/{room}"
            link: nodes.Node = nodes.literal(name, name)
            if page in self.env.found_docs:
                uri = self.env.app.builder.get_relative_uri(self.env.docname, page)
                link = nodes.reference("", "", link, internal=True, refuri=uri)
            sentence = (ast.get_docstring(self.parse(name)) or "").split("\n\n")[0]
            listed += nodes.list_item("", nodes.paragraph("", "", link, nodes.Text(": "), *worded(sentence)))
        return listed

    def folder(self, name: str) -> list[nodes.Node]:
        """Return what a room is, the names that it hands out itself, and a section for each of its modules."""
        tree = self.parse(name)
        modules = [f"{name}.{path.stem}" for path in sorted(self.path_of(name).glob("[a-z]*.py"))]
        sections = [self.section(module, self.parse(module)) for module in modules]
        handed_out = self.handed_out(name, exports(tree))
        return [*described(tree), *handed_out, *self.entries(name, tree), *sections]

    def handed_out(self, room: str, names: dict[str, str]) -> list[nodes.Node]:
        """Return a line of names that can be imported from the room itself, and let them be found there too."""
        line = nodes.paragraph("", f"To be imported from {room} itself: ")
        domain: Any = self.env.get_domain("py")
        for short, full in sorted(names.items()):
            if full in domain.objects:
                domain.note_object(f"{room}.{short}", domain.objects[full].objtype, full, aliased=True)
            link = addnodes.pending_xref(refdomain="py", reftype="obj", reftarget=full, refwarn=False)
            link += nodes.literal(short, short)
            line += [nodes.Text(" "), link]
        return [line] if names else []

    def section(self, name: str, tree: ast.Module) -> nodes.section:
        """Return a module's section: what it holds, then its names."""
        section = nodes.section("", nodes.title("", name), ids=[nodes.make_id(name)], names=[name])
        section += [*described(tree), *self.entries(name, tree)]
        return section

    def entries(self, name: str, tree: ast.Module) -> list[nodes.Node]:
        """Return an entry for each public name of a module."""
        return [self.entry(name, definition) for definition in public(tree.body)]

    def entry(self, module: str, definition: Definition) -> addnodes.desc:
        """Return a function or class with its docstring; under a class, its public methods."""
        full = f"{module}.{definition.name}"
        is_class = isinstance(definition, ast.ClassDef)
        kind = "class" if is_class else "function"
        made = addnodes.desc(domain="py", objtype=kind, desctype=kind, noindex=False)
        made["classes"] += ["py", kind]
        head = addnodes.desc_signature("", "", ids=[full])
        if is_class:
            head += addnodes.desc_annotation("", "class ")
        head += addnodes.desc_name("", definition.name)
        head += nodes.inline("", signature(definition), classes=["signature"])
        content = addnodes.desc_content("", *described(definition))
        if is_class:
            for method in public(definition.body):
                content += self.entry(full, method)
        self.env.get_domain("py").note_object(full, kind, full, location=made)
        made += [head, content]
        return made


def rooms_of(project: Path) -> list[str]:
    """Return the rooms of the package from the lowest to the highest, as the contract of import-linter has them."""
    contracts = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return [room for layer in reversed(contracts[0]["layers"]) for room in re.findall(r"\w+", layer)]


def exports(tree: ast.Module) -> dict[str, str]:
    """Return the names in a folder's `__all__` that it imports: name → dotted name of where it is defined."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = {alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)
    ]
    listed = ast.literal_eval(lists[0]) if lists else []
    return {name: found[name] for name in listed if name in found}


def public(body: list[ast.stmt]) -> list[Definition]:
    """Return the functions and classes with a docstring whose names do not begin with an underscore."""
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_") and ast.get_docstring(node)]


def signature(definition: Definition) -> str:
    """Return the arguments and the result of a function; of a class, the fields of its instances."""
    if isinstance(definition, ast.FunctionDef):
        returned = f" → {ast.unparse(definition.returns)}" if definition.returns else ""
        return f"({ast.unparse(definition.args)}){returned}"
    fields = [ast.unparse(node) for node in definition.body if isinstance(node, ast.AnnAssign)]
    fields = [field for field in fields if "ClassVar" not in field]
    return f"({', '.join(fields)})" if fields else ""


def described(node: Any) -> list[nodes.Node]:
    """Return the docstring as paragraphs and literal blocks."""
    made: list[nodes.Node] = []
    for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
        if block.startswith("    "):
            made.append(nodes.literal_block(block, block))
        else:
            made.append(nodes.paragraph("", "", *worded(block)))
    return made


def worded(text: str) -> list[nodes.Node]:
    """Return a text of which the parts between backticks are code."""
    parts = enumerate(re.split(r"`+", " ".join(text.split())))
    return [nodes.literal(part, part) if position % 2 else nodes.Text(part) for position, part in parts]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the directive."""
    app.add_directive("api", Api)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
