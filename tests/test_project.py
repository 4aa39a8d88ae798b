"""The files around the package agree: pins, environments, licence, citation, workflows, words, notebooks."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from dtbook.artifacts import ArtifactStore
from dtbook.artifacts.provenance import imported_names
from dtbook.pages.notebooks import declared_parameters

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = PROJECT["urls"]["Repository"]
SAYING_THE_ADDRESS = {
    "CITATION.cff": r"^repository-code: (.+)",
    "book/intro.md": r"\[repository\]\((.+?)\)|^  url += \{(.+?)\}",
    "book/open_problems.md": r"\[repository\]\((.+?)\)",
}


def requirements(*extras):
    lines = PROJECT["dependencies"] + [
        line for name in extras for line in PROJECT["optional-dependencies"][name]
    ]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}


# Dependencies


def test_every_requirement_is_pinned_within_its_range():
    for requirement in requirements("book", "lab", "minari", "test"):
        pin = pins()[canonicalize_name(requirement.name)].specifier
        version = re.fullmatch(r"==([^+*]+)", str(pin))
        assert version, f"{requirement.name}{pin} is not an exact version without a build's label"
        assert requirement.specifier.contains(version[1]), f"{requirement} is pinned{pin}"


def needed(name, extras, found):
    """Collect the distributions that `name` needs, on this machine, torch's own builds of CUDA aside."""
    found.setdefault(name, set())
    if extras <= found[name] and found[name]:
        return found
    found[name] |= extras | {""}
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        environments = [default_environment() | {"extra": extra} for extra in found[name]]
        wanted = requirement.marker is None or any(map(requirement.marker.evaluate, environments))
        if wanted and not requirement.name.startswith(("cuda-", "nvidia-", "triton")):
            needed(canonicalize_name(requirement.name), requirement.extras, found)
    return found


def test_everything_installed_for_the_book_is_pinned():
    packages = needed("dtbook", {"book", "lab", "test"}, {}).keys() - {"dtbook"}
    assert len(packages) > len(requirements("book", "lab", "test")), "what the requirements need in turn"
    assert packages - pins().keys() == set()


@cache
def names_in(file):
    """The dotted names that a module of the package imports."""
    return imported_names(file.read_text()) if file.is_file() else set()


def names_behind(names):
    """The dotted names that every module of the package imports which importing `names` runs."""
    queue, files = list(names), {}
    while queue:
        parts = queue.pop().split(".")
        for at in (ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1) if parts[0] == "dtbook"):
            for file in {at / "__init__.py", at.with_suffix(".py")} - files.keys():
                files[file] = names_in(file)
                queue += files[file]
    return set().union(*files.values())


@pytest.fixture(scope="module")
def installed():
    """What the package's own dependencies bring with them."""
    found = {}
    for requirement in requirements():
        needed(canonicalize_name(requirement.name), requirement.extras, found)
    return found


