"""Frames, means and directions of chapter 6 against runs of the hooked model, one observation set at a time."""

import numpy as np
import pytest
import torch

from dtbook.analysis import frames
from dtbook.analysis.attribution import contrast, decompose
from dtbook.analysis.interventions import ablate
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import sample, select, showing, weights
from dtbook.model import DecisionTransformer, DTConfig


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module")
def model():
    cfg = DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=60)
    model, generator = DecisionTransformer(cfg).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def inputs(chosen, rtg, timestep):
    n = len(chosen.images)
    states = torch.from_numpy(chosen.images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)


def forward(model, *asked):
    return model(*asked)[:, 0].softmax(-1)[:, 2].detach().numpy()


@torch.no_grad()
@pytest.mark.parametrize("claim", frames.FRAME_CASES)
def test_a_frame_is_the_weighted_median_of_its_situation(model, observations, claim):
    situation, rtg, removed = frames.FRAME_CASES[claim]
    chosen, asked = select(observations, situation), inputs(select(observations, situation), rtg, 7)
    intact, before = forward(model, *asked), decompose(model, *asked)
    with ablate(model, removed):
        without, after = forward(model, *asked), decompose(model, *asked)
    rise, share = without - intact, weights(chosen)
    table = frames.median_frames(model, observations, 7, "F-L").set_index(["claim", "run"]).loc[claim]
    row = int(
        np.flatnonzero(
            np.flatnonzero(showing(observations.images, situation)) == table["observation"].iloc[0]
        )[0]
    )
    assert share[rise < rise[row] - 1e-9].sum() < 0.5 <= share[rise <= rise[row] + 1e-9].sum()
    assert table["rise"].tolist() == pytest.approx([rise[row]] * 2, abs=1e-6)
    assert table["over"].iloc[0] == pytest.approx(share[rise >= 0.3].sum())
    assert table["below"].iloc[0] == pytest.approx(share[without <= frames.REPORTED[claim]].sum())
    for run, p, parts in (("intact", intact, before), ("without", without, after)):
        assert table.loc[run, "forward"] == pytest.approx(p[row], abs=1e-6)
        for name in ("L0H0", "L0H1", "L0 MLP", "L0 b_O", "b_U"):
            expected = float(parts[name][row, 0] @ contrast("F-L").double())
            assert table.loc[run, name] == pytest.approx(expected, abs=1e-6), (run, name)


@torch.no_grad()
def test_means_keep_what_is_left_when_the_rest_is_taken_off(model, observations):
    drawn, _ = sample(observations, frames.N_SAMPLED, np.random.default_rng(4))
    _, cache = model.run_with_cache(*inputs(drawn, 0.3, 5))
    z, mlp = cache["z", 0][:, 1].numpy(), cache["mlp_out", 0][:, 1].numpy()
    table = frames.kept_by_means(model, observations, 0.3, 5, seed=4).set_index("component")
    for name, written in (("L0H0", z[:, 0]), ("L0H1", z[:, 1]), ("L0 MLP", mlp)):
        whole = (written**2).sum()
        rest = {
            "feature mean": written - written.mean(1, keepdims=True),
            "data mean": written - written.mean(0),
        }
        for mean, left in rest.items():  # orthogonal: squares add up
            assert table.loc[name, mean] == pytest.approx(1 - (left**2).sum() / whole, abs=1e-5), (name, mean)


@torch.no_grad()
def test_along_a_preference_is_what_the_head_adds_to_it(model, observations):
    drawn, _ = sample(select(observations, "obstacle"), 1000, np.random.default_rng(2))
    asked = inputs(drawn, 0.9, 5)
    with_bias = decompose(model, *asked)["L0H1"][:, 0].mean(0) @ contrast("F-R").double()
    row = frames.along_preference(model, observations, 0.9, 5, "F-R", seed=2).iloc[0]
    assert row["along"] == pytest.approx(float(with_bias), abs=1e-5)
    share = np.random.default_rng(0).normal(size=(200_000, model.cfg.d_model))
    share = np.abs(share[:, 0]) / np.linalg.norm(share, axis=1)  # of a fixed direction, in random ones
    z = model.run_with_cache(*asked)[1]["z", 0][:, 1, 1].mean(0) @ model.blocks[0].attn.W_O[1]
    scale = float(z.norm() * (model.W_U @ contrast("F-R").double()).norm())
    assert row["random"] == pytest.approx(np.quantile(share, 0.95) * scale, rel=0.03)
    assert row["p"] == pytest.approx((share * scale >= abs(row["along"])).mean(), abs=0.02)
