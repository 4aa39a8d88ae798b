"""The circuit of a head against the hooked model: cached patterns, patched runs, decomposed logits."""

import numpy as np
import pytest
import torch

from dtbook.analysis.attribution import contrast, decompose, forward_preference
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.head_circuit import (
    TERMS,
    Circuit,
    attention_table,
    carried,
    counterfactual_effects,
    emptying,
    measure_circuit,
    neuron_directions,
    score_terms,
    weight_maps,
    written_by_head,
    written_by_heads,
)
from dtbook.analysis.heads import obstacle_head_scores
from dtbook.analysis.interventions import STATE_TOKENS, Site, patch
from dtbook.analysis.population import run_at
from dtbook.gridworld import FRONT, all_observations
from dtbook.gridworld.situations import batches, counterfactual_pairs, select, weights
from dtbook.model import DecisionTransformer, DTConfig

RTG, T = 0.7, 4


@pytest.fixture(scope="module")
def model():
    """A model whose attention, biases and neurons all matter, in float64."""
    model = DecisionTransformer(DTConfig(d_model=16, d_head=8, d_mlp=24, max_steps=20)).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        model.W_E_state *= 0.1
    return model.eval()


@pytest.fixture(scope="module")
def observations():
    return all_observations(5, 2)[::7]


@torch.no_grad()
def test_what_a_head_writes_of_its_parts_is_the_hooked_heads_result(model, observations):
    """Token by token: the parts of each, and the bias, sum to the cached v through W_O on the actions."""
    chosen, steps = select(observations, "obstacle")[:1], (2, 9)
    written = {head: written_by_head(model, head, RTG, steps) for head in (0, 1)}
    values = []
    for t in steps:
        batch = next(iter(batches(chosen, RTG, t)))
        _, cache = model.run_with_cache(batch.states, batch.rtgs.double(), batch.timesteps)
        values.append(torch.einsum("phd,hdm,ma->hpa", cache["v", 0][0], model.blocks[0].attn.W_O, model.W_U))
    expected = torch.stack(values).mean(0).numpy()
    for head, table in written.items():
        rtg = table.loc["RTG"].sum() + table.loc["both", "bias"]
        np.testing.assert_allclose(rtg, expected[head, 0], atol=1e-6)
        W_OV = model.blocks[0].attn.W_V[head] @ model.blocks[0].attn.W_O[head]
        front = emptying(model, "obstacle") @ W_OV @ model.W_U
        found = table.loc["state", "empty"] - table.loc["state", "obstacle"]
        np.testing.assert_allclose(found, front.numpy(), atol=1e-6)
    both = written_by_heads(model, RTG, steps).set_index(["head", "token", "what"])
    assert np.array_equal(both.loc[1], written[1])
    with pytest.raises(ValueError, match="no head L0H2"):
        written_by_head(model, 2, RTG, steps)


def test_score_terms_add_up_to_the_cached_attention(model, observations):
    batch = next(iter(batches(observations, RTG, T)))
    run = run_at(FoldedWeights(model).embed(batch.states[:, 0]), RTG, T)
    _, cache = model.run_with_cache(*batch.inputs)
    pattern = cache["blocks.0.attn.hook_pattern"][:, :, 1]  # the state token's
    odds = (pattern[..., 0] / pattern[..., 1]).log().T
    terms = score_terms(run)
    assert torch.allclose(terms.sum(0), odds, atol=1e-9)
    state, rtg = model.embed_states(batch.states[:, 0]), RTG * model.W_E_rtg
    W_QK = model.blocks[0].attn.W_Q[1] @ model.blocks[0].attn.W_K[1].T / 8**0.5
    assert torch.allclose(terms[0, 1], state @ W_QK @ rtg, atol=1e-9)
    assert torch.allclose(terms[2, 1], -((state @ W_QK) * state).sum(-1), atol=1e-9)


def test_parts_of_the_effect_are_those_of_patched_runs(model, observations):
    found = counterfactual_effects(model, observations, 1, "obstacle", RTG, T)
    clean, other = next(counterfactual_pairs(observations, RTG, T, "obstacle"))
    before, parts = forward_preference(model(*clean.inputs)), decompose(model, *clean.inputs)
    logits, source = model.run_with_cache(*other.inputs)
    row = found.effects.iloc[0]

    def mean(change):
        return float(change[:, 0].double() @ clean.weights.double())

    assert row["n"] == len(clean.weights)
    assert row["whole"] == pytest.approx(mean(forward_preference(logits) - before), abs=1e-6)
    hooks = {
        "head": [Site("blocks.0.attn.hook_z", 1, STATE_TOKENS)],
        "QK": [Site("blocks.0.attn.hook_pattern", 1, STATE_TOKENS)],
        "OV": [Site("blocks.0.attn.hook_v", 1)],
    }
    for name, sites in hooks.items():
        with patch(model, source, *sites):
            assert row[name] == pytest.approx(
                mean(forward_preference(model(*clean.inputs)) - before), abs=1e-6
            )
    with patch(model, source, *hooks["head"]):
        patched, post = decompose(model, *clean.inputs), model.run_with_cache(*clean.inputs)[1]
    on = contrast("F-R").double()
    assert row["direct F-R"] == pytest.approx(mean((patched["L0H1"] - parts["L0H1"]) @ on), abs=1e-6)
    assert row["MLP F-R"] == pytest.approx(mean((patched["L0 MLP"] - parts["L0 MLP"]) @ on), abs=1e-6)
    one = 5
    _, cache = model.run_with_cache(*clean.inputs)
    change = (post["post", 0] - cache["post", 0])[:, 1::3, one]
    output = model.blocks[0].mlp.W_out[one] @ model.W_U @ on
    assert found.neurons["change"][one] == pytest.approx(mean(change * output), abs=1e-6)
    assert found.neurons["output"][one] == pytest.approx(float(output))
    assert found.neurons["change"].sum() == pytest.approx(row["MLP F-R"])
    assert found.terms["change"].sum() != 0


