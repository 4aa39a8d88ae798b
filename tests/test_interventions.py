"""Ablation, patching and path patching against TransformerLens, edited weights and what linearity gives exactly."""

import math
import re
from contextlib import ExitStack
from itertools import product

import numpy as np
import pytest
import torch
from transformer_lens import patching

from dtbook.analysis.attribution import decompose
from dtbook.analysis.interventions import (
    RTG_TOKENS,
    STATE_TOKENS,
    Site,
    ablate,
    component_outputs,
    constant,
    edited,
    feature_mean,
    mean_output,
    patch,
    path_patch,
    site,
    written,
)
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import batches, select, weights
from dtbook.model import DecisionTransformer, DTConfig

ONE = DTConfig(d_model=16, n_heads=2, d_head=4, d_mlp=8, max_steps=20)
DEEP = DTConfig(d_model=24, n_heads=3, d_head=8, d_mlp=20, n_layers=2, n_timesteps=3, max_steps=20)
CLOSE = {"atol": 1e-11, "rtol": 1e-11}
every_model = pytest.mark.parametrize("cfg", [ONE, DEEP], ids=["one layer", "two layers, three timesteps"])
in_both_types = pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, {"atol": 2e-5, "rtol": 1e-5}), (torch.float64, CLOSE)],
    ids=["float32", "float64"],
)


def loud(cfg, dtype=torch.float64):
    """A model whose every parameter, biases included, is far from zero."""
    model, generator = DecisionTransformer(cfg).to(dtype), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            )
        model.W_E_state *= 0.05  # else attention is all or nothing, and nothing moves it
    return model.eval().requires_grad_(False)


def inputs(cfg, seed=0, batch=5, time=None):
    """Views with valid indices, RTGs, timesteps and actions, at random."""
    generator, time = torch.Generator().manual_seed(seed), time or cfg.n_timesteps
    views = [torch.randint(n, (batch, time, 7, 7), generator=generator) for n in (11, 6, 3)]
    return (
        torch.stack(views, -1).to(torch.uint8),
        torch.randn(batch, time, generator=generator),
        torch.randint(cfg.max_steps + 1, (batch, time), generator=generator),
        torch.randint(3, (batch, time - 1), generator=generator),
    )


def two_runs(cfg, dtype=torch.float64):
    """A model, clean inputs with their cache, source inputs with theirs, and both logits."""
    model, clean, source = loud(cfg, dtype), inputs(cfg, 0), inputs(cfg, 1)
    clean_logits, clean_cache = model.run_with_cache(*clean)
    source_logits, source_cache = model.run_with_cache(*source)
    assert (clean_logits - source_logits).abs().min() > 1e-4
    return model, clean, clean_cache, clean_logits, source_cache, source_logits


def components(cfg):
    for layer in range(cfg.n_layers):
        yield from (f"L{layer}H{head}" for head in range(cfg.n_heads))
        yield from (f"L{layer} MLP", f"L{layer}N3")


def hooked(model):
    return [name for name, hook in model.hook_dict.items() if hook.has_hooks()]


# Ablation


def test_zero_ablation_is_zero_weights():
    for name in components(ONE):
        model, batch = loud(ONE), inputs(ONE)
        with ablate(model, name):
            ablated = model(*batch)
        intact = model(*batch)
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        weights = {"L0H0": [attn.W_O[0]], "L0H1": [attn.W_O[1]], "L0N3": [mlp.W_out[3]]}
        for weight in weights.get(name, [mlp.W_out, mlp.b_out]):
            weight.zero_()
        torch.testing.assert_close(ablated, model(*batch), **CLOSE)
        assert (ablated - intact).abs().max() > 0.01


def test_ablation_acts_at_the_state_tokens_and_nowhere_else():
    model, batch = loud(DEEP), inputs(DEEP)
    _, intact = model.run_with_cache(*batch)
    with ablate(model, "L0H2", "L0 MLP"):
        _, cache = model.run_with_cache(*batch)
    z, before = cache["z", 0], intact["z", 0]
    assert (z[:, STATE_TOKENS, 2] == 0).all()
    torch.testing.assert_close(z[:, :, :2], before[:, :, :2])
    torch.testing.assert_close(z[:, RTG_TOKENS, 2], before[:, RTG_TOKENS, 2])
    assert (cache["mlp_out", 0][:, [1, 4, 7]] == 0).all()
    assert (cache["mlp_out", 0][:, [0, 2, 3, 5, 6]] != 0).all()
    with ablate(model, "L0H2", positions=None):
        _, cache = model.run_with_cache(*batch)
    assert (cache["z", 0][:, :, 2] == 0).all()


