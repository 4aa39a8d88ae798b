"""Sphinx extension of this book: executed notebooks, diagrams in the page, libraries from the book itself."""

import html
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from dtbook.notebooks import notebook_digest

BOOK = Path(__file__).resolve().parent.parent
PLOTLY_MIME = "application/vnd.plotly.v1+json"
OUTSIDE_SCRIPT = "<script data-outside-the-book>"  # as dtbook.figures writes it
LOGGER = logging.getLogger(__name__)


def use_executed_copy(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the executed copy of a notebook in the source's place; warn where it is missing, failed or stale.

    The page keeps the source's name, so its Colab, Binder and download links lead to the source.
    """
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    copy = executed_folder(app) / path.name
    app.env.note_dependency(str(copy))
    executed = nbformat.read(copy, as_version=4) if copy.exists() else None
    if problem := fault(nbformat.reads(source[0], as_version=4), executed):
        LOGGER.warning("%s %s; `dtbook run` makes it anew", copy, problem, location=docname)
    if executed is not None:
        strip_for_pages(executed)
        source[0] = nbformat.writes(executed)


def executed_folder(app: Sphinx) -> Path:
    """The folder of the executed copies."""
    return Path(app.srcdir) / "book" / "_executed"


def fault(source: nbformat.NotebookNode, executed: nbformat.NotebookNode | None) -> str | None:
    """What is wrong with the executed copy of `source`, as the rest of a sentence; None if nothing is."""
    if executed is None:
        return "is missing"
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    if errors := [output for output in outputs if output.output_type == "error"]:
        return f"has failed ({errors[0].ename}: {errors[0].evalue})"
    if executed.metadata.get("dtbook", {}).get("digest") != notebook_digest(source):
        return "is stale: the notebook has changed since"
    return None


def strip_for_pages(executed: nbformat.NotebookNode) -> None:
    """Drop, in place, what pages do not need: plotly's JSON twin, the script that draws outside the book."""
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(PLOTLY_MIME, None)
            if "text/html" in data:
                data["text/html"] = data["text/html"].partition(OUTSIDE_SCRIPT)[0]


class Pictures(SphinxTransform):
    """Holds every image to having alternative text, and draws the book's own SVG diagrams in the page itself.

    An `<img>` cannot see the page's theme; a diagram in the page takes its colours from it, by book.css.
    """

    default_priority = 210

    def apply(self, **kwargs: Any) -> None:
        """Check and replace the images of a document."""
        for image in list(self.document.findall(nodes.image)):
            alt = image.get("alt", "").strip()
            if not alt:
                LOGGER.warning("the image %s has no alternative text", image["uri"], location=image)
            path = BOOK / "_static" / Path(image["uri"]).name
            if path.suffix == ".svg" and path.exists():
                self.env.note_dependency(str(path))
                image.replace_self(nodes.raw("", diagram(path, alt), format="html"))


def diagram(path: Path, alt: str) -> str:
    """The SVG as part of a page: one image to a screen reader, its ids prefixed with the file's name."""
    svg = path.read_text(encoding="utf-8")
    svg = svg.replace(' id="', f' id="{path.stem}-').replace("url(#", f"url(#{path.stem}-")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def copy_libraries(app: Sphinx, exception: Exception | None) -> None:
    """Copy plotly.js and the part of MathJax that pages use out of the installed packages into the book."""
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    shutil.copy(_package("plotly") / "package_data" / "plotly.min.js", static)
    source, mathjax = _package("sphinx-mathjax-offline") / "static" / "mathjax", static / "mathjax"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(source / fonts, mathjax / fonts, dirs_exist_ok=True)
    shutil.copy(source / "tex-chtml.js", mathjax)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the book needs the package {name}; `pip install -e .[book]` brings it")
    return Path(spec.origin).parent


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the extension."""
    app.connect("source-read", use_executed_copy)
    app.connect("build-finished", copy_libraries)
    app.add_transform(Pictures)
    for name in ("comments_config", "use_jupyterbook_latex"):
        app.add_config_value(name, None, "")  # set by jupyter-book for extensions that are left out here
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
