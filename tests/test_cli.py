"""The `dtbook` command on a small book of its own: what it runs, refuses, and leaves after a failure."""

import json
import os
import re
import shutil
import socket
import sys
import threading
from contextlib import contextmanager, suppress

import nbformat
import pytest
from click.testing import CliRunner

from dtbook import cli
from dtbook.artifacts import ArtifactStore, describe, post_weights, provenance
from dtbook.pages.notebooks import (
    KERNEL_ENVIRONMENT,
    Parameter,
    inputs_digest,
    notebook_digest,
    read_notebook,
    run_notebook,
)

PARAMETERS = """episodes = 3  # episodes, at least 1
temperature = 1.0  # of the softmax
title = "curve"
greedy = False  # act by argmax
rtgs = [0.0, 0.5]  # asked returns"""


def write_notebook(path, *cells, parameters=None):
    nodes = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(cells)]
    if parameters:
        nodes.insert(
            0, nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]})
        )
    notebook = nbformat.v4.new_notebook(cells=nodes)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


def changed(**parts):
    """A change of a notebook's text that puts these in the place of its parts."""
    return lambda good: json.dumps(json.loads(good) | parts)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "my böok"
    (folder / "book").mkdir(parents=True)
    write_notebook(folder / "notebooks/01_task.ipynb", "print(episodes * temperature)", parameters=PARAMETERS)
    monkeypatch.setattr(cli, "CHECKOUT", folder)
    monkeypatch.setattr("dtbook.artifacts.store.CHECKOUT", folder)
    (folder / "pyproject.toml").touch()
    return folder


def dtbook(*arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def executed(checkout, name="01_task", folder="book/_executed"):
    return nbformat.read(checkout / folder / f"{name}.ipynb", as_version=4)


def copies(checkout):
    """Names of the executed copies; what is beside them is not looked at."""
    return sorted(path.name for path in (checkout / "book/_executed").glob("*.ipynb"))


def printed(notebook):
    return [output.get("text") for cell in notebook.cells for output in cell.get("outputs", [])]


# Running


@pytest.mark.slow
def test_notebooks_run_in_order_with_a_line_each_and_then_are_up_to_date(checkout):
    write_notebook(checkout / "notebooks/10_late.ipynb", "1 + 1")
    write_notebook(checkout / "notebooks/02_middle.ipynb", "2 + 2")
    first = dtbook("run")
    assert first.exit_code == 0, first.output
    lines = first.output.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["[1/3] 01_task", "[2/3] 02_middle", "[3/3] 10_late"]
    assert all(": done in " in line for line in lines[:3])

    assert dtbook("run").output.count("up to date") == 3
    write_notebook(checkout / "notebooks/02_middle.ipynb", "2 + 3")
    assert [line.partition(": ")[2][:4] for line in dtbook("run").output.splitlines()[:3]] == [
        "up t",
        "done",
        "up t",
    ]


def test_a_bar_counts_the_cells(checkout, capfd):
    notebook = checkout / "notebooks/01_task.ipynb"
    write_notebook(notebook, "1", "2", "3")
    run_notebook(notebook, checkout / "copy.ipynb", {}, "inputs", progress="[1/1] 01_task")
    shown = capfd.readouterr().err
    assert "[1/1] 01_task" in shown
    assert "0/3" in shown
    assert "1/3" in shown


def test_an_executed_copy_is_the_source_with_its_outputs_and_the_digest(checkout):
    dtbook("run", "1")
    source = nbformat.read(checkout / "notebooks/01_task.ipynb", as_version=4)
    copy = executed(checkout)
    assert printed(copy) == ["3.0\n"]
    assert copy.metadata["dtbook"]["digest"] == notebook_digest(source) == notebook_digest(copy)
    assert [cell.id for cell in copy.cells] == [cell.id for cell in source.cells]
    assert copies(checkout) == ["01_task.ipynb"]


def test_two_runs_write_the_same_bytes(checkout):
    cells = ["import sys; print('a'); print('e', file=sys.stderr)", "print('b', flush=True); print('c')"]
    write_notebook(checkout / "notebooks/01_task.ipynb", *cells, parameters=PARAMETERS)
    copies = []
    for _ in range(2):
        dtbook("run", "01", "-p", "episodes=5")
        copies.append((checkout / "runs/01_task.ipynb").read_bytes())
        shutil.rmtree(checkout / "runs")
    assert copies[0] == copies[1]


@pytest.mark.slow
def test_what_is_run_again_is_compared_with_the_books_copies(checkout):
    write_notebook(checkout / "notebooks/02_time.ipynb", "import time; time.time_ns()")
    early = dtbook("run", "--again")
    assert early.exit_code == 1
    assert "the book's copies of 01_task, 02_time are not current: first `dtbook run`" in early.output
    dtbook("run", "--workers", "1")
    before = (checkout / "book/_executed/02_time.ipynb").read_bytes()
    result = dtbook("run", "--again", "--workers", "1")
    assert result.output.splitlines()[:2] == ["[1/2] 01_task: identical", "[2/2] 02_time: differs"]
    assert result.exit_code == 1
    assert "run again, 02_time came out otherwise" in result.output
    assert (checkout / "book/_executed/02_time.ipynb").read_bytes() == before
    assert dtbook("run", "--again", "-p", "episodes=2").exit_code == 2


def test_the_kernel_is_this_python_with_one_thread_and_no_progress_bars(checkout, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "another", "language": "python"}))
    for variable in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    for variable in KERNEL_ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    show = "import os, sys; print(sys.executable, *map(os.getenv, ['OMP_NUM_THREADS', 'NUMBA_NUM_THREADS']))"
    bar = "from tqdm import tqdm\nfor _ in tqdm(range(3)): pass"
    write_notebook(checkout / "notebooks/01_task.ipynb", show, bar, "import os; print(os.getcwd())")
    assert dtbook("run").exit_code == 0
    assert printed(executed(checkout)) == [f"{sys.executable} 1 1\n", f"{checkout / 'notebooks'}\n"]


