"""A notebook as others run it: Colab, plain papermill, JupyterLab, nbmake; the same outputs under each runner."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import nbformat
import papermill
import pytest
from nbmake.nb_run import NotebookRun
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_post_chapters import CHAPTERS, assert_shown_as_shipped, without  # noqa: F401 -- a fixture

from dtbook.pages.notebooks import run_notebook, small_parameters

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOK = ROOT / "notebooks/11_encodings.ipynb"
COLAB = (
    "import sys, types\nfor name in ('google', 'google.colab'): sys.modules[name] = types.ModuleType(name)\n"
)


def clean_environment(home):
    """The environment without a trace of this checkout, and with a home of its own."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DTBOOK_DATA_URL")
    }
    homes = ("HOME", "XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")
    return kept | dict.fromkeys(homes, str(home)) | {"TQDM_DISABLE": "1"}


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with nothing but the notebook's file."""
    folder = tmp_path / "my drive"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    return folder


def distributions(names):
    """Names of the installed distributions that these need, themselves included; extras aside."""
    found, queue = set(), [canonicalize_name(name) for name in names]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        with suppress(
            importlib.metadata.PackageNotFoundError
        ):  # CUDA's, which torch asks for in its other builds
            lines = importlib.metadata.requires(name) or []
            wanted = [
                r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})
            ]
            queue += [canonicalize_name(requirement.name) for requirement in wanted]
            found.add(name)
    return found


@pytest.fixture
def colab_python(tmp_path):
    """A clean environment that has pip and the libraries that the package asks for, but not the package itself.

    They are linked from this environment. What only the book's build and the tests need is not there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [Requirement(line).name for line in project["project"]["dependencies"]]
    builder = [Requirement(line).name for line in project["build-system"]["requires"]]
    for name in distributions([*asked, *builder, "pip"]):
        files = importlib.metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(sysconfig.get_path("purelib"), top))
    return python


@pytest.fixture
def source(tmp_path):
    """A copy of what a clone of the repository holds, to install from: building leaves traces in it."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("dtbook", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


def test_a_wheel_holds_every_room_and_each_module_can_be_imported(source, tmp_path):
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    files = [
        path for path in (ROOT / "dtbook").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    packed = {
        path.relative_to(tmp_path / "unpacked").as_posix() for path in tmp_path.glob("unpacked/dtbook/**/*.*")
    }
    assert packed == {path.relative_to(ROOT).as_posix() for path in files} | {"dtbook/data/manifest.json"}
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.suffix == ".py"
    ]
    code = f"""import dtbook, importlib
for name in {modules}: importlib.import_module(name.removesuffix(".__init__"))
print(dtbook.__file__)"""
    environment = clean_environment(tmp_path / "home") | {"PYTHONPATH": str(tmp_path / "unpacked")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_on_colab_a_notebook_s_file_alone_runs_to_the_end(elsewhere, colab_python, source, tmp_path):
    startup = tmp_path / "home/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00-colab.py").write_text(COLAB)
    environment = (
        clean_environment(tmp_path / "home")
        | {
            "DTBOOK_SOURCE": str(source),
            "PIP_NO_INDEX": "1",  # Colab's libraries are there; what pip would fetch beyond them is in this environment
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's own way to say yes
        }
    )
    there = [colab_python, "-c", "import dtbook"]
    assert subprocess.run(there, env=environment, cwd=elsewhere, capture_output=True).returncode == 1
    parameters = [x for name, value in small_parameters(NOTEBOOK).items() for x in ("-p", name, str(value))]
    command = [colab_python, "-m", "papermill", NOTEBOOK.name, "out.ipynb", *parameters]
    result = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = subprocess.run(
        [colab_python, "-c", "import dtbook; print(dtbook.__file__)"],
        env=environment,
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "venv")
    fetched = [path.name for path in (tmp_path / "home").rglob("seed_10/model/*")]
    assert "model.safetensors" in fetched
    assert sorted(path.name for path in elsewhere.iterdir()) == [NOTEBOOK.name, "out.ipynb"]


