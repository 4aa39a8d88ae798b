"""What chapter 14 promises: other tasks and contexts through `replicate`, own weights, a hub and back."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from dtbook.artifacts import ArtifactError, ArtifactStore
from dtbook.gridworld import Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pages.notebooks import run_notebook, small_parameters
from dtbook.pipeline import Recipe, load_snapshots, name_of, replicate
from dtbook.rollout import calibration_curve, rollout
from dtbook.training import Sampler, TrainConfig
from dtbook.trajectories import Trajectories
from dtbook.trajectories.collection import QuotaConfig
from dtbook.trajectories.ppo import PPOConfig

CHAPTER = Path(__file__).resolve().parent.parent / "notebooks/14_bring_your_own.ipynb"
SEED, MAX_STEPS = 3, 30
SMALL = {"d_model": 16, "d_head": 8, "d_mlp": 16, "max_steps": MAX_STEPS}


def cell(notebook, name):
    """The cell of a notebook that has this id."""
    return next(each for each in nbformat.read(notebook, as_version=4).cells if each["id"] == name)


# A replication of another task


def recipe_of(task, n_timesteps):
    return Recipe(
        task=task,
        ppo=PPOConfig(total_steps=16 * 32 * 12, num_steps=32),
        envs=16,
        quota=QuotaConfig(steps_per_class=300, round_episodes=64, max_rounds=20),
        model=DTConfig(n_timesteps=n_timesteps, **SMALL),
        train=TrainConfig(steps=30, batch_size=32, balance_classes=False, evaluation_episodes=3),
        snapshots=(0, 30),
        calibration={"rtgs": [-1.0, 0.9], "episodes": 4, "max_steps": MAX_STEPS, "task": task},
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (Task(6, 2, MAX_STEPS, random_start=True), 1),
            id="another size, two obstacles, random starts",
            marks=pytest.mark.slow,
        ),
        pytest.param((Task(5, 1, MAX_STEPS), 3), id="three timesteps", marks=pytest.mark.slow),
    ],
)
def made(request, tmp_path_factory):
    """A store with all that `replicate` makes, and its recipe."""
    store, recipe = ArtifactStore(tmp_path_factory.mktemp("made")), recipe_of(*request.param)
    replicate(store, SEED, recipe, progress=False)
    return store, recipe


def windows(store, recipe):
    """What the model was trained on, as its arguments."""
    data = Trajectories.load(store.path(name_of(SEED, "trajectories.npz")))
    batch = Sampler(data, recipe.model.n_timesteps, recipe.train).batch(np.random.default_rng(0))
    return *batch[:3], batch.actions[:, :-1]


@pytest.mark.parametrize("file", ["history.npz", "trajectories.npz"])
def test_its_episodes_are_of_that_task(made, file):
    store, recipe = made
    task, data = recipe.task, Trajectories.load(store.path(name_of(SEED, file)))
    assert data.task == task
    assert data.obstacles.shape == (len(data.actions), task.n_obstacles)
    first = {(int(data.agent[row]), int(data.direction[row])) for row in data.episode_starts}
    inside = (task.size - 2) ** 2
    if task.random_start:  # anywhere but on the goal
        assert len({agent for agent, _ in first}) == inside - 1
        assert {direction for _, direction in first} == {0, 1, 2, 3}
    else:
        assert first == {(task.size + 1, 0)}  # (1, 1), facing east
    assert data.lengths.max() <= task.max_steps
    returns = {-1: -1.0, 0: 0.0, 1: 1 - 0.9 * data.lengths / task.max_steps}  # as minigrid pays
    for sign, expected in returns.items():
        here = np.sign(data.returns) == sign
        np.testing.assert_allclose(data.returns[here], np.broadcast_to(expected, here.shape)[here], rtol=1e-6)


@torch.no_grad()
def test_its_model_has_that_shape(made):
    store, recipe = made
    assert store.verify() == []
    model = DecisionTransformer.from_pretrained(store.path(name_of(SEED, "model")))
    context = recipe.model.n_timesteps
    assert model.cfg == recipe.model
    assert (len(model.W_pos), len(model.W_E_time)) == (3 * context, MAX_STEPS + 1)
    losses = pd.read_parquet(store.path(name_of(SEED, "training.parquet")))["loss"]
    assert len(losses) == recipe.train.steps
    assert np.isfinite(losses).all()
    states, *others = windows(store, recipe)
    assert states.shape[1] == context
    logits = model(states, *others)
    snapshots = load_snapshots(store, SEED)
    assert list(snapshots) == [0, recipe.train.steps]
    torch.testing.assert_close(snapshots[recipe.train.steps](states, *others), logits, atol=0.02, rtol=0)
    if context > 1:  # what was seen first is read to the last
        changed = states.clone()
        changed[:, 0] = 0
        assert (model(changed, *others)[:, -1] != logits[:, -1]).any(1).all()


def test_its_calibration_is_of_that_task(made):
    store, recipe = made
    for name in ("ppo.parquet", "trajectories.npz", "model", "calibration.parquet"):
        assert store.entries()[name_of(SEED, name)]["parameters"]["task"] == asdict(recipe.task)
    model = DecisionTransformer.from_pretrained(store.path(name_of(SEED, "model")))
    curve = pd.read_parquet(store.path(name_of(SEED, "calibration.parquet")))
    assert curve[["acting", "rtg"]].to_numpy().tolist() == [
        [acting, rtg] for acting in ("greedy", "sampled") for rtg in (-1.0, 0.9)
    ]
    assert np.isfinite(curve.select_dtypes("number")).all(axis=None)
    for acting, part in curve.groupby("acting"):
        asked = np.repeat([-1.0, 0.9], 4)
        played = rollout(model, asked, acting == "greedy", seed=SEED, task=recipe.task)
        assert part["mean"].tolist() == pytest.approx(played.returns.reshape(2, 4).mean(1))
        assert part["length"].tolist() == played.lengths.reshape(2, 4).mean(1).tolist()


# The chapter, with weights of one's own


@pytest.mark.slow
def test_the_chapter_takes_a_model_from_a_folder(tmp_path):
    model = DecisionTransformer(DTConfig(n_timesteps=2, **SMALL), seed=5)
    model.save_pretrained(tmp_path / "model")
    parameters = small_parameters(CHAPTER) | {"subject": str(tmp_path / "model"), "seed": 2}
    run_notebook(CHAPTER, tmp_path / "executed.ipynb", parameters, "inputs")
    shown = cell(tmp_path / "executed.ipynb", "load").outputs[-1]["data"]["text/plain"]
    curve = calibration_curve(model, [-1.0, 0.0, 0.9], parameters["episodes"], max_steps=MAX_STEPS, seed=2)
    assert shown == repr(curve[["rtg", "mean", "sem", "succeeded", "survived", "died"]].round(2))
    received = cell(tmp_path / "executed.ipynb", "hub-model").outputs[-1]["data"]["text/plain"]
    assert received == "['README.md', 'config.json', 'model.safetensors']"
    refused = cell(tmp_path / "executed.ipynb", "hub-model-refused").outputs[-1]["text"]
    assert refused == "…/received/model.safetensors has sha256 …; expected was ….\n"


# A hub and back


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the hub's place; downloads are links into a cache, as huggingface_hub leaves them."""

    def create_repo(repo_id, **_):
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(*, repo_id, folder_path, **_):
        assert (tmp_path / "hub" / repo_id).is_dir(), "upload_folder makes no repository"
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, **_):
        source, target = tmp_path / "hub" / repo_id, tmp_path / "cache" / repo_id
        for file in filter(Path.is_file, source.rglob("*")):
            link = target / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
        return str(target)

    for call in (create_repo, upload_folder, snapshot_download):  # each takes only what the real one takes
        real = getattr(huggingface_hub, call.__name__)
        monkeypatch.setattr(huggingface_hub, call.__name__, create_autospec(real, side_effect=call))
    for call in (create_repo, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, call.__name__, staticmethod(call))
    return tmp_path / "hub"


