"""Findings and scorecard as artifacts: put together from what the store holds, made once, named where absent."""

import pandas as pd
import pytest

from dtbook import measures
from dtbook.artifacts import ArtifactError, ArtifactStore
from dtbook.claims import CLAIMS, RULES
from dtbook.pipeline import table_writer


def put(store, name, table):
    with store.write(name, stage="claims", rooms=["claims"], parameters={}, seeds=[0]) as path:
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


def test_absent_controls_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="has no controls/shuffled_0"):
        measures.measure_controls(ArtifactStore(tmp_path))