def test_the_ablated_run_decomposes():
    model, batch = loud(DEEP), inputs(DEEP)
    with ablate(model, "L1H0", "L0N3"):
        parts = decompose(model, *batch)
        torch.testing.assert_close(sum(parts.values()), model(*batch), **CLOSE)
    assert (parts["L1H0"] == 0).all()


@every_model
def test_ablating_to_its_own_output_changes_nothing(cfg):
    model, batch = loud(cfg), inputs(cfg, batch=1)
    for name in components(cfg):
        where = site(model, name)
        own = model.run_with_cache(*batch)[1][where.hook][where.index]
        with ablate(model, name, to=constant(own)):
            torch.testing.assert_close(model(*batch), model(*batch), **CLOSE)
            ablated = model(*batch)
        torch.testing.assert_close(ablated, model(*batch), **CLOSE)


def test_feature_mean_is_over_the_width_of_a_head():
    model, batch = loud(ONE), inputs(ONE)
    _, intact = model.run_with_cache(*batch)
    with ablate(model, "L0H0", "L0 MLP", to=feature_mean):
        _, cache = model.run_with_cache(*batch)
    z = intact["z", 0].numpy()[:, 1, 0]
    np.testing.assert_allclose(cache["z", 0].numpy()[:, 1, 0], np.repeat(z.mean(1, keepdims=True), 4, 1))
    assert float(cache["mlp_out", 0][:, 1].std(-1).max()) < 1e-12


def test_mean_output_is_the_weighted_mean_over_all_observations():
    observations, model = select(all_observations(5, 2), "obstacle"), loud(ONE)
    (everything,) = batches(observations, 0.9, 10, batch_size=10**6)
    _, cache = model.run_with_cache(*everything.inputs)
    share = torch.from_numpy(weights(observations))[:, None]
    expected = {
        "L0H1": (share * cache["z", 0][:, 1, 1]).sum(0),
        "L0 MLP": (share * cache["mlp_out", 0][:, 1]).sum(0),
        "L0N3": (share * cache["post", 0][:, 1, 3, None]).sum(),
    }
    for name, value in expected.items():
        mean = mean_output(model, name, observations, 0.9, 10, batch_size=17)
        torch.testing.assert_close(mean, value, **CLOSE)
        with ablate(model, name, to=constant(mean)):
            outputs = component_outputs(model, name, *inputs(ONE))
        torch.testing.assert_close(outputs, value.expand_as(outputs), **CLOSE)


# Activation patching


@every_model
@in_both_types
def test_patching_a_run_with_itself_changes_nothing(cfg, dtype, close):
    model, clean, cache, logits, *_ = two_runs(cfg, dtype)
    for name in [*model.hook_dict, *components(cfg)]:
        if "action" in name and cfg is ONE:
            continue  # a single timestep has no action
        with patch(model, cache, name):
            torch.testing.assert_close(model(*clean), logits, **close)
    with patch(model, cache, *(name for name in cache.keys())):  # noqa: SIM118
        torch.testing.assert_close(model(*clean), logits, **close)


@every_model
@in_both_types
def test_patching_everything_gives_the_other_run(cfg, dtype, close):
    model, clean, _, _, source, expected = two_runs(cfg, dtype)
    tokens = ["hook_rtg_embed", "hook_state_embed", "hook_time_embed"]
    tokens += ["hook_action_embed"] if cfg is DEEP else []
    writers = [f"blocks.{layer}.hook_{name}_out" for layer in range(cfg.n_layers) for name in ("attn", "mlp")]
    last = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    heads = [Site("blocks.0.attn.hook_z", head) for head in range(cfg.n_heads)]
    for sites in (
        tokens,
        ["hook_embed"],
        ["hook_embed", *writers],
        [last],
        ["hook_embed", *heads],
        list(source.keys()),
    ):
        with patch(model, source, *sites):
            torch.testing.assert_close(model(*clean), expected, **close)


