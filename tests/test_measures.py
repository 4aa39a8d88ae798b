"""Findings and scorecard as artifacts: put together from what the store holds, made once, named where absent."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small
from click.testing import CliRunner

from dtbook import cli
from dtbook.analysis import ablations
from dtbook.analysis.attribution import preference_direction
from dtbook.analysis.head_circuit import Circuit, measure_circuit
from dtbook.analysis.neurons import neuron_table
from dtbook.analysis.weights import Embeddings
from dtbook.artifacts import ArtifactError, ArtifactStore
from dtbook.claims import CLAIMS, RULES
from dtbook.claims.evidence import Evidence
from dtbook.claims.rules import decide_claims
from dtbook.gridworld import all_observations
from dtbook.gridworld.rules import Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.model.subject import Subject
from dtbook.pipeline import Recipe, measure, replication
from dtbook.pipeline.engine import Job, failures, run_graph, table_writer


def put(store, name, table):
    with store.write(name, stage="claims", code=["dtbook.claims.rules"], parameters={}, seeds=[0]) as path:
        table_writer(table)(path)


@pytest.fixture
def store(tmp_path):
    store = ArtifactStore(tmp_path)
    for seed in range(10):
        rows = [{"claim": id, "effect": 1.0 + seed / 10, "passed": float(seed < 9)} for id in RULES]
        put(store, f"recipe_post/seed_{seed}/claims.parquet", pd.DataFrame(rows))
    rows = pd.DataFrame({"claim": list(RULES), "effect": 0.5, "passed": 1.0})
    put(store, measure.POST_CLAIMS, rows)
    controls = rows.assign(passed=(rows["claim"] == "C15").astype(float), model="untrained_0")
    put(store, f"recipe_post/{measure.CONTROL_CLAIMS}", controls)
    return store


def scorecard_of(store, n):
    return Job(measure.MEASURE_ROWS["scorecard"], ArtifactStore(store.root), seeds=tuple(range(n)))


def test_scorecard_is_put_together_and_kept(store):
    scorecard_of(store, 10).ensure()
    card = pd.read_parquet(store.path("scorecard.parquet")).set_index("claim")
    assert list(card.index) == list(CLAIMS)
    assert card.loc["C14", ["passed", "n", "verdict", "posts_weights"]].tolist() == [9, 10, "replicated", 0.5]
    assert card.loc["C14", "effect"] == pytest.approx(1.45)
    assert card.loc["C15", "verdict"] == "uninformative"
    assert (card["book_verdict"] == "undecided").all()
    assert len(pd.read_csv(store.path("scorecard.csv"))) == len(CLAIMS)
    made = store.path("scorecard.parquet").stat().st_mtime_ns
    assert scorecard_of(store, 10).ensure() is None
    assert store.path("scorecard.parquet").stat().st_mtime_ns == made
    scorecard_of(store, 9).ensure()  # other replications, another card
    assert pd.read_parquet(store.root / "scorecard.parquet")["n"].max() == 9


def test_the_books_own_recipe_stands_beside_the_posts_once_it_is_all_there(store):
    rows = pd.DataFrame({"claim": list(RULES), "effect": 2.0, "passed": 0.0})
    for name in measure.BOOK_CLAIMS:
        put(store, name, rows)
    scorecard_of(store, 10).ensure()
    card = pd.read_parquet(store.path("scorecard.parquet")).set_index("claim")
    found = card.loc["C14", ["verdict", "book_verdict", "book_passed", "book_n", "book_effect"]]
    assert found.tolist() == ["replicated", "not replicated", 0, 10, 2.0]


def test_experiments_decide_the_claims_about_training(store):
    runs = pd.DataFrame(
        {"claim": "C26", "effect": [0.95, 0.97, 0.99], "passed": 1.0, "model": ["a", "b", "c"]}
    )
    put(store, measure.EXPERIMENT_CLAIMS, runs)
    scorecard_of(store, 10).ensure()
    card = pd.read_parquet(store.path("scorecard.parquet")).set_index("claim")
    assert card.loc["C26", ["passed", "n", "verdict"]].tolist() == [3, 3, "replicated"]
    assert card.loc["C27", "verdict"] == "undecided"


def test_findings_name_their_replication(store):
    table = measure.findings(store, [3, 7], "recipe_post")
    expected = {"recipe_post/seed_3": [3], "recipe_post/seed_7": [7]}
    assert table.groupby("model")["seed"].unique().map(list).to_dict() == expected


TINY = DTConfig(d_model=8, d_head=4, d_mlp=8, max_steps=10)
RECIPE = Recipe(task=Task(5, 2, max_steps=10))


def put_model(store, seed):
    model = DecisionTransformer(TINY, seed=seed).eval()
    with store.write("seed_10/model", stage="heads", code=["dtbook.model.transformer"], seeds=[seed]) as path:
        model.save_pretrained(path)
    return model


def jobs_of(store, **settings):
    """The jobs of these stages, with these settings."""
    recipe = replace(RECIPE, settings=settings)
    return measure.of_subject(store, "seed_10", recipe, [measure.MEASURE_ROWS[name] for name in settings])


def test_tables_are_kept_by_the_models_hash(tmp_path):
    store, small = ArtifactStore(tmp_path), {"rtgs": (0.9,), "timesteps": (3,)}
    play = {"rtgs": (0.9,), "episodes": 2, "max_steps": 10}
    for seed, is_made in ((1, True), (1, False), (2, True)):
        model = put_model(store, seed)
        done = [job.ensure() for job in jobs_of(ArtifactStore(tmp_path), neurons=small, ablated_play=play)]
        assert [seconds is not None for seconds in done] == [is_made, is_made]
        entry = store.entries()["seed_10/neurons.parquet"]["parameters"]
        assert entry["from"] == {"seed_10/model": store.entries()["seed_10/model"]["sha256"]}
        assert (entry["task"]["size"], entry["timesteps"], entry["seed"]) == (5, [3], 0)
    expected = neuron_table(model, all_observations(5, 2), **small)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "seed_10/neurons.parquet"), expected)
    played = pd.read_parquet(tmp_path / "seed_10/ablated_play.parquet")
    assert set(played["ablated"]) == {"none", "L0H0", "L0H1", "L0 MLP"}
    expected = ablations.ablated_play(model, task=RECIPE.task, **play)
    pd.testing.assert_frame_equal(played, expected)


def test_the_circuit_is_what_is_measured_of_the_model(tmp_path):
    few = {"head": 0, "rtgs": (0.9,), "rtg": 0.9, "timesteps": (3,), "timestep": 3, "situations": ("goal",)}
    store = ArtifactStore(tmp_path)
    model = put_model(store, 1)
    for job in jobs_of(store, circuit=few, embeddings={}):
        job.ensure()
    found = Circuit.load(store.path("seed_10/circuit"))
    expected = measure_circuit(model, all_observations(5, 2), **few)
    assert np.array_equal(found.maps["OV"], expected.maps["OV"])
    pd.testing.assert_frame_equal(found.effects, expected.effects)
    on = Embeddings.load(store.path("seed_10/embeddings.safetensors")).on("F-R")
    assert np.allclose(on["rtg"], (model.W_E_rtg @ preference_direction(model, "F-R")).detach(), atol=1e-6)


def test_absent_controls_are_named(tmp_path):
    job = Job(measure.MEASURE_ROWS["control claims"], ArtifactStore(tmp_path), recipe=RECIPE)
    with pytest.raises(
        ArtifactError, match="has no controls/shuffled_0 and 2 more: `dtbook reproduce` makes"
    ):
        job.ensure()


# A subject, and a model of the reader's own


def test_a_subject_is_found_by_its_name_or_its_folder(tmp_path):
    shipped, entries = Subject.find("seed_11"), ArtifactStore().entries()
    assert (shipped.name, shipped.sha256) == ("seed_11", entries["seed_11/model"]["sha256"])
    assert Subject.find("controls/shuffled_0").sha256 == entries["controls/shuffled_0"]["sha256"]
    own = Subject.find(str(ArtifactStore().path("seed_11/model")))
    assert own.sha256 == shipped.sha256
    assert (own.model.W_E_rtg == shipped.model.W_E_rtg).all()
    allowed = "give post, controls/shuffled_0, .*seed_10, .* or a model's folder"
    for absent in ("seed_77", str(tmp_path / "nowhere"), ""):
        with pytest.raises(ValueError, match=f"^there is no subject '{absent}': {allowed}"):
            Subject.find(absent)


def test_what_was_measured_of_a_subject_is_found_with_it(tmp_path, monkeypatch):
    """In `data/`, and where another store holds it; of the post's weights without the weights."""
    monkeypatch.setattr(DecisionTransformer, "from_post_checkpoint", lambda: pytest.fail("weights were read"))
    of_post, shipped = Subject.find("post"), ArtifactStore()
    assert of_post.path("causal.parquet") == shipped.path("post/causal.parquet")
    assert (of_post.has("circuit"), of_post.has("model")) == (True, False)
    other = ArtifactStore(tmp_path)
    for artifact in ("seed_11/model", "seed_11/calibration.parquet"):
        other.take(artifact, shipped)
    monkeypatch.chdir(tmp_path.parent)
    own = Subject.find(f"{tmp_path.name}/seed_11")
    assert own.name == str(tmp_path / "seed_11")
    assert own.path("calibration.parquet") == tmp_path / "seed_11/calibration.parquet"
    assert (own.model.W_E_rtg == Subject.find("seed_11").model.W_E_rtg).all()
    alone = Subject.find(str(tmp_path / "seed_11/model"))
    assert not alone.has("calibration.parquet")
    for subject in (own, alone):
        sentence = (
            f"subject is '{subject.name}'; it must be one with turns.parquet: post, seed_10, or a folder "
        )
        with pytest.raises(ValueError, match=sentence):
            subject.path("turns.parquet")


