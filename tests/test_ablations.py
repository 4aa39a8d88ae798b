"""The situation table against hooked runs with `interventions`, and its own identities, in float64."""

import numpy as np
import pytest
import torch

from dtbook.analysis.ablations import situation_table, variants
from dtbook.analysis.attribution import contrast
from dtbook.analysis.interventions import ablate, component_outputs, constant, feature_mean, mean_output
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import SITUATIONS, showing, weights
from dtbook.model import DecisionTransformer, DTConfig

CFG = DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=20)
ASKED = dict(rtgs=(0.9, -1.0), timesteps=(3, 10), seed=2)


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
def table(model, observations):
    return situation_table(model, observations, **ASKED)


def row(table, situation, rtg, timestep, ablated="none", how="none"):
    where = {"situation": situation, "rtg": rtg, "timestep": timestep, "ablated": ablated, "how": how}
    chosen = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    assert len(chosen) == 1
    return chosen.iloc[0]


def inputs(observations, rtg, timestep):
    n = len(observations.images)
    states = torch.from_numpy(observations.images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)


def edits(model, observations, component, how, asked):
    """The edit of `interventions` that does what an ablation of the table does."""
    if how == "zero":
        return torch.zeros_like
    if how == "feature mean":
        return feature_mean
    if how == "mean":
        return constant(mean_output(model, component, observations, *asked))
    donors = np.random.default_rng(2).choice(
        len(observations.images), len(observations.images), p=weights(observations)
    )
    written = component_outputs(model, component, *inputs(observations, *asked))
    return lambda part: written[donors].reshape(part.shape)


@torch.no_grad()
@pytest.mark.parametrize("asked", [(0.9, 3), (-1.0, 10)])
def test_every_ablation_is_that_of_interventions(model, observations, table, asked):
    share = weights(observations)
    for component, how in variants(model):
        if component == "none":
            logits = model(*inputs(observations, *asked))[:, 0]
        else:
            with ablate(model, component, to=edits(model, observations, component, how, asked)):
                logits = model(*inputs(observations, *asked))[:, 0]
        probabilities, preference = logits.softmax(-1).numpy(), (logits @ contrast("F-R").double()).numpy()
        for situation in SITUATIONS:
            chosen = showing(observations.images, situation)
            found = row(table, situation, *asked, component, how)
            part = share[chosen] / share[chosen].sum()
            expected = [*(part @ probabilities[chosen]), part @ preference[chosen]]
            assert found[["left", "right", "forward", "logit_diff"]].tolist() == pytest.approx(
                expected, abs=1e-9
            )
            assert (found["low"], found["high"]) == pytest.approx(
                (probabilities[chosen, 2].min(), probabilities[chosen, 2].max()), abs=1e-6
            )


def test_contributions_sum_to_the_preference(table):
    parts = ["state", "time and position", "L0H0", "L0H1", "L0 b_O", "L0 MLP", "b_U"]
    np.testing.assert_allclose(table[parts].sum(axis=1), table["logit_diff"], atol=1e-9)
    np.testing.assert_allclose(table[["left", "right", "forward"]].sum(axis=1), 1, atol=1e-9)
    assert (table.query("ablated == 'L0H0' and how == 'zero'")["L0H0"] == 0).all()


def test_attention_is_the_hooked_pattern(model, observations, table):
    _, cache = model.run_with_cache(*inputs(observations, 0.9, 3))
    chosen = showing(observations.images, "obstacle")
    part = weights(observations)[chosen] / weights(observations)[chosen].sum()
    expected = part @ cache["pattern", 0][chosen, :, 1, 0].detach().numpy()
    found = row(table, "obstacle", 0.9, 3)
    assert found[["attention L0H0", "attention L0H1"]].tolist() == pytest.approx(expected.tolist())


def test_the_same_seed_gives_the_same_table(model, observations, table):
    assert situation_table(model, observations, **ASKED).equals(table)


def test_an_unknown_ablation_gets_one_sentence(model, observations):
    with pytest.raises(ValueError, match="how is 'median'; it must be one of 'zero', 'mean'"):
        situation_table(model, observations, how=["median"])