def test_parts_add_up_to_the_whole_activation():
    model, clean, _, logits, source, _ = two_runs(DEEP)
    name = "blocks.1.attn.hook_z"
    parts = [Site(name, head, pos) for head, pos in product(range(3), range(8))]
    with patch(model, source, *parts):
        by_parts = model(*clean)
    with patch(model, source, name):
        torch.testing.assert_close(by_parts, model(*clean), **CLOSE)
    with patch(model, source, Site(name, 1, RTG_TOKENS)):  # of the last layer's, nobody reads these
        torch.testing.assert_close(model(*clean), logits, **CLOSE)
    with patch(model, source, Site(name, 1, -1)):
        patched = model(*clean)
    torch.testing.assert_close(patched[:, :2], logits[:, :2], **CLOSE)
    assert (patched[:, 2] - logits[:, 2]).abs().max() > 0.01
    parts = [Site("blocks.1.mlp.hook_post", neuron=neuron) for neuron in range(20)]
    with patch(model, source, *parts):
        by_parts = model(*clean)
    with patch(model, source, "blocks.1.mlp.hook_post"):
        torch.testing.assert_close(by_parts, model(*clean), **CLOSE)


def test_a_source_of_one_row_patches_any_number():
    model, clean = loud(ONE), inputs(ONE, batch=6)
    single = [value[:1] for value in inputs(ONE, 1)]
    expected, source = model.run_with_cache(*single)
    for rows in (1, 4, 6):
        with patch(model, source, "blocks.0.hook_resid_pre"):
            logits = model(*(value[:rows] for value in clean))
        torch.testing.assert_close(logits, expected.expand(rows, -1, -1), **CLOSE)


class ByIndex(torch.nn.Module):
    """TransformerLens's functions hand over one tensor of tokens; this one is an index into a list of inputs."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs, self.cfg = model, inputs, model.cfg

    def run_with_hooks(self, tokens, **kwargs):
        return self.model.run_with_hooks(*[column[tokens[:, 0]] for column in self.inputs], **kwargs)


def lens_results(cfg, function):
    """TransformerLens's patched numbers, and what our `patch` gives at a site; both in float64."""
    model, clean, _, _, source, _ = two_runs(cfg)
    n_pos = 3 * cfg.n_timesteps - 1
    tokens = torch.arange(5)[:, None].expand(-1, n_pos)
    metric = lambda logits: logits[:, -1, 2].sum() - logits[:, -1, 0].sum()  # noqa: E731
    theirs = function(ByIndex(model, clean).eval(), tokens, source, metric)

    def ours(where):
        with patch(model, source, where):
            return float(metric(model(*clean)))

    return theirs, ours, n_pos


@every_model
@pytest.mark.parametrize(
    ("function", "hook"),
    [
        (patching.get_act_patch_resid_pre, "hook_resid_pre"),
        (patching.get_act_patch_resid_mid, "hook_resid_mid"),
        (patching.get_act_patch_attn_out, "hook_attn_out"),
        (patching.get_act_patch_mlp_out, "hook_mlp_out"),
    ],
)
def test_patching_by_position_is_transformerlens(cfg, function, hook):
    theirs, ours, n_pos = lens_results(cfg, function)
    expected = [
        [ours(Site(f"blocks.{layer}.{hook}", positions=pos)) for pos in range(n_pos)]
        for layer in range(cfg.n_layers)
    ]
    assert theirs.numpy() == pytest.approx(np.array(expected), rel=1e-5)  # it keeps its results in float32


@every_model
@pytest.mark.parametrize(
    ("function", "hook"),
    [
        (patching.get_act_patch_attn_head_out_all_pos, "hook_z"),
        (patching.get_act_patch_attn_head_q_all_pos, "hook_q"),
        (patching.get_act_patch_attn_head_k_all_pos, "hook_k"),
        (patching.get_act_patch_attn_head_v_all_pos, "hook_v"),
        (patching.get_act_patch_attn_head_pattern_all_pos, "hook_pattern"),
    ],
)
def test_patching_heads_is_transformerlens(cfg, function, hook):
    theirs, ours, _ = lens_results(cfg, function)
    expected = [
        [ours(Site(f"blocks.{layer}.attn.{hook}", head)) for head in range(cfg.n_heads)]
        for layer in range(cfg.n_layers)
    ]
    assert theirs.numpy() == pytest.approx(np.array(expected), rel=1e-5)


@every_model
def test_patching_heads_by_position_is_transformerlens(cfg):
    theirs, ours, n_pos = lens_results(cfg, patching.get_act_patch_attn_head_out_by_pos)
    for layer, pos, head in product(range(cfg.n_layers), range(n_pos), range(cfg.n_heads)):
        expected = ours(Site(f"blocks.{layer}.attn.hook_z", head, pos))
        assert float(theirs[layer, pos, head]) == pytest.approx(expected, rel=1e-5)
    theirs, ours, n_pos = lens_results(cfg, patching.get_act_patch_attn_head_pattern_by_pos)
    for layer, pos, head in product(range(cfg.n_layers), range(n_pos), range(cfg.n_heads)):
        expected = ours(Site(f"blocks.{layer}.attn.hook_pattern", head, pos))
        assert float(theirs[layer, head, pos]) == pytest.approx(expected, rel=1e-5)