def test_a_damaged_copy_is_made_again(checkout):
    dtbook("run")
    copy = checkout / "book/_executed/01_task.ipynb"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:100])
    assert "done in" in dtbook("run").output
    assert copy.read_bytes() == whole


def test_inputs_are_cells_parameters_code_and_artifacts(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "rollout.py").write_text("import numpy\n\ndef rollout():\n    return numpy.ones(1)")
    (tmp_path / "ppo.py").write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    path = tmp_path / "notebooks/04_calibration.ipynb"
    store = ArtifactStore(tmp_path / "data")

    def digests_after(change):
        change()
        return inputs_digest(path, {"episodes": 1}, store)

    def write_artifact():
        with store.write("a", stage="test", code=[]) as draft:
            draft.write_text("a")

    write_notebook(path, "%time 1", "from dtbook.rollout import rollout")
    before = digests_after(lambda: None)
    assert digests_after(lambda: (tmp_path / "ppo.py").write_text("f(1)")) == before, "code it does not use"
    assert inputs_digest(path, {"episodes": 2}, store) != before
    changes = [
        lambda: write_notebook(path, "%time 2", "from dtbook.rollout import rollout"),
        lambda: (tmp_path / "rollout.py").write_text(
            "import scipy\n\ndef rollout():\n    return scipy.ones(1)"
        ),
        write_artifact,
    ]
    assert len({before, *map(digests_after, changes)}) == 4


ASK = """from dtbook.artifacts import describe
from dtbook.artifacts.post_weights import NONE, NoPostWeights, fetch_post_checkpoint, note
try:
    found = fetch_post_checkpoint()
    note(describe(found)["sha256"])
    print(found.read_text(), found)
except NoPostWeights as error:
    note(NONE, str(error))
    print("without")"""


