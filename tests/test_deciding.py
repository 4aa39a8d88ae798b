"""Which seeds decide by the post's recipe, and that their replications are made from PPO's own history."""

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from small import RECIPE

from dtbook.artifacts import ArtifactStore
from dtbook.artifacts.comparison import compare
from dtbook.artifacts.store import CHECKOUT
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pipeline import deciding
from dtbook.pipeline.points import POINT_KINDS, recipe_of, run_replication
from dtbook.pipeline.replication import Recipe
from dtbook.pipeline.reproduce import reproduce_data
from dtbook.pipeline.sweep import read_sweep
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


def test_the_sweep_of_recipes_goes_from_the_posts_to_the_books():
    points = read_sweep(CHECKOUT / "sweeps" / "recipes.yml", CHECKOUT / "notebooks")
    assert len(points) == 8 * 5
    recipes = [recipe_of({**POINT_KINDS["replication"].defaults, **point.parameters}) for point in points]
    for found, expected in ((recipes[0], Recipe.post()), (recipes[-1], Recipe.first())):
        beside = {name: getattr(found.train, name) for name in ("checkpoint_every", "evaluation_episodes")}
        expected = replace(expected, train=replace(expected.train, **beside), folder="")
        assert found == replace(expected, snapshots=found.snapshots)


@pytest.mark.slow
def test_a_point_that_is_a_replication_keeps_what_data_would(tmp_path):
    parts = {name: asdict(getattr(SMALL, name)) for name in ("task", "ppo", "model", "train")}
    given = {f"{part}.{name}": value for part, settings in parts.items() for name, value in settings.items()}
    given |= {f"calibration.{name}": value for name, value in SMALL.calibration.items()}
    given |= {"seed": 2, "envs": SMALL.envs, "episodes": "history"}
    row = run_replication(
        {**POINT_KINDS["replication"].defaults, **given}, tmp_path / "kept", tmp_path / "made"
    )
    kept = ArtifactStore(tmp_path / "kept")
    scores = pd.read_parquet(kept.path("seed_2/heads.parquet"))["score"]
    assert [row["score L0H0"], row["score L0H1"]] == scores.tolist()
    assert not [name for name in kept.entries() if name.endswith(("trained", "history.npz"))]


@pytest.mark.slow
def test_all_by_the_posts_recipe_is_made_and_decided(tmp_path, monkeypatch):
    """Two replications decide, a third is for M4: its model is not shipped; the scorecard is over the two."""
    store, shipped = ArtifactStore(tmp_path), ArtifactStore()
    monkeypatch.setattr(deciding, "LEAST_SHARE", 0.03)
    monkeypatch.setattr(deciding, "ALL", 3)
    monkeypatch.setattr(deciding, "seeds_that_decide", partial(deciding.seeds_that_decide, wanted=2))
    names = reproduce_data(store, shipped, everything=True, recipe=SMALL, workers=2)
    tried = pd.read_parquet(store.path(deciding.HISTORIES))
    first, second, third = tried["seed"][tried["decides"]]
    models = [name for name in names if name.endswith("/model")]
    assert models == [f"recipe_post/seed_{seed}/model" for seed in (first, second)]
    assert f"recipe_post/seed_{third}/claims.parquet" in names
    assert not [name for name in names if name.endswith(("history.npz", "training.parquet"))]
    assert store.entries()["recipe_post/controls/claims.parquet"]["stage"] == "control claims"
    card = pd.read_parquet(store.path("scorecard.parquet")).set_index("claim")
    assert card["n"]["C02"] == 2
    assert card["controls_n"]["C02"] == 6
    assert set(compare(store, store, names).values()) == {"identical"}
    again = []
    reproduce_data(store, shipped, everything=True, recipe=SMALL, say=again.append)
    assert {line.rpartition(": ")[2] for line in again} == {"up to date"}