# Path patching


@pytest.mark.parametrize("sender", ["L0H1", "L0 MLP", "L0N3"])
def test_head_and_mlp_to_logits_is_what_linearity_gives(sender):
    model, clean, cache, logits, source, _ = two_runs(ONE)
    block, change = model.blocks[0], {}
    change["L0H1"] = (source["z", 0] - cache["z", 0])[:, 1, 1] @ block.attn.W_O[1]
    change["L0 MLP"] = (source["mlp_out", 0] - cache["mlp_out", 0])[:, 1]
    change["L0N3"] = (source["post", 0] - cache["post", 0])[:, 1, 3, None] * block.mlp.W_out[3]
    with path_patch(model, cache, source, sender, "logits"):
        torch.testing.assert_close(model(*clean)[:, 0], logits[:, 0] + change[sender] @ model.W_U, **CLOSE)


@every_model
def test_with_the_mlp_frozen_a_patched_head_is_its_path_to_the_logits(cfg):
    model, clean, cache, logits, source, _ = two_runs(cfg)
    layer = cfg.n_layers - 1
    with patch(model, cache, f"blocks.{layer}.hook_mlp_out"), patch(model, source, f"L{layer}H0"):
        frozen = model(*clean)
    with path_patch(model, cache, source, f"L{layer}H0", "logits"):
        torch.testing.assert_close(model(*clean), frozen, **CLOSE)
    assert (frozen - logits).abs().max() > 0.01
    with patch(model, source, f"L{layer}H0"):
        whole = model(*clean)
    with (
        path_patch(model, cache, source, f"L{layer}H0", "logits"),
        path_patch(model, cache, source, f"L{layer}H0", f"L{layer} MLP"),
    ):
        torch.testing.assert_close(model(*clean), whole, **CLOSE)  # it has no other path


def test_head_to_mlp_is_the_mlp_run_on_the_changed_input():
    model, clean, cache, logits, source, _ = two_runs(ONE)
    change = (source["z", 0] - cache["z", 0])[:, :, 0] @ model.blocks[0].attn.W_O[0]
    mlp_out = model.blocks[0].mlp(cache["resid_mid", 0] + change)
    expected = logits + (mlp_out - cache["mlp_out", 0])[:, 1:] @ model.W_U
    with path_patch(model, cache, source, "L0H0", "L0 MLP"):
        torch.testing.assert_close(model(*clean), expected, **CLOSE)


@pytest.mark.parametrize("sender", ["rtg", "state", "time"])
def test_embedding_to_head_through_v_is_what_linearity_gives(sender):
    """The pattern is the clean run's, so with the MLP frozen the logits move by pattern · Δ W_V W_O W_U."""
    model, clean, cache, logits, source, _ = two_runs(ONE)
    rtg, state, time = (
        source[f"hook_{n}_embed"] - cache[f"hook_{n}_embed"] for n in ("rtg", "state", "time")
    )
    nothing = torch.zeros_like(rtg)
    change = {"rtg": [rtg, nothing], "state": [nothing, state], "time": [time, time]}[sender]
    attn = model.blocks[0].attn
    moved = cache["pattern", 0][:, 1, 1:] @ torch.cat(change, 1) @ attn.W_V[1] @ attn.W_O[1] @ model.W_U
    with patch(model, cache, "blocks.0.hook_mlp_out"), path_patch(model, cache, source, sender, "L0H1 V"):
        torch.testing.assert_close(model(*clean), logits + moved, **CLOSE)
    assert moved.abs().max() > 0.01


