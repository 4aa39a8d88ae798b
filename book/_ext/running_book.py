"""Sphinx extension of this book: executed notebooks, libraries from the book itself, and the rooms beside it."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import nbformat
from front import executed_folder
from sphinx.application import Sphinx
from sphinx.util import logging

from dtbook.pages.notebooks import notebook_digest, read_notebook

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
    executed = read_notebook(copy) if copy.exists() else None
    if problem := fault(nbformat.reads(source[0], as_version=4), executed):
        LOGGER.warning("%s %s; `dtbook run` makes it anew", copy, problem, location=docname)
    if executed is not None:
        strip_for_pages(executed)
        source[0] = nbformat.writes(executed)


def fault(source: nbformat.NotebookNode, executed: nbformat.NotebookNode | None) -> str | None:
    """Return what is wrong with the executed copy of `source`, as the rest of a sentence; None if nothing is."""
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


def copy_libraries(app: Sphinx, exception: Exception | None) -> None:
    """Copy plotly.js, CircuitsVis and the part of MathJax that pages use out of the installed packages."""
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    shutil.copy(_package("plotly") / "package_data" / "plotly.min.js", static)
    shutil.copy(_package("circuitsvis") / "dist" / "cdn" / "iife.js", static / "circuitsvis.js")
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
    for room in (
        "api",
        "artifacts",
        "chapters",
        "diagrams",
        "front",
        "playground_weights",
        "scorecard",
        "website",
    ):
        app.setup_extension(room)
    for name in ("comments_config", "use_jupyterbook_latex"):
        app.add_config_value(name, None, "")  # set by jupyter-book for extensions that are left out here
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