def test_the_head_part_is_the_obstacle_score(model, observations):
    score = obstacle_head_scores(model, observations, RTG, T).set_index("head")
    row = counterfactual_effects(model, observations, 1, "obstacle", RTG, T).effects.iloc[0]
    assert row["head"] == pytest.approx(score["change"][1], abs=1e-6)
    assert row["whole"] == pytest.approx(score["whole_change"][1], abs=1e-6)


def test_what_is_written_is_found_from_what_is_read(model, observations):
    clean, other = next(counterfactual_pairs(observations, RTG, T, "obstacle"))
    caches = [model.run_with_cache(*batch.inputs)[1] for batch in (clean, other)]
    z = [cache["z", 0][:, 1, 1] for cache in caches]
    written = clean.weights.double() @ (z[1] - z[0]) @ model.blocks[0].attn.W_O[1]
    expected = torch.cosine_similarity(written[:, None], model.blocks[0].mlp.W_in, dim=0)
    found = counterfactual_effects(model, observations, 1, "obstacle", RTG, T).neurons
    assert found["written"].to_numpy() == pytest.approx(expected.detach().numpy(), abs=1e-6)
    W_OV = model.blocks[0].attn.W_V[1] @ model.blocks[0].attn.W_O[1]
    towards = torch.cosine_similarity((model.W_E_rtg @ W_OV)[:, None], model.blocks[0].mlp.W_in, dim=0)
    assert found["rtg"].to_numpy() == pytest.approx(towards.detach().numpy(), abs=1e-6)


def test_emptying_changes_the_front_cell_alone(model):
    rows = model.W_E_state.detach()
    i, j = FRONT
    expected = (1 - 6) * rows[7 * i + j] + (0 - 2) * rows[49 + 7 * i + j]
    assert torch.allclose(emptying(model, "obstacle"), expected)
    assert torch.equal(emptying(model, "goal from the top"), emptying(model, "goal"))


def test_attention_is_the_cached_patterns_weighted_mean(model, observations):
    table = attention_table(model, observations, [RTG], [T]).set_index(["head", "situation"])
    for situation in ("empty", "obstacle"):
        seen = select(observations, situation)
        batch = next(iter(batches(seen, RTG, T)))
        _, cache = model.run_with_cache(*batch.inputs, names_filter="blocks.0.attn.hook_pattern")
        pattern = cache["blocks.0.attn.hook_pattern"][:, 0, 1, 0].numpy()
        row = table.loc[(0, situation)]
        assert row["mean"] == pytest.approx(weights(seen) @ pattern, abs=1e-6)
        assert row["q05"] < row["q50"] < row["q95"]


def test_carried_begins_at_nothing_and_ends_at_all(model):
    neurons = neuron_directions(model, 1, "obstacle", RTG).assign(change=np.arange(24.0))
    for by in ("output", np.arange(24)):
        shares = carried(neurons, by)
        assert (shares.iloc[0], shares.iloc[-1], len(shares)) == pytest.approx((0, 1, 25))
    assert carried(neurons, np.arange(24)[::-1]).iloc[1] == pytest.approx(23 / np.arange(24).sum())


def test_a_circuit_comes_back_from_its_folder(model, observations, tmp_path):
    made = measure_circuit(model, observations, 1, (RTG,), RTG, (T,), T, ("obstacle", "goal"))
    made.save(tmp_path / "circuit")
    again = Circuit.load(tmp_path / "circuit")
    assert all(np.array_equal(made.maps[name], again.maps[name]) for name in made.maps)
    for name in ("attention", "effects", "terms", "neurons"):
        assert getattr(made, name).equals(getattr(again, name))
    assert list(made.terms["term"][:6]) == list(TERMS)


def test_what_does_not_exist_gets_one_sentence(model, observations):
    with pytest.raises(ValueError, match="There is no head L0H2"):
        weight_maps(model, 2)
    with pytest.raises(ValueError, match="situation is 'empty'; it must be one of 'wall'"):
        measure_circuit(model, observations, situations=("empty",))