@pytest.mark.parametrize(("letter", "sender"), list(product("QK", ["rtg", "state"])))
def test_embedding_to_head_through_q_or_k_is_attention_recomputed(letter, sender):
    model, clean, cache, logits, source, _ = two_runs(ONE)
    attn, stream = model.blocks[0].attn, {name: cache["resid_pre", 0].clone() for name in "QK"}
    at = 0 if sender == "rtg" else 1
    stream[letter][:, at] += (source[f"hook_{sender}_embed"] - cache[f"hook_{sender}_embed"])[:, 0]
    query = stream["Q"][:, 1] @ attn.W_Q[0] + attn.b_Q[0]
    keys = stream["K"] @ attn.W_K[0] + attn.b_K[0]
    pattern = ((query[:, None] * keys).sum(-1) / 2).softmax(-1)  # √d_head = 2
    z = (pattern[:, :, None] * cache["v", 0][:, :, 0]).sum(1)
    expected = logits[:, 0] + (z - cache["z", 0][:, 1, 0]) @ attn.W_O[0] @ model.W_U
    with (
        patch(model, cache, "blocks.0.hook_mlp_out"),
        path_patch(model, cache, source, sender, f"L0H0 {letter}"),
    ):
        torch.testing.assert_close(model(*clean)[:, 0], expected, **CLOSE)
    assert (letter, sender) == ("Q", "rtg") or (expected - logits[:, 0]).abs().max() > 1e-3


def readers(cfg, layer):
    """All that reads the stream in a layer."""
    return [f"L{layer}H{head} {letter}" for head in range(cfg.n_heads) for letter in "QKV"] + [
        f"L{layer} MLP"
    ]


def run_along(model, clean, cache, source, edges):
    """Logits with all these edges patched at once."""
    with ExitStack() as stack:
        for sender, receiver in edges:
            stack.enter_context(path_patch(model, cache, source, sender, receiver))
        logits = model(*clean)
    assert not hooked(model)
    return logits


@every_model
@in_both_types
def test_all_paths_of_the_embeddings_together_are_the_other_run(cfg, dtype, close):
    model, clean, cache, _, source, expected = two_runs(cfg, dtype)
    senders = ["rtg", "state", "time"] + (["action"] if cfg is DEEP else [])
    receivers = [reader for layer in range(cfg.n_layers) for reader in readers(cfg, layer)] + ["logits"]
    logits = run_along(model, clean, cache, source, product(senders, receivers))
    torch.testing.assert_close(logits, expected, **close)


@in_both_types
def test_all_paths_out_of_a_layer_together_are_its_output_patched(dtype, close):
    model, clean, cache, _, source, _ = two_runs(DEEP, dtype)
    senders = ["L0H0", "L0H1", "L0H2", "L0 MLP"]
    logits = run_along(model, clean, cache, source, product(senders, [*readers(DEEP, 1), "logits"]))
    with patch(model, source, "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"):
        torch.testing.assert_close(logits, model(*clean), **close)


class Split(ByIndex):
    """As TransformerLens's path patching expects a model: its forks under `attn`, and a switch to turn them on."""

    @property
    def blocks(self):
        return self.model.blocks

    def set_use_split_qkv_input(self, _):
        """The model forks by itself where somebody hooks."""

    def run_with_hooks(self, tokens, fwd_hooks):
        ours = [(name.replace("attn.hook", "hook"), hook) for name, hook in fwd_hooks]
        return super().run_with_hooks(tokens, fwd_hooks=ours)


@pytest.mark.parametrize("letter", "qkv")
def test_head_to_later_head_is_transformerlens(letter):
    """Its "clean" is what is patched in: our source."""
    model, clean, cache, _, source, _ = two_runs(DEEP)
    tokens = torch.arange(5)[:, None].expand(-1, 8)
    metric = lambda logits: logits[:, -1, 2].sum() - logits[:, -1, 0].sum()  # noqa: E731
    wrapped = Split(model, clean).eval()
    theirs = patching.get_act_patch_direct_path(
        wrapped, tokens, source, cache, metric, 0, 2, letter, verbose=False
    )
    for head in range(3):
        with path_patch(model, cache, source, "L0H2", f"L1H{head} {letter.upper()}"):
            assert float(theirs[1, head]) == pytest.approx(float(metric(model(*clean))), rel=1e-5)
    assert len(set(theirs[1].tolist())) == 3


def test_head_to_later_head_is_that_heads_input_changed():
    model, clean, cache, _, source, _ = two_runs(DEEP)
    change = (source["z", 0] - cache["z", 0])[:, :, 2] @ model.blocks[0].attn.W_O[2]
    values = (cache["resid_pre", 1] + change) @ model.blocks[1].attn.W_V[1] + model.blocks[1].attn.b_V[1]
    with path_patch(model, cache, source, "L0H2", "L1H1 V"):
        _, run = model.run_with_cache(*clean)
    torch.testing.assert_close(run["v", 1][:, :, 1], values, **CLOSE)
    for name, head in product("qkv", range(3)):
        if (name, head) != ("v", 1):
            torch.testing.assert_close(run[name, 1][:, :, head], cache[name, 1][:, :, head], **CLOSE)
    torch.testing.assert_close(run["mlp_out", 0], cache["mlp_out", 0], **CLOSE)


