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
from forked import Fork

from dtbook.artifacts import ArtifactStore
from dtbook.artifacts.comparison import compare
from dtbook.model import DecisionTransformer
from dtbook.pipeline import name_of
from dtbook.pipeline.replication import REPLICATION, REPLICATION_ROWS
from dtbook.trajectories import Trajectories

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]

SMALL = """
import sys
from dtbook.artifacts.store import ArtifactStore
from dtbook.pipeline import replicate
from small import RECIPE
replicate(ArtifactStore(sys.argv[1]), 3, RECIPE, progress=False)
"""
DYING = SMALL.replace(
    "replicate(Art",
    """
import os, signal
from dataclasses import replace
from dtbook.pipeline import engine
made = engine.Job.writers
def dying(job):
    def half(path):
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return [*made(job)[:-1], half] if job.stage.name == sys.argv[2] else made(job)
engine.Job.writers = dying
replicate(Art""",
)
FILES = [name.format(of="seed_3") for stage in REPLICATION for name in REPLICATION_ROWS[stage].makes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes that all others are compared with, made under a seed of hashes that no fork has."""
    folder = tmp_path_factory.mktemp("whole")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    subprocess.run([sys.executable, "-c", SMALL, folder], env=environment, check=True)
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
    assert curve["acting"].tolist() == ["greedy"] * 4 + ["sampled"] * 4
    losses = pd.read_parquet(whole.path(name_of(3, "training.parquet")))["loss"]
    assert len(losses) == 30
    assert np.isfinite(losses).all()


def test_killed_at_any_moment_it_ends_in_the_same_bytes(whole, tmp_path):
    """Killed four times, each at a random moment after one more artifact was there: nothing damaged lies about."""
    rng, kills = random.Random(5), 0
    for artifacts in (1, 3, 5, 7):
        process = Fork(SMALL, tmp_path)
        while process.poll() is None and len(ArtifactStore(tmp_path).entries()) < artifacts:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        kills += process.poll() is None
        process.kill()
        for path in (tmp_path / "seed_3").glob("*"):
            if path.suffix == ".npz":
                Trajectories.load(path)
            elif path.suffix == ".parquet":
                pd.read_parquet(path)
            elif path.name in ("model", "trained"):
                DecisionTransformer.from_pretrained(path)
    assert kills >= 2, "the runs should have been killed on their way"
    assert Fork(SMALL, tmp_path).wait() == 0
    assert compare(ArtifactStore(tmp_path), whole, FILES) == dict.fromkeys(FILES, "identical")
    assert ArtifactStore(tmp_path).verify() == []


def test_killed_while_each_stage_writes_it_keeps_what_is_whole(whole, tmp_path):
    had = -1
    for stage in REPLICATION:
        assert Fork(DYING, tmp_path, stage).wait() == -signal.SIGKILL
        store = ArtifactStore(tmp_path)
        entries = set(store.entries())
        assert store.verify() == []
        assert len(entries) > had, "what the stages before made is there"
        assert not entries >= set(FILES)
        had = len(entries)
    assert Fork(SMALL, tmp_path).wait() == 0
    assert compare(ArtifactStore(tmp_path), whole, FILES) == dict.fromkeys(FILES, "identical")


def test_a_second_call_makes_nothing_again(whole):
    before = {name: (whole.root / name).stat().st_mtime_ns for name in FILES}
    assert Fork(SMALL, whole.root).wait() == 0
    assert before == {name: (whole.root / name).stat().st_mtime_ns for name in FILES}
