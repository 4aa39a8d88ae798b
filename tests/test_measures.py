"""Findings and scorecard as artifacts: put together from what the store holds, made once, named where absent."""

import numpy as np
import pandas as pd
import pytest

from dtbook import measures
from dtbook.analysis import ablations
from dtbook.analysis.attribution import preference_direction
from dtbook.analysis.head_circuit import Circuit, measure_circuit
from dtbook.analysis.weights import Embeddings
from dtbook.artifacts import ArtifactError, ArtifactStore
from dtbook.claims import CLAIMS, RULES
from dtbook.gridworld import all_observations
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pipeline import table_writer


def put(store, name, table):
    with store.write(name, stage="claims", code=["dtbook.claims.rules"], parameters={}, seeds=[0]) as path:
        table_writer(table)(path)


@pytest.fixture
def store(tmp_path):
    store = ArtifactStore(tmp_path)
    for seed in range(10):
        rows = [{"claim": id, "effect": 1.0 + seed / 10, "passed": float(seed < 9)} for id in RULES]
        put(store, f"seed_{seed}/claims.parquet", pd.DataFrame(rows))
    rows = pd.DataFrame({"claim": list(RULES), "effect": 0.5, "passed": 1.0})
    put(store, measures.POST_CLAIMS, rows)
    put(store, measures.CONTROL_CLAIMS, rows.assign(passed=0.0, model="untrained_0"))
    return store


def test_scorecard_is_put_together_and_kept(store):
    measures.make_scorecard(store, range(10))
    card = pd.read_parquet(store.path("scorecard.parquet")).set_index("claim")
    assert list(card.index) == list(CLAIMS)
    assert card.loc["C14", ["passed", "n", "verdict", "posts_weights"]].tolist() == [9, 10, "replicated", 0.5]
    assert card.loc["C14", "effect"] == pytest.approx(1.45)
    assert len(pd.read_csv(store.path("scorecard.csv"))) == len(CLAIMS)
    made = store.path("scorecard.parquet").stat().st_mtime_ns
    measures.make_scorecard(ArtifactStore(store.root), range(10))
    assert store.path("scorecard.parquet").stat().st_mtime_ns == made
    measures.make_scorecard(ArtifactStore(store.root), range(9))  # other replications, another card
    assert pd.read_parquet(store.root / "scorecard.parquet")["n"].max() == 9


def test_experiments_decide_the_claims_about_training(store):
    runs = pd.DataFrame(
        {"claim": "C26", "effect": [0.95, 0.97, 0.99], "passed": 1.0, "model": ["a", "b", "c"]}
    )
    put(store, measures.EXPERIMENT_CLAIMS, runs)
    measures.make_scorecard(store, range(10))
    card = pd.read_parquet(store.path("scorecard.parquet")).set_index("claim")
    assert card.loc["C26", ["passed", "n", "verdict"]].tolist() == [3, 3, "replicated"]
    assert card.loc["C27", "verdict"] == "undecided"


def test_findings_name_their_replication(store):
    table = measures.findings(store, [3, 7])
    assert table.groupby("model")["seed"].unique().map(list).to_dict() == {"seed_3": [3], "seed_7": [7]}


def test_tables_of_the_anatomy_are_kept_by_the_models_hash(tmp_path, monkeypatch):
    store, small = ArtifactStore(tmp_path), {"rtgs": (0.9,), "timesteps": (3,)}
    monkeypatch.setattr(measures, "ANATOMY", {"neurons": (ablations.neurons, small)})
    monkeypatch.setattr(
        measures, "PLAY_SETTINGS", {"rtgs": (0.9,), "episodes": 2, "max_steps": 10, "seed": 0}
    )
    monkeypatch.setattr(measures, "_observations", lambda task: all_observations(5, 2))
    made = []
    for seed in (1, 1, 2):  # the second call makes nothing, the third all
        with store.write(
            "seed_0/model", stage="training", code=["dtbook.model.transformer"], seeds=[seed]
        ) as path:
            DecisionTransformer(
                DTConfig(d_model=8, d_head=4, d_mlp=8, max_steps=10), seed=seed
            ).save_pretrained(path)
        measures.measure_anatomy(ArtifactStore(tmp_path), "seed_0", progress=False)
        entry = store.entries()["seed_0/neurons.parquet"]
        assert entry["parameters"]["model"] == store.entries()["seed_0/model"]["sha256"]
        made.append((tmp_path / "seed_0/neurons.parquet").stat().st_mtime_ns)
    assert made[0] == made[1] < made[2]
    model = DecisionTransformer.from_pretrained(tmp_path / "seed_0/model")
    expected = ablations.neurons(model, all_observations(5, 2), **small)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "seed_0/neurons.parquet"), expected)
    assert set(pd.read_parquet(tmp_path / "seed_0/ablated_play.parquet")["ablated"]) == {
        "none",
        "L0H0",
        "L0H1",
        "L0 MLP",
    }


def test_the_circuit_is_kept_by_the_models_hash(tmp_path, monkeypatch):
    few = {"head": 0, "rtgs": (0.9,), "rtg": 0.9, "timesteps": (3,), "timestep": 3, "situations": ("goal",)}
    monkeypatch.setattr(measures, "CIRCUIT_SETTINGS", few)
    monkeypatch.setattr(measures, "_observations", lambda task: all_observations(5, 2))
    store, config = ArtifactStore(tmp_path), DTConfig(d_model=8, d_head=4, d_mlp=8, max_steps=10)
    model = DecisionTransformer(config, seed=1).eval()
    with store.write("seed_0/model", stage="training", code=["dtbook.model.transformer"], seeds=[1]) as path:
        model.save_pretrained(path)
    for _ in range(2):  # the second call finds it made
        measures.measure_circuit_of(store, "seed_0", progress=False)
    found = Circuit.load(store.path("seed_0/circuit"))
    expected = measure_circuit(model, all_observations(5, 2), **few)
    assert np.array_equal(found.maps["OV"], expected.maps["OV"])
    pd.testing.assert_frame_equal(found.effects, expected.effects)
    on = Embeddings.load(store.path("seed_0/embeddings.safetensors")).on("F-R")
    assert np.allclose(on["rtg"], (model.W_E_rtg @ preference_direction(model, "F-R")).detach(), atol=1e-6)


def test_absent_controls_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="has no controls/shuffled_0"):
        measures.measure_controls(ArtifactStore(tmp_path))