def test_a_path_can_be_received_at_some_tokens_only():
    model, clean, cache, _, source, _ = two_runs(DEEP)
    with path_patch(model, cache, source, "time", "L0H1 K", RTG_TOKENS):
        _, run = model.run_with_cache(*clean)
    changed = (run["k", 0] != cache["k", 0]).any(-1).any(0)
    assert changed[:, 1].tolist() == [True, False, False] * 2 + [True, False]
    assert not changed[:, [0, 2]].any()


@every_model
def test_what_all_senders_write_is_the_stream(cfg):
    model, _, cache, *_ = two_runs(cfg)
    embeddings = ["rtg", "state", "time"] + (["action"] if cfg is DEEP else [])
    writers = [name for name in components(cfg) if "N" not in name]
    total = sum(written(model, cache, name) for name in [*embeddings, *writers])
    total = total + cache["hook_pos_embed"] + sum(block.attn.b_O for block in model.blocks)
    torch.testing.assert_close(total, cache["resid_post", -1], **CLOSE)
    neurons = (
        sum(written(model, cache, f"L0N{neuron}") for neuron in range(cfg.d_mlp)) + model.blocks[0].mlp.b_out
    )
    torch.testing.assert_close(neurons, written(model, cache, "L0 MLP"), **CLOSE)


# What is left behind, and what is refused


def contexts(model, cache, source):
    yield ablate(model, "L0H1", "L0N2")
    yield patch(model, source, "L0 MLP", Site("blocks.0.attn.hook_pattern", 1, STATE_TOKENS))
    yield path_patch(model, cache, source, "state", "L0H1 K")


def test_no_hook_outlives_its_context_and_nothing_is_edited():
    model, clean, cache, _, source, _ = two_runs(ONE)
    weights, intact = {name: value.clone() for name, value in model.state_dict().items()}, model(*clean)
    copies = [value.clone() for value in clean], {n: source[n].clone() for n in source.keys()}  # noqa: SIM118
    for context in contexts(model, cache, source):
        with context:
            assert hooked(model)
            assert (model(*clean) - intact).abs().max() > 1e-4
        assert not hooked(model)
        assert torch.equal(model(*clean), intact)
    for context in contexts(model, cache, source):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
        assert not hooked(model)
    assert all(torch.equal(value, copy) for value, copy in zip(clean, copies[0], strict=True))
    assert all(torch.equal(source[name], copy) for name, copy in copies[1].items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_contexts_leave_other_peoples_hooks_alone():
    model, batch, calls = loud(ONE), inputs(ONE), []
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: calls.append(value.clone()))]):
        with ablate(model, "L0H0"):
            with pytest.raises(ZeroDivisionError), ablate(model, "L0H1"):
                raise ZeroDivisionError
            without_head_0 = model(*batch)
        intact = model(*batch)
    with ablate(model, "L0H0"):
        assert torch.equal(model(*batch), without_head_0)
    assert (without_head_0 - intact).abs().max() > 0.01
    assert len(calls) == 2
    assert torch.equal(*calls)  # it was there first, so it sees the heads before they are ablated
    assert not hooked(model)


def test_an_edit_that_fails_leaves_no_hook():
    model, _, _, _, source, _ = two_runs(ONE)
    with (
        pytest.raises(ValueError, match=r"shape \(5, 2, 16\).*must fit \(4, 2, 16\)"),
        patch(model, source, "blocks.0.hook_resid_pre"),
    ):
        model(*(value[:4] for value in inputs(ONE)))
    assert not hooked(model)
    with pytest.raises(ValueError, match="must fit"), edited(model, ("L0 MLP", lambda part: part.sum(-1))):
        model(*inputs(ONE))


