"""The book's Sphinx extension, on a little book made for it, and the two ways to build the real one."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from sphinx.application import Sphinx

from dtbook.pages.notebooks import declared_parameters, notebook_digest, python_of
from dtbook.pipeline.replication import BOOK_SEEDS, TUNING

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import chapters  # noqa: E402
import front  # noqa: E402
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


GLUE = "application/papermill.record/"
CHAPTER = """> The answer.

A {term}`logit` and another {term}`logit` are {glue:text}`verdict`.

$$
a = b
$$

$$
c = d
$$ (eq-named)

See {eq}`eq-named`.
"""
SCORES = {
    "claim": ["C01", "C02"],
    "statement": ["all classes occur", "unbiased"],
    "of": ["", ""],
    "group": ["Data", "Circuit"],
    "passed": [9, 1],
    "n": [10, 10],
    "verdict": ["replicated", "not replicated"],
    "section": ["notebooks/chapter.html#results", "notebooks/99_gone.html"],
}


PUBLISHED = """[project.urls]
Repository = "https://github.com/owner/little-book"
Book = "https://pages.example/little-book/"
"""


def write_chapter(root):
    """A chapter with all that the extension adds to, and its executed copy."""
    glued = {"output_type": "display_data", "data": {f"{GLUE}text/plain": "'not replicated'"}}
    glued["metadata"] = {"scrapbook": {"name": "verdict", "mime_prefix": GLUE}}
    source = notebook("A question?")
    prose = {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": CHAPTER}
    figure = notebook("", "draw()").cells[1] | {"id": "figure"}
    figure["metadata"] = {"mystnb": {"figure": {"caption": "What it shows", "name": "fig-one"}}}
    source.cells = [nbformat.from_dict(cell) for cell in (source.cells[0], prose, source.cells[1], figure)]
    copy = nbformat.from_dict(json.loads(nbformat.writes(source)))
    copy.cells[2].outputs, copy.cells[3].outputs = nbformat.from_dict([[glued], [FIGURE]])
    copy.metadata["dtbook"] = {"digest": notebook_digest(source)}
    (root / "notebooks").mkdir()
    nbformat.write(source, root / "notebooks" / "chapter.ipynb")
    nbformat.write(copy, root / "book" / "_executed" / "chapter.ipynb")
    (root / "book" / "_executed" / "chapter.seconds").write_text("151.2\n")


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
    (root / "pyproject.toml").write_text(PUBLISHED)
    (root / "plain.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    pages = "sound\nstale\nfailed\nmissing\n"
    (root / "index.md").write_text(
        f"# Little book\n\n```{{toctree}}\n{pages}book/glossary\nnotebooks/chapter\n```\n\n"
        "![](plain.svg)\n\n![The model](architecture.svg)\n\n"
        "```{architecture} head-1 mlp\nWhat this is about.\n```\n\n"
        "```{architecture} tail-1\n```\n\n```{scorecard}\n```\n"
    )
    (root / "book" / "glossary.md").write_text(
        "# Glossary\n\n```{glossary}\nLogit\n  A number, see {term}`Agent`.\n\nAgent\n  Who acts.\n```\n"
    )
    write_chapter(root)
    (root / "data").mkdir()
    pd.DataFrame(SCORES).to_parquet(root / "data" / "scorecard.parquet")
    warnings = io.StringIO()
    settings = {
        "extensions": ["myst_nb", "running_book", "sphinx_sitemap"],
        "sitemap_url_scheme": "{link}",
        "nb_execution_mode": "off",
        "exclude_patterns": ["book/_executed"],
        "myst_enable_extensions": ["dollarmath"],
        "numfig": True,
        "html_theme": "sphinx_book_theme",
        "html_theme_options": {"use_repository_button": True},
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


def test_addresses_are_those_of_the_project(little_book):
    out = little_book[0]
    page = BeautifulSoup((out / "notebooks/chapter.html").read_text(), "html.parser")
    assert page.select_one("link[rel=canonical]")["href"] == (
        "https://pages.example/little-book/notebooks/chapter.html"
    )
    assert page.select("a[href='https://github.com/owner/little-book']")
    assert "<loc>https://pages.example/little-book/index.html</loc>" in (out / "sitemap.xml").read_text()


@pytest.fixture(scope="module")
def chapter(little_book):
    return BeautifulSoup((little_book[0] / "notebooks" / "chapter.html").read_text(), "html.parser")


@pytest.fixture(scope="module")
def index(little_book):
    return BeautifulSoup((little_book[0] / "index.html").read_text(), "html.parser")


def test_chapter_opens_with_times_and_what_came_before(chapter):
    opening = chapter.select_one("blockquote + p.opening")
    parts = [part.text for part in opening.find_all(["span", "button"], recursive=False)]
    assert parts == ["1 min to read", "3 min to run", "previously: Glossary", "show all code"]
    assert opening.select_one("a")["href"] == "../book/glossary.html"


def test_formulas_are_numbered_in_reading_order(chapter):
    assert [number.text.strip("#¶") for number in chapter.select(".math .eqno")] == ["(1)", "(2)"]
    assert chapter.select_one("p a[href='#equation-eq-named']").text == "(2)"


def test_term_is_defined_once_where_it_is_first_used(chapter):
    terms = chapter.select("a .std-term")
    assert len(terms) == 2
    assert [definition.text for definition in chapter.select(".definition")] == ["A number, see Agent."]
    assert terms[0].find_parent(class_="defined")
    assert not chapter.select(".definition a")


def test_verdict_carries_its_mark(chapter):
    assert chapter.select_one(".pasted-text")["class"] == ["pasted-text", "verdict", "verdict-no"]


def test_drawn_figure_offers_its_data(chapter):
    assert chapter.select_one("figure details.figure-data > summary")


def test_time_to_run_is_said_as_one_says_it():
    assert [chapters.in_words(seconds) for seconds in (4.4, 89, 91, 1500)] == [
        "4 s",
        "89 s",
        "2 min",
        "25 min",
    ]


def test_compute_time_counts_a_stage_once_for_all_its_artifacts():
    def entry(stage, seed, seconds):
        return {"stage": stage, "seeds": [seed], "seconds": seconds}

    training = {f"seed_10/{name}": entry("training", 0, 60.0) for name in ("model", "training.parquet")}
    others = {"seed_11/model": entry("training", 1, 70.0), "seed_10/heads": entry("heads", 0, 60.0)}
    artifacts = training | others | {"replicas.parquet": {"stage": "replicas", "seeds": [0, 1]}}
    assert front.making_time(artifacts) == "made in 3 min of processor time, training included"
    assert front.making_time({"replicas.parquet": artifacts["replicas.parquet"]}) == ""


def test_components_are_picked_out_in_the_margin(little_book, index):
    note = index.select_one("aside.margin.locator")
    assert [group["id"] for group in note.select("g.lit")] == ["architecture-1-head-1", "architecture-1-mlp"]
    assert note.svg["aria-label"] == "The model in small: head 1 and mlp picked out among its components."
    assert note.p.text == "What this is about."
    assert [
        line
        for line in little_book[1]
        if "must name components of the diagram (" in line and "tail-1" in line
    ]


def test_scorecard_has_each_claim_in_its_words_and_leads_to_its_place(index):
    counts = [part.text for part in index.select(".scorecard-counts > span")]
    assert counts == ["1 replicated", "0 mixed", "1 not replicated"]
    assert [group.text for group in index.select(".scorecard-group")] == ["Data", "Circuit"]
    marks = index.select(".scorecard-marks li")
    assert [mark.text.strip() for mark in marks] == [
        "replicated: all classes occur",
        "not replicated: unbiased",
    ]
    assert marks[0].a["href"] == "notebooks/chapter.html#results"
    assert marks[0].a["title"] == "C01: replicated, 9 of 10"
    assert marks[1].a is None
    assert "verdict-no" in marks[1].select_one(".verdict")["class"]


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
    assert "var CircuitsVis" in (static / "circuitsvis.js").read_text()[:200]
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
    assert scope["html_theme_options"]["repository_branch"] == CONFIG["repository"]["branch"]
    assert scope["html_theme_options"]["launch_buttons"] == CONFIG["launch_buttons"]
    assert scope["extensions"] == CONFIG["sphinx"]["config"]["extensions"]
    assert Path(scope["html_static_path"][0]) == ROOT / "book" / "_static"


@pytest.mark.slow
def test_sphinx_alone_builds_the_whole_book(tmp_path):
    copies = {path.name for path in (ROOT / "book" / "_executed").glob("*.ipynb")}
    if not copies >= {path.name for path in NOTEBOOKS}:
        pytest.skip("the notebooks have not been executed: `make book` does it")
    command = [sys.executable, "-m", "sphinx", "-c", "book", "-b", "html", "-W", "--keep-going", "-q", "."]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (tmp_path / "notebooks").glob("*.html")} == {
        path.stem for path in NOTEBOOKS
    }


# On Colab the first cell takes the package from where its reader says, and from nowhere else: tests/test_elsewhere.py.
SETUP = """
if "google.colab" in sys.modules:
    source = os.environ.get("DTBOOK_SOURCE")
    if not source:
        raise RuntimeError(
            "DTBOOK_SOURCE is not set, and this cell installs the book's package only from where you say: "
            "run %env DTBOOK_SOURCE=git+https://github.com/OWNER/REPOSITORY@COMMIT in a cell above it, "
            "with the repository that you opened this notebook from, or anything else that pip installs"
        )
    %pip install --quiet {source}
