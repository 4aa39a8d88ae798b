"""Steering and weight edits against what linearity gives, and against models built with the edited weights."""

import pytest
import torch
from test_interventions import DEEP, ONE, hooked, inputs, loud

from dtbook.analysis.attribution import decompose, preference_direction
from dtbook.analysis.interventions import STATE_TOKENS, Site, ablate
from dtbook.analysis.steering import add, steer, weights_edited, without
from dtbook.model import DecisionTransformer

EXACT = {"atol": 1e-11, "rtol": 1e-11}


def vector(width, seed=3):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cfg", [ONE, DEEP], ids=["one layer", "two layers, three timesteps"])
def test_steering_behind_the_last_block_moves_the_logits_by_its_product_with_W_U(cfg):
    model, batch, v = loud(cfg), inputs(cfg), vector(cfg.d_model)
    with steer(model, v, -2.5, f"blocks.{cfg.n_layers - 1}.hook_resid_post"):
        moved = model(*batch)
    assert torch.allclose(moved, model(*batch) - 2.5 * v @ model.W_U, **EXACT)


def test_steering_before_the_block_is_what_another_position_would_write():
    """W_pos[1] is added to the state token alone, so adding to it is an independent way to steer there."""
    model, batch, v = loud(ONE), inputs(ONE), vector(ONE.d_model)
    moved = DecisionTransformer(ONE).double()
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.W_pos[1] += 1.5 * v
    with steer(model, v, 1.5):
        assert torch.allclose(model(*batch), moved(*batch), **EXACT)
    with torch.no_grad():
        moved.W_pos[0] += 1.5 * v
    with steer(model, v, 1.5, positions=None):
        assert torch.allclose(model(*batch), moved(*batch), **EXACT)


def test_a_steered_head_writes_the_vector_through_its_W_O():
    model, batch, v = loud(ONE), inputs(ONE), vector(ONE.d_head)
    before = decompose(model, *batch)
    with steer(model, v, 2.0, "L0H1"):
        after = decompose(model, *batch)
    assert torch.allclose(
        after["L0H1"] - before["L0H1"], 2 * v @ model.blocks[0].attn.W_O[1] @ model.W_U, **EXACT
    )
    assert torch.allclose(after["L0H0"], before["L0H0"], **EXACT)


def test_steering_adds_up_and_by_nothing_changes_nothing():
    model, batch, v = loud(ONE), inputs(ONE), vector(ONE.d_model)
    with steer(model, v, 0.0):
        none = model(*batch)
    assert torch.allclose(none, model(*batch), **EXACT)
    with steer(model, v, 1.0), steer(model, v, 2.0):
        twice = model(*batch)
    with steer(model, v, 3.0):
        assert torch.allclose(twice, model(*batch), **EXACT)
    assert not hooked(model)
    assert torch.equal(add(v)(torch.zeros(2, ONE.d_model).double()), v.expand(2, -1))


@pytest.mark.parametrize(("multiple", "number"), [(float("nan"), 1.0), (1.0, float("inf")), (1e200, 1e200)])
def test_nothing_is_pushed_beyond_all_numbers(multiple, number):
    model, v = loud(ONE), vector(ONE.d_model)
    v[3] = number
    with (
        pytest.raises(ValueError, match=r"multiple · vector holds (nan|inf) \(multiple is .*must be finite"),
        steer(model, v, multiple),
    ):
        raise AssertionError("entered")


def test_a_site_says_its_own_tokens():
    model, batch, v = loud(ONE), inputs(ONE), vector(ONE.d_model)
    with steer(model, v, 1.0, Site("blocks.0.hook_resid_pre", positions=STATE_TOKENS)):
        there = model(*batch)
    with steer(model, v, 1.0):
        assert torch.equal(there, model(*batch))


@pytest.mark.parametrize(
    ("width", "where", "message"),
    [
        (3, "blocks.0.hook_resid_pre", r"vector has shape \(3,\).*shape \(16,\)"),
        (16, "L0H1", r"shape \(16,\); blocks.0.attn.hook_z is steered by one of shape \(4,\)"),
        (16, "L0N3", r"one of shape \(1,\)"),
        (16, "L0H7", "head is 7"),
        (2, "blocks.0.attn.hook_pattern", "attention is no vector"),
    ],
)
def test_steering_what_is_not_there_gets_one_sentence(width, where, message):
    model = loud(ONE)
    with pytest.raises(ValueError, match=message), steer(model, vector(width), 1.0, where):
        raise AssertionError("nothing runs")
    assert not hooked(model)


# Weight edits


def test_zeroed_W_O_of_a_head_is_its_zero_ablation():
    model, batch = loud(ONE), inputs(ONE)

    def silence(W_O):
        W_O[1] = 0
        return W_O

    with weights_edited(model, W_O=silence):
        edited = model(*batch)
    with ablate(model, "L0H1"):
        assert torch.allclose(edited, model(*batch), **EXACT)


def test_a_direction_taken_out_of_a_weight_is_not_written_any_more():
    model, batch = loud(ONE), inputs(ONE)
    direction = preference_direction(model, "F-R")
    with weights_edited(model, blocks_0_mlp_W_out=without(direction), b_out=torch.zeros_like):
        parts = decompose(model, *batch)
    on_F_R = parts["L0 MLP"][..., 2] - parts["L0 MLP"][..., 1]
    assert on_F_R.abs().max() < 1e-12
    assert (parts["L0 MLP"][..., 2] - parts["L0 MLP"][..., 0]).abs().max() > 1e-3


def test_weights_come_back_bit_by_bit_whatever_happens():
    model, batch = loud(ONE), inputs(ONE)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    intact = model(*batch)
    with weights_edited(model, W_E_state=lambda w: w * 1e-3, W_U=lambda w: w + 1):
        assert (model(*batch) - intact).abs().max() > 1e-3
    with pytest.raises(KeyboardInterrupt), weights_edited(model, W_U=torch.zeros_like):
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match=r"edit of W_U gives shape \(3, 16\); it must stay \(16, 3\)"),
        weights_edited(model, W_E_rtg=torch.zeros_like, W_U=lambda w: w.T),
    ):
        raise AssertionError("nothing runs")
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_a_weight_that_is_not_there_gets_one_sentence():
    with (
        pytest.raises(ValueError, match="no one weight 'W_X'; the model has W_E_rtg, "),
        weights_edited(loud(ONE), W_X=abs),
    ):
        raise AssertionError("nothing runs")
    with pytest.raises(ValueError, match="no one weight 'W_Q'"), weights_edited(loud(DEEP), W_Q=abs):
        raise AssertionError("two layers have two")
