"""The experiments: settling, snapshots inspected, sweeps collected, claims decided, against values known by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from dtbook.analysis import dynamics
from dtbook.analysis.heads import obstacle_head_scores
from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import FRONT, Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pipeline import Recipe, experiments, sweep
from dtbook.pipeline.engine import run_job
from dtbook.trajectories import play

SMALL = {"d_model": 16, "d_head": 8, "d_mlp": 16, "max_steps": 30}
TASK = Task(size=5, n_obstacles=2, max_steps=30)


@pytest.fixture(scope="module")
def probe():
    return dynamics.make_probe(TASK, n=50)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0.0, 0.5, 0.95, 1.0], 200),
        ([0.95, 0.5, 0.95, 1.0], 200),  # near the end at first, but it leaves again
        ([1.0, 1.0, 1.0, 1.0], 0),
        ([0.0, 0.0, 0.0, 1.0], 400),
        ([[0.0, 1.0], [1.0, 0.0], [1.0, 1.05], [1.0, 1.0]], 200),  # the later of two measures
    ],
)
def test_settling_is_the_first_step_from_which_all_stays_near_the_end(values, step):
    assert dynamics.settles([0, 100, 200, 400], np.array(values)) == step


def test_settling_needs_a_snapshot():
    with pytest.raises(ValueError, match="at least one snapshot"):
        dynamics.settles([], np.zeros(0))


def test_probe_holds_all_of_what_is_rare_and_a_sample_of_what_is_not(probe):
    assert {name: len(o.images) for name, o in probe.facing.items()}["obstacle"] == 50
    whole = dynamics.make_probe(TASK, n=10**9)
    for name, code in (("obstacle", 6), ("wall", 2), ("goal", 8)):
        assert (whole.facing[name].images[:, *FRONT, 0] == code).all()
        assert (probe.facing[name].images[:, *FRONT, 0] == code).all()
    assert len(whole.facing["obstacle"].images) > 50 >= len(whole.facing["goal"].images)
    assert len(probe.facing["goal"].images) == len(whole.facing["goal"].images)


@pytest.mark.parametrize("shape", [{"n_layers": 0}, {"n_layers": 1}, {"n_layers": 2, "n_timesteps": 3}])
def test_inspection_is_the_hooked_model_on_the_weighted_observations(probe, shape):
    model = DecisionTransformer(DTConfig(**SMALL, **shape), seed=3).eval()
    row = dynamics.inspect(model, probe)
    for name, o in probe.facing.items():
        n = len(o.images)
        with torch.no_grad():
            logits = model(
                torch.from_numpy(o.images)[:, None], torch.full((n, 1), 0.9), torch.full((n, 1), 10)
            )
        forward = logits[:, 0].double().softmax(-1)[:, 2].numpy()
        assert row[f"forward {name} 0.9"] == pytest.approx(
            np.average(forward, weights=o.multiplicity), abs=1e-6
        )
    if not model.cfg.n_layers:
        assert np.isnan(row["best score"])
        assert not [name for name in row if name.startswith("score")]
        return
    scores = obstacle_head_scores(model, probe.facing["obstacle"])
    assert row["best score"] == scores["score"].max()
    assert len([name for name in row if name.startswith("score")]) == len(scores)


@pytest.mark.parametrize("encoding", ["index", "one-hot"])
def test_front_cells_are_what_the_logits_of_a_model_without_layers_change_by(encoding):
    model = DecisionTransformer(DTConfig(**SMALL, n_layers=0, encoding=encoding), seed=1).eval()
    cells = experiments.front_cells(model).set_index(["kind", "name"])["value"]
    images = torch.zeros(2, 1, 7, 7, 3, dtype=torch.uint8)
    images[0, 0, *FRONT] = torch.tensor([6, 2, 0])  # a blue ball
    images[1, 0, *FRONT] = torch.tensor([8, 1, 0])  # the green goal
    with torch.no_grad():
        logits = model(images, torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))[:, 0]
    change = (logits[0] - logits[1]) @ torch.tensor([0.0, -1.0, 1.0])
    assert float(change) == pytest.approx(cells["thing", "obstacle"] - cells["thing", "goal"], abs=1e-5)
    if encoding == "index":
        parts = 6 * cells["object", "unit"] + 2 * cells["colour", "unit"]
    else:
        parts = cells["object", "6"] + cells["colour", "2"] + cells["state", "0"]
    assert cells["thing", "obstacle"] == pytest.approx(parts, abs=1e-5)


def test_the_front_cell_s_path_begins_and_ends_at_what_the_model_says_of_obstacle_and_goal(probe):
    model = DecisionTransformer(DTConfig(**SMALL), seed=2).eval()
    o, table = (
        probe.facing["wall"],
        experiments.along_front_cell(model, probe.facing["wall"], [0.0, 0.5, 1.0], 0.9),
    )
    row = table.set_index(["path", "share"])
    for path, share, cell in (("object", 0, (6, 2, 0)), ("both", 1, (8, 1, 0)), ("object", 1, (8, 2, 0))):
        images = o.images.copy()
        images[:, *FRONT] = cell
        expected = dynamics.forward_probability(model, replace(o, images=images), 0.9)
        assert row["forward"][path, share] == pytest.approx(expected, abs=1e-6)
        cells = experiments.front_cells(model).set_index(["kind", "name"])["value"]
        direct = cell[0] * cells["object", "unit"] + cell[1] * cells["colour", "unit"]
        assert row["direct"][path, share] == pytest.approx(direct, abs=1e-5)
    assert row["object"]["both", 0.5] == 7
    assert (o.images[:, *FRONT, 0] == 2).all(), "the observations themselves are left alone"
    with pytest.raises(ValueError, match="only indices have values in between"):
        experiments.along_front_cell(
            DecisionTransformer(DTConfig(**SMALL, encoding="one-hot")), o, [0.0], 0.9
        )


def encodings(without, mended, alone, data="history.npz", balanced=False):
    how = {"data": f"seed_10/{data}", "balance_classes": balanced, "seed": 0}
    rows = [
        how | {"encoding": encoding, "last_step_share": share, "greedy succeeded 0.9": value}
        for encoding, share, value in (
            ("index", 0.0, without),
            ("index", 0.2, mended),
            ("one-hot", 0.0, alone),
        )
    ]
    return pd.DataFrame(rows)


def sizes(ours, best, seeds=3):
    """Of each of two shapes some models, whose mean is what is given."""
    rows = [
        experiments.SHAPE | {"n_layers": layers, "greedy 0.9": 0.9, "sampled 0.9": mean + off}
        for layers, mean in ((1, ours), (2, best))
        for off in np.linspace(-0.05, 0.05, seeds) * (seeds > 1)
    ]
    return pd.DataFrame(rows)


def watched(sizes):
    """A training whose returns settle at step 100, what a short program explains at once, and its circuits' sizes."""
    returns = [0.0, 0.9, 0.9, 0.9, 0.9]
    columns = {"greedy 0.9": returns, "sampled 0.9": [0.9] * 5, "explained trigram": [0.9] * 5}
    return pd.DataFrame({"step": [0, 100, 200, 400, 800], "circuit size": sizes} | columns)


