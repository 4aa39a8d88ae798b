"""Kept and resampled units against hooked runs; the smallest circuit of models whose circuit was planted."""

import numpy as np
import pytest
import torch
from planted import FORWARD, FRONT_OBJECT, SEEN, TOLD, blank, plant_head, plant_mlp

from dtbook.analysis.counterfactuals import Case
from dtbook.analysis.faithfulness import (
    DIRECT,
    METHODS,
    case_rows,
    circuit_logits,
    circuit_tables,
    curve_masks,
    faithfulness,
    importance,
    smallest_circuit,
    subset_masks,
    unit_names,
)
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.interventions import Site, ablate, edited, patch
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import without_front
from dtbook.model import DecisionTransformer, DTConfig

CASE, TIMESTEP = Case("obstacle", 0.9, 0.9), 7
CFG = DTConfig(d_model=12, d_head=5, d_mlp=6, max_steps=20)


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module")
def model():
    model, generator = DecisionTransformer(CFG).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def rows(observations):
    return case_rows(observations, CASE, seed=4, timestep=TIMESTEP).drawn(200, np.random.default_rng(0))


def ask(images, rtg=CASE.rtg):
    n, states = len(images), torch.from_numpy(images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), TIMESTEP)


def odds(logits):
    logits = logits.detach().numpy()
    return logits[..., 2] - np.log(np.exp(logits[..., 0]) + np.exp(logits[..., 1]))


def chance(logits):
    return torch.as_tensor(logits).softmax(-1)[..., 2].numpy()