@pytest.fixture(scope="module")
def providers():
    """The distributions of each importable name."""
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_needs_the_package_s_own_dependencies_alone(path, installed, providers):
    """As on Colab, where its first cell installs the package without extras."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = imported_names("\n".join(TransformerManager().transform_cell(cell) for cell in cells))
    names |= names_behind(names)
    modules = {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "dtbook"}
    extra = {m for m in modules if not {canonicalize_name(d) for d in providers.get(m, [m])} & set(installed)}
    assert extra <= {"minari", "distributed"}, "which are looked for where they are used"


def test_the_conda_environment_asks_for_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    python, *conda, pip = environment["dependencies"]
    version = re.fullmatch(r"python=(3\.\d+)", python)  # as repo2docker reads it
    assert version[1] in SpecifierSet(PROJECT["requires-python"])
    asked = {requirement.name: requirement.specifier for requirement in map(Requirement, conda)}
    torch = next(requirement for requirement in requirements() if requirement.name == "torch")
    assert asked.pop("pytorch-cpu") == torch.specifier
    lab = requirements("lab")[-1]
    assert asked == {"pip": SpecifierSet(), lab.name: lab.specifier}
    assert pip == {"pip": ["-e ."]}, "all else is asked for by pyproject.toml alone"


def test_the_hooks_have_the_pinned_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {
        repository["repo"].split("/")[-1]: repository["rev"].removeprefix("v") for repository in hooks
    }
    pinned = {name: str(pins()[name].specifier).removeprefix("==") for name in ("ruff", "nbstripout")}
    assert versions == {"ruff-pre-commit": pinned["ruff"], "nbstripout": pinned["nbstripout"]}


# Continuous integration


def test_ci_runs_make_test_on_every_python_offered():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if "make test" in line and not line.startswith("#")] == [
        "env -u DTBOOK_POST_MODEL DTBOOK_POST_URL=http://127.0.0.1:9/closed.pt make test"
    ]
    assert lines[-1] == 'DTBOOK_POST_MODEL="$model" .venv/bin/python -m pytest -m post_weights'
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    offered = SpecifierSet(PROJECT["requires-python"])
    assert jobs["tests"]["strategy"]["matrix"]["python"] == [
        f"3.{n}" for n in range(30) if f"3.{n}" in offered
    ]


def test_what_is_published_has_been_tested():
    jobs = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())["jobs"]
    steps = jobs["build"]["steps"]
    tested = next(i for i, step in enumerate(steps) if step.get("run") == ".ci/run")
    uploaded = next(i for i, step in enumerate(steps) if "upload-pages-artifact" in step.get("uses", ""))
    assert tested < uploaded
    assert steps[uploaded]["with"]["path"] == "book/_build/html"
    assert jobs["deploy"]["needs"] == "build"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda path: path.name)
def test_actions_are_pinned_by_major_version(path):
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    actions = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert actions
    assert [action for action in actions if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []


def run_in_ci(folder, test, ci="true", **variables):
    """pytest on one test that is kept by this project's conftest."""
    shutil.copy(ROOT / "tests/conftest.py", folder)
    (folder / "test_it.py").write_text(f"import pytest\n{test}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder]
    variables |= {"CI": ci, "XDG_CACHE_HOME": str(folder)}  # where nothing was fetched
    variables |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
    }  # none has a part in it, and nbmake imports half of Jupyter
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


NEEDS_WEIGHTS = "@pytest.mark.post_weights\ndef test_it():\n    pytest.skip('no browser')"


@pytest.mark.slow
def test_in_ci_a_test_is_skipped_only_for_want_of_the_posts_weights(tmp_path):
    without = run_in_ci(tmp_path, NEEDS_WEIGHTS, DTBOOK_POST_MODEL="")
    assert (without.returncode, "1 skipped" in without.stdout) == (0, True), without.stdout
    (tmp_path / "post.pt").touch()
    copy = run_in_ci(tmp_path, NEEDS_WEIGHTS, DTBOOK_POST_MODEL=str(tmp_path / "post.pt"))
    assert "skipped, which CI does not allow: Skipped: no browser" in copy.stdout
    gone = run_in_ci(tmp_path, NEEDS_WEIGHTS, DTBOOK_POST_MODEL="gone.pt")
    assert "DTBOOK_POST_MODEL is 'gone.pt', but there is no file" in gone.stderr
    assert gone.returncode == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    "skip", ["def test_it():\n    pytest.skip('no browser')", "pytest.importorskip('no_browser')"]
)
@pytest.mark.slow
def test_a_skip_fails_in_ci_and_nowhere_else(tmp_path, skip):
    def run(ci):
        return run_in_ci(tmp_path, skip, ci)

    in_ci = run("true")
    assert in_ci.returncode not in (0, 5), in_ci.stdout
    assert re.search("skipped, which CI does not allow: .*no.browser", in_ci.stdout)
    assert " skipped" in run("").stdout.splitlines()[-1]


# Words about the project


def test_the_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys(), "what the format asks for"
    assert citation["version"] == PROJECT["version"] == importlib.metadata.version("dtbook")
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["references"][0]["url"] == PROJECT["urls"]["The post"]