@pytest.fixture
def post(checkout, tmp_path, monkeypatch):
    """Chapters, of which the second and third ask for the post's weights; where a copy will lie."""
    write_notebook(checkout / "notebooks/02_asks.ipynb", ASK)
    write_notebook(checkout / "notebooks/03_asks.ipynb", ASK)
    monkeypatch.delenv(post_weights.COPY, raising=False)
    monkeypatch.setenv(post_weights.REFUSED, "")
    monkeypatch.delenv(post_weights.REFUSED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "post.pt"


def outcomes():
    """What `dtbook run`, as a new process, did with each of the three."""
    os.environ.pop(post_weights.REFUSED, None)
    return [line.partition(": ")[2][:4] for line in dtbook("run").output.splitlines()[:3]]


@pytest.mark.slow
def test_a_copy_is_stale_when_the_weights_that_its_kernel_would_read_are_others(post, checkout, monkeypatch):
    with listening(monkeypatch) as attempts:
        assert outcomes() == ["done", "done", "done"]
        assert len(attempts) == 1, "made in a kernel; the next is told"
        assert printed(executed(checkout, "03_asks")) == ["without\n"]
        assert outcomes() == ["up t", "up t", "up t"]
        assert len(attempts) == 2
        post.write_text("weights")
        monkeypatch.setenv(post_weights.COPY, str(post))
        assert outcomes() == ["up t", "done", "done"]
        assert executed(checkout, "02_asks").metadata["dtbook"]["post_weights"] == describe(post)["sha256"]
        assert "post_weights" not in executed(checkout).metadata["dtbook"]
        assert outcomes() == ["up t", "up t", "up t"]
        monkeypatch.delenv(post_weights.COPY)
        assert outcomes() == ["up t", "done", "done"]
        assert len(attempts) == 3


@contextmanager
def listening(monkeypatch):
    """An address of the weights where every connection is counted and closed."""
    attempts = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close_each():
            with suppress(OSError):
                while True:
                    connection, address = server.accept()
                    attempts.append(address)
                    connection.close()

        threading.Thread(target=close_each, daemon=True).start()
        monkeypatch.setenv(post_weights.MIRROR, f"http://127.0.0.1:{server.getsockname()[1]}/model.pt")
        yield attempts
        server.shutdown(socket.SHUT_RDWR)


def test_a_copy_that_is_not_there_is_refused_before_anything_runs(post, checkout, monkeypatch):
    monkeypatch.setenv(post_weights.COPY, str(post))
    result = dtbook("run")
    assert (result.exit_code, result.output.splitlines()) == (
        1,
        [
            f"Error: DTBOOK_POST_MODEL is {str(post)!r}, but there is no file {post}: name a copy, or unset it."
        ],
    )
    assert not (checkout / "book/_executed").exists()


def test_paths_count_from_the_callers_folder(post, checkout, monkeypatch):
    """The kernel runs in the folder of the notebooks."""
    (post.parent / "caller").mkdir()
    monkeypatch.chdir(post.parent / "caller")
    monkeypatch.setenv("HOME", str(post.parent))
    post.write_text("weights")
    monkeypatch.setenv(post_weights.COPY, "../post.pt")
    parameters = 'sweep = ""  # folder of a sweep; empty: none\ntitle = ""  # of the folder'
    write_notebook(checkout / "notebooks/02_asks.ipynb", ASK, "print(sweep, title)", parameters=parameters)
    for given, there in (
        ("../mine", post.parent / "caller/../mine"),
        ("~/mine", post.parent / "mine"),
        ("", ""),
    ):
        assert dtbook("run", "2", "-p", f"sweep={given}", "-p", "title=../a").exit_code == 0
        weights, paths = printed(executed(checkout, "02_asks", "runs"))
        assert weights.startswith("weights /")
        assert paths == f"{there} ../a\n"


def test_a_subject_is_a_name_or_a_path_from_the_callers_folder_and_a_wrong_one_is_refused(
    checkout, tmp_path, monkeypatch
):
    (tmp_path / "caller/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "caller")
    parameters = 'subject = "seed_10"  # subject looked at\nsubjects = ["seed_10"]  # subjects compared'
    write_notebook(checkout / "notebooks/02_asks.ipynb", "print(subject, subjects)", parameters=parameters)
    for given, there in (("post", "post"), ("mine", tmp_path / "caller/mine")):
        both = dtbook("run", "2", "-p", f"subject={given}", "-p", f'subjects=["post", "{given}"]')
        assert both.exit_code == 0, both.output
        assert printed(executed(checkout, "02_asks", "runs")) == [f"{there} ['post', '{there}']\n"]
    said = [dtbook("run", "2", "-p", "subject=mine").output for _ in range(2)]
    assert ["up to date" in each for each in said] == [False, True]
    (tmp_path / "caller/mine/config.json").write_text("another model")
    assert "done in" in dtbook("run", "2", "-p", "subject=mine").output
    (checkout / "runs/02_asks.ipynb").unlink()
    for wrong in ("subject=seed_77", 'subjects=["post", "seed_77"]'):
        said = dtbook("run", "2", "-p", wrong).output
        assert re.fullmatch(
            r"Error: 02_asks: there is no subject 'seed_77': give post, or a model's folder\n", said
        )
    assert not (checkout / "runs/02_asks.ipynb").exists()


def test_a_digest_ignores_what_running_a_notebook_leaves():
    cell = {"cell_type": "code", "source": "1 + 1", "metadata": {}}
    run = cell | {
        "outputs": [{"output_type": "stream"}],
        "execution_count": 1,
        "id": "x",
        "source": ["1 +", " 1"],
    }
    digest = notebook_digest({"cells": [cell]})
    assert digest == notebook_digest({"cells": [run]})
    for change in ({"source": "1 + 2"}, {"cell_type": "markdown"}, {"metadata": {"tags": ["hide-input"]}}):
        assert notebook_digest({"cells": [cell | change]}) != digest


# Parameters


def test_parameters_reach_the_notebook_but_not_the_book(checkout):
    assert dtbook("run", "1", "-p", "episodes=7", "-p", "temperature=2").exit_code == 0
    assert printed(executed(checkout, folder="runs")) == ["14.0\n"]
    assert not (checkout / "book/_executed").exists()
    assert "up to date" in dtbook("run", "1", "-p", "episodes=7", "-p", "temperature=2").output
    assert "done in" in dtbook("run", "1", "-p", "episodes=8").output


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "episode=3",
            "01_task has no parameter 'episode': it declares episodes, temperature, title, greedy, rtgs",
        ),
        ("episodes=2.5", "01_task: episodes must be of type int, like 3, not 2.5"),
        ("episodes=many", "01_task: episodes must be of type int, like 3, not 'many'"),
        ("episodes=true", "01_task: episodes must be of type int, like 3, not True"),
        ("temperature=nan", "01_task: temperature must be of type float, like 1.0, not 'nan'"),
        ("temperature=1e999", "01_task: temperature must be of type float, like 1.0, not inf"),
        ("greedy=1", "01_task: greedy must be of type bool, like False, not 1"),
        ("rtgs=0.5", "01_task: rtgs must be of type list, like [0.0, 0.5], not 0.5"),
        ("rtgs=[]", "01_task: rtgs must be of type list, like [0.0, 0.5], not []"),
        ("rtgs=[0.5, 'all']", "01_task: rtgs must be of type list, like [0.0, 0.5], not [0.5, 'all']"),
        ("rtgs=[1e999]", "01_task: rtgs must be of type list, like [0.0, 0.5], not [inf]"),
        ("episodes=0", "01_task: episodes must be at least 1, not 0"),
        ("episodes", "-p takes NAME=VALUE, not 'episodes'"),
        ("=3", "-p takes NAME=VALUE, not '=3'"),
    ],
)
def test_a_wrong_parameter_is_one_sentence_and_nothing_runs(checkout, assignment, sentence):
    result = dtbook("run", "01", "-p", assignment)
    assert result.exit_code != 0
    assert result.output.splitlines()[-1].removeprefix("Error: ").removeprefix("Invalid value: ") == sentence
    assert not (checkout / "runs").exists()


