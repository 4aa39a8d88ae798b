"""Sweeps: what they refuse, their table, and that nothing is lost or run twice, whoever dies on the way."""

import pickle
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from browser import served
from click.testing import CliRunner
from distributed import LocalCluster
from forked import Fork

from dtbook import cli
from dtbook.artifacts import ArtifactError, ArtifactStore
from dtbook.artifacts.processes import check_scheduler
from dtbook.artifacts.provenance import code_behind
from dtbook.figures.display import GLUE_MIME
from dtbook.gridworld import Task
from dtbook.model import DecisionTransformer
from dtbook.pages.notebooks import code_of
from dtbook.pipeline import engine, sweep
from dtbook.pipeline.engine import run_job
from dtbook.trajectories import play

PARAMETERS = """k = 1  # which point
gate = ""  # file without which point 1 does not end
log = ""  # file to which each run writes a line as it starts and as it ends
fail_at = -1  # the k that fails
any = None  # of whatever kind
"""
CELLS = (
    """import os, time

def note(*what):
    if log:
        with open(log, 'a') as file:
            print(*what, file=file)""",
    """note('start', k, os.getppid(), os.getpid())
while gate and k == 1 and not os.path.exists(gate):
    time.sleep(0.05)
if k == fail_at:
    raise ValueError(f'k must not be {k}')""",
    """from dtbook.figures import glue

glue(square=k * k, half=k / 2, many=[1, 2], odd=bool(k % 2), none=float('nan'))""",
    "note('end', k)",
)


@pytest.fixture
def notebooks(tmp_path):
    """One notebook that glues the square of its parameter, in a path with a space and a letter beyond ASCII."""
    folder = tmp_path / "nöte books"
    folder.mkdir()
    cells = [nbformat.v4.new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "01_square.ipynb")
    return folder


def points(notebooks, values, **parameters):
    described = {"notebook": 1, "parameters": parameters, "grid": {"k": list(values)}}
    return sweep.points_of(described, notebooks)


def lines(log):
    """How often each point started and ended, as ("start", k) and ("end", k)."""
    return (
        Counter(tuple(line.split()[:2]) for line in log.read_text().splitlines())
        if log.exists()
        else Counter()
    )


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "it ended before"
        time.sleep(0.02)


# What is to be run


def test_points_are_all_combinations_in_order_each_once(notebooks):
    described = {
        "notebook": "01_square",
        "parameters": {"gate": "a"},
        "grid": {"k": [1, 2, 2]},
        "points": [{"fail_at": 7}, {"fail_at": 8}, {"fail_at": 7}],
    }
    found = [dict(point.parameters) for point in sweep.points_of(described, notebooks)]
    gate = str(Path("a").absolute())  # a file, which counts from here
    assert found == [{"gate": gate, "fail_at": f, "k": k} for f in (7, 8) for k in (1, 2)]
    assert len(sweep.points_of({"notebook": 1}, notebooks)) == 1, "without a grid: the defaults"


@pytest.mark.parametrize("page", ["README.md", "book/cluster.md"])
def test_the_sweeps_in_the_words_are_sweeps(page, tmp_path):
    text = (Path(__file__).parent.parent / page).read_text()
    described = yaml.safe_load(re.search(r"^ *```yaml\n(.*?)```", text, re.DOTALL | re.MULTILINE)[1])
    assert len(sweep.points_of(described, tmp_path)) in (9, 18)


def test_a_point_keeps_its_name_when_the_sweep_grows(notebooks):
    few, more = points(notebooks, [1, 2]), points(notebooks, [3, 1, 2])
    assert [point.id for point in few] == [point.id for point in more][1:]
    assert len({point.id for point in more}) == 3


