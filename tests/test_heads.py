"""The obstacle head: found where it was planted, absent where the MLP does the work, the same fast and slow."""

import json
import math

import numpy as np
import pytest
import torch
from planted import FORWARD, FRONT_OBJECT, NEAR, SEEN, TOLD, blank, plant_head, plant_mlp

from dtbook.analysis.attribution import forward_preference
from dtbook.analysis.counterfactuals import Case, pairs
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.heads import (
    changes_by_patching,
    changes_fused,
    obstacle_head_scores,
    order_heads,
)
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import counterfactual_pairs, select, weights
from dtbook.model import DecisionTransformer, DTConfig

NEAR_OBJECT = 2 * 7 + 6  # at the agent's left hand


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


def loud(cfg, dtype=torch.float64):
    """A model whose every parameter, biases included, is far from zero."""
    model, generator = DecisionTransformer(cfg).to(dtype), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            )
    return model.eval()


def score_of(model, observations, column="score"):
    return obstacle_head_scores(model, observations)[column].tolist()


# Planted circuits


@pytest.mark.parametrize("head", [0, 1])
def test_a_head_that_avoids_obstacles_is_found(observations, head):
    model = plant_head(blank(), head, strength=1.0)
    scores = obstacle_head_scores(model, observations)
    assert scores["score"].tolist() == pytest.approx([1.0, 0.0] if head == 0 else [0.0, 1.0])
    assert scores["mean_ratio"].tolist() == pytest.approx(scores["score"].tolist())
    assert scores["whole_change"].tolist() == pytest.approx([5.0, 5.0])  # object 6 becomes 1
    ordered = order_heads(model, scores)
    assert ordered.metadata["obstacle_head"]["head"] == "L0H1"
    assert (ordered.blocks[0].attn.W_O[1, 0, FORWARD], ordered.blocks[0].attn.W_O[0, 0, FORWARD]) == (-1, 0)
    assert ordered.metadata["head_order"] == {"0": [1, 0] if head == 0 else [0, 1]}


def test_what_the_mlp_does_is_no_obstacle_head(observations):
    model = plant_mlp(blank(), SEEN, strength=3.0)
    scores = obstacle_head_scores(model, observations)
    assert scores["score"].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert scores["whole_change"].tolist() == pytest.approx([15.0, 15.0])
    assert order_heads(model, scores).metadata["obstacle_head"]["head"] == "no obstacle head"


def test_a_head_that_tells_the_mlp_is_found(observations):
    model = plant_mlp(plant_head(blank(), 0, 1.0, to=TOLD), TOLD, strength=2.0)
    assert score_of(model, observations) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(("strength", "name"), [(0.26, "L0H1"), (0.24, "no obstacle head")])
def test_a_quarter_of_the_work_makes_an_obstacle_head(observations, strength, name):
    """The head does its share, the state token itself writes the rest straight to the logits."""
    model = plant_head(blank(), 1, strength)
    model.W_E_state[FRONT_OBJECT, FORWARD] = -(1 - strength)
    scores = obstacle_head_scores(model, observations)
    assert scores["score"].tolist() == pytest.approx([0.0, strength])
    assert order_heads(model, scores).metadata["obstacle_head"]["head"] == name


def test_observations_with_next_to_no_change_do_not_decide(observations):
    """Where the left hand is free or a wall, a neuron undoes all but a millionth of what head 1 does."""
    model = plant_head(blank(), 1, strength=1.0)
    mlp = model.blocks[0].mlp
    model.W_E_state[NEAR_OBJECT, NEAR] = 1
    mlp.W_in[SEEN, 1], mlp.W_in[NEAR, 1], mlp.b_in[1] = 1.0, -50.0, 100.0  # shut from an object of 3 up
    mlp.W_out[1, FORWARD] = 1 - 1e-6
    chosen = select(observations, "obstacle")
    undone = chosen.images[:, 2, 6, 0] < 3
    share, whole = weights(chosen), np.where(undone, 5e-6, 5.0)
    assert 0.1 < share[undone].sum() < 0.9
    scores = obstacle_head_scores(model, observations)
    assert scores["score"][1] == pytest.approx(5 / (share @ whole))
    assert scores["mean_ratio"][1] == pytest.approx(share @ (5 / whole), rel=1e-6)
    assert scores["mean_ratio"][1] > 1e4 * scores["score"][1]


