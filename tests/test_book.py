"""The book's Sphinx extension, on a little book made for it, and the two ways to build the real one."""

import io
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from sphinx.application import Sphinx

from dtbook.notebooks import notebook_digest

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import running_book  # noqa: E402


def notebook(title, code="x = 1", outputs=()):
    cells = [
        {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {title}"},
        {
            "cell_type": "code",
            "id": "code",
            "metadata": {},
            "source": code,
            "execution_count": 1,
            "outputs": [*outputs],
        },
    ]
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return nbformat.from_dict({"cells": cells, "metadata": language, "nbformat": 4, "nbformat_minor": 5})


def executed(source, outputs=()):
    copy = notebook(source.cells[0].source.removeprefix("# "), source.cells[1].source, outputs)
    copy.metadata["dtbook"] = {"digest": notebook_digest(source)}
    return copy


FIGURE = {
    "output_type": "display_data",
    "metadata": {},
    "data": {
        PLOTLY: {"data": []},
        "text/html": '<div class="book-figure">drawn</div>\n<script data-outside-the-book>load("cdn.plot.ly")</script>',
    },
}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "seed must be 0 or more", "traceback": []}


@pytest.fixture(scope="module")
def little_book(tmp_path_factory):
    """Pages and warnings of a book with a sound, a stale, a failed and a missing copy."""
    root = tmp_path_factory.mktemp("book")
    copies = root / "book" / "_executed"
    copies.mkdir(parents=True)
    for name in ("sound", "stale", "failed", "missing"):
        source = notebook(name)
        nbformat.write(source, root / f"{name}.ipynb")
        copy = executed(source, {"sound": [FIGURE], "failed": [ERROR]}.get(name, ()))
        if name == "stale":
            copy.metadata["dtbook"]["digest"] = notebook_digest(notebook(name, "x = 2"))
        if name != "missing":
            nbformat.write(copy, copies / f"{name}.ipynb")
    (root / "plain.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    pages = "sound\nstale\nfailed\nmissing\n"
    (root / "index.md").write_text(
        f"# Little book\n\n```{{toctree}}\n{pages}```\n\n![](plain.svg)\n\n![The model](architecture.svg)\n"
    )
    warnings = io.StringIO()
    settings = {
        "extensions": ["myst_nb", "running_book"],
        "nb_execution_mode": "off",
        "exclude_patterns": ["book"],
    }
    out = root / "out"
    app = Sphinx(root, None, out, root / "doctrees", "html", settings, status=None, warning=warnings)
    app.build()
    return out, re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).splitlines()


def warned(lines, page):
    return [line for line in lines if page in line]


def test_sound_copy_is_shown_without_a_warning(little_book):
    out, lines = little_book
    page = (out / "sound.html").read_text()
    assert '<div class="book-figure">drawn</div>' in page
    assert "cdn.plot.ly" not in page
    assert warned(lines, "sound") == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "missing.ipynb is missing; `dtbook run` makes it anew"),
        ("stale", "stale.ipynb is stale: the notebook has changed since; `dtbook run` makes it anew"),
        (
            "failed",
            "failed.ipynb has failed (ValueError: seed must be 0 or more); `dtbook run` makes it anew",
        ),
    ],
)
def test_unsound_copy_is_warned_about(little_book, name, sentence):
    lines = warned(little_book[1], f"{name}.ipynb")
    assert len(lines) == 1
    assert sentence in lines[0]


def test_every_change_of_a_notebook_makes_its_copy_stale():
    source = notebook("a question")
    copy = executed(source)
    assert running_book.fault(source, copy) is None
    source.cells[0].source += "?"
    assert "stale" in running_book.fault(source, copy)


def test_picture_without_alternative_text_is_warned_about(little_book):
    assert [line for line in little_book[1] if "plain.svg has no alternative text" in line]
    assert warned(little_book[1], "architecture.svg") == []


def test_diagram_stands_in_the_page_itself(little_book):
    page = (little_book[0] / "index.html").read_text()
    assert '<svg role="img" aria-label="The model"' in page
    assert 'id="architecture-head-0"' in page
    assert "url(#architecture-tip)" in page


def test_diagram_names_every_component():
    svg = (ROOT / "book" / "_static" / "architecture.svg").read_text()
    components = {
        "rtg-token",
        "state-token",
        "time-embedding",
        "head-0",
        "head-1",
        "mlp",
        "unembedding",
        "logits",
    }
    assert components <= set(re.findall(r'id="([\w-]+)"', svg))


def test_libraries_come_from_the_installed_packages(little_book):
    static = little_book[0] / "_static"
    assert (static / "plotly.min.js").stat().st_size > 1e6
    assert (static / "mathjax" / "tex-chtml.js").exists()
    assert list(
        (static / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2").glob("MathJax_Main-Regular.woff")
    )


def test_package_that_is_not_installed_is_named():
    with pytest.raises(ModuleNotFoundError, match="the book needs the package no-such-thing; `pip install"):
        running_book._package("no-such-thing")


def test_sphinx_alone_takes_its_settings_from_the_same_file(monkeypatch):
    scope = {"__file__": str(ROOT / "book" / "conf.py")}
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec((ROOT / "book" / "conf.py").read_text(), scope)
    assert scope["html_title"] == CONFIG["title"]
    assert scope["html_theme_options"]["repository_url"] == CONFIG["repository"]["url"]
    assert scope["html_theme_options"]["launch_buttons"] == CONFIG["launch_buttons"]
    assert scope["extensions"] == CONFIG["sphinx"]["config"]["extensions"]
    assert Path(scope["html_static_path"][0]) == ROOT / "book" / "_static"


def test_sources_say_one_address_of_the_repository():
    address = CONFIG["repository"]["url"]
    owner = address.removeprefix("https://github.com/").partition("/")[0]
    texts = [*(ROOT / "book").glob("*.md"), *NOTEBOOKS]
    found = {
        url for path in texts for url in re.findall(rf"https://github\.com/{owner}/[\w.-]+", path.read_text())
    }
    assert found == {address}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_and_begins_as_all_do(path):
    cells = json.loads(path.read_text())["cells"]
    assert all(
        not cell["outputs"] and cell["execution_count"] is None
        for cell in cells
        if cell["cell_type"] == "code"
    )
    setup, parameters = [cell for cell in cells if cell["cell_type"] == "code"][:2]
    assert "hide-input" in setup["metadata"]["tags"]
    source = "".join(setup["source"])
    assert f'os.environ.get("DTBOOK_SOURCE", "git+{CONFIG["repository"]["url"]}")' in source
    assert '"google.colab" in sys.modules' in source
    assert "parameters" in parameters["metadata"]["tags"]
    for line in filter(None, "".join(parameters["source"]).splitlines()):
        assert re.fullmatch(r"\w+ = .+  # .+", line), line
