"""The directive `artifacts`: what makes each file of data/, and each figure of the book, by which command."""

import re
from pathlib import Path

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from dtbook.artifacts.store import ArtifactStore
from dtbook.pages.notebooks import find_notebooks, read_notebook
from dtbook.pipeline.listing import listing


class Artifacts(SphinxDirective):
    """Two tables in the page's Markdown, of which the argument says one: `figures`, or `files`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return one table."""
        root = Path(self.env.srcdir)
        for path in [*find_notebooks(root / "notebooks"), root / "data" / "manifest.json"]:
            self.env.note_dependency(str(path))
        rows = listing(root / "notebooks", ArtifactStore(root / "data"))
        table = figures(root / "notebooks", rows) if self.arguments[0] == "figures" else files(rows)
        return self.parse_text_to_nodes(markdown(table))


def files(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the artifacts of `listing`, with names as code and chapters as links."""
    shown = pd.DataFrame({"file": rows["artifact"].map(code), "of": rows["of"], "stage": rows["stage"]})
    return shown.assign(command=rows["command"].map(code), chapters=rows["chapters"])


def figures(notebooks: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return every figure, the command that draws it, the files its chapter starts from and their commands."""
    shown = []
    for path in find_notebooks(notebooks):
        number = str(int(path.stem.partition("_")[0]))
        used = rows[rows["chapters"].str.split(", ").map(lambda chapters, n=number: n in chapters)]
        names = ", ".join(map(code, used["artifact"]))
        commands = ", ".join(map(code, used["command"].unique()))
        for name in figure_names(path):
            row = {"figure": f"{{numref}}`{name}`", "drawn by": code(f"dtbook run {number}")}
            shown.append(row | {"from": names, "made by": commands})
    return pd.DataFrame(shown)


def figure_names(path: Path) -> list[str]:
    """Return the labels of a notebook's figures, in order."""
    cells = read_notebook(path).cells
    found = [cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in cells]
    return [name for name in found if name]


def code(text: str) -> str:
    """Return a text as code."""
    return f"`{text}`"


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(re.sub(r'[|]', '/', str(cell)) for cell in row)} |" for row in rows)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the directive."""
    app.add_directive("artifacts", Artifacts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
