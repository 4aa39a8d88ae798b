"""The directive `api`: the package's rooms, and the public names of each with signature and docstring.

It reads the sources and imports nothing, so the page needs no torch, and an odd character in a docstring is text.
"""

import ast
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

Definition = ast.FunctionDef | ast.ClassDef


class Api(SphinxDirective):
    """Sections for the modules of the package, in the order in which data flows through it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One section a module."""
        folder = Path(self.env.srcdir) / self.arguments[0]
        made: list[nodes.Node] = []
        for path in sorted(folder.glob("[a-z]*.py")):
            self.env.note_dependency(str(path))
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if found := public(tree.body):
                made.append(self.module(f"{self.arguments[0]}.{path.stem}", tree, found))
        return made

    def module(self, name: str, tree: ast.Module, found: list[Definition]) -> nodes.section:
        """A module's section: what lives there, then its names."""
        section = nodes.section("", nodes.title("", name), ids=[nodes.make_id(name)], names=[name])
        section += described(tree)
        for definition in found:
            section += self.entry(name, definition)
        return section

    def entry(self, module: str, definition: Definition) -> addnodes.desc:
        """A function or class with its docstring; under a class, its public methods."""
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


def public(body: list[ast.stmt]) -> list[Definition]:
    """The functions and classes with a docstring whose names do not begin with an underscore."""
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_") and ast.get_docstring(node)]


def signature(definition: Definition) -> str:
    """What a function takes and returns; of a class, the fields of its instances."""
    if isinstance(definition, ast.FunctionDef):
        returned = f" → {ast.unparse(definition.returns)}" if definition.returns else ""
        return f"({ast.unparse(definition.args)}){returned}"
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    return f"({', '.join(ast.unparse(field) for field in fields)})" if fields else ""


def described(node: Any) -> list[nodes.Node]:
    """The docstring as paragraphs and literal blocks; what stands between backticks is code."""
    made: list[nodes.Node] = []
    for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
        if block.startswith("    "):
            made.append(nodes.literal_block(block, block))
            continue
        paragraph = nodes.paragraph()
        for position, part in enumerate(re.split(r"`+", " ".join(block.split()))):
            paragraph += nodes.literal(part, part) if position % 2 else nodes.Text(part)
        made.append(paragraph)
    return made


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the directive."""
    app.add_directive("api", Api)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
