"""What the book adds to the text of its pages: opening lines, numbers of formulas, definitions, marks, data tables."""

from pathlib import Path
from typing import Any

from docutils import nodes
from front import executed_folder, in_words
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import ExtensionMetadata

# Silent reading of non-fiction: Brysbaert 2019, doi 10.1016/j.jml.2019.104047, has 238.
WORDS_PER_MINUTE = 220
SECONDS_PER_FIGURE = 15
MARKS = {
    "replicated": "yes",
    "supported": "yes",
    "holds": "yes",
    "passes": "yes",
    "not replicated": "no",
    "refuted": "no",
    "fails": "no",
    "mixed": "half",
    "unclear": "half",
    "undecided": "none",
}
"""The words of a verdict, and which of the book's marks stands before each."""


class Equations(SphinxTransform):
    """Numbers all displayed formulas in reading order, those without a label too."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Give each formula of a document a label, an id and its number."""
        domain = self.env.get_domain("math")
        docname = self.env.docname
        for count, formula in enumerate(self.document.findall(nodes.math_block), start=1):
            if not formula.get("label"):
                label = f"{Path(docname).name}-{count}"
                formula["label"], formula["docname"] = label, docname
                formula["ids"].append(nodes.make_id(f"equation-{label}"))
                formula["nowrap"] = formula.get("nowrap", False)
            domain.equations[formula["label"]] = (docname, count)
            formula["number"] = count


def minutes_to_read(doctree: nodes.document) -> int:
    """Return how many minutes the prose, formulas and figures of a page take to read; code and tables do not count."""
    prose = [
        node
        for node in doctree.findall(nodes.paragraph)
        if not any(isinstance(above, nodes.table) for above in ancestors(node))
    ]
    words = sum(len(node.astext().split()) for node in prose)
    figures = sum(1 for _ in doctree.findall(nodes.figure))
    return max(1, round(words / WORDS_PER_MINUTE + figures * SECONDS_PER_FIGURE / 60))


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    """Return the nodes that a node lies in, from the inside out."""
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def run_seconds(app: Sphinx, docname: str) -> float | None:
    """Return how many seconds the notebook of a page took when it was executed; None if they were not noted."""
    note = executed_folder(app) / f"{Path(docname).name}.seconds"
    return float(note.read_text()) if note.exists() else None


def add_opening(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Add a line below the opening of a chapter: time to read and to run, the chapter before, a button for all code."""
    section = next(iter(doctree.findall(nodes.section)), None)
    if section is None or not docname.startswith("notebooks/") or app.builder.format != "html":
        return
    line = nodes.paragraph(classes=["opening"])
    line += nodes.inline("", f"{minutes_to_read(doctree)} min to read")
    if (seconds := run_seconds(app, docname)) is not None:
        line += nodes.inline("", f"{in_words(seconds)} to run")
    relations = getattr(app.builder, "relations", {}).get(docname)
    if relations and relations[1] and app.builder.name == "html":
        before = relations[1]
        title = app.env.titles[before].astext()
        uri = app.builder.get_relative_uri(docname, before)
        line += nodes.inline("", "previously: ", nodes.reference("", title, internal=True, refuri=uri))
    line += nodes.raw("", '<button type="button" class="show-code">show all code</button>', format="html")
    position = 1
    while position < len(section) and isinstance(section[position], nodes.block_quote | nodes.target):
        position += 1
    section.insert(position, line)


def mark_verdicts(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give every glued verdict its mark."""
    for node in doctree.findall(nodes.inline):
        if "pasted-text" in node["classes"] and node.astext() in MARKS:
            node["classes"] += ["verdict", f"verdict-{MARKS[node.astext()]}"]


def definitions(env: BuildEnvironment) -> dict[str, list[nodes.Node]]:
    """Return the inline nodes of the definition of each term of the glossary, by the term's id in the page."""
    found = {}
    if "book/glossary" not in env.found_docs:
        return {}
    for item in env.get_doctree("book/glossary").findall(nodes.definition_list_item):
        paragraph = next(iter(item.findall(nodes.paragraph)), None)
        for term in item.findall(nodes.term):
            if paragraph is not None:
                for name in term["ids"]:
                    found[name] = [_plain(child) for child in paragraph.children]
    return found


def _plain(node: nodes.Node) -> nodes.Node:
    """Return the node without links, which would stand inside a link's explanation."""
    if isinstance(node, addnodes.pending_xref):
        cited = node.get("refdomain") == "cite"
        return nodes.Text("" if cited else node.astext())
    return node.deepcopy()


def define_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put its definition beside the first use of each glossary term on a page, shown when it is pointed at."""
    if app.builder.name != "html" or docname == "book/glossary":
        return
    known = getattr(app, "_book_definitions", None)
    if known is None:
        known = app._book_definitions = definitions(app.env)  # type: ignore[attr-defined]
    for link in list(doctree.findall(nodes.reference)):
        name = link.get("refuri", "").partition("#")[2]
        inside = next(iter(link.findall(nodes.inline)), None)
        if inside is None or "std-term" not in inside["classes"] or name not in known:
            continue
        explanation = nodes.inline("", "", *known.pop(name), classes=["definition"])
        link.replace_self(nodes.inline("", "", link.deepcopy(), explanation, classes=["defined"]))
    app._book_definitions = None  # type: ignore[attr-defined]


DATA_TABLE = '<details class="figure-data"><summary>The data of this figure as a table</summary></details>\n'


def depart_figure(self: Any, node: nodes.figure) -> None:
    """Close a figure; one that is drawn from data gets a table of them, which _static/tables.js fills when opened."""
    if any("book-figure" in raw.astext() for raw in node.findall(nodes.raw)):
        self.body.append(DATA_TABLE)
    type(self).depart_figure(self, node)


def visit_figure(self: Any, node: nodes.figure) -> None:
    """Open a figure as the theme does."""
    type(self).visit_figure(self, node)


def visit_citation(self: Any, node: nodes.citation) -> None:
    """Open an entry of the bibliography as an item of its list: readers aloud know docutils' own role no more."""
    type(self).visit_citation(self, node)
    self.body[-1] = self.body[-1].replace('role="doc-biblioentry"', 'role="listitem"')


def depart_citation(self: Any, node: nodes.citation) -> None:
    """Close an entry as docutils does."""
    type(self).depart_citation(self, node)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the additions."""
    app.add_transform(Equations)
    app.add_node(nodes.figure, override=True, html=(visit_figure, depart_figure))
    app.add_node(nodes.citation, override=True, html=(visit_citation, depart_citation))
    for addition in (mark_verdicts, add_opening, define_terms):
        app.connect("doctree-resolved", addition)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