MUST = "must have values of one kind, and whole numbers of at most 64 bits,"


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        ("[1, 2", "is not YAML"),
        ("just a text", "the whole must be a mapping of names to values, not 'just a text'"),
        ("stage: training\nnotebook: 1", "exactly one of the keys notebook and stage must be given"),
        ("grid: {k: [1]}", "exactly one of the keys notebook and stage must be given"),
        ("notebook: 1\ngird: {k: [1]}", "there is no key 'gird': there are notebook, stage, parameters, grid"),
        ("stage: trainig", "stage must be one of calibration, ppo, replication, training, not 'trainig'"),
        ("notebook: 1\ngrid: {k: 1}", "grid.k must be a list, not 1"),
        ("notebook: 1\ngrid: {k: []}", "grid.k must not be empty"),
        ("notebook: 1\ngrid: {k: [{a: 1}]}", "grid.k[0] must be a plain value: a number, text, true or"),
        ("notebook: 1\npoints: {k: 1}", "points must be a list, not {'k': 1}"),
        ("notebook: 1\ngrid: {k: [1]}\npoints: [{k: 2}]", "'k' must stand in grid or in points, not in both"),
        ("notebook: 7", "there is no notebook '7': 01_square"),
        ("notebook: 1\ngrid: {kk: [1]}", "01_square has no parameter 'kk': it declares k, gate, log, fail_at, any"),
        ("notebook: 1\ngrid: {k: [1, 1.5]}", "01_square: k must be of type int, like 1, not 1.5"),
        ("stage: training\nparameters: {train.lrr: 1}", "training has no parameter 'train.lrr': it declares seed"),
        ("stage: training\nparameters: {train.lr: -1}", "TrainConfig.lr is -1.0; it must be a finite number > 0"),
        ("stage: training\nparameters: {model.n_heads: 2.5}", "model.n_heads must be of type int, like 2, not 2.5"),
        ("stage: ppo\nparameters: {task.size: 2}", "Task.size is 2; it must be an integer from 5 to 16"),
        ("stage: training\nparameters: {data: mine.npz}", "there is no artifact 'mine.npz': give an absolute path"),
        ("stage: ppo\ngrid: {seed: [0]}\ngrid: {seed: [1]}", "is not YAML: the key 'grid' stands twice in \""),
        ("notebook: 1\ngrid:\n  k: [1]\n  k: [2]", "the key 'k' stands twice in \"<unicode string>\", line 4"),
        ("notebook: 1\npoints: [{k: 1, 'k': 2}]", "the key 'k' stands twice"),
        ("notebook: 1\ngrid: {any: [1, some]}", f"any {MUST} not 1 and 'some'"),
        ("notebook: 1\ngrid: {any: [1, true]}", f"any {MUST} not 1 and True"),
        ("notebook: 1\ngrid: {k: [1, 36893488147419103232]}", f"k {MUST} not 36893488147419103232"),
        ("stage: ppo\ngrid: {seed: [1, 36893488147419103232]}", f"seed {MUST} not 36893488147419103232"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_one_sentence_and_nothing_runs(
    notebooks, tmp_path, monkeypatch, described, sentence
):
    file = tmp_path / "wrong.yml"
    file.write_text(described)
    said = refused(notebooks, monkeypatch, str(file), "--folder", str(tmp_path / "out"))
    assert said.startswith(f"Error: {file}") or "there is no notebook" in said
    assert sentence in said
    assert not (tmp_path / "out").exists()


def refused(notebooks, monkeypatch, *arguments):
    """The one line in which `dtbook sweep` refuses, with and without --dry-run."""
    monkeypatch.setattr(cli, "CHECKOUT", notebooks.parent)
    notebooks.rename(notebooks.with_name("notebooks"))
    results = [CliRunner().invoke(cli.main, ["sweep", *more, *arguments]) for more in (["--dry-run"], [])]
    assert [(result.exit_code, len(result.output.splitlines())) for result in results] == [(1, 1)] * 2, (
        results
    )
    assert results[0].output == results[1].output
    return results[0].output


def test_merged_keys_of_yaml_are_no_repetition(notebooks, tmp_path):
    (tmp_path / "sweep.yml").write_text("notebook: 1\npoints:\n- &a {k: 1, log: x}\n- {<<: *a, k: 2}")
    assert [p.parameters["k"] for p in sweep.read_sweep(tmp_path / "sweep.yml", notebooks)] == [1, 2]


@pytest.mark.parametrize(
    "address",
    ["http://cluster:8787", "tcp://cluster", "cluster", "tcp://cluster:port", "tcp://cluster:0", "tcp://cluster:65536",
     "tcp://", "", "tcp:/cluster:8786", "tcp://cluster:8786/status"],
)  # fmt: skip
def test_what_cannot_be_a_scheduler_is_refused_at_once(notebooks, tmp_path, monkeypatch, address):
    (tmp_path / "sweep.yml").write_text("notebook: 1")
    said = refused(notebooks, monkeypatch, str(tmp_path / "sweep.yml"), "--scheduler", address)
    assert said == f"Error: --scheduler must be an address like tcp://host:8786, not {address!r}\n"
    again = CliRunner().invoke(
        cli.main, ["reproduce", "--scheduler", address, "--folder", str(tmp_path / "made")]
    )
    assert (again.exit_code, again.output) == (1, said)
    assert not (tmp_path / "made").exists()


def test_schedulers_have_these_addresses():
    for address in (
        None,
        "tcp://10.0.0.1:8786",
        "cluster:1",
        "tls://[::1]:8786",
        "wss://a.b-c:443",
        "inproc://1/2/3",
    ):
        assert check_scheduler(address) == address


def test_a_name_that_the_table_has_is_refused_at_once(notebooks, tmp_path, monkeypatch):
    path = notebooks / "01_square.ipynb"
    (tmp_path / "sweep.yml").write_text("notebook: 1\ngrid: {point: [1]}")
    path.write_text(path.read_text().replace("k = 1  #", "point = 1\\nk = 1  #"))
    with pytest.raises(
        sweep.SweepError, match=r"sweep.yml: a parameter is called 'point', which is a column of"
    ):
        sweep.read_sweep(tmp_path / "sweep.yml", notebooks)
    (tmp_path / "sweep.yml").write_text("notebook: 1")
    path.write_text(path.read_text().replace("glue(square", "glue(error=1, square"))
    said = refused(notebooks, monkeypatch, str(tmp_path / "sweep.yml"))
    assert "sweep.yml: 01_square glues 'error', which is a column of the sweep's table: choose" in said


# The table


def glue_at(todo, folder, *values):
    """Put executed notebooks that glued these values where a sweep's points have theirs."""
    store = ArtifactStore(folder)
    for point, glued in zip(todo, values, strict=True):
        cell = nbformat.v4.new_code_cell("", id="glues")
        for name, value in glued.items():
            data = {f"{GLUE_MIME}text/plain": repr(value)}
            cell.outputs.append(
                nbformat.v4.new_output("display_data", data, metadata={"scrapbook": {"name": name}})
            )
        notebook = nbformat.read(todo[0].target.notebook, as_version=4)
        notebook.cells.append(cell)
        with store.write(point.artifact, stage="test", code=[]) as draft:
            nbformat.write(notebook, draft)


def test_whatever_was_glued_the_table_is_written_and_says_what_it_changed(notebooks, tmp_path):
    todo, said = points(notebooks, [1, 2, 3, 4]), []
    odd = {"mixed": 1, "big": 2**70, "text": "\ud800", "flag": True, "point": 7, "k": 1, "whole": 2**62}
    values = [odd, {"mixed": "many", "big": -1, "flag": 0.5, "k": 5}, {"mixed": float("nan"), "whole": 1}]
    glue_at(todo[:3], tmp_path, *values)
    table = sweep.tabulate(todo, tmp_path, {todo[3].id: "failed"}, said.append)
    table.to_parquet(tmp_path / "table.parquet", index=False)
    back = pd.read_parquet(tmp_path / "table.parquet")
    expected = {
        "point": [point.id for point in todo],
        "k": [1, 2, 3, 4],
        "mixed": ["1", "many", None, None],
        "big": [str(2**70), "-1", None, None],
        "text": ["\\ud800", None, None, None],
        "flag": ["True", "0.5", None, None],
        "glued point": [7, None, None, None],
        "whole": [2**62, None, 1, None],
        "glued k": [None, 5, None, None],
        "error": [None, None, None, "failed"],
    }
    assert {name: [None if pd.isna(x) else x for x in column] for name, column in back.items()} == expected
    text = "is text in the table: its values are of several kinds, or beyond 64 bits"
    new = "is a column already: what was glued is"
    assert said == [
        *(f"{name!r} {text}" for name in ("big", "flag")),
        f"'k' {new} 'glued k'",
        f"'mixed' {text}",
        f"'point' {new} 'glued point'",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_sweep_leaves_a_table_a_notebook_a_point_and_a_manifest(notebooks, tmp_path):
    todo = points(notebooks, [3, 4, 5], fail_at=4)
    table = sweep.run_sweep(todo, tmp_path / "out", workers=2)
    assert table["point"].tolist() == [point.id for point in todo]
    assert list(table.columns) == ["point", "fail_at", "k", "square", "half", "odd", "none", "error"]
    assert table["k"].tolist() == [3, 4, 5]
    assert table["square"].dropna().tolist() == [9, 25]
    assert table["error"].isna().tolist() == [True, False, True]
    store = ArtifactStore(tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(store.path("table.parquet")), table)
    kept = tmp_path / "out/failed" / f"{todo[1].id}.ipynb"
    assert table["error"][1].startswith(
        "01_square failed in cell [4], `note('start', k, os.getppid(), os.getpid())`: "
    )
    assert table["error"][1].endswith(f"ValueError: k must not be 4; {kept} is the run so far")
    assert kept.exists()
    executed = nbformat.read(store.path(todo[0].artifact), as_version=4)
    assert executed.metadata["dtbook"]["parameters"] == {"fail_at": 4, "k": 3}
    entry = store.entries()[todo[0].artifact]
    assert (entry["stage"], entry["parameters"]["point"]) == ("01_square", {"fail_at": 4, "k": 3})
    assert entry["code"] == code_behind([sweep._execute, *code_of(todo[0].target.notebook)])["code"]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_what_is_there_is_not_run_again_and_the_table_is_the_same_bytes(notebooks, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    sweep.run_sweep(points(notebooks, [1, 2], log=str(log)), out)
    before = (out / "table.parquet").read_bytes()
    sweep.run_sweep(points(notebooks, [1, 2], log=str(log)), out)
    assert (out / "table.parquet").read_bytes() == before
    (out / points(notebooks, [2], log=str(log))[0].artifact).write_text("damaged")
    table = sweep.run_sweep(points(notebooks, [1, 2, 3], log=str(log)), out)
    assert lines(log) == {
        (what, k): n for what in ("start", "end") for k, n in zip("123", (1, 2, 1), strict=True)
    }
    assert table["square"].tolist() == [1, 4, 9]
    source = notebooks / "01_square.ipynb"
    source.write_text(source.read_text().replace("k * k", "k ** 2"))
    sweep.run_sweep(points(notebooks, [1], log=str(log)), out)
    assert lines(log)["end", "1"] == 2, "another notebook, another point"


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_stage_leaves_its_artifacts_and_one_row(tmp_path):
    task, rng = Task(size=5, n_obstacles=1, max_steps=30), np.random.default_rng(0)
    data = play(task, lambda images, *_: rng.integers(0, 3, len(images)), 300, rng)
    data.save(tmp_path / "trajectories.npz")
    small = {"d_model": 16, "d_head": 8, "d_mlp": 16, "max_steps": 30}
    described = {
        "stage": "training",
        "parameters": {f"model.{name}": value for name, value in small.items()}
        | {"data": str(tmp_path / "trajectories.npz"), "train.balance_classes": False, "train.steps": 3}
        | {"calibration.rtgs": [0, 0.9], "calibration.episodes": 2, "calibration.max_steps": 30}
        | {"train.evaluation_episodes": 0},
        "grid": {"model.n_layers": [0, 1], "seed": [5]},
    }
    todo = sweep.points_of(described, tmp_path)
    table = sweep.run_sweep(todo, tmp_path / "out")
    assert table["error"].isna().all(), table["error"].tolist()
    assert table["model.n_layers"].tolist() == [0, 1]
    assert {"loss", "greedy 0.9", "sampled 0", "greedy survived 0", "sampled error", "score L0H1"} <= set(
        table
    )
    store = ArtifactStore(tmp_path / "out")
    for point, row in zip(todo, table.to_dict("records"), strict=True):
        folder = store.path(point.artifact)
        model = DecisionTransformer.from_pretrained(folder / "model")
        assert model.cfg.n_layers == row["model.n_layers"]
        assert row["weights"] == sum(weight.numel() for weight in model.parameters())
        losses = pd.read_parquet(folder / "training.parquet")["loss"]
        assert row["loss"] == losses.mean()
        curve = pd.read_parquet(folder / "calibration.parquet").set_index(["acting", "rtg"])["mean"]
        assert row["greedy 0.9"] == curve["greedy", 0.9]
    assert [run_job(point.job(tmp_path / "again")).error for point in todo] == [None, None]
    assert sweep.tabulate(todo, tmp_path / "again", {}).equals(table)
    ours, theirs = (ArtifactStore(tmp_path / name).entries() for name in ("out", "again"))
    for point in todo:
        assert ours[point.artifact]["seconds"] > 0
        same = [entries[point.artifact] | {"seconds": 0} for entries in (ours, theirs)]
        assert same[0] == same[1], "the same bytes"


# Deaths

DRIVER = """
import pickle, sys
from dtbook.pipeline import sweep
points, folder, workers, scheduler = pickle.load(open(sys.argv[1], "rb"))
sweep.run_sweep(points, folder, workers, scheduler)
"""


def start(tmp_path, todo, workers=2, scheduler=None):
    """A sweep in a process of its own, into tmp_path/out."""
    (tmp_path / "job").write_bytes(pickle.dumps((todo, tmp_path / "out", workers, scheduler)))
    return Fork(DRIVER, tmp_path / "job")


def ended(log):
    return {int(k): n for (what, k), n in lines(log).items() if what == "end"}


def kill_worker_of_point_1(log, process):
    """Kill the process that runs point 1, which waits at its gate, and wait for the kernel to notice."""
    wait_for(lambda: ("start", "1") in lines(log), process)
    line = next(line.split() for line in log.read_text().splitlines() if line.startswith("start 1"))
    kernel = psutil.Process(int(line[3]))
    psutil.Process(int(line[2])).kill()
    kernel.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_killed_local_worker_costs_its_points_a_second_start_and_no_more(notebooks, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    process = start(tmp_path, points(notebooks, range(4), log=str(log), gate=str(gate)))
    kill_worker_of_point_1(log, process)
    gate.touch()
    assert process.wait() == 0
    table = pd.read_parquet(tmp_path / "out/table.parquet")
    assert (table["square"].tolist(), table["error"].notna().sum()) == ([0, 1, 4, 9], 0)
    assert lines(log)["start", "1"] == 2
    assert ended(log)[1] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_sweep_killed_on_its_way_goes_on_with_what_is_missing(notebooks, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    todo = points(notebooks, range(3), log=str(log), gate=str(gate))
    process = start(tmp_path, todo, workers=1)
    wait_for(lambda: ("start", "1") in lines(log), process)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/table.parquet").exists()
    assert ended(log) == {0: 1}
    gate.touch()
    assert sweep.run_sweep(todo, tmp_path / "out")["square"].tolist() == [0, 1, 4]
    assert ended(log) == {0: 1, 1: 1, 2: 1}


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_point_that_kills_its_worker_each_time_is_named_and_the_others_end(notebooks, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "import os, psutil\nif k == 1: psutil.Process(os.getppid()).kill()", id="killer"
    )
    path = notebooks / "01_square.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(2, cell)
    nbformat.write(notebook, path)
    table = sweep.run_sweep(points(notebooks, range(3)), tmp_path / "out", workers=2)
    assert table["square"].fillna(-1).tolist() == [0, -1, 4]
    assert table["error"][1] == "its process died 2 times (out of memory?)"


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_dask_cluster_that_loses_a_worker_ends_the_sweep_with_each_point_run_once(notebooks, tmp_path):
    log, gate, reported = tmp_path / "log", tmp_path / "gate", []
    todo = points(notebooks, range(5), log=str(log), gate=str(gate))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        process = start(tmp_path, todo, scheduler=address)
        wait_for(lambda: len(ended(log)) >= 2, process)
        kill_worker_of_point_1(log, process)
        gate.touch()
        assert process.wait() == 0
        again = sweep.run_sweep(todo, tmp_path / "out", 1, address, reported.append)
    table = pd.read_parquet(tmp_path / "out/table.parquet")
    assert table["square"].tolist() == [k * k for k in range(5)]
    assert ended(log) == dict.fromkeys(range(5), 1)
    assert lines(log)["start", "1"] == 2
    assert again.equals(table)
    assert [line.rpartition(": ")[2] for line in reported] == ["up to date"] * 5
    assert ArtifactStore(tmp_path / "out").verify() == []


def test_a_scheduler_that_is_not_there_is_one_sentence(notebooks, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "CHECKOUT", notebooks.parent)
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 1)
    notebooks.rename(notebooks.with_name("notebooks"))
    (tmp_path / "sweep.yml").write_text("notebook: 1")
    command = [
        "sweep",
        str(tmp_path / "sweep.yml"),
        "--folder",
        str(tmp_path / "out"),
        "--scheduler",
        "tcp://127.0.0.1:9",
    ]
    result = CliRunner().invoke(cli.main, command)
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1), result.output
    assert "127.0.0.1:9" in result.output


def test_what_answers_but_is_no_scheduler_is_one_sentence(notebooks, tmp_path, monkeypatch):
    """As the page of a scheduler does, or a socket that says nothing."""
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 1)
    with served(tmp_path) as page, socket.create_server(("127.0.0.1", 0)) as mute:
        for port in (page.rpartition(":")[2].strip("/"), mute.getsockname()[1]):
            address = f"tcp://127.0.0.1:{port}"
            with pytest.raises(
                ArtifactError, match=f"must be that of a Dask cluster, but at {address} none answers"
            ):
                sweep.run_sweep(points(notebooks, [1]), tmp_path / "out", scheduler=address)
    assert not (tmp_path / "out/table.parquet").exists()
