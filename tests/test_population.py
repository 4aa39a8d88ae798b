"""The population as sums against the hooked model: every quantity, ablation and patch, in float64."""

import numpy as np
import pytest
import torch
from bridge import bridge_of
from planted import scattered

from dtbook.analysis.attribution import decompose
from dtbook.analysis.counterfactuals import Pair, ablations, activation_patches, path_patches
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.interventions import Site, ablate, feature_mean, mean_output, patch, path_patch
from dtbook.analysis.population import logits, per_observation, run_at
from dtbook.analysis.written import (
    Written,
    direct,
    logits_of,
    mean_z,
    nothing,
    run_all,
    to_feature_mean,
    to_mlp_feature_mean,
    without_mlp,
)
from dtbook.gridworld import EMPTY, GOAL, OBSTACLE, all_observations
from dtbook.gridworld.situations import batches, weights, without_front
from dtbook.model import DecisionTransformer, DTConfig

CONFIGS = {
    "two heads": DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=20),
    "one head": DTConfig(d_model=8, n_heads=1, d_head=8, d_mlp=8, max_steps=20),
    "four heads, one-hot": DTConfig(
        d_model=8, n_heads=4, d_head=3, d_mlp=8, max_steps=20, encoding="one-hot"
    ),
    "longer context": DTConfig(d_model=8, n_timesteps=3, d_head=4, d_mlp=8, max_steps=20),
    "seven actions": DTConfig(d_model=8, d_head=4, d_mlp=19, max_steps=20, n_actions=7),
}
CONDITIONS = [(0.9, 10), (-1.0, 0), (0.25, 20)]
HEAD_SITES = {"Q": "q", "K": "k", "V": "v", "pattern": "pattern"}


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return scattered(CONFIGS[request.param])


def inputs(images, rtg, timestep):
    n = len(images)
    states = torch.as_tensor(images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)


def close(a, b):
    """Equal up to the rounding of sums whose terms are as large as the largest result."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * max(1.0, float(b.abs().max())))


@torch.no_grad()
def compare_quantities(model, images):
    """Attention, what each component writes and the MLP sees and does, against the model's own activations."""
    f, given = FoldedWeights(model), inputs(images, 0.9, 10)
    run = run_at(f.embed(images), 0.9, 10)
    expected, cache = model.run_with_cache(*given)
    close(run.logits(), expected[:, 0])
    close(run.logits().softmax(1), expected[:, 0].softmax(1))
    close(run.pattern.T, cache["pattern", 0][:, :, 1, 0])
    close(f.pre(run.resid_mid()), cache["pre", 0][:, 1])
    close(run.post(), cache["post", 0][:, 1])
    close(run.mlp_out(), cache["mlp_out", 0][:, 1] @ model.W_U)
    W_read = torch.cat([model.blocks[0].mlp.W_in, model.W_U], 1)
    for head in range(model.cfg.n_heads):
        z = cache["z", 0][:, 1, head]
        read = torch.cat([z @ model.blocks[0].attn.W_O[head] @ W_read, z.mean(1, keepdim=True)], 1)
        close(run.head(head).read(), read)
        close(direct(f, run.head(head)).T, f.direct_logits(read))
        close(mean_z(f, run.head(head)), read[:, -1])
    ours, theirs = run.contributions(), decompose(model, *given)
    state = sum(theirs.pop(f"state: {name}") for name in ("object", "colour", "state"))
    theirs |= {"state": state, "time and position": theirs.pop("time") + theirs.pop("position")}
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        close(value, theirs[name][:, 0])


@torch.no_grad()
def compare_ablations(model, observations):
    """Zero, mean, resample and feature mean of each head and the MLP, and single neurons."""
    f, images = FoldedWeights(model), observations.images
    embedded, share = f.embed(observations), weights(observations)
    rows = np.random.default_rng(0).permutation(len(images))
    run, donor = run_at(embedded, 0.25, 20), run_at(embedded[rows], 0.25, 20)
    given, writes = inputs(images, 0.25, 20), run.writes()
    _, others = model.run_with_cache(*inputs(images[rows], 0.25, 20))
    for head, name in enumerate(f.head_names):
        own = run.head(head)
        instead = {
            "zero": (ablate(model, name), nothing(f)),
            "mean": (
                ablate(model, name, to=mean_output(model, name, observations, 0.25, 20)),
                Written(own.mean(share)),
            ),
            "resample": (patch(model, others, name), donor.head(head)),
            "feature mean": (
                ablate(model, name, to=feature_mean),
                to_feature_mean(f, head, own),
            ),
        }
        for hooked, written in instead.values():
            with hooked:
                close(run.logits(writes | {name: written}), model(*given)[:, 0])
    out, direct = run_all(f, [writes], with_mlp=(0,)), without_mlp(f, writes)
    of_mlp = {
        ablate(model, "L0 MLP"): 0,
        patch(model, others, "L0 MLP"): donor.mlp_out().T,
        ablate(model, "L0 MLP", to=feature_mean): to_mlp_feature_mean(f, out.mlp_mean[0]),
    }
    for hooked, mlp_out in of_mlp.items():
        with hooked:
            close((direct + mlp_out).T, model(*given)[:, 0])
    for (name, ours), hooked in zip(ablations(run), [*f.head_names, "L0 MLP"], strict=True):
        with ablate(model, hooked):
            close(ours, model(*given)[:, 0])
        assert name == hooked
    change = donor.post()[:, 3] - run.post()[:, 3]
    with patch(model, others, "L0N3"):
        close(run.logits() + change[:, None] * f.W_mlp[3], model(*given)[:, 0])


