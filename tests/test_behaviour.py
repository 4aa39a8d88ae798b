"""The tables of chapters 5 and 6 against hooked runs, observation by observation, in float64."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from planted import scattered

from dtbook.analysis import ablations, behaviour
from dtbook.analysis.attribution import contrast, decompose
from dtbook.analysis.interventions import ablate
from dtbook.analysis.neurons import NEURON_WAYS, neuron_table
from dtbook.gridworld import Task, all_observations
from dtbook.gridworld.situations import select, showing, weights
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.protocol import AVOIDS
from dtbook.rollout import calibration_curve

CFG = DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=20)


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module")
def model():
    return scattered(CFG)


def inputs(observations, rtg, timestep):
    n = len(observations.images)
    states = torch.from_numpy(observations.images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)


@torch.no_grad()
def run(model, observations, rtg, timestep):
    return model(*inputs(observations, rtg, timestep))[:, 0]


def test_distributions_are_histograms_of_the_hooked_model(model, observations):
    table = behaviour.log_odds_distributions(model, observations, rtgs=(0.9, -1.0), timesteps=(3, 10))
    totals = table.groupby(["situation", "rtg"])["share"].sum()
    assert len(totals) == 12
    np.testing.assert_allclose(totals, 1)
    for situation, rtg in (("empty", -1.0), ("goal from the left", 0.9)):
        chosen = select(observations, situation)
        p = np.stack([run(model, chosen, rtg, t).softmax(-1)[:, 2].numpy() for t in (3, 10)])
        share = np.stack([weights(chosen) / 2] * 2)
        counts, _ = np.histogram(np.log(p / (1 - p)), behaviour.EDGES, weights=share)
        found = table.query("situation == @situation and rtg == @rtg").set_index("middle")["share"]
        middles = (behaviour.EDGES[1:] + behaviour.EDGES[:-1]) / 2
        np.testing.assert_allclose(found.reindex(middles, fill_value=0.0), counts, atol=1e-6)


def test_log_odds_beyond_the_bins_are_counted_in_the_last(model, observations):
    sure = copy.deepcopy(model)
    sure.b_U.data += torch.tensor([0.0, 0.0, 200.0])
    table = behaviour.log_odds_distributions(sure, observations, rtgs=(0.0,), timesteps=(3,))
    assert set(table["middle"]) == {29.75}
    np.testing.assert_allclose(table["share"], 1)


def test_correlation_is_that_of_the_states(model, observations):
    rtgs = (-1.0, 0.0, 0.9)
    logits = torch.cat([run(model, observations, rtg, 10) for rtg in rtgs]).numpy()
    each = np.tile(observations.multiplicity, 3)  # every state once, so that numpy needs no weights
    table = behaviour.turns(model, observations, rtgs, 10)
    expected = np.corrcoef(np.repeat(logits[:, :2], each, axis=0).T)[0, 1]
    assert behaviour.correlation(table, "logits") == pytest.approx(expected, abs=1e-6)
    centred = logits - logits.mean(1, keepdims=True)
    expected = np.corrcoef(np.repeat(centred[:, :2], each, axis=0).T)[0, 1]
    assert behaviour.correlation(table, "centred") == pytest.approx(expected, abs=1e-6)


def test_where_it_turns_along_walls_is_the_hooked_models_mean(model, observations):
    table = behaviour.along_walls(model, observations, rtgs=(0.9, -1.0), timesteps=(3, 17))
    assert len(table) == 2 * 2 * 4
    left_hand, right_hand = (
        observations.images[:, column, 6, 0] == 2 for column in (2, 4)
    )  # minigrid's wall
    there = {"any": left_hand | True, "left": left_hand, "right": right_hand}
    there["neither"] = ~left_hand & ~right_hand
    for row in table.to_dict("records"):
        seen = showing(observations.images, row["situation"])
        chosen = observations[seen & there[row["wall at"]]]
        p = np.mean([run(model, chosen, row["rtg"], t).softmax(-1).numpy() for t in (3, 17)], axis=0)
        expected = weights(chosen) @ p
        assert [row["left"], row["right"], row["forward"]] == pytest.approx(expected, abs=1e-6)
        states = chosen.multiplicity.sum() / observations[seen].multiplicity.sum()
        assert (row["share"], row["observations"]) == (pytest.approx(states), len(chosen))
    assert behaviour.clockwise_bias(0.1, 0.3) == pytest.approx(0.5)


def test_over_time_has_the_mean_the_extremes_and_who_has_them(model, observations):
    asked = dict(rtgs=(0.9, -1.0), timesteps=(3, 17), situations=("obstacle", "goal from the top"))
    table = behaviour.over_time(model, observations, **asked)
    assert len(table) == 8
    for row in table.itertuples():
        chosen = select(observations, row.situation)
        logits = run(model, chosen, row.rtg, row.timestep)
        p, share = logits.softmax(-1)[:, 2].numpy(), weights(chosen)
        over = p > AVOIDS
        expected = [share @ p, p.min(), p.max(), share @ over, over.sum()]
        found = [row.forward, row.low, row.high, row.over, row.n_over]
        assert found == pytest.approx(expected, abs=1e-6)
        assert row.greedy == pytest.approx(share @ (logits.argmax(-1) == 2).numpy())
        images = observations.images[[row.worst, row.mildest]]
        assert (images == chosen.images[[p.argmax(), p.argmin()]]).all()


def test_what_is_certified_leaves_no_timestep_out():
    assert tuple(range(101)) == behaviour.CERTIFIED
    assert set(behaviour.CERTIFIED) < set(behaviour.EVERY_TIMESTEP)
    assert behaviour.EVERY_TIMESTEP[-1] == Task().max_steps - 1


def test_exceptions_are_all_that_is_above_the_bar_and_no_more(model, observations):
    timesteps = (2, 5, 11)
    table = behaviour.exceptions(model, observations, rtgs=(-1.0, 0.9, 0.5), timesteps=timesteps)
    kinds = [
        ("wall", -1.0),
        ("goal", -1.0),
        ("wall", 0.9),
        ("obstacle", 0.9),
    ]  # as the post's Table 1 has them
    assert set(zip(table["situation"], table["rtg"], strict=True)) <= set(kinds)
    number = 0
    for situation, rtg in kinds:
        mask = showing(observations.images, situation)
        p = np.stack([run(model, observations, rtg, t).softmax(-1)[:, 2].numpy() for t in timesteps])
        p[:, ~mask] = 0
        part = table.query("situation == @situation and rtg == @rtg").set_index("observation")
        assert set(part.index) == set(np.flatnonzero((p > AVOIDS).any(0)))
        for row in list(part.itertuples())[::7]:
            own = p[:, row.Index]
            above = [t for t, value in zip(timesteps, own, strict=True) if value > AVOIDS]
            assert (row.n, row.first) == (len(above), above[0])
            assert row.timestep == timesteps[own.argmax()]
            assert row.forward == pytest.approx(own.max(), abs=1e-6)
            assert row.states == observations.multiplicity[row.Index]
        number += len(part)
    assert 0 < number == len(table)


def test_no_exception_is_a_table_without_rows(model, observations):
    still = copy.deepcopy(model)
    still.b_U.data -= torch.tensor([0.0, 0.0, 200.0])
    table = behaviour.exceptions(still, observations, timesteps=(3,))
    assert len(table) == 0
    assert {"situation", "observation", "n", "forward"} <= set(table.columns)


@torch.no_grad()
def test_a_scan_is_the_decomposition_averaged(model, observations):
    chosen = select(observations, "obstacle")
    table = behaviour.scan(model, chosen, rtgs=(-0.5, 0.9), timesteps=(2, 9), preference="F-L")
    row = table.query("rtg == 0.9 and timestep == 9").iloc[0]
    share, direction = torch.from_numpy(weights(chosen)), contrast("F-L").double()
    parts = decompose(model, *inputs(chosen, 0.9, 9))
    for name in ("L0H0", "L0H1", "L0 b_O", "L0 MLP", "b_U"):
        assert row[name] == pytest.approx(float(share @ (parts[name][:, 0] @ direction)), abs=1e-6)
    state = sum(value for name, value in parts.items() if name.startswith("state"))
    assert row["state"] == pytest.approx(float(share @ (state[:, 0] @ direction)), abs=1e-6)
    logits = run(model, chosen, 0.9, 9)
    assert row[["left", "right", "forward"]].tolist() == pytest.approx((share @ logits).tolist(), abs=1e-6)
    assert row["P(forward)"] == pytest.approx(float(share @ logits.softmax(-1)[:, 2]), abs=1e-6)
    assert row["logit_diff"] == pytest.approx(float(share @ (logits @ direction)), abs=1e-6)
    _, cache = model.run_with_cache(*inputs(chosen, 0.9, 9))
    expected = share @ cache["pattern", 0][:, 1, 1, 0]
    assert row["attention L0H1"] == pytest.approx(float(expected), abs=1e-6)


def test_scans_of_situations_are_scans_of_their_observations(model, observations):
    table = behaviour.situation_scans(model, observations, rtgs=(0.5,), timesteps=(4,))
    assert table["situation"].tolist() == list(behaviour.FACING)
    alone = behaviour.scan(model, select(observations, "goal"), rtgs=(0.5,), timesteps=(4,))
    goal = table[table["situation"] == "goal"].drop(columns="situation").reset_index(drop=True)
    pd.testing.assert_frame_equal(goal, alone)


def posts(model, observations, rtg, timestep):
    """The neurons' activations at the state token, from a hooked run."""
    _, cache = model.run_with_cache(*inputs(observations, rtg, timestep))
    return cache["post", 0][:, 1]