def test_a_planted_head_of_a_second_layer_is_found(observations):
    model = plant_head(blank(n_heads=3, n_layers=2), 2, strength=1.0, layer=1)
    scores = obstacle_head_scores(model, observations)
    assert scores["score"].tolist() == pytest.approx([0, 0, 0, 0, 0, 1.0])
    ordered = order_heads(model, scores)
    assert ordered.metadata["obstacle_head"]["head"] == "L1H1"
    assert ordered.metadata["head_order"]["1"] == [0, 2, 1]
    assert score_of(ordered, observations) == pytest.approx([0, 0, 0, 0, 1.0, 0])


def test_a_model_that_no_obstacle_moves_has_none(observations):
    model = blank()
    scores = obstacle_head_scores(model, observations)
    assert scores["score"].isna().all()
    ordered = order_heads(model, scores)
    assert ordered.metadata["obstacle_head"]["head"] == "no obstacle head"
    assert ordered.metadata["obstacle_head"]["score"] == {"L0H0": None, "L0H1": None}
    assert ordered.metadata["head_order"] == {"0": [0, 1]}
    json.dumps(ordered.metadata, allow_nan=False)


# The fast way is the slow way


@pytest.mark.parametrize(
    "cfg",
    [
        DTConfig(),
        DTConfig(d_model=20, n_heads=5, d_head=3, d_mlp=6, encoding="one-hot", n_timesteps=3),
    ],
    ids=["the post's shape", "one-hot, five heads, longer context"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_fused_changes_are_those_of_patching(observations, cfg, dtype, tolerance):
    model = loud(cfg, dtype)
    rtg = 0.75  # the same in float32, which batches are in, and float64
    clean, other = next(counterfactual_pairs(observations, rtg, 10))
    pair = next(pairs(FoldedWeights(model), observations, Case("obstacle", rtg, rtg), 10))
    fast, slow = changes_fused(pair), changes_by_patching(model, clean, other)
    torch.testing.assert_close(fast.whole, slow.whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(fast.by_head, slow.by_head, atol=tolerance, rtol=tolerance)
    assert slow.by_head.abs().mean() > 0.01


@pytest.mark.parametrize("n_layers", [1, 2])
def test_scores_are_the_definition(observations, n_layers):
    """By hand-written hooks, all observations at once, against any batch size."""
    cfg = DTConfig(d_model=12, n_heads=2, d_head=4, d_mlp=8, n_layers=n_layers)
    model, chosen = loud(cfg), select(observations, "obstacle")
    n, share = len(chosen.images), weights(chosen)
    state = torch.from_numpy(chosen.images)[:, None]
    emptied = state.clone()
    emptied[:, 0, 3, 5] = torch.tensor([1, 0, 0], dtype=torch.uint8)
    rest = torch.full((n, 1), -0.5), torch.full((n, 1), 7)

    def preference(logits):
        logits = logits[:, 0].detach().numpy()
        return logits[:, 2] - np.log(np.exp(logits[:, 0]) + np.exp(logits[:, 1]))

    before, (after, cache) = preference(model(state, *rest)), model.run_with_cache(emptied, *rest)
    whole = preference(after) - before
    scores = obstacle_head_scores(model, observations, -0.5, 7, batch_size=33)
    assert scores[["layer", "head"]].to_numpy().tolist() == [
        [la, h] for la in range(n_layers) for h in range(2)
    ]
    for row in scores.itertuples():

        def swap(z, hook, head=row.head):
            z = z.clone()
            z[:, 1, head] = cache[hook.name][:, 1, head]
            return z

        hook = f"blocks.{row.layer}.attn.hook_z"
        change = preference(model.run_with_hooks(state, *rest, fwd_hooks=[(hook, swap)])) - before
        assert row.change == pytest.approx(share @ change)
        assert row.whole_change == pytest.approx(share @ whole)
        assert row.score == pytest.approx((share @ change) / (share @ whole))
        assert row.mean_ratio == pytest.approx(share @ (change / whole))


def test_forward_preference_is_the_log_odds_of_forward():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(forward_preference(logits), torch.logit(logits.softmax(-1)[:, 2]))


@pytest.mark.post_weights
def test_the_posts_obstacle_head_is_its_head_1(observations):
    model = DecisionTransformer.from_post_checkpoint()
    scores = obstacle_head_scores(model, all_observations())
    assert scores["score"].tolist() == pytest.approx(
        [0.0323, 0.7771], abs=2e-4
    )  # measured: see the docstring
    assert order_heads(model, scores).metadata["obstacle_head"]["head"] == "L0H1"
    assert order_heads(model, scores).metadata["head_order"] == {"0": [0, 1]}


# Ordering


def test_ordering_changes_names_only(observations):
    model = loud(DTConfig(d_model=12, n_heads=4, d_head=4, d_mlp=8))
    model.metadata["source"] = "a test"
    scores = obstacle_head_scores(model, observations)
    best = int(scores["score"].argmax())
    scores.loc[scores["head"] == 3, "score"] = scores["score"][best] + 1  # make head 3 the best
    ordered = order_heads(model, scores)
    batch = next(counterfactual_pairs(observations, 0.9, 10))[0].inputs
    torch.testing.assert_close(ordered(*batch), model(*batch))
    assert ordered.metadata["head_order"] == {"0": [0, 3, 2, 1]}
    assert model.metadata == {"source": "a test"}
    record = ordered.metadata["obstacle_head"]
    assert record["score"]["L0H1"] == scores["score"][3]
    assert record["score"]["L0H3"] == scores["score"][1]
    assert record["mean_ratio"]["L0H3"] == scores["mean_ratio"][1]
    assert record["whole_change"] == scores["whole_change"][0]
    assert "0.25" in record["rule"]
    json.dumps(ordered.metadata, allow_nan=False)


def test_ordering_an_ordered_model_changes_nothing(observations):
    model = plant_head(blank(), 0, 1.0)
    once = order_heads(model, obstacle_head_scores(model, observations))
    twice = order_heads(once, obstacle_head_scores(once, observations))
    assert twice.metadata["head_order"] == once.metadata["head_order"] == {"0": [1, 0]}
    assert twice.metadata["obstacle_head"]["score"] == pytest.approx(once.metadata["obstacle_head"]["score"])
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())


@pytest.mark.parametrize("n_heads", [1, 3])
def test_scores_of_another_model_are_refused(observations, n_heads):
    scores = obstacle_head_scores(blank(), observations)
    with pytest.raises(ValueError, match="scores has 2 rows; this model needs one for each") as caught:
        order_heads(blank(n_heads), scores)
    assert "\n" not in str(caught.value)


def test_a_single_head_stays_head_0(observations):
    model = plant_head(blank(n_heads=1), 0, 1.0)
    ordered = order_heads(model, obstacle_head_scores(model, observations))
    assert ordered.metadata["obstacle_head"]["head"] == "L0H0"


@pytest.mark.parametrize("n_layers", [0])
def test_a_model_without_heads_has_no_obstacle_head(observations, n_layers):
    model = blank(n_layers=n_layers)
    scores = obstacle_head_scores(model, observations)
    assert scores.empty
    assert order_heads(model, scores).metadata["obstacle_head"]["head"] == "no obstacle head"


def test_no_obstacle_to_be_seen_gets_one_sentence():
    with pytest.raises(ValueError, match="observations is empty"):
        obstacle_head_scores(blank(), all_observations(size=5, n_obstacles=0))
