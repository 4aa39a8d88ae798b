"""Which seeds decide by the post's recipe, and that their replications are made from PPO's own history."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from small import RECIPE

from dtbook.artifacts import ArtifactStore
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pipeline import deciding
from dtbook.pipeline.replication import Recipe
from dtbook.training import TrainConfig
from dtbook.trajectories import Trajectories
from dtbook.trajectories.ppo import PPOConfig

SMALL = replace(
    RECIPE,
    folder="recipe_post",
    episodes="history",
    model=DTConfig(max_steps=300, init="post"),
    train=replace(RECIPE.train, balance_classes=False, schedule="constant"),
)


def test_the_posts_recipe_is_made_of_its_presets():
    recipe = Recipe.post()
    assert (recipe.ppo, recipe.envs, recipe.episodes) == (PPOConfig.post(), 30, "history")
    assert (recipe.model, recipe.train) == (DTConfig.post(), TrainConfig.post())
    assert len(recipe.snapshots) >= 40
    assert recipe.snapshots[-1] == recipe.train.steps
    ratios = np.diff(np.log(recipe.snapshots[1:]))
    assert ratios.max() < 1.5 * np.median(ratios)  # a logarithmic grid


@pytest.mark.slow
def test_the_first_seeds_with_every_class_are_replicated(tmp_path, monkeypatch):
    store, lines = ArtifactStore(tmp_path), []
    alone = deciding.histories(
        store, SMALL, 1, say=lines.append
    )  # with the usual bar: whatever seed it takes
    counts = {}
    for seed in alone["seed"]:
        history = Trajectories.load(store.path(f"recipe_post/seed_{seed}/history.npz"))
        counts[seed] = [(history.classes == c).mean() for c in range(3)]
    assert [min(shares) >= 0.02 for shares in counts.values()] == alone["decides"].tolist()
    assert alone["decides"].tolist() == [False] * (len(alone) - 1) + [True]
    np.testing.assert_allclose(alone[["−1", "0", "+"]], list(counts.values()))

    monkeypatch.setattr(deciding, "LEAST_SHARE", min(counts[0]) + 1e-9)  # seed 0 is passed over
    deciding.replicate_deciding(store, SMALL, 1, say=lines.append)
    tried = pd.read_parquet(store.path("recipe_post/histories.parquet"))
    (chosen,) = tried["seed"][tried["decides"]]
    assert chosen == len(tried) - 1 > 0
    made = [name for name in store.entries() if name.endswith("/claims.parquet")]
    assert made == [f"recipe_post/seed_{chosen}/claims.parquet"]
    model = DecisionTransformer.from_pretrained(store.path(f"recipe_post/seed_{chosen}/model"))
    assert model.cfg.init == "post"
    sources = store.entries()[f"recipe_post/seed_{chosen}/training.parquet"]["parameters"]["from"]
    assert list(sources) == [f"recipe_post/seed_{chosen}/history.npz"]
    lines.clear()
    deciding.replicate_deciding(store, SMALL, 1, say=lines.append)
    assert all(line.endswith("up to date") for line in lines)
