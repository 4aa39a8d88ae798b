"""The Decision Transformer against TransformerLens, minigrid and a float64 transcription of the original."""

import copy
import math
from dataclasses import replace

import gymnasium
import minigrid  # noqa: F401 - registers the environments
import numpy as np
import pytest
import torch
from bridge import bridge_of
from minigrid.wrappers import OneHotPartialObsWrapper
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.hooks import RemovableHandle
from transformer_lens import patching

from dtbook.model import DecisionTransformer, DTConfig, fetch_post_checkpoint
from dtbook.model.config import one_hot
from dtbook.model.gradients import WITHOUT_GRADIENT, Gradients

SHAPES = {
    "the post's": DTConfig(),
    "two layers, three timesteps": DTConfig(
        d_model=24, n_heads=4, d_head=8, d_mlp=40, n_layers=2, n_timesteps=3, max_steps=20
    ),
    "one-hot, three layers, nine timesteps": DTConfig(
        d_model=16, n_heads=1, d_head=12, d_mlp=8, n_layers=3, n_timesteps=9, encoding="one-hot"
    ),
}
every_shape = pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES.keys())
SMALL = DTConfig(d_model=16, n_heads=2, d_head=4, d_mlp=8, max_steps=20)


def loud(cfg, dtype=torch.float32):
    """A model whose every parameter, biases included, is far from zero."""
    model, generator = DecisionTransformer(cfg).to(dtype), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            )
        model.W_E_state *= 0.3
    return model.eval()


def inputs(cfg, batch=6, time=None, seed=0):
    """Views with valid indices, RTGs, timesteps and actions, at random."""
    rng, time = np.random.default_rng(seed), time or cfg.n_timesteps
    states = np.stack([rng.integers(n, size=(batch, time, 7, 7)) for n in (11, 6, 3)], axis=-1)
    return (
        torch.tensor(states, dtype=torch.uint8),
        torch.tensor(rng.uniform(-1, 1, (batch, time)), dtype=torch.float32),
        torch.tensor(rng.integers(cfg.max_steps + 1, size=(batch, time))),
        torch.tensor(rng.integers(3, size=(batch, time - 1))),
    )


# Where training starts


@pytest.mark.parametrize(
    ("cfg", "rtg"), [(DTConfig.post(), 1 / 128), (DTConfig.book(), 0.1)], ids=["post", "book"]
)
def test_the_posts_start_is_the_originals(cfg, rtg):
    """Mean and standard deviation of each weight, from the code of the original (W_pos around 0.8/√128).

    The book's differs in the RTG embedding alone.
    """
    model = DecisionTransformer(cfg, seed=3)
    expected = {"W_E_rtg": (0, rtg), "W_E_state": (0, 0.02), "W_E_time": (0, 1), "W_pos": (0.0707, 1)}
    expected |= {"W_E_action": (0, 1 / 512), "W_U": (0, 128**-0.5 / 3**0.5), "b_U": (0, 128**-0.5 / 3**0.5)}
    for name, weight in model.named_parameters():
        last, sample = name.rpartition(".")[2], weight.detach().flatten().double()
        if last[0] == "b" and last != "b_U":
            assert not sample.any(), name
            continue
        mean, std = expected.get(last, (0, 0.0707))
        assert abs(sample.mean() - mean) < 4 * std / len(sample) ** 0.5, name
        assert abs(sample.std() - std) < 4 * std / (2 * len(sample)) ** 0.5 or last == "b_U", name
    uniform = torch.cat([model.W_U.flatten(), model.b_U])
    assert uniform.abs().max() < 128**-0.5 < 1.02 * uniform.abs().max()
    assert replace(model.cfg, init="first") == DTConfig()


# Against TransformerLens


