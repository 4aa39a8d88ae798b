"""What makes what: the table that `dtbook stages` prints, and the book's page, against `data/` and the chapters."""

import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from click.testing import CliRunner
from sphinx.application import Sphinx

from dtbook import cli
from dtbook.artifacts.store import ArtifactStore
from dtbook.pipeline.listing import listing

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "book" / "_ext"))


@pytest.fixture(scope="module")
def rows():
    return listing(ROOT / "notebooks").set_index("artifact")


def each(part):
    """The subjects that "seed_10 … seed_19" or "post" stands for."""
    recipe, seeds = part.partition("seed_")[0], [int(seed) for seed in re.findall(r"seed_(\d+)", part)]
    return [f"{recipe}seed_{seed}" for seed in range(seeds[0], seeds[-1] + 1)] if seeds else [part]


def test_every_artifact_of_data_is_in_the_table(rows):
    found = set()
    for name, of in rows["of"].items():
        if name.startswith("SUBJECT/") and of != "not in data/":
            found |= {name.replace("SUBJECT", subject) for part in of.split(", ") for subject in each(part)}
        elif name == "controls/shuffled_N":
            found |= set(of.split(", "))
        elif of != "not in data/":
            found |= {name, *(f"{recipe}/{name}" for recipe in of.split(", ") if recipe)}
    assert found - {"SUBJECT/checkpoints.safetensors", "SUBJECT/trained", "own/model"} == set(
        ArtifactStore().entries()
    )


def test_what_chapters_read_by_its_name_is_said_to_be_theirs(rows):
    """The names that stand whole in a chapter's code, or after its folder, found by an expression of the test's own."""
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        number = str(int(path.stem[:2]))
        for folder, file in re.findall(r'\.path\(f?"(?:([^"/]+)/)?([\w.]+)"\)', code):
            named = f"{folder}/{file}" if folder else file
            name = named if named in rows.index else f"SUBJECT/{file}"
            assert number in rows["chapters"][name].split(", "), (path.stem, name)


@pytest.mark.parametrize(
    ("artifact", "command", "chapters"),
    [
        ("SUBJECT/turns.parquet", "dtbook reproduce", "5"),
        ("SUBJECT/units.parquet", "dtbook causes", "9"),
        ("SUBJECT/program_rows.parquet", "dtbook causes", "15"),
        ("experiments/size.parquet", "dtbook experiments", "12"),
        ("SUBJECT/trained", "dtbook reproduce", ""),
        ("scorecard.csv", "dtbook reproduce", ""),
    ],
)
def test_rows_known_by_hand(rows, artifact, command, chapters):
    assert rows.loc[artifact, ["command", "chapters"]].tolist() == [command, chapters]


def test_the_command_prints_it(rows):
    result = CliRunner().invoke(cli.main, ["stages"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == len(rows) + 1
    assert re.search(
        r"^ *SUBJECT/situations.parquet +seed_10, post +situations +dtbook reproduce ", result.output, re.M
    )


def test_the_page_has_a_row_for_each_figure_and_each_file(tmp_path, rows):
    figure = nbformat.v4.new_code_cell('read(store.path(f"{folder}/program.parquet"))', id="figure")
    figure.metadata["mystnb"] = {"figure": {"caption": "What it shows", "name": "fig-one"}}
    figure.outputs = [nbformat.v4.new_output("display_data", {"text/html": "<p>drawn</p>"})]
    chapter = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A question?", id="t"), figure])
    chapter.metadata["language_info"] = {"name": "python", "pygments_lexer": "python3"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(chapter, tmp_path / "notebooks/07_chapter.ipynb")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(ArtifactStore().manifest.read_text())
    page = "# Page\n\n```{artifacts} figures\n```\n\n```{artifacts} files\n```\n"
    (tmp_path / "index.md").write_text(f"{page}\n```{{toctree}}\nnotebooks/07_chapter\n```\n")
    settings = {"extensions": ["myst_nb", "artifacts"], "nb_execution_mode": "off", "numfig": True}
    warnings = io.StringIO()
    arguments = (tmp_path, None, tmp_path / "out", tmp_path / "doctrees", "html", settings)
    Sphinx(*arguments, status=None, warning=warnings).build()
    said = [line for line in warnings.getvalue().splitlines() if "is already registered" not in line]
    assert said == [], "but of another build's extensions in this process"
    html = BeautifulSoup((tmp_path / "out/index.html").read_text(), "html.parser")
    figures, files = html.select("table")
    cells = [cell.text for cell in figures.select("tbody td")]
    assert cells == ["Fig. 1", "dtbook run 7", "SUBJECT/program.parquet", "dtbook causes"]
    assert figures.select_one("tbody a")["href"] == "notebooks/07_chapter.html#fig-one"
    assert [row.td.text for row in files.select("tbody tr")] == list(rows.index)