@torch.no_grad()
def compare_patches(model, images):
    """Every activation and path patch, of a state and of an RTG, against the hooks."""
    f = FoldedWeights(model)
    embedded, other = f.embed(images), f.embed(without_front(torch.from_numpy(images)))
    share = torch.ones(len(images), dtype=torch.float64)
    base, given = run_at(embedded, 0.9, 10), inputs(images, 0.9, 10)
    _, base_cache = model.run_with_cache(*given)
    for source, changed in (
        (run_at(other, 0.9, 10), inputs(without_front(torch.from_numpy(images)), 0.9, 10)),
        (run_at(embedded, -1.0, 10), inputs(images, -1.0, 10)),
    ):
        _, cache = model.run_with_cache(*changed)
        seen = set()
        for token, name, ours in activation_patches(Pair(base, source, share)):
            with patch(model, cache, *sites_of(token, name, f.head_names)):
                close(ours, model(*given)[:, 0])
            seen.add((token, name.split(" ")[-1]))
        assert {("state", "heads"), ("state", "MLP"), ("state", "pattern")} < seen
        for path, ours in path_patches(Pair(base, source, share)):
            sender, _, receiver = path.partition(" → ")
            with path_patch(model, base_cache, cache, sender, receiver, positions=1):
                if receiver == "logits":
                    with patch(model, base_cache, "blocks.0.hook_mlp_out"):
                        close(ours, model(*given)[:, 0])
                else:
                    close(ours, model(*given)[:, 0])


def sites_of(token, name, head_names):
    """The sites of the hooked model that a name of `activation_patches` means."""
    at = 0 if token == "RTG" else 1
    if name == "embedding":
        return [Site("blocks.0.hook_resid_pre", positions=at)]
    if name == "heads":
        return head_names
    head, _, part = name.partition(" ")
    if not part or part == "MLP":
        return [name]
    return [Site(f"blocks.0.attn.hook_{HEAD_SITES[part]}", int(head[3:]), at)]


def test_quantities_are_the_hooked_models(model, observations):
    compare_quantities(model, observations.images)


def test_ablations_are_the_hooked_models(model, observations):
    compare_ablations(model, observations)


def test_patches_are_the_hooked_models(model, observations):
    compare_patches(model, observations.images)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [7, 10_000])
def test_logits_are_the_hooked_models_at_every_condition(model, observations, batch_size):
    ours = per_observation(
        model, observations, CONDITIONS, lambda run: {"logits": run.logits()}, batch_size=batch_size
    )["logits"]
    assert ours.dtype == np.float64
    for condition, values in zip(CONDITIONS, ours, strict=True):
        close(values, model(*inputs(observations.images, *condition))[:, 0])


def test_plain_pytorch_on_a_device_gives_the_same(model, observations):
    close(logits(model, observations, CONDITIONS, device="cpu"), logits(model, observations, CONDITIONS))


@pytest.mark.slow
@torch.no_grad()
def test_all_892298_observations_have_the_models_logits():
    """A narrow one's: from one observation to the next differs where it lies in the sums, not their width."""
    model, observations = scattered(DTConfig(d_model=32, d_head=16, d_mlp=64)), all_observations()
    ours = torch.from_numpy(logits(model, observations, [(0.9, 10)])[0])
    for batch in batches(observations, 0.9, 10):
        states, rtgs, timesteps = batch.inputs
        close(
            ours[batch.rows], model(states, torch.full_like(rtgs, 0.9, dtype=torch.double), timesteps)[:, 0]
        )


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_the_posts_shape_has_its_logits_quantities_and_interventions():
    """Of 20,000 observations at random: alone, and their logits also among all."""
    model, observations = scattered(DTConfig()), all_observations()
    rows = np.sort(np.random.default_rng(8).choice(len(observations), 20_000, replace=False))
    some = observations[rows]
    ours = logits(model, some, [(0.9, 10)])[0]
    close(ours, model(*inputs(some.images, 0.9, 10))[:, 0])
    close(logits(model, observations, [(0.9, 10)])[0][rows], ours)
    compare_quantities(model, some.images)
    compare_ablations(model, some)
    compare_patches(model, some.images)


@torch.no_grad()
def test_a_thousand_observations_have_the_activations_of_transformerlens():
    model, drawn = scattered(DTConfig()), all_observations(6, 3)
    images = drawn.images[np.random.default_rng(2).choice(len(drawn), 1000, replace=False)]
    given = inputs(images, 0.9, 10)
    expected, cache = bridge_of(model).run_with_cache(model.embed(*given), start_at_layer=0)
    run = run_at(FoldedWeights(model).embed(images), 0.9, 10)
    close(run.logits(), expected[:, 1] + model.b_U)
    close(run.pattern.T, cache["blocks.0.attn.hook_pattern"][:, :, 1, 0])
    close(run.embedded.folded.pre(run.resid_mid()), cache["blocks.0.mlp.hook_pre"][:, 1])