@pytest.mark.parametrize(
    ("claim", "arguments", "effect", "passed"),
    [
        ("C25", (encodings(0.4, 0.95, 0), sizes(0.9, 0.9), {}), 0.55, 1),
        ("C25", (encodings(0.6, 0.95, 0), sizes(0.9, 0.9), {}), 0.35, 0),  # it needed no mending
        ("C25", (encodings(0.4, 0.8, 0), sizes(0.9, 0.9), {}), 0.4, 0),  # it was not mended
        ("C26", (encodings(0, 0, 0.9), sizes(0.9, 0.9), {}), 0.9, 1),
        ("C26", (encodings(0, 0, 0.89), sizes(0.9, 0.9), {}), 0.89, 0),
        ("C27", (encodings(0, 0, 0), sizes(0.86, 0.9), {}), 0.04, 1),
        ("C27", (encodings(0, 0, 0), sizes(0.80, 0.9), {}), 0.1, 0),
        ("C28", (None, None, {"a": watched([9.0, 80, 80, 10, 8])}), 4, 1),
        ("C28", (None, None, {"a": watched([9.0, 10, 8, 7, 8])}), 0, 0),
    ],
)
def test_claims_are_decided_by_their_rules(claim, arguments, effect, passed):
    row = experiments.decide_on_training(*arguments).set_index("claim").loc[claim]
    assert row["effect"] == pytest.approx(effect)
    assert row["passed"] == passed