@torch.no_grad()
def test_a_neuron_ablated_alone_is_a_hooked_run(model, observations):
    asked = dict(rtgs=(0.9, -1.0), timesteps=(3, 10), situations=("goal", "obstacle"), seed=7)
    table = neuron_table(model, observations, **asked).set_index(["situation", "rtg", "how", "neuron"])
    assert len(table) == 2 * 2 * 3 * CFG.d_mlp
    chosen, share = select(observations, "obstacle"), weights(select(observations, "obstacle"))
    drawn = np.random.default_rng(7).choice(len(observations.images), len(share), p=weights(observations))
    direction, share = contrast("F-R").double(), torch.from_numpy(share)
    everywhere = torch.from_numpy(weights(observations))
    for neuron in (0, 5, 11):
        expected = {how: torch.zeros(4).double() for how in NEURON_WAYS}
        for t in (3, 10):
            intact, own = run(model, chosen, 0.9, t), posts(model, chosen, 0.9, t)[:, neuron]
            instead = {"zero": 0 * own, "mean": everywhere @ posts(model, observations, 0.9, t)[:, neuron]}
            instead["resample"] = posts(model, observations, 0.9, t)[drawn, neuron]
            for how, value in instead.items():

                def put(post, hook, neuron=neuron, value=value):
                    post[:, 1, neuron] = value
                    return post

                with model.hooks([("blocks.0.mlp.hook_post", put)]):
                    without = run(model, chosen, 0.9, t)
                row = [(own > 0).double(), own * (model.W_out[0] @ model.W_U @ direction)[neuron]]
                row += [(without - intact) @ direction, (without.softmax(-1) - intact.softmax(-1))[:, 2]]
                expected[how] += torch.stack(row) @ share / 2
        for how, values in expected.items():
            row = table.loc["obstacle", 0.9, how, neuron]
            found = row[["active", "contribution", "change", "rise"]].tolist()
            assert found == pytest.approx(values.tolist(), abs=1e-7), (how, neuron)