@torch.no_grad()
def test_rooms_that_the_task_never_shows_have_the_models_logits(model, observations):
    """Goals elsewhere, obstacles of other colours, of which the population has none."""
    rng, images = np.random.default_rng(4), observations.images[:300].copy()
    images[rng.random(images.shape[:3]) < 0.05] = GOAL, 1, 0
    at = images[..., 0] == OBSTACLE
    images[at, 1] = rng.integers(0, 6, at.sum())
    run = run_at(FoldedWeights(model).embed(images), 0.9, 10)
    close(run.logits(), model(*inputs(images, 0.9, 10))[:, 0])


@torch.no_grad()
def test_runs_evaluated_together_are_those_evaluated_alone(observations):
    """Whatever they share: observations, tables, terms, constants; two at a time or an odd number."""
    model = scattered(CONFIGS["two heads"])
    f = FoldedWeights(model)
    embedded, other = f.embed(observations), f.embed(observations.images[::-1])
    runs = [run_at(one, *condition).writes() for one in (embedded, other) for condition in CONDITIONS]
    runs += [
        runs[0] | {"L0H0": nothing(f)},
        runs[1] | {"L0H1": runs[4]["L0H1"]},
        runs[0] | {"more": runs[5]["L0H0"]},
    ]
    together = logits_of(f, runs)
    for run, ours in zip(runs, together, strict=True):
        close(ours, logits_of(f, [run])[0])


def test_a_run_leaves_what_is_embedded_as_it_was(model, observations):
    embedded = FoldedWeights(model).embed(observations)
    before = [part.clone() for part in (embedded.read, embedded.q, embedded.k, embedded.direct)]
    run = run_at(embedded, 0.9, 10)
    first = run.logits()
    run.contributions()
    close(run.logits(), first)
    for part, was in zip((embedded.read, embedded.q, embedded.k, embedded.direct), before, strict=True):
        assert torch.equal(part, was)


def test_single_precision_is_good_to_a_hundred_thousandth_of_the_terms(observations):
    """Of the largest contribution to a logit, as the module says."""
    model = DecisionTransformer(DTConfig(), seed=4)
    expected = logits(DecisionTransformer(DTConfig(), seed=4).double(), observations, [(0.9, 10)])[0]
    ours = logits(model, observations, [(0.9, 10)])[0]
    parts = run_at(FoldedWeights(model).embed(observations), 0.9, 10).contributions()
    largest = max(float(part.abs().max()) for part in parts.values())
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() < 1e-5 * largest


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [((0.9, 21), "timestep is 21; this model has timesteps 0 to 20"), ((float("nan"), 0), "rtg is nan")],
)
def test_a_condition_that_the_model_has_not_gets_one_sentence(model, observations, condition, sentence):
    with pytest.raises(ValueError, match=sentence):
        logits(model, observations, [condition])


def test_observations_of_another_view_get_one_sentence(model):
    images = np.full((3, 5, 5, 3), EMPTY, np.uint8)
    with pytest.raises(ValueError, match=r"observations show \(5, 5, 3\); this model sees a view of 7 cells"):
        FoldedWeights(model).embed(images)


def test_only_one_layer_can_be_folded():
    with pytest.raises(ValueError, match="model has 2 layers; only one can be folded"):
        FoldedWeights(DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8, n_layers=2)))


def test_runs_of_constants_alone_get_one_sentence(model, observations):
    f = FoldedWeights(model)
    writes = run_at(f.embed(observations), 0.9, 10).writes()
    with pytest.raises(ValueError, match="runs hold constants alone; one part at least"):
        logits_of(f, [dict.fromkeys(writes, nothing(f))])


def test_half_precision_is_not_folded():
    with pytest.raises(
        ValueError, match=r"model is in torch.float16; only float32 and float64 can be folded"
    ):
        FoldedWeights(DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8)).half())


def test_no_observation_has_no_logits(model, observations):
    assert logits(model, observations[:0], CONDITIONS).shape == (3, 0, model.cfg.n_actions)
    run = run_at(FoldedWeights(model).embed(observations.images[:0]), 0.9, 10)
    assert run.post().shape == (0, model.cfg.d_mlp)


def test_a_model_with_hooks_or_exchanged_parts_is_not_folded():
    """What is attached or exchanged is in no weight, so that every number would be silently another model's."""
    for change in (
        lambda m: m.blocks[0].mlp.register_forward_hook(lambda _, __, out: 0 * out),
        lambda m: setattr(m.blocks[0], "mlp", torch.nn.Tanh()),
    ):
        model = DecisionTransformer(CONFIGS["two heads"])
        FoldedWeights(model)
        change(model)
        with pytest.raises(ValueError, match="model has hooks or exchanged parts; only a plain"):
            FoldedWeights(model)