def test_every_notebook_is_checked_before_the_first_runs(checkout):
    write_notebook(checkout / "notebooks/02_other.ipynb", "1")
    result = dtbook("run", "-p", "episodes=3")
    assert "02_other has no parameter 'episodes': it declares none" in result.output
    assert not (checkout / "runs").exists()


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (3, "-4", -4),
        (1.0, "2", 2.0),
        (1.0, "1e-3", 1e-3),
        (False, "TRUE", True),
        ("a", "3", "3"),
        ([0.5], "[1]", [1]),
    ],
)
def test_texts_become_values_of_the_declared_type(default, text, value):
    accepted = Parameter("x", default, "").accept(text)
    assert accepted == value
    assert type(accepted) is type(value)


@pytest.mark.parametrize(
    ("default", "meaning", "good", "bad", "sentence"),
    [
        (3, "episodes, at least 1", 1, 0, "x must be at least 1, not 0"),
        (3, "at most 10_000 episodes", "10000", 10_001, "x must be at most 10_000, not 10001"),
        (0.5, "share, above 0 and below 1", 0.01, 0.0, "x must be above 0, not 0.0"),
        (0.5, "share, above 0 and below 1", 0.99, 1, "x must be below 1, not 1.0"),
        (0.9, "return asked for, from −1 to 1", -1, "1.5", "x must be from −1 to 1, not 1.5"),
        ([0.9], "returns, from -1 to 1 each", [-1.0, 1.0], [0.0, 2.0], "x must be from -1 to 1, not 2.0"),
        (1e-3, "step size, above 1e-6", 2e-6, 1e-7, "x must be above 1e-6, not 1e-07"),
        (
            "greedy",
            "how to act: one of greedy, sampled",
            "sampled",
            "argmax",
            "x must be one of greedy, sampled, not",
        ),
        ("a", "one of a, b; shown in the caption", "b", "shown", "x must be one of a, b, not 'shown'"),
    ],
)
def test_limits_stand_in_the_meaning(default, meaning, good, bad, sentence):
    parameter = Parameter("x", default, meaning)
    parameter.accept(good)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parameter.accept(bad)