def test_gradients_flow_through_an_edit():
    model, batch = loud(ONE).requires_grad_(True), inputs(ONE)
    with ablate(model, "L0H0"):
        model(*batch).sum().backward()
    W_V = model.blocks[0].attn.W_V.grad
    assert (W_V[0, :, :] == 0).all()
    assert (W_V[1] != 0).any()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("L1H0", r"layer is 1 in 'L1H0'; this model has layers 0 to 0"),
        ("L0H2", r"head is 2 in .*; this model has heads 0 to 1"),
        ("L0N8", r"neuron is 8 in .*; this model has neurons 0 to 7"),
        ("L0 mlp", r"no hook or component 'L0 mlp'"),
        ("blocks.0.hook_z", r"no hook or component 'blocks.0.hook_z'"),
        (Site("blocks.0.attn.hook_z", head=2), r"head is 2 in 'blocks.0.attn.hook_z'"),
        (Site("blocks.0.attn.hook_z", head=-1), r"head is -1"),
        (Site("blocks.0.hook_mlp_out", head=0), r"head is 0, but blocks.0.hook_mlp_out has no heads"),
        (Site("blocks.0.attn.hook_z", neuron=0), r"neuron is 0, but blocks.0.attn.hook_z has no neurons"),
        (Site("blocks.0.attn.hook_z", positions=2), r"positions is 2 at .*; this model has positions 0 to 1"),
        (Site("hook_state_embed", positions=1), r"this model has positions 0 to 0"),
    ],
)
def test_what_the_model_does_not_have_gets_one_sentence(where, message):
    model = loud(ONE)
    source = {"blocks.0.attn.hook_z": torch.zeros(1, 2, 2, 4)}
    for context in (
        ablate(model, where),
        patch(model, source, where),
        edited(model, (where, torch.zeros_like)),
    ):
        with pytest.raises(ValueError, match=message) as caught, context:
            raise AssertionError("entered")
        assert "\n" not in str(caught.value)
        assert not hooked(model)


def test_a_source_without_the_activation_gets_one_sentence():
    model = loud(ONE)
    with (
        pytest.raises(ValueError, match=r"source holds no blocks\.0\.hook_mlp_out"),
        patch(model, {}, "L0 MLP"),
    ):
        raise AssertionError("entered")


HEAD_1 = "blocks.0.attn.hook_z"


@pytest.fixture
def entered(as_users_run_it):
    """What entering a context of a model with three timesteps and running it gives: logits, or an error's sentence."""
    model = DecisionTransformer(DTConfig(d_model=16, n_heads=2, d_head=4, d_mlp=8, n_timesteps=3)).eval()
    states, rtgs, timesteps = (
        torch.zeros(2, 3, 7, 7, 3, dtype=torch.uint8),
        torch.ones(2, 3),
        torch.zeros(2, 3),
    )
    given = states, rtgs, timesteps.long(), timesteps.long()[:, :2]
    _, cache = model.run_with_cache(*given)

    def enter(intervention, *arguments, **options):
        source = {patch: [cache], path_patch: [cache, cache]}.get(intervention, [])
        try:
            with intervention(model, *source, *arguments, **options):
                return model(*given)
        except ValueError as error:
            return str(error)

    return enter


def test_every_intervention_refuses_what_is_no_site(entered):
    said = []
    for where in (["L0H1"], 1, None):
        found = entered(ablate, where), entered(edited, (where, torch.zeros_like)), entered(patch, where)
        said.append(" and ".join(set(found)))
    for arguments in ((1.5,), (1, [1])):
        with pytest.raises(ValueError, match="must be an integer") as error:
            Site(HEAD_1, *arguments)
        said.append(str(error.value))
    said += [entered(ablate, "L0H1", to=to) for to in ("mean", None, [0.0])]
    said += [entered(path_patch, ["L0H1"], "logits"), entered(path_patch, "L0H1", 3)]
    no_site = (
        'There is no hook or component {}; name a hook of the model, such as "blocks.0.attn.hook_z", or a component, '
        'such as "L0H1", "L0 MLP" or "L0N17", each by itself.'
    )
    assert said == [
        *(no_site.format(where) for where in ("['L0H1']", "1", "None")),
        "Site.head is 1.5; it must be an integer.",
        "Site.positions is [1]; it must be an integer.",
        *(
            f"to is {to!r}; it must be a number, a tensor or an edit, such as feature_mean."
            for to in ("mean", None, [0.0])
        ),
        'sender is [\'L0H1\']; it must be "rtg", "state", "action", "time", or like '
        '"L0H1", "L0 MLP" or "L0N17".',
        'receiver is 3; it must be like "L0H1 Q", "L0H1 K", "L0H1 V" or "L0 MLP", or "logits".',
    ]


