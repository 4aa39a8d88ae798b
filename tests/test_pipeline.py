"""The whole way from nothing, small: the same bytes twice, and kills that leave only whole artifacts."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from dtbook.artifacts import ArtifactStore
from dtbook.comparison import compare
from dtbook.model import DecisionTransformer
from dtbook.pipeline import REFERENCE_ONLY, name_of, shipped_names
from dtbook.trajectories import Trajectories

pytestmark = pytest.mark.slow

SMALL = """
import sys
from dtbook import pipeline
from dtbook.artifacts import ArtifactStore
recipe = pipeline.Recipe(
    task=pipeline.Task(size=5, n_obstacles=1, max_steps=30),
    ppo=pipeline.PPOConfig(total_steps=16 * 32 * 12, num_steps=32, minibatches=4),
    envs=16,
    quota=pipeline.QuotaConfig(steps_per_class=300, round_episodes=64, max_rounds=20),
    model=pipeline.DTConfig(d_model=16, d_head=8, d_mlp=16, max_steps=30),
    train=pipeline.TrainConfig(steps=30, batch_size=32, checkpoint_every=5, evaluation_episodes=3),
    calibration={"rtgs": [-1.0, 0.9], "episodes": 4, "max_steps": 30},
)
pipeline.replicate(ArtifactStore(sys.argv[1]), 3, recipe, progress=False)
"""
DYING = SMALL.replace(
    "pipeline.replicate(",
    """
import os, signal
run_stage, dies = pipeline.run_stage, sys.argv[2]
def dying(store, seed, stage, rooms, parameters, names, make):
    def half(path):
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    run_stage(store, seed, stage, rooms, parameters, names, lambda: [*make()[:-1], half] if stage == dies else make())
pipeline.run_stage = dying
pipeline.replicate(""",
)
NOT_SHIPPED = ("trained", "checkpoints.safetensors")
FILES = shipped_names(3) + [name_of(3, file) for file in (*REFERENCE_ONLY, *NOT_SHIPPED)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, "-c", SMALL, str(folder)], check=True)
    return ArtifactStore(folder)


def test_every_artifact_is_there_and_says_what_made_it(whole):
    assert whole.verify() == []
    entries = whole.entries()
    assert set(entries) == set(FILES)
    for entry in entries.values():
        assert entry["seeds"] == [3]
        assert entry["parameters"]
        assert {"torch", "numpy", "minigrid"} <= set(entry["libraries"])
    assert entries[name_of(3, "model")]["parameters"]["train"]["steps"] == 30
    DecisionTransformer.from_pretrained(whole.path(name_of(3, "model")))
    data = Trajectories.load(whole.path(name_of(3, "trajectories.npz")))
    assert data.task.size == 5
    curve = pd.read_parquet(whole.path(name_of(3, "calibration.parquet")))
    assert curve["acting"].tolist() == ["greedy", "greedy", "sampled", "sampled"]
    losses = pd.read_parquet(whole.path(name_of(3, "training.parquet")))["loss"]
    assert len(losses) == 30
    assert np.isfinite(losses).all()


def test_killed_at_any_moment_it_ends_in_the_same_bytes(whole, tmp_path):
    """Killed four times, each at a random moment after one more artifact was there: nothing damaged lies about."""
    rng, kills = random.Random(5), 0
    for artifacts in (1, 3, 5, 7):
        process = subprocess.Popen([sys.executable, "-c", SMALL, str(tmp_path)])
        while process.poll() is None and len(ArtifactStore(tmp_path).entries()) < artifacts:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for path in (tmp_path / "seed_3").glob("*"):
            if path.suffix == ".npz":
                Trajectories.load(path)
            elif path.suffix == ".parquet":
                pd.read_parquet(path)
            elif path.name in ("model", "trained"):
                DecisionTransformer.from_pretrained(path)
    assert kills >= 2, "the runs should have been killed on their way"
    subprocess.run([sys.executable, "-c", SMALL, str(tmp_path)], check=True)
    assert compare(ArtifactStore(tmp_path), whole, FILES) == dict.fromkeys(FILES, "identical")
    assert ArtifactStore(tmp_path).verify() == []


def test_killed_while_each_stage_writes_it_keeps_what_is_whole(whole, tmp_path):
    had = -1
    for stage in ("ppo", "collection", "training", "heads", "calibration"):
        command = [sys.executable, "-c", DYING, str(tmp_path), stage]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        store = ArtifactStore(tmp_path)
        entries = set(store.entries())
        assert store.verify() == []
        assert len(entries) > had, "what the stages before made is there"
        assert not entries >= set(FILES)
        had = len(entries)
    subprocess.run([sys.executable, "-c", SMALL, str(tmp_path)], check=True)
    assert compare(ArtifactStore(tmp_path), whole, FILES) == dict.fromkeys(FILES, "identical")


def test_a_second_call_makes_nothing_again(whole):
    before = {name: (whole.root / name).stat().st_mtime_ns for name in FILES}
    subprocess.run([sys.executable, "-c", SMALL, str(whole.root)], check=True)
    assert before == {name: (whole.root / name).stat().st_mtime_ns for name in FILES}
