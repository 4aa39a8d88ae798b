"""The exhaustive engine against the hooked model: logits, contributions, ablations and patches, in float64."""

import numpy as np
import pytest
import torch

from dtbook.analysis.attribution import decompose
from dtbook.analysis.interventions import ablate, feature_mean, patch
from dtbook.analysis.population import FoldedWeights, logits, per_observation
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import without_front
from dtbook.model import DecisionTransformer, DTConfig

CONFIGS = {
    "two heads": DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=20),
    "one head": DTConfig(d_model=8, n_heads=1, d_head=8, d_mlp=8, max_steps=20),
    "four heads, one-hot": DTConfig(
        d_model=8, n_heads=4, d_head=3, d_mlp=8, max_steps=20, encoding="one-hot"
    ),
    "longer context": DTConfig(d_model=8, n_timesteps=3, d_head=4, d_mlp=8, max_steps=20),
}
ASKED = [(0.9, 10), (-1.0, 0), (0.25, 20)]


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """A model whose every parameter, biases included, is far from zero."""
    model, generator = DecisionTransformer(CONFIGS[request.param]).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def inputs(observations, rtg, timestep):
    n = len(observations.images)
    states = torch.from_numpy(observations.images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_logits_are_the_hooked_models(model, observations):
    found = per_observation(model, observations, ASKED, lambda run: {"logits": run.logits()}, batch_size=7)[
        "logits"
    ]
    assert found.dtype == np.float64
    for condition, values in zip(ASKED, found, strict=True):
        close(values, model(*inputs(observations, *condition))[:, 0])


@torch.no_grad()
def test_contributions_are_those_of_decompose(model, observations):
    run = FoldedWeights(model).embed(torch.from_numpy(observations.images)).at(0.9, 10)
    ours, theirs = run.contributions(), decompose(model, *inputs(observations, 0.9, 10))
    close(sum(ours.values()), run.logits())
    close(
        ours.pop("state"), sum(theirs.pop(f"state: {name}") for name in ("object", "colour", "state"))[:, 0]
    )
    close(ours.pop("time and position"), (theirs.pop("time") + theirs.pop("position"))[:, 0])
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        close(value, theirs[name][:, 0])


@torch.no_grad()
def test_ablated_heads_and_mlp_are_those_of_interventions(model, observations):
    folded, asked = FoldedWeights(model), inputs(observations, 0.25, 20)
    run = folded.embed(torch.from_numpy(observations.images)).at(0.25, 20)
    for head, name in enumerate(folded.head_names):
        results = run.head_results()
        means = results[head, :, -1:].clone()
        results[head] = 0
        with ablate(model, name):
            close(run.logits(results), model(*asked)[:, 0])
        results[head, :, :-1] = means * folded.feature_mean[head]
        with ablate(model, name, to=feature_mean):
            close(run.logits(results), model(*asked)[:, 0])
    with ablate(model, "L0 MLP"):
        close(run.unembed(run.resid_mid(), torch.zeros(1, 3, dtype=torch.float64)), model(*asked)[:, 0])


@torch.no_grad()
def test_patterns_values_and_neurons_are_those_of_the_cache(model, observations):
    embedded = FoldedWeights(model).embed(torch.from_numpy(observations.images))
    other = FoldedWeights(model).embed(without_front(embedded.images))
    clean, source = embedded.at(0.9, 10), other.at(0.9, 10)
    asked = inputs(observations, 0.9, 10)
    counterfactual = (without_front(asked[0]), *asked[1:])
    _, cache = model.run_with_cache(*asked)
    _, changed = model.run_with_cache(*counterfactual)
    close(clean.pattern.T, cache["pattern", 0][:, :, 1, 0])
    close(clean.post(), cache["post", 0][:, 1])
    with patch(model, changed, "blocks.0.attn.hook_pattern"):
        close(clean.logits(clean.head_results(pattern=source.pattern)), model(*asked)[:, 0])
    with patch(model, changed, "blocks.0.attn.hook_v"):
        close(clean.logits(clean.head_results(state_result=other.state_result)), model(*asked)[:, 0])


def test_a_run_leaves_what_is_embedded_as_it_was(model, observations):
    embedded = FoldedWeights(model).embed(torch.from_numpy(observations.images))
    before = [part.clone() for part in (embedded.state, embedded.state_result, embedded.q, embedded.k)]
    run = embedded.at(0.9, 10)
    first = run.logits()
    run.contributions()
    close(run.logits(), first)
    for part, was in zip(
        (embedded.state, embedded.state_result, embedded.q, embedded.k), before, strict=True
    ):
        assert torch.equal(part, was)


def test_single_precision_is_good_to_a_ten_thousandth(observations):
    model = DecisionTransformer(DTConfig(), seed=4)
    with torch.no_grad():
        expected = model(
            *(x.float() if x.dtype == torch.float64 else x for x in inputs(observations, 0.9, 10))
        )[:, 0]
    found = logits(model, observations, [(0.9, 10)])[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [((0.9, 21), "timestep is 21; this model has timesteps 0 to 20"), ((float("nan"), 0), "rtg is nan")],
)
def test_a_condition_that_the_model_cannot_be_asked_gets_one_sentence(model, observations, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        logits(model, observations, [asked])


def test_only_one_layer_can_be_folded():
    with pytest.raises(ValueError, match="model has 2 layers; only one can be folded"):
        FoldedWeights(DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8, n_layers=2)))


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
