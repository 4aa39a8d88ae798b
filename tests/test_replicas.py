"""Several replications as processes: kills, what is there already, and the table of the bars."""

import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dtbook import pipeline
from dtbook.artifacts import ArtifactStore
from dtbook.pipeline import name_of
from dtbook.replicas import BARS, measures, parse_seeds, replicate_all, summary

RECIPE = pipeline.Recipe(
    task=pipeline.Task(size=5, n_obstacles=1, max_steps=30),
    ppo=pipeline.PPOConfig(total_steps=16 * 32 * 12, num_steps=32, minibatches=4),
    envs=16,
    quota=pipeline.QuotaConfig(steps_per_class=300, round_episodes=64, max_rounds=20),
    model=pipeline.DTConfig(d_model=16, d_head=8, d_mlp=16, max_steps=30),
    train=pipeline.TrainConfig(steps=30, batch_size=32, checkpoint_every=5, evaluation_episodes=3),
    snapshots=(0, 4, 30),
    calibration={"rtgs": [-1.0, 0.0, 0.5, 0.9], "episodes": 4, "max_steps": 30},
)


def log_stage(seed, stage, seconds):
    """In a worker: leave a line where the test finds it."""
    with open(os.environ["STAGES_LOG"], "a") as file:
        file.write(f"{seed} {stage} {os.getpid()}\n")


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "stages.log"
    path.touch()
    monkeypatch.setenv("STAGES_LOG", str(path))
    return lambda: [line.split() for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("7, 0-2,1", [7, 0, 1, 2]), ("4-4", [4])]
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,", "1.5", "0-"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ValueError, match="seeds must be numbers and rising ranges"):
        parse_seeds(text)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path, log):
    """Killed once in the middle, its replication is begun again where it stopped; the others are not disturbed."""
    store, killed = ArtifactStore(tmp_path / "made"), []

    def kill_one():
        while not killed:
            for seed, stage, pid in log():
                if (seed, stage) == ("1", "collection"):
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(int(pid))
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    assert replicate_all(store, [0, 1], 2, log_stage, RECIPE) == {}
    thread.join()
    assert store.verify() == []
    pids = {seed: {pid for s, _, pid in log() if s == seed} for seed in "01"}
    assert len(pids["0"]) == 1
    assert len(pids["1"]) == 2
    assert len(log()) == 5 + 2 + 5  # the second attempt hears of two stages that are there
    for name in (name_of(seed, "model") for seed in (0, 1)):
        store.path(name)
    lines = len(log())
    times = {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*.parquet")}
    assert replicate_all(store, [0, 1], 1, log_stage, RECIPE) == {}
    assert len(log()) == lines + 10
    assert times == {path: path.stat().st_mtime_ns for path in times}

    table = summary(store, [0, 1])
    assert table["seed"].tolist() == [0, 1]
    assert {"L0H0", "L0H1", "meets", "missed", *BARS} <= set(table)
    models = pipeline.load_snapshots(store, 1)
    assert list(models) == [0, 4, 30]
    final = pipeline.DecisionTransformer.from_pretrained(store.path(name_of(1, "model")))
    for name, value in final.state_dict().items():
        assert (models[30].state_dict()[name] - value).abs().max() <= 1e-3 * (1 + value.abs().max())


@pytest.mark.slow
def test_workers_end_with_the_process_that_asked(tmp_path, log):
    """Killed without a chance to stop them, it leaves no worker that writes where the next call goes on."""
    arguments = (ArtifactStore(tmp_path / "made"), [0], 1, log_stage, RECIPE)
    asked = get_context("spawn").Process(target=replicate_all, args=arguments)
    asked.start()
    while not log():
        time.sleep(0.01)
    worker = int(log()[0][2])
    asked.kill()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(60)
    assert "calibration" not in [stage for _, stage, _ in log()]


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_is_made(tmp_path, log):
    bad = tmp_path / "made" / "seed_0"
    bad.parent.mkdir()
    bad.write_text("in the way of a folder")
    assert replicate_all(ArtifactStore(tmp_path / "made"), [0, 1], 1, log_stage, RECIPE) == {0: 1}
    assert [stage for seed, stage, _ in log()] == ["ppo", "collection", "training", "heads", "calibration"]


@pytest.mark.slow
def test_shuffled_controls_see_the_same_steps_with_other_actions(tmp_path, monkeypatch):
    store, seen = ArtifactStore(tmp_path), []
    pipeline.replicate(store, 0, RECIPE, progress=False)
    train = pipeline.training.train

    def spy(data, *args):
        seen.append(data)
        return train(data, *args)

    monkeypatch.setattr(pipeline.training, "train", spy)
    pipeline.train_control(store, 1, RECIPE, progress=False)
    data = pipeline.Trajectories.load(store.path(name_of(0, "trajectories.npz")))
    assert (seen[0].agent == data.agent).all()
    assert (seen[0].returns == data.returns).all()
    assert sorted(seen[0].actions) == sorted(data.actions)
    assert (seen[0].actions != data.actions).mean() > 0.3
    model = pipeline.DecisionTransformer.from_pretrained(store.path(pipeline.CONTROLS[1]))
    assert "obstacle_head" in model.metadata


def test_measures_of_curves_written_out():
    rows = [(-1.0, -0.98, 0.0), (0.0, 0.02, 0.9), (0.5, 0.6, 0.1), (0.9, 0.94, 0.0)]
    curves = pd.concat(
        pd.DataFrame(rows, columns=["rtg", "mean", "survived"]).assign(acting=acting)
        for acting in ("greedy", "sampled")
    )
    assert measures(curves) == pytest.approx(
        {f"{acting} {rtg:g}": mean for acting in ("greedy", "sampled") for rtg, mean, _ in rows if rtg != 0.5}
        | {"survived 0": 0.9, "error": (0.02 + 0.1 + 0.04) / 3}
    )


def test_no_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        replicate_all(ArtifactStore(tmp_path), [0], 0, log_stage)


def test_the_shipped_reference_does_what_it_is_asked_for():
    """Worked out from the table itself, 500 episodes a point; the error bar is closer than that of a replication."""
    curves = pd.read_parquet(ArtifactStore().path("seed_0/calibration.parquet"))
    assert (curves["episodes"] == 500).all()
    greedy, sampled = (curves[curves["acting"] == how].set_index("rtg") for how in ("greedy", "sampled"))
    assert greedy["mean"][0.9] >= 0.93
    assert greedy["mean"][-1.0] <= -0.95
    assert abs(sampled["mean"][0.0]) <= 0.05
    assert sampled["survived"][0.0] >= 0.85
    asked = sampled.loc[0.0:0.9, "mean"]
    assert len(asked) == 10
    assert (asked - asked.index).abs().mean() <= 0.09
