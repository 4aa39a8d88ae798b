"""The logits as a sum of components, exactly, for every shape of model, under ablation too."""

import math

import pytest
import torch

from dtbook.analysis.attribution import (
    by_cell,
    contrast,
    decompose,
    preference_direction,
    state_logits_by_channel,
)
from dtbook.model import DecisionTransformer, DTConfig

CONFIGS = [
    DTConfig(),
    DTConfig(n_layers=0, d_model=8),
    DTConfig(d_model=24, n_heads=4, d_head=8, d_mlp=40, n_layers=2, n_timesteps=3, encoding="one-hot"),
]
every_config = pytest.mark.parametrize("cfg", CONFIGS, ids=["the post's", "no layers", "one-hot, two layers"])


def loud(cfg, dtype=torch.float64):
    """A model whose every parameter, biases included, is far from zero."""
    model, generator = DecisionTransformer(cfg).to(dtype), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            )
    return model.eval()


def inputs(cfg, batch=5):
    """Views with valid indices, RTGs, timesteps and actions, at random."""
    generator, time = torch.Generator().manual_seed(1), cfg.n_timesteps
    views = [torch.randint(n, (batch, time, 7, 7), generator=generator) for n in (11, 6, 3)]
    return (
        torch.stack(views, -1).to(torch.uint8),
        torch.randn(batch, time, generator=generator),
        torch.randint(cfg.max_steps + 1, (batch, time), generator=generator),
        torch.randint(3, (batch, time - 1), generator=generator),
    )


@every_config
def test_components_and_biases_are_the_logits(cfg):
    model = loud(cfg)
    parts = decompose(model, *inputs(cfg))
    torch.testing.assert_close(sum(parts.values()), model(*inputs(cfg)), atol=1e-10, rtol=0)
    heads = [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    layers = [f"L{layer} {name}" for layer in range(cfg.n_layers) for name in ("b_O", "MLP")]
    embeddings = ["state: object", "state: colour", "state: state", "time", "position"]
    assert sorted(parts) == sorted([*embeddings, *heads, *layers, "b_U"])


def test_components_are_what_their_names_say():
    cfg = CONFIGS[2]
    model, (states, rtgs, timesteps, actions) = loud(cfg), inputs(cfg)
    parts = decompose(model, states, rtgs, timesteps, actions)
    _, cache = model.run_with_cache(states, rtgs, timesteps, actions)
    expected = {
        "time": cache["hook_time_embed"],
        "position": cache["hook_pos_embed"][:, [1, 4, 7]],
        "L1H3": cache["result", 1][:, [1, 4, 7], 3],
        "L0 MLP": cache["mlp_out", 0][:, [1, 4, 7]],
    }
    for name, written in expected.items():
        torch.testing.assert_close(parts[name], written @ model.W_U)
    torch.testing.assert_close(parts["L1 b_O"][3, 2], model.blocks[1].attn.b_O @ model.W_U)
    state = parts["state: object"] + parts["state: colour"] + parts["state: state"]
    torch.testing.assert_close(state, cache["hook_state_embed"] @ model.W_U)


@pytest.mark.parametrize("encoding", ["index", "one-hot"])
def test_a_channels_part_moves_with_that_channel_alone(encoding):
    model = loud(DTConfig(d_model=8, encoding=encoding))
    states = inputs(model.cfg)[0]
    before = state_logits_by_channel(model, states)
    changed = states.clone()
    changed[..., 3, 5, 1] = (changed[..., 3, 5, 1] + 1) % 6
    after = state_logits_by_channel(model, changed)
    assert torch.equal(after["object"], before["object"])
    assert torch.equal(after["state"], before["state"])
    difference = (model.embed_states(changed) - model.embed_states(states)) @ model.W_U
    torch.testing.assert_close(after["colour"] - before["colour"], difference)


def test_float32_components_of_the_default_model_sum_too():
    model = loud(CONFIGS[0], torch.float32)
    parts = decompose(model, *inputs(model.cfg))
    torch.testing.assert_close(sum(parts.values()), model(*inputs(model.cfg)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_and_its_model_in_float32_is_not(dtype):
    model = loud(CONFIGS[0], dtype)
    with pytest.raises(ValueError, match=rf"^model is in {dtype}; its logits are .*: model\.float\(\)\.$"):
        decompose(model, *inputs(model.cfg))
    model.float()
    parts = decompose(model, *inputs(model.cfg))
    torch.testing.assert_close(sum(parts.values()), model(*inputs(model.cfg)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_a_batch_of_none_has_components_of_no_rows(cfg):
    model = loud(cfg)
    none = [None if each is None else each[:0] for each in inputs(cfg)]
    parts = decompose(model, *none)
    assert {part.shape for part in parts.values()} == {model(*none).shape} == {(0, cfg.n_timesteps, 3)}
    assert parts.keys() == decompose(model, *inputs(cfg)).keys()


def test_under_ablation_the_sum_is_that_of_the_ablated_run():
    cfg = CONFIGS[2]
    model = loud(cfg)

    def without_head_1(z, hook):
        z[:, :, 1] = 0
        return z

    hooks = [
        ("blocks.0.attn.hook_z", without_head_1),
        ("blocks.1.hook_mlp_out", lambda value, hook: 0 * value),
    ]
    with model.hooks(fwd_hooks=hooks):
        parts, logits = decompose(model, *inputs(cfg)), model(*inputs(cfg))
    torch.testing.assert_close(sum(parts.values()), logits, atol=1e-10, rtol=0)
    assert not parts["L0H1"].any()
    assert not parts["L1 MLP"].any()
    assert (logits - model(*inputs(cfg))).abs().max() > 0.1


def test_an_edit_between_the_components_is_noticed():
    model = loud(CONFIGS[0])
    edit = [("blocks.0.hook_resid_post", lambda value, hook: value + 1)]
    with model.hooks(fwd_hooks=edit), pytest.raises(RuntimeError, match="miss the logits"):
        decompose(model, *inputs(model.cfg))


@pytest.mark.parametrize(
    ("preference", "weights"),
    [("F-R", [0, -1, 1]), ("R-L", [-1, 1, 0]), ("L-F", [1, 0, -1]), ("F", [0, 0, 1])],
)
def test_preferences_are_signed_differences_of_logits(preference, weights):
    assert contrast(preference).tolist() == weights
    model = loud(CONFIGS[0])
    resid = torch.randn(4, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = resid @ model.W_U @ torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(resid @ preference_direction(model, preference), expected)


@pytest.mark.parametrize("preference", ["", "F-F", "forward", "F-R-L", "f-r", "F-", "X-R"])
def test_other_preferences_are_refused(preference):
    with pytest.raises(ValueError, match=f"preference is {preference!r}; it must be L, R, F or a pair"):
        contrast(preference)


def test_cells_of_the_view_are_image_indices():
    model = DecisionTransformer(DTConfig(d_model=8))
    maps = by_cell(model, torch.arange(147.0))
    assert maps.shape == (3, 7, 7)
    assert maps[:, 3, 5].tolist() == [26, 75, 124]  # the cell in front of the agent, as in the original