"""


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
    assert SETUP in "".join(setup["source"])
    assert "parameters" in parameters["metadata"]["tags"]
    for line in filter(None, "".join(parameters["source"]).splitlines()):
        assert re.fullmatch(r"\w+ = .+  # .+", line), line


# What has two ends by nature: returns, shares, timesteps of an episode, numbers of what data/ or a model holds.
TWO_SIDED = re.compile(
    "rtgs?|asked_for|slow_return|bar|timesteps?|last_timestep|late|noise|certified_to|size|"
    "n_obstacles|state|exported|few|every|control_every"
)


def refuses(parameter, value):
    given = [value] if isinstance(parameter.default, list) else value
    said = f"^{parameter.name} must be (at least|from|one of) .*, not |^there is no subject '{value}': give "
    with pytest.raises(ValueError, match=said):
        parameter.accept(given)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_one_may_set_has_limits(path):
    for name, parameter in declared_parameters(path).items():
        value = (*parameter.default, "")[0] if isinstance(parameter.default, list) else parameter.default
        if isinstance(value, str):
            refuses(parameter, "no such thing")
        elif not isinstance(value, bool):
            refuses(parameter, type(value)(-(10**9)))
            if TWO_SIDED.fullmatch(name):
                refuses(parameter, type(value)(10**6))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_looked_at_has_one_name_in_all_chapters(path):
    """One that finds a model, or the tables of some, takes it by `subject`, several by `subjects`."""
    declared = declared_parameters(path)
    defaults = {"subject": "seed_10", "subjects": []}
    taken = {name: declared[name].default for name in defaults if name in declared}
    assert taken.items() <= defaults.items()
    assert bool(taken) == ("Subject.find" in python_of(path))
    for name in taken:
        shipped = [f"seed_{seed}" for seed in BOOK_SEEDS]
        assert declared[name].accept(shipped if name == "subjects" else "post")
        refuses(declared[name], f"seed_{TUNING}")