@pytest.fixture
def model():
    return DecisionTransformer(DTConfig(**SMALL), seed=6, metadata={"step": 1})


def assert_same(model, again):
    assert again.cfg == model.cfg
    assert again.metadata == model.metadata
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(9, (20, 1, 7, 7, 3), dtype=torch.uint8, generator=generator)
    inputs = states, torch.linspace(-1, 1, 20)[:, None], torch.arange(20)[:, None]
    assert torch.equal(model(*inputs), again(*inputs))


def test_what_the_chapter_says_of_the_hub_runs(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    names = {"folder": tmp_path / "mine", "DecisionTransformer": DecisionTransformer}
    (code,) = re.findall(r"```python\n(.*?)```", cell(CHAPTER, "hub").source, re.DOTALL)
    exec(code, names)
    assert_same(model, names["model"])
    assert sorted(path.name for path in (hub / "you/your-model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    weights = hub / "you/your-model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256"):
        DecisionTransformer.from_pretrained(names["received"])


def test_push_to_hub_saves_makes_the_repository_and_uploads(hub, model):
    model.push_to_hub("you/your-model")
    received = huggingface_hub.snapshot_download("you/your-model")
    assert_same(model, DecisionTransformer.from_pretrained(received))
    with pytest.raises(FileNotFoundError, match=r"you/your-model/config\.json does not exist"):
        DecisionTransformer.from_pretrained("you/your-model")  # no folder here: the download comes first


def test_a_store_goes_to_the_hub_as_it_is(hub, model, tmp_path):
    mine = ArtifactStore(tmp_path / "mine")
    for name in ("seed_10/model", "seed_11/model"):
        with mine.write(name, stage="training", code=["dtbook.training"]) as path:
            model.save_pretrained(path)
    huggingface_hub.create_repo("you/your-data", repo_type="dataset")
    huggingface_hub.upload_folder(repo_id="you/your-data", folder_path=mine.root, repo_type="dataset")
    received = ArtifactStore(huggingface_hub.snapshot_download("you/your-data", repo_type="dataset"))
    assert received.verify() == []
    assert_same(model, DecisionTransformer.from_pretrained(received.path("seed_10/model")))
    config = hub / "you/your-data/seed_11/model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"metadata": {}}))
    with pytest.raises(ArtifactError, match=r"seed_11/model is not what .* says"):
        received.path("seed_11/model")