def test_on_colab_nothing_is_installed_unasked(elsewhere, tmp_path):
    cells = nbformat.read(elsewhere / NOTEBOOK.name, as_version=4).cells
    setup = next(cell.source for cell in cells if cell.cell_type == "code")
    environment = clean_environment(tmp_path / "home") | {"PIP_LOG": str(tmp_path / "pip.log")}
    environment.pop("DTBOOK_SOURCE", None)
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", COLAB + setup]
    result = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 1
    assert "RuntimeError: DTBOOK_SOURCE is not set" in result.stdout + result.stderr
    assert not (tmp_path / "pip.log").exists()


def test_plain_papermill_runs_a_chapter_from_any_folder(elsewhere):
    papermill.execute_notebook(
        elsewhere / NOTEBOOK.name,
        elsewhere / "out.ipynb",
        small_parameters(NOTEBOOK),
        cwd=elsewhere,
        progress_bar=False,
    )
    executed = nbformat.read(elsewhere / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


def test_lab_opens_on_the_notebooks(tmp_path):
    """What `make lab` does, without the browser that it opens."""
    target = subprocess.run(
        ["make", "-n", "--no-print-directory", "lab"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert target.splitlines()[-1] == '".venv/bin/jupyter" lab notebooks'
    jupyter = Path(sys.executable).with_name("jupyter")
    command = [jupyter, "lab", "notebooks", "--no-browser", "--allow-root", "--port=0"]
    with subprocess.Popen(command, cwd=ROOT, env=clean_environment(tmp_path)) as server:
        try:
            while not any("}" in path.read_text() for path in tmp_path.glob("jpserver-*.json")):
                assert server.poll() is None
                time.sleep(0.05)
            said = json.loads(next(tmp_path.glob("jpserver-*.json")).read_text())

            def ask(path):
                with urlopen(f"{said['url']}{path}?token={said['token']}") as answer:
                    return answer.read()

            listed = {file["name"] for file in json.loads(ask("api/contents"))["content"]}
            assert listed >= {path.name for path in NOTEBOOKS}
            kernel = json.loads(ask("api/kernelspecs"))["kernelspecs"]["python3"]
            assert kernel["spec"]["argv"][0] in ("python", sys.executable)
            assert b"JupyterLab" in ask("lab")
        finally:
            server.terminate()


def outputs(notebook):
    """What the cells of a chapter put out, stderr aside; text that came in pieces is put together."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []):
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            texts = [output for output in kept if output.output_type == "stream"]
            others = [output for output in kept if output.output_type != "stream"]
            plain = [
                {**output, "execution_count": None} for output in others
            ]  # one counts the cell of parameters
            found.append(("".join(output.text for output in texts), plain))
    return found


def state_of_the_checkout():
    folders = [ROOT / name for name in ("data", "notebooks", "book")]
    files = [path for folder in folders for path in folder.rglob("*") if "_build" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


TWICE = ("03_training", "06_ablations", "13_play")
"""They train, measure and play, and are run by both runners here; `make reproduce` runs every chapter twice."""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_runs_puts_out_the_same_and_touches_nothing_else(notebook, tmp_path, request):
    """By nbmake, with its assertions; some again by the book's runner. Both take the chapter's small parameters.

    Those that show the post's weights do without them, and every number of the post's is the shipped one.
    """
    if notebook.stem in CHAPTERS:
        request.getfixturevalue("without")
    before = state_of_the_checkout()
    once = NotebookRun(notebook, default_timeout=300).execute()
    assert once.error is None, once.error.trace
    if notebook.stem in TWICE:
        run_notebook(notebook, tmp_path / notebook.name, small_parameters(notebook), "inputs")
        again = nbformat.read(tmp_path / notebook.name, as_version=4)
        for first, second in zip(outputs(once.nb), outputs(again), strict=True):
            assert first == second
    assert state_of_the_checkout() == before
    if notebook.stem in CHAPTERS:
        assert_shown_as_shipped(once.nb, notebook.stem)