@pytest.mark.parametrize(
    "meaning", ["episodes from the first checkpoint", "steps above that count", "from 3 files"]
)
def test_other_words_limit_nothing(meaning):
    assert Parameter("x", 3, meaning).accept(-1) == -1


def test_params_lists_name_type_default_and_meaning(checkout):
    lines = dtbook("params", "01_task").output.splitlines()
    assert lines[:4] == [
        "01_task",
        "  episodes: int = 3  episodes, at least 1",
        "  temperature: float = 1.0  of the softmax",
        "  title: str = 'curve'",
    ]


def test_a_derived_default_is_refused(checkout):
    write_notebook(checkout / "notebooks/01_task.ipynb", "1", parameters="steps = 2 * 300")
    assert "01_task: the default of steps must be a plain value, not 2 * 300" in dtbook("params").output


# What is no notebook

NOT_NOTEBOOKS = {
    "empty": (lambda good: "", "01_task.ipynb is not a notebook: it is empty"),
    "markers in the file": (
        lambda good: good.replace("  {\n", "<<<<<<< HEAD\n  {\n", 1),
        "01_task.ipynb is not a notebook: line 3 is the marker of a merge conflict",
    ),
    "a byte order mark": (lambda good: "\ufeff" + good, "it begins with a byte order mark: save it as UTF-8"),
    "cut off": (lambda good: good[:200], "01_task.ipynb is not a notebook: Notebook does not appear to be JSON"),
    "no object": (lambda good: "null", "01_task.ipynb is not a notebook: its JSON holds no cells"),
    "no cells": (changed(cells=[]), "01_task.ipynb is not a notebook: it has no cells"),
    "half a cell": (changed(cells=[{"cell_type": "code"}]), "01_task.ipynb is not a notebook: "),
    "no kernelspec": (changed(metadata={}), "01_task.ipynb must name a Python kernel in its kernelspec, not {}"),
    "another language": (
        changed(metadata={"kernelspec": {"name": "ir", "display_name": "R", "language": "R"}}),
        "must name a Python kernel in its kernelspec, not {'name': 'ir'",
    ),
    "an unclosed bracket": (
        lambda good: good.replace("0.5]", "0.5"),
        "01_task: cell 1, `episodes = 3  # episodes, at least 1`, is not Python: '[' was never closed",
    ),
    "a typing error in another cell": (
        lambda good: good.replace("print(", "print(("),
        "01_task: cell 2, `print((episodes * temperature)`, is not Python: '(' was never closed",
    ),
    "a null in a cell": (
        lambda good: good.replace("print(", "\\u0000print("),
        "is not Python: source code string cannot contain null bytes",
    ),
    "markers in a cell": (
        lambda good: good.replace("print(", "<<<<<<< HEAD\\nprint("),
        "01_task: cell 2, `<<<<<<< HEAD`, holds the markers of a merge conflict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_NOTEBOOKS)
def test_what_is_no_notebook_is_one_sentence_in_every_command(checkout, what):
    spoil, sentence = NOT_NOTEBOOKS[what]
    path, sweep = checkout / "notebooks/01_task.ipynb", checkout / "sweep.yml"
    write_notebook(checkout / "notebooks/00_before.ipynb", "1")
    path.write_text(spoil(path.read_text()))
    sweep.write_text("notebook: 01_task\ngrid: {episodes: [1]}")
    for command in (["run"], ["params", "1"], ["sweep", "--dry-run", str(sweep)], ["build"]):
        result = dtbook(*command)
        *_, said = result.output.splitlines()
        assert result.exit_code == 1, command
        assert said.startswith("Error: "), command
        assert sentence in said, command
    assert not (checkout / "book/_executed").exists()
    if "kernel" not in sentence:
        assert sentence in dtbook("stages").output


def test_magics_texts_and_a_kernel_of_another_name_are_a_notebooks(checkout):
    path = checkout / "notebooks/01_task.ipynb"
    write_notebook(path, "%time 1 +\\\n 1", "%%bash\nif true; then", "!ls\nfiles = !ls")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("Title [\n=======", id="text"))
    notebook.metadata = {
        "kernelspec": {"name": "mine", "display_name": "Mine"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    assert read_notebook(path) == notebook


def test_a_damaged_copy_stops_the_build_in_one_sentence(checkout):
    (checkout / "book/_executed").mkdir()
    copy = checkout / "book/_executed/01_task.ipynb"
    copy.write_text((checkout / "notebooks/01_task.ipynb").read_text()[:100])
    result = dtbook("build")
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert f"{copy} is not a notebook: " in result.output


def test_two_notebooks_of_one_number_are_told_apart_by_name(checkout):
    """Jupyter's copy stands before the notebook in the folder."""
    write_notebook(checkout / "notebooks/01_task-Copy1.ipynb", "1")
    (checkout / "sweep.yml").write_text("notebook: 1")
    sentence = "notebook '1' is 01_task-Copy1 and 01_task: name one, or take the other away"
    for command in (["run", "1"], ["params", "1"], ["sweep", "--dry-run", str(checkout / "sweep.yml")]):
        assert dtbook(*command).output == f"Error: {sentence}\n"
    assert dtbook("params", "01_task").output.splitlines()[0] == "01_task"
    assert dtbook("params", "01_task-Copy1").output == "01_task-Copy1\n"


def test_an_unknown_notebook_is_answered_with_the_known_ones(checkout):
    result = dtbook("run", "9")
    assert result.exit_code != 0
    assert result.output == "Error: there is no notebook '9': 01_task\n"


# Failing


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (
            "x = -1\nraise ValueError(f'episodes must be positive, not {x}')",
            " in cell [2], `x = -1`: ValueError: episodes must be positive, not -1",
        ),
        pytest.param(
            "import os; os._exit(1)",
            " in cell [2], `import os; os._exit(1)`: Kernel died",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failure_names_the_cell_keeps_the_run_and_stops(checkout, cell, sentence):
    dtbook("run", "1")
    write_notebook(checkout / "notebooks/01_task.ipynb", "print('so far')", cell)
    write_notebook(checkout / "notebooks/02_next.ipynb", "1")
    result = dtbook("run", "--workers", "1")
    assert result.exit_code == 1
    error = result.output.splitlines()[-1]
    assert error.startswith(f"Error: 01_task failed{sentence}")
    assert "[2/2]" not in result.output
    assert printed(executed(checkout, "01_task.failed"))[0] == "so far\n"
    assert not (checkout / "book/_executed/01_task.ipynb").exists(), (
        "a former success must not look like this one"
    )

    write_notebook(checkout / "notebooks/01_task.ipynb", "print('mended')")
    assert dtbook("run", "--workers", "1").exit_code == 0
    assert copies(checkout) == ["01_task.ipynb", "02_next.ipynb"]


@pytest.mark.slow
def test_two_at_once_are_told_in_order_and_stop_at_a_failure(checkout):
    """The first takes until the second is done; the third fails and waits for the fourth, which nothing follows."""
    begun = "import pathlib, time\n\ndef wait(n):\n    while not pathlib.Path(n).exists(): time.sleep(0.05)\n"
    cells = {
        "01_task": "wait('2')",
        "02_quick": "pathlib.Path('2').touch()",
        "03_wrong": "wait('4'); 1 / 0",
        "04_long": "pathlib.Path('4').touch(); time.sleep(1)",
        "05_late": "pathlib.Path('5').touch()",
    }
    for name, cell in cells.items():
        write_notebook(checkout / f"notebooks/{name}.ipynb", begun, cell)
    result = dtbook("run", "--workers", "2")
    assert result.exit_code == 1
    first, second, error = result.output.splitlines()
    assert re.fullmatch(r"\[1/5\] 01_task: done in [\d.]+ s", first)
    assert re.fullmatch(r"\[2/5\] 02_quick: done in [\d.]+ s", second)
    assert error.startswith("Error: 03_wrong failed in cell [2], `wait('4'); 1 / 0`: ZeroDivisionError: ")
    assert copies(checkout) == ["01_task.ipynb", "02_quick.ipynb", "03_wrong.failed.ipynb", "04_long.ipynb"]
    assert not (checkout / "notebooks/5").exists()

    write_notebook(checkout / "notebooks/03_wrong.ipynb", "1")
    lines = dtbook("run", "--workers", "2").output.splitlines()[:5]
    assert [line.partition(": ")[2][:4] for line in lines] == ["up t", "up t", "done", "up t", "done"]


def test_a_failure_shows_the_line_that_starts_the_cell(checkout):
    write_notebook(checkout / "notebooks/01_task.ipynb", "1", "rollout = None\nrollout()")
    assert "01_task failed in cell [2], `rollout = None`: TypeError: " in dtbook("run").output


# The other commands


def test_verify_tells_good_from_bad(checkout):
    with ArtifactStore().write("curve.csv", stage="test", code=[]) as draft:
        draft.write_text("0,0\n")
    assert ArtifactStore().root == checkout / "data"
    result = dtbook("verify")
    assert (result.exit_code, "1 artifacts, 0.0 MB, all as the manifest says" in result.output) == (0, True)
    (checkout / "data/curve.csv").write_text("0,1\n")
    result = dtbook("verify")
    assert result.exit_code == 1
    assert f"Error: {checkout / 'data/curve.csv'} is not what" in result.output


@pytest.mark.slow
def test_build_is_clean_and_fails_on_a_warning_every_time(checkout):
    (checkout / "book/_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (checkout / "book/_config.yml").write_text("title: A book\nonly_build_toc_files: true\n")
    (checkout / "book/intro.md").write_text("# A book\n\n{ref}`nowhere`\n")
    assert [dtbook("build").exit_code for _ in range(2)] == [1, 1]
    (checkout / "book/intro.md").write_text("# A book\n\nIt is finished.\n")
    (checkout / "book/_build/html/old.html").write_text("of a former build")
    assert dtbook("build").exit_code == 0
    assert "It is finished." in (checkout / "book/_build/html/book/intro.html").read_text()
    assert not (checkout / "book/_build/html/old.html").exists()


def test_build_without_a_book_is_one_sentence(checkout):
    (checkout / "book").rmdir()
    assert "has no book/: `dtbook build` needs a checkout" in dtbook("build").output


def test_bench_runs_each_and_fails_with_one(checkout, capfd):
    (checkout / "benchmarks").mkdir()
    (checkout / "benchmarks/speed.py").write_text("print('steps/s | 1')")
    assert dtbook("bench").exit_code == 0
    assert capfd.readouterr().out == "steps/s | 1\n"
    assert "there is no benchmark 'sped': speed" in dtbook("bench", "sped").output
    assert dtbook("bench", "--write").exit_code == 0
    said = (checkout / "book/speed/speed.txt").read_text()
    assert said.startswith("dtbook bench speed\n")
    assert said.endswith("\n\nsteps/s | 1\n")
    (checkout / "benchmarks/broken.py").write_text("1 / 0")
    result = dtbook("bench")
    assert (result.exit_code, result.output.splitlines()[-1]) == (1, "Error: failed: broken")
    assert "steps/s | 1\n" in capfd.readouterr().out, "one failure does not keep the others from running"
