"""The weights that a playground loads on demand, as files of the book: one script for each model after the first."""

import re
from pathlib import Path

from sphinx.application import Sphinx

from dtbook.pages.notebooks import read_notebook

# As dtbook.playground writes them; in the pages these scripts are left out (running_book.strip_for_pages).
WEIGHTS = re.compile(
    r"<script data-outside-the-book>"
    r'(\(globalThis\.dtbookPlayground \?\?= \{\}\)\["([0-9a-f]{16})"\] = "[\w+/=]+";)</script>'
)


def copy_weights(app: Sphinx, exception: Exception | None) -> None:
    """Write the weights that executed notebooks hold into the book, each under the hash of its numbers."""
    if exception or app.builder.format != "html":
        return
    for copy in sorted((Path(app.srcdir) / "book" / "_executed").glob("*.ipynb")):
        if "dtbookPlayground" not in copy.read_text(encoding="utf-8"):
            continue
        for cell in read_notebook(copy).cells:
            for output in cell.get("outputs", []):
                for script, name in WEIGHTS.findall("".join(output.get("data", {}).get("text/html", ""))):
                    (Path(app.outdir) / "_static" / f"playground-{name}.js").write_text(
                        script, encoding="utf-8"
                    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("build-finished", copy_weights)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
