"""The engine: graphs of jobs, killed and failing ones, what is there already; and replications by it."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import pandas as pd
import psutil
import pytest
from small import RECIPE

from dtbook.artifacts.comparison import compare
from dtbook.artifacts.store import ArtifactStore
from dtbook.model.subject import Subject
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline import name_of, replicate, replication
from dtbook.pipeline.engine import Job, Outcome, Stage, failures, run_graph
from dtbook.pipeline.replication import (
    BARS,
    CONTROLS,
    REFERENCE,
    REPLICATION_ROWS,
    load_snapshots,
    parse_seeds,
    summary,
)
from dtbook.rollout import calibration_row
from dtbook.trajectories.episodes import Trajectories

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]  # processes of its own


def log_and(function, job):
    """In a worker: leave a line where the test finds it, then do what the stage does."""
    with open(os.environ["STAGES_LOG"], "a") as file:
        file.write(f"{job.of} {job.stage.name} {os.getpid()}\n")
    return function(job)


def logged(jobs):
    """The jobs, each of which leaves a line as it begins."""
    return [
        replace(job, stage=replace(job.stage, function=partial(log_and, job.stage.function))) for job in jobs
    ]


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "stages.log"
    path.touch()
    monkeypatch.setenv("STAGES_LOG", str(path))
    return lambda: [line.split() for line in path.read_text().splitlines()]


def write(text, job):
    """A stage's function: what it makes is a text, of what it needs."""
    return [
        lambda path: path.write_text(text + "".join(job.path(name).read_text() for name in job.stage.needs))
    ]


def die(job):
    """A stage's function: its process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(job):
    """A stage's function with a mistake in it."""
    raise KeyError("mistake")


def stage(name, function=None, needs=(), uses=()):
    return Stage(name, (name,), function or partial(write, name), needs, uses)


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("7, 0-2,1", [7, 0, 1, 2]), ("4-4", [4])]
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,", "1.5", "0-"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ValueError, match="seeds must be numbers and rising ranges"):
        parse_seeds(text)


# Graphs


def test_a_job_waits_for_what_it_needs_and_what_it_uses(tmp_path):
    store = ArtifactStore(tmp_path)
    stages = [stage("c", needs=("a", "b")), stage("d", uses=("c", "z")), stage("a"), stage("b", needs=("a",))]
    said, jobs = [], [Job(each, store) for each in stages]
    outcomes = run_graph(jobs, 2, say=said.append)
    assert failures(outcomes) == []
    assert [line.partition(":")[0] for line in said] == ["[1/4] a", "[2/4] b", "[3/4] c", "[4/4] d"]
    assert (tmp_path / "c").read_text() == "caba"
    assert store.entries()["d"]["parameters"]["from"] == {"c": store.entries()["c"]["sha256"]}
    assert set(run_graph(jobs, say=said.append).values()) == {Outcome()}, "all is there"
    assert said[-1] == "[4/4] d: up to date"
    changed = [*jobs[:2], Job(replace(stages[2], function=partial(write, "A")), store), jobs[3]]
    changed[2] = replace(changed[2], parameters={"text": "A"})
    again = run_graph(changed)
    assert [again[job].seconds is None for job in changed] == [False] * 4
    assert (tmp_path / "c").read_text() == "cAbA"


def test_what_fails_is_told_leaves_out_what_needs_it_and_the_others_go_on(tmp_path):
    store = ArtifactStore(tmp_path)
    jobs = [
        Job(each, store)
        for each in (
            stage("a", fail),
            stage("b", needs=("a",)),
            stage("c", die),
            stage("d"),
            stage("e", needs=("x",)),
        )
    ]
    found = {str(job): outcome.error for job, outcome in run_graph(jobs, 2).items()}
    trace = next((tmp_path / "failed").glob("*.txt"))
    assert found == {
        "a": f"KeyError: 'mistake'; {trace} has the traceback",
        "b": f"{tmp_path} has no a: `dtbook reproduce` makes it",
        "c": "its process died 2 times (out of memory?)",
        "d": None,
        "e": f"{tmp_path} has no x: `dtbook reproduce` makes it",
    }
    assert 'raise KeyError("mistake")' in trace.read_text()
    run_graph([Job(stage("a"), store)])
    assert not trace.exists()