@torch.no_grad()
def test_a_circuit_is_the_hooked_model_with_the_rest_resampled(model, rows):
    """Some heads, some neurons, with and without the direct path; all units, and none."""
    trio = next(rows.trios(FoldedWeights(model)))
    own, other = ask(rows.images), ask(rows.others)
    _, cache = model.run_with_cache(*other)
    names, rng = unit_names(model), np.random.default_rng(1)
    masks = np.concatenate([rng.random((20, len(names))) < 0.5, np.eye(2, len(names)) == 2])
    masks[-1] = True
    found = circuit_logits(trio.clean, trio.other, masks)
    change = (model.embed_states(other[0]) - model.embed_states(own[0]))[:, 0] @ model.W_U
    for k, kept in enumerate(masks):
        out = [name for name, here in zip(names, kept, strict=True) if not here and name != DIRECT]
        with patch(model, cache, *out):
            logits = model(*own)[:, 0] + (0 if kept[0] else change)
        torch.testing.assert_close(found[:, k], logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, -1], model(*own)[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, -2], model(*other)[:, 0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_shares_are_the_definition(model, rows):
    names = unit_names(model)
    masks = np.stack([np.zeros(len(names), bool), np.arange(len(names)) % 2 == 0, np.ones(len(names), bool)])
    table = faithfulness(model, rows, masks)
    trio = next(rows.trios(FoldedWeights(model)))
    left = chance(circuit_logits(trio.source, trio.other, masks)) - chance(
        circuit_logits(trio.clean, trio.other, masks)
    )
    emptied = without_front(torch.from_numpy(rows.images)).numpy()
    own = chance(model(*ask(emptied))[:, 0]) - chance(model(*ask(rows.images))[:, 0])
    assert table["size"].tolist() == [0, (len(names) + 1) // 2, len(names)]
    assert table["share"].tolist() == pytest.approx((left.mean(0) / own.mean()).tolist())
    match = 1 - np.abs(left - own[:, None]).mean(0) / np.abs(own).mean()
    assert table["match"].tolist() == pytest.approx(match.tolist())
    assert table.loc[[0, 2], ["share", "match"]].to_numpy().ravel().tolist() == pytest.approx(
        [0, 0, 1, 1], abs=1e-12
    )
    assert table["agreement"][2] == pytest.approx(1)


@torch.no_grad()
def test_importance_is_that_of_hooked_runs(model, rows):
    table = importance(model, rows).set_index("unit")
    emptied = without_front(torch.from_numpy(rows.images)).numpy()
    clean, source = ask(rows.images), ask(emptied)
    caches = [model.run_with_cache(*asked)[1] for asked in (clean, source)]
    before = odds(model(*clean)[:, 0])
    direction = model.W_U @ torch.tensor([-0.5, -0.5, 1.0]).double()
    states = [model.embed_states(asked[0])[:, 0] for asked in (clean, source)]
    for name in unit_names(model)[1:]:
        with patch(model, caches[1], name):
            assert table["patching"][name] == pytest.approx((odds(model(*clean)[:, 0]) - before).mean())
        with ablate(model, name):
            assert table["ablation"][name] == pytest.approx((odds(model(*clean)[:, 0]) - before).mean())
        hook, block = (
            ("hook_z", model.blocks[0].attn.W_O) if "H" in name else ("hook_post", model.blocks[0].mlp.W_out)
        )
        where, k = ("attn." if "H" in name else "mlp.") + hook, int(name[3:])
        change = (caches[1][f"blocks.0.{where}"] - caches[0][f"blocks.0.{where}"])[:, 1]
        written = change[:, k] @ block[k] if "H" in name else change[:, k, None] * block[k]
        assert table["attribution"][name] == pytest.approx(float((written @ direction).mean()))
    assert table["attribution"][DIRECT] == pytest.approx(float(((states[1] - states[0]) @ direction).mean()))
    with edited(model, (Site("blocks.0.hook_resid_post", None, 1), lambda part: part - states[0][:, None])):
        assert table["ablation"][DIRECT] == pytest.approx((odds(model(*clean)[:, 0]) - before).mean())


def test_few_observations_meet_many_others(observations):
    rows = case_rows(observations, Case("goal from the top", -1.0, -1.0), seed=0)
    assert len(rows.images) == len(rows.others) >= 16_384
    assert rows.weights.sum() == pytest.approx(1)
    again = case_rows(observations, Case("goal from the top", -1.0, -1.0), seed=0)
    assert np.array_equal(rows.others, again.others)


def test_masks_keep_the_first_of_an_order_and_every_subset(model):
    masks = curve_masks([2, 0, 1, 3], sizes=(0, 2, 9))
    assert masks.tolist() == [[False] * 4, [True, False, True, False], [True] * 4]
    labels, subsets = subset_masks(model)
    assert len(labels) == len(set(labels)) == 16
    row = dict(zip(labels, subsets, strict=True))["state → logits + L0 MLP"]
    assert row.tolist() == [True, False, False, *[True] * CFG.d_mlp]


PLANTED = {
    "head 1": (lambda: plant_head(blank(), 1, 1.0), ["L0H1"]),
    "head 0": (lambda: plant_head(blank(), 0, 1.0), ["L0H0"]),
    "a neuron": (lambda: plant_mlp(blank(), SEEN, 1.0), ["L0N0"]),
    "head 1 and a neuron": (
        lambda: plant_mlp(plant_head(blank(), 1, 1.0, to=TOLD), TOLD, 2.0),
        ["L0H1", "L0N0"],
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_smallest_circuit_is_what_was_planted(observations, planted):
    build, units = PLANTED[planted]
    rows = case_rows(observations, CASE, seed=0, timestep=TIMESTEP)
    circuit = smallest_circuit(build(), rows, seed=1)
    assert circuit["unit"].tolist() == units
    assert circuit["share"].iloc[-1] == pytest.approx(1)
    assert circuit["match"].iloc[-1] == pytest.approx(1)


def test_the_direct_path_is_found_too(observations):
    model = blank()
    model.W_E_state[FRONT_OBJECT, FORWARD] = -1
    rows = case_rows(observations, CASE, seed=0, timestep=TIMESTEP)
    assert smallest_circuit(model, rows, seed=1)["unit"].tolist() == [DIRECT]


def test_the_tables_hold_every_order_and_begin_with_the_case(observations):
    model = plant_head(blank(), 1, 1.0)
    units, left = circuit_tables(model, observations, CASE, seed=0)
    assert units["unit"].tolist() == unit_names(model)
    assert units.set_index("unit").loc["L0H1", ["patching", "attribution"]].tolist() == pytest.approx(
        [5.0, 5.0]
    )
    assert set(left["order"]) == {*METHODS, *(f"random {k}" for k in range(3)), "subsets", "smallest"}
    assert (left["situation"] == "obstacle").all()
    for _, curve in left[~left["order"].isin(["subsets", "smallest"])].groupby("order"):
        assert curve["share"].tolist()[:1] + curve["share"].tolist()[-1:] == pytest.approx([0, 1], abs=1e-12)
    best = left[(left["order"] == "patching") & (left["size"] == 1)]["share"]
    assert best.tolist() == pytest.approx([1])
    again = circuit_tables(model, observations, CASE, seed=0)[1]
    assert again.equals(left)
