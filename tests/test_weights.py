"""QK and OV circuits rebuild a forward pass; the post's printed numbers come out of its own weights."""

import math

import pytest
import torch

from dtbook.analysis.attribution import preference_direction
from dtbook.analysis.weights import front_cell_table, ov_circuit, qk_circuit, state_maps
from dtbook.model import DecisionTransformer, DTConfig

SHAPE = DTConfig(d_model=24, n_heads=4, d_head=9, d_mlp=8, n_layers=2, n_timesteps=2, max_steps=20)
FRONT = (3, 5)  # image[3, 5] is the cell in front of the agent
# What the front cell can hold: minigrid's object and colour index (the post's Table 3).
HOLDS = {"empty": (1, 0), "wall": (2, 5), "obstacle": (6, 2), "goal": (8, 1)}


@pytest.fixture(scope="module")
def post():
    """The post's own model."""
    return DecisionTransformer.from_post_checkpoint()


def loud(cfg):
    """A model whose every parameter, biases included, is far from zero."""
    model, generator = DecisionTransformer(cfg).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            )
    return model.eval()


def run(model):
    """The cache of a forward pass, and the states, at random."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randint(11, (4, 2, 7, 7, 3), generator=generator).to(torch.uint8)
    rtgs, timesteps = torch.rand(4, 2, generator=generator), torch.randint(21, (4, 2), generator=generator)
    _, cache = model.run_with_cache(states, rtgs, timesteps, torch.ones(4, 1, dtype=torch.int64))
    return cache, states


# Circuits against the forward pass


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_qk_circuits_rebuild_the_cached_scores(layer, scaled):
    model = loud(SHAPE)
    cache, _ = run(model)
    resid = cache["resid_pre", layer][2]
    visible = torch.ones(5, 5).tril().bool()
    for head in range(4):
        qk = qk_circuit(model, layer, head, resid, resid, scaled=scaled)
        scores = qk.weight + qk.destination_bias[:, None] + qk.source_bias + qk.constant
        expected = cache["attn_scores", layer][2, head] * (1 if scaled else math.sqrt(9))
        torch.testing.assert_close(scores[visible], expected[visible])


@pytest.mark.parametrize("layer", [0, 1])
def test_ov_circuits_rebuild_the_cached_results(layer):
    model = loud(SHAPE)
    cache, _ = run(model)
    identity = torch.eye(24, dtype=torch.float64)
    for head in range(4):
        ov = ov_circuit(model, layer, head, cache["resid_pre", layer][2], identity)
        expected = cache["result", layer][2, :, head]
        torch.testing.assert_close(cache["pattern", layer][2, head] @ ov.weight + ov.bias, expected)
        on_logits = ov_circuit(model, layer, head, cache["resid_pre", layer][2])
        torch.testing.assert_close(on_logits.weight, ov.weight @ model.W_U.detach())


def test_rows_of_the_state_embedding_add_up_to_the_state_tokens_score():
    model = loud(SHAPE)
    cache, states = run(model)
    flat = states[2, 1].permute(2, 0, 1).flatten().double()
    rows = torch.cat([model.W_E_state, model.W_E_time, model.W_pos]).detach()
    shared = (cache["hook_time_embed"][2, 1] + model.W_pos[4]).detach()
    by_row = qk_circuit(model, 0, 1, rows[:147], cache["resid_pre", 0][2, :1])
    rest = qk_circuit(model, 0, 1, shared[None], cache["resid_pre", 0][2, :1])
    score = flat @ (by_row.weight[:, 0] + by_row.destination_bias)
    score = score + rest.weight[0, 0] + rest.destination_bias[0] + rest.source_bias[0] + rest.constant
    torch.testing.assert_close(score, cache["attn_scores", 0][2, 1, 4, 0])


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_heads_that_do_not_exist_are_named(layer, head):
    model = loud(SHAPE)
    for circuit in (
        lambda: qk_circuit(model, layer, head, model.W_pos, model.W_pos),
        lambda: ov_circuit(model, layer, head, model.W_pos),
    ):
        with pytest.raises(ValueError, match=f"no head L{layer}H{head}; the model has 2 layers of 4 heads"):
            circuit()


@pytest.mark.parametrize("encoding", ["index", "one-hot"])
def test_the_front_cell_table_is_what_changing_that_cell_does(encoding):
    model = loud(DTConfig(d_model=16, encoding=encoding))
    direction = preference_direction(model, "F-L")
    view = torch.zeros(7, 7, 3, dtype=torch.uint8)
    table = front_cell_table(model, "F-L")
    effect = {}
    for name, code in HOLDS.items():
        view[FRONT] = torch.tensor([*code, 0], dtype=torch.uint8)
        effect[name] = float((model.embed_states(view) @ direction).detach())
        assert tuple(table.loc[name, ["object", "colour", "state"]]) == (*code, 0)
    for name in HOLDS:
        difference = table.contribution[name] - table.contribution["empty"]
        assert difference == pytest.approx(effect[name] - effect["empty"], abs=1e-12)


# The post's printed numbers, from its own weights


@pytest.mark.post_weights
def test_rtg_on_the_preferences(post):
    """In the text: ~1.13 and ~ -0.16."""
    assert round(float(post.W_E_rtg.detach() @ preference_direction(post, "F-R")), 2) == 1.13
    assert round(float(post.W_E_rtg.detach() @ preference_direction(post, "R-L")), 2) == -0.16


@pytest.mark.post_weights
def test_front_cell_of_the_state_embedding(post):
    """Figure 14's colour weight, -0.742; its object weight is printed as 0.27, the first digits of 0.2792."""
    object_, colour, state = state_maps(post, "F-R")[:, *FRONT].tolist()
    assert round(colour, 3) == -0.742
    assert math.floor(object_ * 100) / 100 == 0.27
    assert round(object_, 4) == 0.2792
    assert abs(state) < 1e-30


@pytest.mark.post_weights
def test_table_3(post):
    """The post multiplies its printed 0.27 and 0.742; with the full weights the last digits differ."""
    object_, colour, _ = state_maps(post, "F-R")[:, *FRONT].tolist()
    printed = {"empty": "0.27", "wall": "-3.17", "obstacle": "0.136", "goal": "1.42"}
    for name, (object_index, colour_index) in HOLDS.items():
        truncated = math.floor(object_ * 100) / 100 * object_index + round(colour, 3) * colour_index
        digits = len(printed[name].split(".")[1])
        assert f"{truncated:.{digits}f}" == printed[name]
    exact = front_cell_table(post).contribution.round(2).to_dict()
    assert exact == {"empty": 0.28, "wall": -3.15, "obstacle": 0.19, "goal": 1.49}


@pytest.mark.post_weights
def test_qk_circuit_of_head_1(post):
    """Figure 16: state to RTG, not divided by the root of d_head."""
    weight = qk_circuit(post, 0, 1, post.W_E_state, post.W_E_rtg[None], scaled=False).weight
    maps = weight.view(3, 7, 7)
    assert [round(float(x), 3) for x in maps[:2, *FRONT]] == [-0.244, -0.217]


@pytest.mark.post_weights
def test_ov_circuit_of_head_1(post):
    """Figure 17: state to the forward logit."""
    maps = ov_circuit(post, 0, 1, post.W_E_state).weight[:, 2].view(3, 7, 7)
    assert [round(float(x), 3) for x in maps[:2, *FRONT]] == [-0.864, 0.168]
