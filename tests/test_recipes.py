"""Two recipes part by part: the sweep's models measured, one training watched, against values computed by hand."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from dtbook.analysis.heads import obstacle_head_scores
from dtbook.artifacts import ArtifactError, ArtifactStore
from dtbook.claims import RULES
from dtbook.gridworld.env import all_observations
from dtbook.gridworld.rules import Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pipeline import Recipe, experiments, recipes, sweep
from dtbook.pipeline.engine import Job
from dtbook.pipeline.replication import calibrate, calibration_of

SMALL = {"d_model": 16, "d_head": 8, "d_mlp": 16, "max_steps": 60}
TASK = Task(size=5, n_obstacles=1, max_steps=30)
CALIBRATION = {"rtgs": [-1.0, 0.0, 0.5, 0.9], "episodes": 3, "max_steps": 30}
RECIPE = replace(Recipe.post(), task=TASK, calibration=CALIBRATION)


def moved(cfg, seed):
    """A model that has gone from its start by a known step: the RTG embedding is turned round."""
    model = DecisionTransformer(cfg, seed).requires_grad_(False)
    model.W_E_rtg.neg_()
    return model.eval()


def test_the_sweep_has_five_seeds_in_each_of_eight_cells():
    cells = pd.DataFrame([recipes.cell_of(point) for point in experiments.read("recipes")])
    sizes = cells.groupby([*recipes.FACTORS])["seed"].agg(["size", "nunique"])
    assert (sizes == 5).to_numpy().all()
    assert len(sizes) == 8
    assert cells["point"].is_unique
    for factor, levels in recipes.FACTORS.items():
        assert set(cells[factor]) == set(levels)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Four points of a sweep, of which two have been run, and the folder that they lie in."""
    root = tmp_path_factory.mktemp("sweeps")
    described = {
        "stage": "replication",
        "points": [
            {"model.init": "post", "episodes": "history", "train.schedule": "constant"},
            {"model.init": "first", "episodes": "quota", "train.schedule": "cosine"},
        ],
        "grid": {"seed": [2, 3]},
    }
    points, store = sweep.points_of(described, root), ArtifactStore(root / "recipes")
    for point in (points[0], points[3]):
        model = moved(DTConfig(**SMALL, init=point.parameters["model.init"]), point.parameters["seed"])
        with store.write(point.artifact, stage="replication", code=["dtbook.pipeline.sweep"]) as folder:
            at = folder / f"seed_{point.parameters['seed']}"
            model.save_pretrained(at / "model")
            calibrate(model, calibration_of(RECIPE), 0).to_parquet(at / "calibration.parquet")
            (folder / "row.json").write_text(json.dumps({}))
    return root, points


@pytest.fixture(scope="module")
def tables(swept, tmp_path_factory):
    root, points = swept
    store = ArtifactStore(tmp_path_factory.mktemp("data"))
    job = recipes.collected_recipes(store, points, root, RECIPE)
    assert job.ensure() > 0
    assert job.ensure() is None, "it was current"
    return [pd.read_parquet(store.path(name)) for name in (recipes.RECIPE_CLAIMS, recipes.RECIPE_MODELS)]


@pytest.mark.slow
def test_the_part_of_the_sweep_that_is_there_is_collected(swept, tables):
    claims, models = tables
    cells = [("post", "history", "post", 2), ("first", "quota", "first", 3)]
    names = [*recipes.FACTORS, "seed"]
    assert list(models[names].itertuples(index=False, name=None)) == cells
    assert models["point"].tolist() == [swept[1][0].id, swept[1][3].id]
    assert list(claims[names].drop_duplicates().itertuples(index=False, name=None)) == cells
    assert claims.groupby("point").size().tolist() == [len(RULES)] * 2
    assert list(claims.columns) == ["point", *names, "claim", "effect", "passed"]


@pytest.mark.slow
def test_without_a_point_there_is_nothing_to_collect(swept, tmp_path):
    with pytest.raises(ArtifactError, match=r"has no point of recipes: `dtbook sweep sweeps/recipes\.yml`"):
        recipes.collected_recipes(ArtifactStore(tmp_path / "data"), swept[1], tmp_path, RECIPE)


@pytest.mark.slow
def test_a_model_of_the_sweep_is_measured_as_by_hand(tables):
    claims, models = tables
    model = moved(DTConfig(**SMALL, init="first"), 3)
    row = models.set_index("seed").loc[3]
    scores = obstacle_head_scores(model, all_observations(5, 1))["score"]
    assert row[["score L0H0", "score L0H1"]].tolist() == pytest.approx(scores.tolist())
    every = torch.cat([weight.flatten() for weight in model.state_dict().values()])
    assert row["norm"] == pytest.approx(float(every.norm()), rel=1e-6)
    assert row["norm W_Q"] == pytest.approx(float(model.blocks[0].attn.W_Q.norm()), rel=1e-6)
    assert row["cosine W_E_rtg"] == pytest.approx(-1)
    assert row["distance W_E_rtg"] == pytest.approx(2 * float(model.W_E_rtg.norm()), rel=1e-6)
    assert -1 <= row["greedy 0.9"] <= 1
    assert 0 <= row["sampled survived 0"] <= 1
    found = claims[claims["seed"] == 3].set_index("claim")
    c14 = float(model.W_E_rtg @ (model.W_U[:, 2] - model.W_U[:, 1]))
    assert found["effect"]["C14"] == pytest.approx(c14, abs=1e-6)
    assert found["passed"]["C14"] == float(c14 >= 0.5), "it has left its start, so it is decided"


