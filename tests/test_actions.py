"""Models with other actions than left, right and forward: what is said of these three holds, or one says why not."""

import numpy as np
import pandas as pd
import pytest
import torch
from planted import scattered
from torch.nn.functional import pad

from dtbook.analysis import (
    ablations,
    attribution,
    behaviour,
    counterfactuals,
    faithfulness,
    frames,
    heads,
)
from dtbook.analysis import program as programs
from dtbook.analysis.dynamics import forward_probability
from dtbook.analysis.interventions import ablate
from dtbook.analysis.neurons import neuron_table
from dtbook.analysis.weights import embeddings, front_cell_table, state_maps
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import batches, select, weights
from dtbook.model import DecisionTransformer, DTConfig

SHAPE = {"d_model": 8, "d_head": 4, "d_mlp": 6, "max_steps": 20}
AT = {"rtgs": (0.9,), "timesteps": (10,)}
CASE = counterfactuals.Case("obstacle", 0.9, 0.9)


@pytest.fixture(scope="module")
def observations():
    return all_observations(5, 1)


@pytest.fixture(scope="module")
def three():
    return scattered(DTConfig(**SHAPE))


def with_more(model, n_actions, b_U):
    """The same model with further actions, whose logits are `b_U`."""
    more = DecisionTransformer(DTConfig(**SHAPE, n_actions=n_actions)).double()
    n_new, state = n_actions - 3, model.state_dict()
    state |= {
        "W_U": pad(model.W_U.detach(), (0, n_new)),
        "b_U": pad(model.b_U.detach(), (0, n_new), value=b_U),
    }
    state["W_E_action"] = pad(model.W_E_action.detach(), (0, 0, 0, n_new))
    more.load_state_dict(state)
    return more.eval()


MEASURES = {
    "state_maps": lambda m, _: pd.DataFrame(state_maps(m, "F-R").flatten(1).numpy()),
    "front_cell_table": lambda m, _: front_cell_table(m),
    "preference_direction": lambda m, _: pd.DataFrame(attribution.preference_direction(m, "F-L").numpy()),
    "embeddings": lambda m, _: pd.DataFrame(embeddings(m).on("F-R")["time"]),
    "causal_table": lambda m, seen: counterfactuals.causal_table(m, seen, [CASE]),
    "situation_table": lambda m, seen: ablations.situation_table(m, seen, **AT),
    "neurons": lambda m, seen: neuron_table(m, seen, **AT, situations=("obstacle",)),
    "over_time": lambda m, seen: behaviour.over_time(m, seen, **AT),
    "exceptions": lambda m, seen: behaviour.exceptions(m, seen, timesteps=(10,)),
    "log_odds": lambda m, seen: behaviour.log_odds_distributions(m, seen, **AT),
    "scan": lambda m, seen: behaviour.scan(m, seen, **AT),
    "scores": lambda m, seen: heads.obstacle_head_scores(m, seen),
    "median_frames": lambda m, seen: frames.median_frames(m, seen),
    "importance": lambda m, seen: faithfulness.importance(m, faithfulness.case_rows(seen, CASE, 0)),
    "forward_probability": lambda m, seen: pd.DataFrame([forward_probability(m, seen, 0.9)]),
}


@pytest.mark.parametrize("name", MEASURES)
def test_actions_that_are_never_taken_change_nothing(name, three, observations):
    of_three, of_seven = (MEASURES[name](m, observations) for m in (three, with_more(three, 7, -1e4)))
    pd.testing.assert_frame_equal(of_three, of_seven, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_without_forward_there_is_one_sentence(name, observations):
    two = DecisionTransformer(DTConfig(**SHAPE, n_actions=2)).eval()
    with pytest.raises(
        ValueError, match="n_actions of model is 2; it must be more than 2, minigrid's number of forward"
    ):
        MEASURES[name](two, observations)


def test_preferences_of_the_actions_that_there_are_need_no_other():
    assert attribution.contrast("R-L", 2).tolist() == [-1, 1]
    assert attribution.contrast("F-R", 4).tolist() == [0, -1, 1, 0]
    two = DecisionTransformer(DTConfig(**SHAPE, n_actions=2))
    assert embeddings(two).on("R-L")["time"].shape == (21,)
    with pytest.raises(
        ValueError, match="n_actions of model is 1; it must be more than 1, minigrid's number of right"
    ):
        attribution.contrast("R", 1)


def test_forward_is_as_likely_as_all_the_models_actions_make_it(three, observations):
    seven = with_more(three, 7, 12.0)
    obstacles = select(observations, "obstacle")
    (batch,) = batches(obstacles, 0.9, 10)
    share = torch.from_numpy(weights(obstacles))
    inputs = batch.states, torch.full((len(share), 1), 0.9, dtype=torch.float64), batch.timesteps
    logits = seven(*inputs)[:, 0]
    chance = logits.softmax(1)
    torch.testing.assert_close(attribution.forward_preference(logits).sigmoid(), chance[:, 2])
    assert chance[:, 3:].sum(1).mean() > 0.05

    table = ablations.situation_table(seven, observations, **AT)
    row = table[(table["situation"] == "obstacle") & (table["ablated"] == "none")].iloc[0]
    np.testing.assert_allclose(
        row[["left", "right", "forward"]].astype(float), share @ chance[:, :3].detach(), rtol=1e-9
    )

    each = neuron_table(seven, observations, **AT, situations=("obstacle",), how=("zero",)).set_index(
        "neuron"
    )
    for neuron in range(3):
        with ablate(seven, f"L0N{neuron}"):
            without = seven(*inputs)[:, 0].softmax(1)
        expected = float(share @ (without - chance)[:, 2])
        assert each["rise"][neuron] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_program_is_about_three_actions(three, observations):
    with pytest.raises(
        ValueError, match="model has 7 actions; a program is about left, right, forward alone"
    ):
        programs.summarise_model(with_more(three, 7, 0.0), observations)