@every_shape
def test_logits_equal_transformerlens(cfg):
    model = loud(cfg)
    batch = inputs(cfg)
    with torch.no_grad():
        resid = model.embed(*batch)
        expected = bridge_of(model)(resid, start_at_layer=0)[:, 1::3] + model.b_U
        torch.testing.assert_close(model(*batch), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1


@every_shape
def test_activations_equal_transformerlens_under_the_same_names(cfg):
    model = loud(cfg, torch.float64)
    _, cache = model.run_with_cache(*inputs(cfg))
    with torch.no_grad():
        _, expected = bridge_of(model).run_with_cache(model.embed(*inputs(cfg)), start_at_layer=0)
    names = [f"attn.hook_{name}" for name in ("q", "k", "v", "z", "pattern")] + [
        "mlp.hook_pre",
        "mlp.hook_post",
    ]
    names += [f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")]
    for layer in range(cfg.n_layers):
        for name in (f"blocks.{layer}.{name}" for name in names):
            torch.testing.assert_close(
                cache[name].flatten(2), expected[name].flatten(2), atol=1e-10, rtol=1e-10
            )


def test_activation_cache_tools_agree_with_the_model():
    cfg = SHAPES["two layers, three timesteps"]
    model = loud(cfg, torch.float64)
    logits, cache = model.run_with_cache(*inputs(cfg))
    final = cache["resid_post", -1]
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(cache.decompose_resid().sum(0), final, **close)
    torch.testing.assert_close(cache.accumulated_resid()[-1], final, **close)
    torch.testing.assert_close(
        cache.get_full_resid_decomposition(expand_neurons=False).sum(0), final, **close
    )
    torch.testing.assert_close(cache.get_full_resid_decomposition().sum(0), final, **close)
    heads = cache.stack_head_results(layer=1).sum(0) + model.accumulated_bias(1, include_mlp_biases=False)
    torch.testing.assert_close(heads, cache["attn_out", 0], **close)
    with_mlp_input = model.accumulated_bias(1, mlp_input=True)
    expected = model.b_O.sum(0) + model.blocks[0].mlp.b_out
    torch.testing.assert_close(with_mlp_input, expected, **close)
    direct = cache.logit_attrs(final[None], tokens=2, incorrect_tokens=1)[0, :, 1::3]
    torch.testing.assert_close(
        direct + (model.b_U[2] - model.b_U[1]), logits[..., 2] - logits[..., 1], **close
    )


def test_cache_of_one_input_can_drop_its_batch_axis():
    model = loud(SMALL)
    batch = inputs(SMALL, batch=1)
    _, whole = model.run_with_cache(*batch)
    _, single = model.run_with_cache(*batch, remove_batch_dim=True)
    assert not single.has_batch_dim
    torch.testing.assert_close(single["pattern", 0], whole["pattern", 0][0])


def test_transformerlens_patching_functions_run_on_the_model():
    """TransformerLens's functions hand over one tensor; this one is an index into a list of inputs."""

    class ByIndex(torch.nn.Module):
        def __init__(self, model, inputs):
            super().__init__()
            self.model, self.inputs, self.cfg = model, inputs, model.cfg

        def arguments(self, tokens):
            return [column[tokens[:, 0]] for column in self.inputs]

        def run_with_hooks(self, tokens, **kwargs):
            return self.model.run_with_hooks(*self.arguments(tokens), **kwargs)

    model = loud(SMALL).eval()
    wrapped = ByIndex(model, inputs(SMALL, batch=8)).eval()
    clean, corrupted = torch.arange(4)[:, None].expand(-1, 2), torch.arange(4, 8)[:, None].expand(-1, 2)
    with torch.no_grad():
        _, cache = model.run_with_cache(*wrapped.arguments(clean))
        both = patching.get_act_patch_resid_pre(wrapped, corrupted, cache, lambda logits: logits[0, 0, 2])
        heads = patching.get_act_patch_attn_head_out_all_pos(wrapped, corrupted, cache, lambda x: x[0, 0, 2])
        swap = [
            ("blocks.0.attn.hook_z", lambda z, hook: torch.cat([z[:, :, :1], cache[hook.name][:, :, 1:]], 2))
        ]
        expected = model.run_with_hooks(*wrapped.arguments(corrupted), fwd_hooks=swap)
    assert both.shape == (1, 2)
    assert heads[0, 1] == pytest.approx(float(expected[0, 0, 2]), abs=1e-6)


# The embedding, by a transcription of design and original


@every_shape
def test_tokens_are_what_the_design_says(cfg):
    model = loud(cfg, torch.float64)
    states, rtgs, timesteps, actions = inputs(cfg, batch=2)
    resid = model.embed(states, rtgs, timesteps, actions).detach()
    time = states.shape[1]
    for b in range(2):
        for t in range(time):
            image, shared = states[b, t].numpy(), model.W_E_time[timesteps[b, t]]
            state = torch.zeros(cfg.d_model, dtype=torch.float64)
            for i in range(7):
                for j in range(7):
                    for channel in range(3):
                        index = int(image[i, j, channel])
                        if cfg.encoding == "index":
                            state += index * model.W_E_state[channel * 49 + i * 7 + j]
                        else:
                            state += model.W_E_state[((0, 11, 17)[channel] + index) * 49 + i * 7 + j]
            expected = [rtgs[b, t].double() * model.W_E_rtg, state]
            if t < time - 1:
                expected.append(model.W_E_action[actions[b, t]])
            for offset, token in enumerate(expected):
                pos = 3 * t + offset
                torch.testing.assert_close(resid[b, pos], token + shared + model.W_pos[pos])
    assert resid.shape[1] == 3 * time - 1


def test_one_hot_bits_are_minigrids():
    env = gymnasium.make("MiniGrid-Dynamic-Obstacles-8x8-v0").unwrapped
    wrapper = OneHotPartialObsWrapper(env)
    rng = np.random.default_rng(0)
    image = np.stack([rng.integers(n, size=(7, 7)) for n in (11, 6, 3)], axis=-1).astype(np.uint8)
    expected = wrapper.observation({"image": image})["image"]
    assert (one_hot(torch.from_numpy(image)).numpy() == expected).all()


@pytest.mark.post_weights
def test_the_posts_model_computes_what_the_original_code_does():
    """Transcribed in NumPy float64 from the original's forward pass and the TransformerLens of its time."""
    sd = torch.load(fetch_post_checkpoint(), weights_only=True)
    sd = {name: value.double().numpy() for name, value in sd.items()}
    attn = {
        name: sd[f"transformer.blocks.0.attn.{name}"]
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
    }
    mlp = {name: sd[f"transformer.blocks.0.mlp.{name}"] for name in ("W_in", "b_in", "W_out", "b_out")}
    states, rtgs, timesteps, _ = inputs(DTConfig(), batch=20)
    flat = (
        states[:, 0].numpy().transpose(0, 3, 1, 2).reshape(20, 147)
    )  # "channel height width" of image[i, j, c]
    time = sd["time_embedding.weight"][timesteps[:, 0].numpy()]
    rtg = rtgs.double().numpy() @ sd["reward_embedding.0.weight"].T + time
    x = np.stack([rtg, flat @ sd["state_encoder.weight"].T + time], 1) + sd["transformer.pos_embed.W_pos"][:2]
    q, k, v = (np.einsum("bpm,hmd->bhpd", x, attn[f"W_{n}"]) + attn[f"b_{n}"][:, None] for n in "QKV")
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(64)
    scores[..., 0, 1] = sd["transformer.blocks.0.attn.IGNORE"]
    pattern = np.exp(scores - scores.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    x = x + np.einsum("bhqk,bhkd,hdm->bqm", pattern, v, attn["W_O"]) + attn["b_O"]
    x = x + np.maximum(x @ mlp["W_in"] + mlp["b_in"], 0) @ mlp["W_out"] + mlp["b_out"]
    expected = x[:, 1] @ sd["predict_actions.weight"].T + sd["predict_actions.bias"]
    model = DecisionTransformer.from_post_checkpoint().double()
    np.testing.assert_allclose(model(states, rtgs, timesteps)[:, 0].detach(), expected, atol=1e-10)


def test_a_model_without_layers_reads_its_state_token():
    model = loud(DTConfig(d_model=8, n_layers=0, max_steps=20))
    batch = inputs(model.cfg)
    torch.testing.assert_close(model(*batch), model.embed(*batch)[:, 1::3] @ model.W_U + model.b_U)


@every_shape
def test_padding_at_the_end_changes_nothing_before_it(cfg):
    model = loud(cfg)
    states, rtgs, timesteps, actions = inputs(cfg)
    time = (cfg.n_timesteps + 1) // 2
    short = model(states[:, :time], rtgs[:, :time], timesteps[:, :time], actions[:, : time - 1])
    torch.testing.assert_close(short, model(states, rtgs, timesteps, actions)[:, :time], atol=1e-5, rtol=1e-5)


# The fast path


@pytest.mark.parametrize("encoding", ["index", "one-hot"])
@pytest.mark.parametrize("n_timesteps", [1, 3])
def test_fast_forward_equals_forward(encoding, n_timesteps):
    model = loud(DTConfig(encoding=encoding, n_timesteps=n_timesteps))
    batch = inputs(model.cfg, batch=64, time=1)
    with torch.no_grad():
        # these logits reach 40, where float32 leaves either path 2e-5 from the exact ones
        torch.testing.assert_close(model.fast_forward(*batch), model(*batch), atol=5e-5, rtol=1e-5)
        model.double()
        torch.testing.assert_close(model.fast_forward(*batch), model(*batch), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("encoding", ["index", "one-hot"])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
@pytest.mark.parametrize("d_head", [3, 20])
def test_gradients_by_hand_are_those_of_autograd(encoding, n_heads, d_head):
    """Twice, in arrays that hold the first batch's numbers; through the hooked path, in float64."""
    shape = DTConfig(d_model=37, n_heads=n_heads, d_head=d_head, d_mlp=40, encoding=encoding, n_actions=4)
    model, target = loud(shape, torch.float64), torch.arange(16) % 4
    plain, by_hand = copy.deepcopy(model), Gradients(model, batch_size=16)
    names = [name for name, _ in plain.named_parameters() if name.rpartition(".")[2] not in WITHOUT_GRADIENT]
    for seed in range(2):
        states, rtgs, timesteps, _ = inputs(shape, batch=16, seed=seed)
        loss, accuracy = by_hand(states[:, 0], rtgs[:, 0], timesteps[:, 0], target)
        logits = plain(states, rtgs, timesteps)[:, 0]
        expected = torch.nn.functional.cross_entropy(logits, target)
        weights = [plain.get_parameter(name) for name in names]
        for name, slow in zip(names, torch.autograd.grad(expected, weights), strict=True):
            torch.testing.assert_close(model.get_parameter(name).grad, slow, atol=1e-13, rtol=1e-9, msg=name)
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        assert accuracy == (logits.argmax(-1) == target).double().mean()


def test_fast_forward_takes_the_fused_path_only_where_it_holds(monkeypatch):
    def refuse(*_):
        raise AssertionError("fused")

    monkeypatch.setattr(DecisionTransformer, "_fused_logits", refuse)
    for cfg in (SHAPES["two layers, three timesteps"], DTConfig(n_timesteps=3), DTConfig(n_layers=0)):
        model = loud(cfg)
        torch.testing.assert_close(model.fast_forward(*inputs(cfg)), model(*inputs(cfg)))
    loud(SMALL).fast_forward(*inputs(SMALL)).sum().backward()
    with pytest.raises(AssertionError, match="fused"), torch.no_grad():
        loud(SMALL).fast_forward(*inputs(SMALL))


def test_fast_forward_lets_hooks_act():
    model = loud(SMALL)
    ablate = [("blocks.0.hook_mlp_out", lambda value, hook: torch.zeros_like(value))]
    with model.hooks(fwd_hooks=ablate):
        torch.testing.assert_close(model.fast_forward(*inputs(SMALL)), model(*inputs(SMALL)))
        ablated = model.fast_forward(*inputs(SMALL))
    assert (model.fast_forward(*inputs(SMALL)) - ablated).abs().max() > 0.1


class Louder(DecisionTransformer):
    """A subclass with a forward pass of its own."""

    def forward(self, *args):
        return 2 * super().forward(*args)


class Other(nn.Module):
    """Another MLP in the place of this one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.constant_(self.layer.bias, 0.1)

    def forward(self, x):
        return self.layer(x).tanh()


class Lora(nn.Module):
    """A weight with a change of low rank."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((16, 1), 0.3)), nn.Parameter(torch.full((1, 8), 0.3))

    def forward(self, weight):
        return weight + self.a @ self.b


def doubled(*args):
    """A hook of any kind: twice the last of what it is given."""
    return tuple(2 * x for x in args[-1]) if isinstance(args[-1], tuple) else 2 * args[-1]


def bound(part, name, change):
    setattr(part, name, change(getattr(part, name)))


def twice(weight):
    weight.grad.mul_(2)


def halved(old):
    return lambda *args: old(*args) / 2


def exchange(parent, name, new):
    setattr(parent, name, new)


CHANGES = {
    "hook of the model": lambda m: m.register_forward_hook(doubled),
    "pre-hook of the model": lambda m: m.register_forward_pre_hook(lambda _, x: (x[0], x[1] / 2, *x[2:])),
    "hook of a block": lambda m: m.blocks[0].register_forward_hook(doubled),
    "hook of the attention": lambda m: m.blocks[0].attn.register_forward_hook(doubled),
    "hook of the MLP": lambda m: m.blocks[0].mlp.register_forward_hook(doubled),
    "pre-hook of the MLP": lambda m: m.blocks[0].mlp.register_forward_pre_hook(doubled),
    "hook that is always called": lambda m: m.blocks[0].mlp.register_forward_hook(doubled, always_call=True),
    "hook of a hook point": lambda m: m.blocks[0].attn.hook_z.register_forward_hook(doubled),
    "hook of every module": lambda m: register_module_forward_hook(
        lambda module, _, out: 2 * out if module is m.blocks[0].mlp else None
    ),
    "hook of a gradient": lambda m: m.blocks[0].mlp.register_full_backward_hook(doubled),
    "pre-hook of a gradient": lambda m: m.blocks[0].register_full_backward_pre_hook(doubled),
    "hook of a weight's gradient": lambda m: m.blocks[0].mlp.W_in.register_hook(lambda grad: 2 * grad),
    "hook after a weight's gradient": lambda m: m.W_pos.register_post_accumulate_grad_hook(twice),
    "hook of a gradient that is zero": lambda m: m.blocks[0].attn.b_K.register_hook(lambda grad: grad + 1),
    "weight norm": lambda m: parametrizations.weight_norm(m.blocks[0].mlp, "W_in"),
    "a change of low rank": lambda m: parametrize.register_parametrization(m.blocks[0].mlp, "W_in", Lora()),
    "pruning": lambda m: prune.l1_unstructured(m.blocks[0].mlp, "W_in", 0.5),
    "another MLP": lambda m: exchange(m.blocks[0], "mlp", Other()),
    "no attention": lambda m: exchange(m.blocks[0], "attn", NoAttention()),
    "a sequence for an MLP": lambda m: exchange(m.blocks[0], "mlp", nn.Sequential(m.blocks[0].mlp, nn.Tanh())),
    "another hook point": lambda m: exchange(m.blocks[0], "hook_mlp_out", nn.Tanh()),
    "a hook point that drops": lambda m: exchange(m, "hook_embed", nn.Hardtanh(-0.1, 0.1)),
    "another method": lambda m: bound(m, "embed_states", halved),
    "another method of the MLP": lambda m: bound(m.blocks[0].mlp, "forward", halved),
    "a narrower MLP": lambda m: m.blocks[0].mlp.__dict__["_parameters"].update(
        {name: nn.Parameter(w.data[..., :4] if name != "W_out" else w.data[:4])
         for name, w in m.blocks[0].mlp.named_parameters() if name != "b_out"}
    ),
    "a key that heads share": lambda m: exchange(m.blocks[0].attn, "b_K", nn.Parameter(m.blocks[0].attn.b_K[:1].data)),
    "values of one number for all heads": lambda m: exchange(m.blocks[0].attn, "b_V", nn.Parameter(torch.ones(1))),
    "a tensor that is no parameter": lambda m: follow(m.blocks[0].mlp),
    "frozen weights": lambda m: m.blocks[0].attn.requires_grad_(False),
    "a frozen embedding": lambda m: m.W_E_state.requires_grad_(False),
    "two layers of weights tied": lambda m: exchange(m.blocks[0].attn, "W_K", m.blocks[0].attn.W_Q),
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "compiled": lambda m: m.compile(backend="eager"),
    "a subclass": lambda m: exchange(m, "__class__", Louder),
}  # fmt: skip


class NoAttention(nn.Module):
    def forward(self, q_input, k_input, v_input):
        return v_input * 0.5


def follow(mlp):
    """Put a plain tensor in a parameter's place."""
    old = mlp.W_in
    del mlp.W_in
    mlp.W_in = 2 * old.detach()


def results(model, run):
    """The logits of a run without gradients, and of one with those of every weight."""
    model.zero_grad()
    with torch.no_grad():
        alone = run(*inputs(SMALL))
    logits = run(*inputs(SMALL))
    logits.float().logsumexp(-1).sum().backward()
    grads = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in model.parameters()]
    return [alone, logits.detach(), *grads]


SLOW = {"compiled": pytest.mark.slow}  # imports the compiler


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in CHANGES])
def test_whatever_is_attached_or_exchanged_is_obeyed(as_users_run_it, name):
    """`fast_forward` has the logits and gradients of the changed model, and the change does change one of them."""
    model = loud(SMALL)
    before = results(model, model)
    handle = CHANGES[name](model)
    try:
        slow, fast = results(model, model), results(model, model.fast_forward)
    finally:
        if isinstance(handle, RemovableHandle):  # that of every module would outlive the test
            handle.remove()
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    same = len(before) == len(slow) and all(torch.equal(a, b) for a, b in zip(before, slow, strict=True))
    assert not same or name == "compiled"


def test_autocast_is_obeyed():
    model = loud(SMALL)
    with torch.autocast("cpu"), torch.no_grad():
        torch.testing.assert_close(model.fast_forward(*inputs(SMALL)), model(*inputs(SMALL)), atol=0, rtol=0)


def test_the_fast_path_is_taken_by_what_this_package_makes(monkeypatch, tmp_path):
    """New, copied, saved and loaded, with its heads in another order, in float64, without gradients, after hooks."""
    model = DecisionTransformer(SMALL)
    model.save_pretrained(tmp_path)
    model.run_with_cache(*inputs(SMALL))
    made = [
        model,
        copy.deepcopy(model),
        DecisionTransformer.from_pretrained(tmp_path),
        model.permute_heads(0, [1, 0]),
    ]
    made += [copy.deepcopy(model).double(), copy.deepcopy(model).requires_grad_(False)]
    monkeypatch.setattr(DecisionTransformer, "forward", None)
    for each in made:
        with torch.no_grad():
            each.fast_forward(*inputs(SMALL))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("method", ["forward", "fast_forward"])
def test_timesteps_and_actions_of_any_integers_are_the_same(dtype, method):
    for n_timesteps in (1, 3):
        cfg = replace(SMALL, n_timesteps=n_timesteps)
        model, (states, rtgs, timesteps, actions) = loud(cfg), inputs(cfg)
        timesteps, actions = timesteps % 2, actions % 2
        run = getattr(model, method)
        expected = run(states, rtgs, timesteps, actions)
        assert torch.equal(run(states, rtgs, timesteps.to(dtype), actions.to(dtype)), expected)


# Hooks


def test_ablating_a_head_by_result_z_or_weights_is_the_same():
    model = loud(SHAPES["two layers, three timesteps"], torch.float64)
    batch = inputs(model.cfg)

    def zero_head(value, hook):
        value[:, :, 2] = 0
        return value

    by_z = model.run_with_hooks(*batch, fwd_hooks=[("blocks.1.attn.hook_z", zero_head)])
    by_result = model.run_with_hooks(*batch, fwd_hooks=[("blocks.1.attn.hook_result", zero_head)])
    with torch.no_grad():
        model.blocks[1].attn.W_O[2] = 0
    torch.testing.assert_close(by_z, by_result, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(by_z, model(*batch), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("letter", "qkv")
def test_one_heads_input_can_be_edited_alone(letter):
    model = loud(SMALL, torch.float64)
    _, cache = model.run_with_cache(*inputs(SMALL))
    _, other = model.run_with_cache(*inputs(SMALL, seed=1))

    def swap(value, hook):
        value[:, :, 1] = other["resid_pre", 0]
        return value

    with model.hooks(fwd_hooks=[(f"blocks.0.hook_{letter}_input", swap)]):
        _, edited = model.run_with_cache(*inputs(SMALL))
    for name in "qkv":
        expected = cache[name, 0].clone()
        if name == letter:
            expected[:, :, 1] = other[name, 0][:, :, 1]
        torch.testing.assert_close(edited[name, 0], expected)


def test_caching_everything_changes_nothing_and_leaves_no_hook():
    model = loud(SHAPES["two layers, three timesteps"], torch.float64)
    batch = inputs(model.cfg)
    logits, cache = model.run_with_cache(*batch)
    torch.testing.assert_close(logits, model(*batch))
    assert set(cache.keys()) == set(model.hook_dict)
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


# Weights


def test_stacked_weights_have_transformerlens_axes():
    cfg = SHAPES["two layers, three timesteps"]
    model = loud(cfg)
    assert model.W_Q.shape == (2, 4, 24, 8)
    assert model.W_O.shape == (2, 4, 8, 24)
    assert (model.b_out[1] == model.blocks[1].mlp.b_out).all()
    assert model.W_U.shape == (24, 3)
    with pytest.raises(AttributeError, match="W_Q"):
        _ = DecisionTransformer(DTConfig(n_layers=0)).W_Q


def test_permuted_heads_are_the_same_function():
    model = loud(SHAPES["two layers, three timesteps"], torch.float64)
    batch = inputs(model.cfg)
    permuted = model.permute_heads(1, [2, 0, 3, 1])
    torch.testing.assert_close(permuted(*batch), model(*batch), atol=1e-12, rtol=1e-12)
    _, cache = model.run_with_cache(*batch)
    _, after = permuted.run_with_cache(*batch)
    torch.testing.assert_close(after["result", 1], cache["result", 1][:, :, [2, 0, 3, 1]])
    assert model.metadata == {}
    assert permuted.metadata["head_order"] == {"1": [2, 0, 3, 1]}
    assert permuted.permute_heads(1, [1, 3, 0, 2]).metadata["head_order"] == {"1": [0, 1, 2, 3]}


def test_the_seed_decides_every_weight():
    first, same = (DecisionTransformer(SMALL, seed=3).state_dict() for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    handed, other = (
        DecisionTransformer(SMALL, generator).state_dict(),
        DecisionTransformer(SMALL, 4).state_dict(),
    )
    for name, value in first.items():
        assert torch.equal(value, same[name])
        assert torch.equal(value, handed[name])
        assert ".b_" in name or name == "b_U" or not torch.equal(value, other[name])


# What is refused


def wrong_inputs():
    states, rtgs, timesteps, actions = inputs(SHAPES["two layers, three timesteps"])
    nan, late = rtgs.clone(), timesteps.clone()
    nan[2, 1], late[0, 0] = float("nan"), 21
    yield "float states", (states.float(), rtgs, timesteps, actions), "uint8"
    yield "no time axis", (states[:, 0], rtgs, timesteps, actions), r"states has shape \(6, 7, 7, 3\)"
    yield (
        "smaller view",
        (states[:, :, :5, :5], rtgs, timesteps, actions),
        r"\(6, 3, 5, 5, 3\).*\*\(7, 7, 3\)",
    )
    yield (
        "long context",
        (*(x.repeat(1, 2, *[1] * (x.ndim - 2)) for x in (states, rtgs, timesteps)), None),
        "6 timesteps",
    )
    yield "integer rtgs", (states, rtgs.long(), timesteps, actions), "rtgs is torch.int64"
    yield "float timesteps", (states, rtgs, timesteps.float(), actions), "timesteps torch.float32"
    yield "short rtgs", (states, rtgs[:, :2], timesteps, actions), r"rtgs has shape \(6, 2\)"
    yield "rtg not a number", (states, nan, timesteps, actions), "rtgs holds nan"
    yield "late timestep", (states, rtgs, late, actions), "timesteps reaches.* 21; allowed is 0 to 20"
    yield "negative timestep", (states, rtgs, late - 21, actions), "timesteps reaches from -"
    yield "no actions", (states, rtgs, timesteps, None), r"give \(batch, 2\) of them"
    yield "too many actions", (states, rtgs, timesteps, timesteps), r"\(6, 3\).*= \(6, 2\)"
    yield (
        "action 3",
        (states, rtgs, timesteps, actions * 0 + 3),
        "actions reaches from 3 to 3; allowed is 0 to 2",
    )


@pytest.mark.parametrize(
    ("batch", "message"), [pytest.param(*case[1:], id=case[0]) for case in wrong_inputs()]
)
@pytest.mark.parametrize("method", ["forward", "fast_forward"])
def test_wrong_inputs_get_one_sentence(as_users_run_it, batch, message, method):
    model = loud(SHAPES["two layers, three timesteps"])
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        getattr(model, method)(*batch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rtg", "timestep"), [(float("inf"), 0), (0.0, -1)])
def test_the_fused_path_checks_too(rtg, timestep):
    states = inputs(SMALL, batch=1)[0]
    with pytest.raises(ValueError, match=r"rtgs holds inf|timesteps reaches"):
        loud(SMALL).fast_forward(states, torch.tensor([[rtg]]), torch.tensor([[timestep]]))


def test_an_index_minigrid_does_not_know_is_refused():
    states = torch.zeros(7, 7, 3, dtype=torch.uint8)
    states[0, 0, 1] = 6
    with pytest.raises(ValueError, match=r"states\[\.\.\., 1\] reaches from 0 to 6; allowed is 0 to 5"):
        one_hot(states)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_heads", 0), ("d_model", -1), ("n_layers", -1), ("encoding", "onehot"), ("d_mlp", 2.5)],
)
def test_wrong_configurations_name_field_and_value(as_users_run_it, field, value):
    with pytest.raises(ValueError, match=rf"DTConfig\.{field} is {value!r}"):
        DTConfig(**{field: value})


@pytest.mark.parametrize(
    ("layer", "order", "message"), [(1, [0, 1], "layer is 1"), (0, [0, 0], "permutation of 0 to 1")]
)
def test_heads_that_do_not_exist_are_not_permuted(layer, order, message):
    with pytest.raises(ValueError, match=message):
        loud(SMALL).permute_heads(layer, order)