def test_a_folder_that_cannot_be_measured_is_one_sentence_at_once(tmp_path):
    def said(*arguments):
        command = ["measure", *map(str, arguments), "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(cli.main, command)
        assert (result.exit_code, len(result.output.splitlines())) == (1, 1), result.output
        return result.output

    assert "there is no subject" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in said(tmp_path / "empty")
    DecisionTransformer(replace(TINY, n_layers=2)).save_pretrained(tmp_path / "two")
    assert "model has 2 layers" in said(tmp_path / "two")
    DecisionTransformer(TINY).save_pretrained(tmp_path / "short")
    assert "model has max_steps 10; the tables need at least 300" in said(tmp_path / "short")
    (tmp_path / "short/model.safetensors").write_bytes(b"altered")
    assert "model.safetensors" in said(tmp_path / "short")
    shipped = ArtifactStore().path("seed_11/model")
    assert "there is no stage 'casual': there are calibration, claims, " in said(shipped, "--only", "casual")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_of_ones_own_gets_the_tables_that_the_shipped_ones_have(tmp_path):
    """A copy of seed 1 with its heads exchanged: they come back in order, and the table is that of `data/`."""
    shipped = ArtifactStore()
    model = DecisionTransformer.from_pretrained(shipped.path("seed_11/model"))
    model.permute_heads(0, [1, 0]).save_pretrained(tmp_path / "mine")
    command = [
        "measure",
        str(tmp_path / "mine"),
        "--out",
        str(tmp_path / "out"),
        "--only",
        "causal",
        "--workers",
        "1",
    ]
    first, second = (CliRunner().invoke(cli.main, command) for _ in range(2))
    assert [result.exit_code for result in (first, second)] == [0, 0], first.output
    assert [line.rpartition(": ")[2] for line in second.output.splitlines()[:2]] == ["up to date"] * 2
    ours = pd.read_parquet(ArtifactStore(tmp_path / "out").path("own/causal.parquet"))
    pd.testing.assert_frame_equal(
        ours, pd.read_parquet(shipped.path("seed_11/causal.parquet")), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_all_tables_of_a_small_model_are_made(tmp_path):
    model, _ = replication.with_heads_in_order(
        DecisionTransformer(small.RECIPE.model, seed=1).eval(), small.RECIPE.task
    )
    model.save_pretrained(tmp_path / "mine")
    store = ArtifactStore(tmp_path / "out")
    jobs = measure.tables_of(Subject.find(str(tmp_path / "mine")), store, small.RECIPE)
    assert failures(run_graph(jobs, 2)) == []
    files = {name.removeprefix("own/") for name in store.entries()}
    reference = {name.removeprefix("post/") for name in ArtifactStore().entries() if name.startswith("post/")}
    assert files == reference - {"front_paths.parquet"} | {"model"}
    found = pd.read_parquet(store.path("own/claims.parquet"))
    calibration = pd.read_parquet(store.path("own/calibration.parquet"))
    observations = all_observations(small.RECIPE.task.size, small.RECIPE.task.n_obstacles)
    pd.testing.assert_frame_equal(found, decide_claims(Evidence(model, observations, calibration)))