def test_a_claim_s_effects_are_the_contrasts_between_its_cells():
    rows = [
        {"start": s, "data": d, "optimiser": o, "seed": seed, "claim": claim, "effect": value, "passed": 1.0}
        for s in recipes.FACTORS["start"]
        for d in ("history", "quota")
        for o in recipes.FACTORS["optimiser"]
        for seed in (0, 1)
        for claim, value in (("C09", 0.2 + 0.5 * (o == "post") + seed), ("C14", np.nan))
    ]
    found = recipes.claim_effects(pd.DataFrame(rows)).set_index(["claim", "term"])["effect"]
    assert found["C09"].to_dict() == pytest.approx(
        {"start": 0, "data": 0, "optimiser": 0.5}
        | dict.fromkeys(("start × data", "start × optimiser", "data × optimiser"), 0),
        abs=1e-12,
    )
    assert "C14" not in found.index.get_level_values("claim"), "it has no effect anywhere"
    assert recipes.claim_effects(pd.DataFrame(rows[:4])).empty


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A replication of the post's recipe with two snapshots, its heads swapped since; and its table."""
    made, store = (ArtifactStore(tmp_path_factory.mktemp(name)) for name in ("made", "data"))
    cfg, of = DTConfig(**SMALL, init="post"), "recipe_post/seed_4"
    trained = {0: DecisionTransformer(cfg, 4).eval(), 70: moved(cfg, 4)}
    flat = {f"{at}/{k}": v.clone() for at, m in trained.items() for k, v in m.state_dict().items()}
    with made.write(f"{of}/snapshots.safetensors", stage="training", code=["dtbook.training"]) as path:
        save_file(flat, path)
    with made.write(f"{of}/model", stage="heads", code=["dtbook.analysis.heads"]) as path:
        trained[70].permute_heads(0, [1, 0]).save_pretrained(path)
    losses = pd.DataFrame({"loss": np.arange(70.0)})
    with made.write(f"{of}/training.parquet", stage="training", code=["dtbook.training"]) as path:
        losses.to_parquet(path)
    Job(recipes.ALONG, store, of, RECIPE, (4,), source=made).ensure()
    return trained, pd.read_parquet(store.path(f"{of}/along.parquet")).set_index("step")


@pytest.mark.slow
def test_along_training_a_model_is_measured_with_the_heads_of_its_end(watched):
    trained, table = watched
    assert table.index.tolist() == [0, 70]
    assert table["cosine W_E_rtg"].tolist() == pytest.approx([1, -1])
    assert table["distance W_E_rtg"][0] == 0
    for step, model in trained.items():
        before = obstacle_head_scores(model, all_observations(5, 1))["score"].tolist()
        assert table.loc[step, ["score L0H1", "score L0H0"]].tolist() == pytest.approx(before, rel=1e-4)
        c14 = float(model.W_E_rtg.detach() @ (model.W_U[:, 2] - model.W_U[:, 1]).detach())
        assert table["C14"][step] == pytest.approx(c14, abs=1e-6)
    assert np.isnan(table["C14 passed"][0]), "at the start nothing is learnt"
    assert table["C14 passed"][70] == float(table["C14"][70] >= 0.5)
    assert np.isnan(table["loss"][0])
    assert table["loss"][70] == 34.5, "fewer than a hundred updates: the mean of all"
    assert {f"{claim}{end}" for claim in RULES for end in ("", " passed")} <= set(table.columns)
    assert table["explained"].between(table["explained trigram"], 1).all(), "a larger table explains more"
    assert ((table["circuit share"] >= 0.95) == table["circuit size"].notna()).all()


def test_the_loss_is_that_of_the_last_hundred_updates():
    losses = recipes.loss_before(np.arange(1000.0), np.array([0, 1, 50, 1000]))
    assert losses[1:].tolist() == [0, 24.5, 949.5]
    assert np.isnan(losses[0])


def test_the_graph_has_what_is_there(swept, tmp_path):
    root, points = swept
    made, data = ArtifactStore(tmp_path / "made"), ArtifactStore(tmp_path / "data")
    swept = {"recipes": points, "book_recipe": points}
    assert recipes.recipe_graph(data, made, swept, tmp_path) == []
    (job,) = recipes.recipe_graph(data, made, swept, root)
    assert [point.id for point in job.given] == [points[0].id, points[3].id]
    for of in ("recipe_post/seed_1", "recipe_post/seed_2", "seed_10"):
        name = f"{of}/snapshots.safetensors"
        with made.write(name, stage="training", code=["dtbook.training"]) as path:
            save_file({}, path)
    _, *watched = recipes.recipe_graph(data, made, swept, root)
    assert [job.of for job in watched] == ["recipe_post/seed_1", "seed_10"]


def delayed(sizes, explained, returns):
    columns = {"circuit size": sizes, "explained trigram": explained, "greedy 0.9": returns}
    return pd.DataFrame({"step": [0, 10, 100, 1000]} | columns).assign(**{"sampled 0.9": 0.9})


def test_what_is_interpretable_settles_with_the_circuit_and_what_is_explained():
    late = recipes.circuit_delay(delayed([np.nan, 60, 25, 15], [0.1, 0.8, 0.9, 0.9], [0, 0.9, 0.9, 0.9]))
    assert late == {"returns": 10, "explained": 10, "size": 100, "ratio": 10}
    explained_last = recipes.circuit_delay(delayed([9, 9, 9, 9], [0.1, 0.1, 0.1, 0.9], [0, 0, 0.9, 0.9]))
    assert explained_last == {"returns": 100, "explained": 1000, "size": 0, "ratio": 10}
    none = recipes.circuit_delay(delayed([9, 9, 9, np.nan], [0.9] * 4, [0, 0, 0.9, 0.9]))
    assert none["returns"] == 100
    assert np.isnan([none["size"], none["ratio"]]).all()
    assert np.isnan(recipes.circuit_delay(delayed([9] * 4, [0.9] * 4, [0.9] * 4))["ratio"])