def test_numpy_numbers_are_numbers(entered):
    for number in (0, 1, -1):
        plain, numpy = (entered(ablate, Site(HEAD_1, kind(1), kind(number))) for kind in (int, np.int64))
        assert torch.equal(plain, numpy)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Site(HEAD_1, 1, slice(8, None)), r"positions is slice\(8, None, None\) at .* positions 0 to 7"),
        (
            Site("hook_rtg_embed", None, slice(3, 5)),
            r"positions is slice\(3, 5, None\) at .* positions 0 to 2",
        ),
    ],
)
def test_a_slice_that_no_run_has_is_refused_before_anything_runs(where, message):
    model = loud(DEEP)
    with pytest.raises(ValueError, match=message), ablate(model, where):
        raise AssertionError("entered")
    assert not hooked(model)


def test_positions_that_a_run_does_not_have_are_refused_as_it_runs():
    model = loud(DEEP)
    _, long = model.run_with_cache(*inputs(DEEP))
    _, short = model.run_with_cache(*inputs(DEEP, time=2))
    run = {time: inputs(DEEP, time=time) for time in (2, 3)}
    for position in (7, -8, slice(6, None)):
        of_head_1, words = Site(HEAD_1, 1, position), re.escape(f"positions is {position} at {HEAD_1}; ")
        for context in (
            ablate(model, of_head_1),
            ablate(model, "L0H1", positions=position),
            patch(model, long, of_head_1),
        ):
            with pytest.raises(ValueError, match=words + "this run has positions 0 to 4"), context:
                model(*run[2])
        with (
            pytest.raises(ValueError, match=words + "source has positions 0 to 4"),
            patch(model, short, of_head_1),
        ):
            raise AssertionError("entered")
        with pytest.raises(ValueError, match=words + "this run"):
            component_outputs(model, of_head_1, *run[2])
    with (
        path_patch(model, long, long, "L0H1", "logits", 7),
        pytest.raises(ValueError, match=r"positions is 7 at .*; this run has positions 0 to 4"),
    ):
        model(*run[2])
    assert not hooked(model)


def test_a_number_or_a_tensor_may_stand_for_what_is_written_instead():
    model, x = loud(ONE), inputs(ONE)
    for value in (0.0, 0.5, torch.arange(4.0)):
        with ablate(model, "L0H1", to=constant(torch.as_tensor(value))):
            expected = model(*x)
        with ablate(model, "L0H1", to=value):
            assert torch.equal(model(*x), expected)


def test_nan_is_put_nowhere():
    with (
        pytest.raises(ValueError, match="value has 1 entries that are NaN"),
        ablate(loud(ONE), "L0H1", to=math.nan),
    ):
        raise AssertionError("entered")


def test_a_batch_of_none_goes_through_every_intervention():
    model, none = loud(ONE), [each[:0] for each in inputs(ONE)[:3]]
    _, cache = model.run_with_cache(*none)
    for context in (ablate(model, "L0H1", "L0 MLP"), patch(model, cache, "L0H1", "L0 MLP")):
        with context:
            assert model(*none).shape == (0, 1, 3)


@pytest.mark.parametrize(
    ("sender", "receiver", "message"),
    [
        ("L0 MLP", "L0 MLP", "reads before L0 MLP writes"),
        ("L0H0", "L0H1 Q", "L0H1 Q reads before L0H0 writes"),
        ("L1H0", "L0 MLP", "no path"),
        ("blocks.0.hook_mlp_out", "logits", "sender is 'blocks.0.hook_mlp_out'; it must be"),
        ("L0H3", "logits", "head is 3"),
        ("rtg", "L0H1", "receiver is 'L0H1'; it must be"),
        ("rtg", "L0H1 Z", "receiver is 'L0H1 Z'"),
        ("rtg", "L2H1 Q", "layer is 2"),
        ("action", "logits", "holds no hook_action_embed"),
    ],
)
def test_a_path_that_does_not_exist_gets_one_sentence(sender, receiver, message):
    model = loud(DEEP)
    _, cache = model.run_with_cache(*inputs(DEEP, time=1))
    with (
        pytest.raises(ValueError, match=message) as caught,
        path_patch(model, cache, cache, sender, receiver),
    ):
        raise AssertionError("entered")
    assert "\n" not in str(caught.value)
    assert not hooked(model)


def test_a_model_without_layers_has_no_paths():
    model = loud(DTConfig(d_model=8, n_layers=0))
    _, cache = model.run_with_cache(*inputs(model.cfg))
    with pytest.raises(ValueError, match="without layers"), path_patch(model, cache, cache, "rtg", "logits"):
        raise AssertionError("entered")