@pytest.mark.parametrize("name", SAYING_THE_ADDRESS)
def test_the_words_say_the_project_s_address(name):
    said = re.findall(SAYING_THE_ADDRESS[name], (ROOT / name).read_text(), flags=re.MULTILINE)
    said = {"".join(groups) for groups in said}
    assert said == {REPOSITORY}, f"{name} must say the Repository of pyproject.toml"


def test_nothing_else_says_the_project_s_address():
    """What needs it takes it from pyproject.toml."""
    command = ["git", "grep", "--files-with-matches", "--fixed-strings"]
    addresses = [part for url in (REPOSITORY, PROJECT["urls"]["Book"]) for part in ("-e", url.rstrip("/"))]
    found = subprocess.run([*command, *addresses], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {*found.stdout.splitlines()} == {"pyproject.toml", *SAYING_THE_ADDRESS}


def test_the_licence_names_the_authors():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith(f"{PROJECT['license']} License\n")
    assert PROJECT["authors"][0]["name"] in licence


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_paths_and_targets_in_the_words_exist(name):
    text = (ROOT / name).read_text()
    targets = re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    made = ("book/_build", ".venv", "runs")
    paths = [path for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if not path.startswith(made)]
    assert [path for path in paths if "NN_" not in path and not (ROOT / path).exists()] == []
    links = re.findall(r"\]\((?!https:)([^)]+)\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert re.findall(r"^make ([a-z]+)", listed, flags=re.MULTILINE) == targets


# The package and the notebooks


def test_data_flows_one_way():
    contract = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert contract.returncode == 0, contract.stdout
    rooms = {path.stem for path in (ROOT / "dtbook").iterdir() if not path.name.startswith(("_", "."))}
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    named = [room for layer in layers for room in re.findall(r"\w+", layer)]
    assert sorted(named) == sorted(rooms), "every room has its floor"
    words = (ROOT / "CONTRIBUTING.md").read_text()
    house = words[words.index("| room |") : words.index("Where does my change go?")]
    drawn = [room for row in house.splitlines() for room in re.findall(r"`(\w+)`", row[: row.find("|", 1)])]
    assert sorted(drawn, key=named.index) == drawn, "from top to bottom, as the contract has them"
    assert sorted(drawn) == sorted(rooms), "the map has every room"


def test_the_artifacts_are_small_enough_for_git():
    sizes = [path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()]
    assert max(sizes, default=0) <= 10e6
    assert sum(sizes) <= 60e6


def test_a_clone_with_windows_line_endings_is_the_same(tmp_path):
    clone = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", ROOT, tmp_path / "clone"]
    subprocess.run(clone, check=True)
    assert ArtifactStore(tmp_path / "clone/data").verify() == []
    listed = ["git", "-C", tmp_path / "clone", "ls-files", "--eol"]
    endings = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[1] for line in endings} == {"w/lf", "w/-text"}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_and_its_parameters_are_plain(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5), "cells have ids, so two runs have the same"
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count is not None] == []
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    declared = declared_parameters(path)
    assert all(parameter.meaning for parameter in declared.values()), (
        "each has a unit and a meaning in its comment"
    )
    for parameter in declared.values():
        assert parameter.accept(parameter.default) == parameter.default, "within its own limits"
    mocked = tagged[0].metadata.get("nbmake", {}).get("mock", {})
    assert mocked.keys() <= declared.keys()
    assert {name: declared[name].accept(value) for name, value in mocked.items()} == mocked


def public_names(path):
    """The functions, classes and constants that a module defines, those that begin with an underscore aside."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            bound = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
            names = [node.id for node in bound]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_is_defined_in_two_modules():
    package, where = ROOT / "dtbook", defaultdict(set)
    for path in package.rglob("*.py"):
        module = path.relative_to(package).with_suffix("")
        for name in public_names(path):
            where[name].add(str(module))
    assert len(where) > 400
    twice = {name: sorted(modules) for name, modules in where.items() if len(modules) > 1}
    assert twice == {}