def test_zero_ablation_of_a_neuron_is_that_of_the_interventions(model, observations):
    asked = dict(rtgs=(0.9,), timesteps=(3,), situations=("goal",), how=("zero",))
    table = neuron_table(model, observations, **asked)
    goal = select(observations, "goal")
    with ablate(model, "L0N5"):
        without = run(model, goal, 0.9, 3).softmax(-1)[:, 2]
    rise = weights(goal) @ (without - run(model, goal, 0.9, 3).softmax(-1)[:, 2]).detach().numpy()
    assert table["rise"][5] == pytest.approx(rise, abs=1e-7)


def test_an_unknown_way_to_ablate_a_neuron_is_named(model, observations):
    with pytest.raises(
        ValueError, match="how is 'feature mean'; it must be one of 'zero', 'mean', 'resample'"
    ):
        neuron_table(model, observations, how=("zero", "feature mean"))


def test_play_without_a_head_is_play_with_its_output_weights_at_zero():
    model, generator = DecisionTransformer(CFG).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    asked = dict(rtgs=[-1.0, 0.9], episodes=50, max_steps=20, seed=4)
    table = ablations.ablated_play(model, **asked)
    assert table["ablated"].unique().tolist() == ["none", "L0H0", "L0H1", "L0 MLP"]
    np.testing.assert_allclose(table[["goal", "truncated", "obstacle", "wall"]].sum(axis=1), 1)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.blocks[0].attn.W_O[1] = 0
    by_variant = table.set_index(["ablated", "acting"])
    for ablated, edited in (("none", model), ("L0H1", cut)):
        for acting in ("greedy", "sampled"):
            expected = calibration_curve(edited, greedy=acting == "greedy", **asked)
            found = by_variant.loc[(ablated, acting), list(expected.columns)].reset_index(drop=True)
            pd.testing.assert_frame_equal(found, expected)
    lengths = by_variant["length"].groupby(level=["ablated", "acting"]).apply(tuple)
    assert lengths.loc[:, "sampled"].nunique() == 4, "each component makes a difference here"
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


def test_without_a_situation_there_is_no_row_for_it(model, observations):
    table = behaviour.log_odds_distributions(model, select(observations, "wall"), rtgs=(0.0,), timesteps=(3,))
    assert set(table["situation"]) == {"wall"}
    assert showing(observations.images, "wall").any()
