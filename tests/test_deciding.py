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
    model=replace(RECIPE.model, init="post"),
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
    store = ArtifactStore(tmp_path)
    monkeypatch.setattr(deciding, "LEAST_SHARE", 0.03)  # seed 1 is passed over
    tried = deciding.histories(store, SMALL, wanted=2)
    shares = {}
    for seed in tried["seed"]:
        history = Trajectories.load(store.path(f"recipe_post/seed_{seed}/history.npz"))
        shares[seed] = [(history.classes == c).mean() for c in range(3)]
    np.testing.assert_allclose(tried[["−1", "0", "+"]], list(shares.values()))
    assert tried["decides"].tolist() == [min(each) >= 0.03 for each in shares.values()] == [True, False, True]
    pd.testing.assert_frame_equal(tried, pd.read_parquet(store.path("recipe_post/histories.parquet")))

    for job in deciding.jobs(store, [2], SMALL):
        job.ensure()
    assert "recipe_post/seed_2/claims.parquet" in store.entries()
    assert DecisionTransformer.from_pretrained(store.path("recipe_post/seed_2/model")).cfg.init == "post"
    sources = store.entries()["recipe_post/seed_2/training.parquet"]["parameters"]["from"]
    assert list(sources) == ["recipe_post/seed_2/history.npz"]