@pytest.mark.parametrize(
    ("claims", "tables"),
    [
        (["C25", "C26"], (encodings(0.4, 0.95, 0.9, data="trajectories.npz"), None)),
        (["C25", "C26"], (encodings(0.4, 0.95, 0.9, balanced=True), None)),
        (["C25", "C26"], (encodings(0.4, 0.95, 0.9).drop(columns="data"), None)),
        (["C27"], (None, sizes(0.86, 0.9, seeds=2))),
    ],
)
def test_what_is_not_the_claims_experiment_does_not_decide_it(claims, tables):
    table = experiments.decide_on_training(*tables, {})
    assert table["claim"].tolist() == claims
    assert table["passed"].isna().all()


def test_models_of_balanced_data_beside_those_of_a_history_decide_nothing():
    balanced = encodings(0.9, 0.95, 0.1, data="trajectories.npz", balanced=True)
    history = encodings(0.4, 0.95, 0.9)
    both = experiments.decide_on_training(pd.concat([balanced, history], ignore_index=True), None, {})
    pd.testing.assert_frame_equal(both, experiments.decide_on_training(history, None, {}))


def test_a_training_that_ends_without_a_faithful_circuit_does_not_decide():
    (row,) = experiments.decide_on_training(None, None, {"a": watched([9.0, 9, 9, 9, np.nan])}).to_dict(
        "records"
    )
    assert np.isnan([row["effect"], row["passed"]]).all()


def test_without_the_sweep_of_sizes_its_claim_is_left_out():
    table = experiments.decide_on_training(encodings(0, 0, 0), None, {"a": watched([9.0, 9, 9, 9, 9])})
    assert table["claim"].tolist() == ["C25", "C26", "C28"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A checkout with a small sweep of encodings, and the folder in which it has been run."""
    root, rng = tmp_path_factory.mktemp("checkout"), np.random.default_rng(0)
    data = play(TASK, lambda images, *_: rng.integers(0, 3, len(images)), 200, rng)
    data.save(root / "trajectories.npz")
    parameters = {f"model.{name}": value for name, value in SMALL.items()}
    parameters |= {"data": str(root / "trajectories.npz"), "train.steps": 2, "train.balance_classes": False}
    parameters |= {"calibration.rtgs": [0.9], "calibration.episodes": 3, "calibration.max_steps": 30}
    parameters |= {"train.evaluation_episodes": 0, "head_scores": False}
    described = {
        "stage": "training",
        "parameters": parameters,
        "grid": {"model.encoding": ["index", "one-hot"]},
    }
    (root / "sweeps").mkdir()
    (root / "sweeps" / "encodings.yml").write_text(yaml.safe_dump(described))
    points = sweep.points_of(described, root / "notebooks")
    sweep.run_sweep(points, root / "runs" / "encodings")
    return root, points


@pytest.mark.slow
def test_a_sweep_is_collected_into_a_row_a_model_and_its_front_cells(swept, probe, tmp_path, monkeypatch):
    root, points = swept
    monkeypatch.setattr(experiments, "make_probe", lambda task: probe)
    store = ArtifactStore(tmp_path / "data")
    job = experiments.collected(store, "encodings", points, root / "runs", Recipe())
    assert job.ensure() > 0
    table = pd.read_parquet(store.path("experiments/encodings.parquet"))
    cells = pd.read_parquet(store.path(experiments.FRONT_CELLS))
    assert table["encoding"].tolist() == ["index", "one-hot"]
    assert table["point"].tolist() == [point.id for point in points]
    for point, row in zip(points, table.to_dict("records"), strict=True):
        folder = root / "runs" / "encodings" / point.artifact
        model = DecisionTransformer.from_pretrained(folder / "model")
        curve = pd.read_parquet(folder / "calibration.parquet").set_index("acting")
        assert row["greedy succeeded 0.9"] == curve["succeeded"]["greedy"]
        assert row["forward wall -1"] == dynamics.inspect(model, probe)["forward wall -1"]
        unused = model.W_E_state[98:] if row["encoding"] == "index" else model.W_E_state[18 * 49 :]
        assert row["state_channel"] == float(unused.detach().abs().max())
        pd.testing.assert_frame_equal(
            cells[cells["point"] == point.id][["kind", "name", "value"]].reset_index(drop=True),
            experiments.front_cells(model),
        )
    assert job.ensure() is None, "it was current"


@pytest.mark.slow
def test_an_incomplete_sweep_is_not_collected(swept, tmp_path):
    _, points = swept
    job = experiments.collected(ArtifactStore(tmp_path / "data"), "encodings", points, tmp_path, Recipe())
    missing = f"{tmp_path / 'encodings'} has no {points[0].artifact} and 1 more"
    assert run_job(job).error == f"{missing}: `dtbook sweep sweeps/encodings.yml` makes it"