def test_two_at_once_do_each_job_once(tmp_path, log):
    store = ArtifactStore(tmp_path / "made")
    jobs = logged([Job(stage(name), store) for name in "abcdef"])
    runs = [threading.Thread(target=run_graph, args=(jobs, 2)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(name for name, _ in log()) == list("abcdef")


def test_no_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers is 0; it must be an integer ≥ 1"):
        run_graph([], 0)


# Replications


def test_a_killed_worker_loses_nothing(tmp_path, log):
    """Killed once in the middle, its job is begun again; the others are not disturbed, and the bytes are the same."""
    store, killed = ArtifactStore(tmp_path / "made"), []
    jobs = logged(job for seed in (0, 1) for job in replication.replication(store, seed, RECIPE))

    def kill_one():
        while not killed:
            for of, name, pid in log():
                if (of, name) == ("seed_1", "training"):
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(int(pid))
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    assert failures(run_graph(jobs, 2)) == []
    thread.join()
    assert store.verify() == []
    begun = [line[:2] for line in log()]
    assert len(begun) == 11
    assert begun.count(["seed_1", "training"]) == 2
    assert set(run_graph(jobs).values()) == {Outcome()}
    assert len(log()) == 11
    alone = ArtifactStore(tmp_path / "alone")
    replicate(alone, 1, RECIPE, progress=False)
    names = list(alone.entries())
    assert compare(store, alone, names) == dict.fromkeys(names, "identical")

    table = summary(store, [0, 1])
    assert table["seed"].tolist() == [0, 1]
    assert {"L0H0", "L0H1", "meets", "missed", *BARS} <= set(table)
    models = load_snapshots(store, 1)
    assert list(models) == [0, 4, 30]
    final = Subject.find("seed_1", store)
    assert final.sha256 == store.entries()["seed_1/model"]["sha256"]
    for name, value in final.model.state_dict().items():
        assert (models[30].state_dict()[name] - value).abs().max() <= 1e-3 * (1 + value.abs().max())


def test_workers_end_with_the_process_that_asked(tmp_path, log):
    """Killed without a chance to stop them, it leaves no worker that writes where the next call goes on."""
    jobs = logged(replication.replication(ArtifactStore(tmp_path / "made"), 0, RECIPE))
    asked = get_context("spawn").Process(target=run_graph, args=(jobs,))
    asked.start()
    while not log():
        time.sleep(0.01)
    worker = int(log()[0][-1])
    asked.kill()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(60)
    assert "calibration" not in [line[1] for line in log()]


def test_no_semaphore_is_left(tmp_path):
    """A bar of progress is drawn in processes that end, and in one that is killed."""
    script = tmp_path / "run.py"
    script.write_text("""
import sys
from functools import partial
from test_engine import die, stage, write
from tqdm import tqdm
from dtbook.artifacts.store import ArtifactStore
from dtbook.pipeline.engine import Job, run_graph

def draw(then, job):
    for _ in tqdm(range(2), disable=True):
        pass
    return then(job)

if __name__ == "__main__":
    parts = {"a": partial(write, "a"), "b": die, "c": partial(write, "c")}
    store = ArtifactStore(sys.argv[1])
    run_graph([Job(stage(name, partial(draw, then)), store) for name, then in parts.items()], 2, say=print)
""")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, script, tmp_path / "made"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert "b: its process died 2 times" in done.stdout
    assert "leaked" not in done.stderr, done.stderr


def test_shuffled_controls_see_the_same_steps_with_other_actions(tmp_path, monkeypatch):
    store, seen = ArtifactStore(tmp_path), []
    replicate(store, REFERENCE, RECIPE, progress=False)
    train = replication.training.train

    def spy(data, *args):
        seen.append(data)
        return train(data, *args)

    monkeypatch.setattr(replication.training, "train", spy)
    Job(REPLICATION_ROWS["controls"], store, CONTROLS[1], RECIPE, (1,)).ensure()
    data = Trajectories.load(store.path(name_of(REFERENCE, "trajectories.npz")))
    assert (seen[0].agent == data.agent).all()
    assert (seen[0].returns == data.returns).all()
    assert sorted(seen[0].actions) == sorted(data.actions)
    assert (seen[0].actions != data.actions).mean() > 0.3
    model = DecisionTransformer.from_pretrained(store.path(CONTROLS[1]))
    assert "obstacle_head" in model.metadata


def test_figures_of_curves_written_out():
    rows = [(-1.0, -0.98, 0.0), (0.0, 0.02, 0.9), (0.5, 0.6, 0.1), (0.9, 0.94, 0.0)]
    curves = pd.concat(
        pd.DataFrame(rows, columns=["rtg", "mean", "survived"]).assign(acting=acting)
        for acting in ("greedy", "sampled")
    )
    expected = {}
    for acting in ("greedy", "sampled"):
        expected |= {f"{acting} {rtg:g}": mean for rtg, mean, _ in rows if rtg != 0.5}
        expected |= {f"{acting} survived 0": 0.9, f"{acting} error": (0.02 + 0.1 + 0.04) / 3}
    assert calibration_row(curves) == pytest.approx(expected)
    one = calibration_row(curves, {"survived": (0.5, 0.7)})
    assert one == {"greedy survived 0.5": 0.1, "sampled survived 0.5": 0.1}


def test_the_shipped_reference_does_what_it_is_asked_for():
    """Worked out from the table itself, 500 episodes a point; the error bar is closer than that of a replication."""
    curves = pd.read_parquet(ArtifactStore().path("seed_10/calibration.parquet"))
    assert (curves["episodes"] == 500).all()
    greedy, sampled = (curves[curves["acting"] == how].set_index("rtg") for how in ("greedy", "sampled"))
    assert greedy["mean"][0.9] >= 0.93
    assert greedy["mean"][-1.0] <= -0.95
    assert abs(sampled["mean"][0.0]) <= 0.05
    assert sampled["survived"][0.0] >= 0.85
    asked = sampled.loc[0.0:0.9, "mean"]
    assert len(asked) == 10
    assert (asked - asked.index).abs().mean() <= 0.09
