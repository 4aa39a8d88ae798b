"""Causal effects over every observation against hooked runs, and on models whose circuit was planted."""

import numpy as np
import pandas as pd
import pytest
import torch
from planted import SEEN, TOLD, blank, plant_head, plant_mlp

from dtbook.analysis.attribution import decompose
from dtbook.analysis.counterfactuals import CASES, INTO_CLEAN, INTO_SOURCE, Case, causal_table
from dtbook.analysis.heads import obstacle_head_scores
from dtbook.analysis.interventions import Site, ablate, patch, path_patch
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import select, weights, without_front
from dtbook.model import DecisionTransformer, DTConfig

FRONT, ASKED = Case("obstacle", 0.9, 0.9), Case("obstacle", -1.0, 0.9)
TIMESTEP = 7


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module")
def model():
    """A model whose every parameter, biases included, is far from zero."""
    cfg = DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=20)
    model, generator = DecisionTransformer(cfg).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


class Hooked:
    """A case run through the hooked model: clean and source inputs and caches."""

    def __init__(self, model, observations, case):
        chosen = select(observations, case.situation)
        self.model, self.share = model, weights(chosen)
        states = torch.from_numpy(chosen.images).unsqueeze(1)
        changed = without_front(states) if case.rtg == case.source_rtg else states
        self.inputs = [self.ask(states, case.rtg), self.ask(changed, case.source_rtg)]
        self.caches = [model.run_with_cache(*asked)[1] for asked in self.inputs]

    def ask(self, states, rtg):
        n = len(states)
        return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), TIMESTEP)

    def odds(self, k):
        logits = self.model(*self.inputs[k])[:, 0].numpy()
        return logits[:, 2] - np.log(np.exp(logits[:, 0]) + np.exp(logits[:, 1]))

    def effect(self, k, edit):
        """Mean change of the log odds and of P(forward) that an edit makes to run k, signed as source − clean."""
        before, sign = self.odds(k), 1 - 2 * k
        with edit(self.caches[k], self.caches[1 - k]):
            after = self.odds(k)
        return [
            sign * self.share @ (f(after) - f(before)) for f in (lambda x: x, lambda x: 1 / (1 + np.exp(-x)))
        ]


def sites(head):
    """The sites of a head, by token and name, as the hooked model knows them."""
    hooks = {"Q": ("hook_q", 1), "K": ("hook_k", 1), "V": ("hook_v", 1), "pattern": ("hook_pattern", None)}
    for part, (hook, position) in hooks.items():
        yield ("state", f"L0H{head} {part}"), Site(f"blocks.0.attn.{hook}", head, position)
    for part in "KV":
        yield ("RTG", f"L0H{head} {part}"), Site(f"blocks.0.attn.hook_{part.lower()}", head, 0)
    yield ("state", f"L0H{head}"), Site("blocks.0.attn.hook_z", head, 1)


SITES = {key: site for head in (0, 1) for key, site in sites(head)} | {
    ("state", "heads"): Site("blocks.0.attn.hook_z", None, 1),
    ("state", "L0 MLP"): Site("blocks.0.hook_mlp_out", None, 1),
    ("state", "embedding"): Site("blocks.0.hook_resid_pre", None, 1),
    ("RTG", "embedding"): Site("blocks.0.hook_resid_pre", None, 0),
}


def found(table, **where):
    chosen = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    assert len(chosen) <= 1
    return [0.0, 0.0] if chosen.empty else chosen.iloc[0][["logits", "probability"]].tolist()


@torch.no_grad()
@pytest.mark.parametrize("case", [FRONT, ASKED], ids=["front cell", "RTG"])
def test_patches_are_those_of_interventions(model, observations, case):
    """And what the table leaves out changes nothing."""
    table, hooked = causal_table(model, observations, [case], TIMESTEP), Hooked(model, observations, case)
    for k, direction in enumerate((INTO_CLEAN, INTO_SOURCE)):
        for (token, name), where in SITES.items():
            expected = hooked.effect(k, lambda own, other, where=where: patch(model, other, where))
            ours = found(table, kind="activation", direction=direction, token=token, site=name)
            assert ours == pytest.approx(expected, abs=1e-9), (token, name)
        for sender in ("state", "L0H0", "L0H1"):
            for reader in ("L0 MLP", "logits"):
                expected = hooked.effect(
                    k, lambda own, other, s=sender, r=reader: path_patch(model, own, other, s, r, positions=1)
                )
                ours = found(table, kind="path", direction=direction, site=f"{sender} → {reader}")
                assert ours == pytest.approx(expected, abs=1e-9), (sender, reader)


@torch.no_grad()
def test_of_the_rtg_token_only_keys_and_values_matter(model, observations):
    hooked = Hooked(model, observations, ASKED)
    for hook in ("attn.hook_q", "attn.hook_z", "hook_mlp_out"):
        where = Site(f"blocks.0.{hook}", None, 0)
        assert hooked.effect(0, lambda own, other, where=where: patch(model, other, where)) == [0, 0]


@torch.no_grad()
def test_ablation_removal_and_attribution_are_those_of_hooked_runs(model, observations):
    table, hooked = causal_table(model, observations, [FRONT], TIMESTEP), Hooked(model, observations, FRONT)
    direction = torch.tensor([-0.5, -0.5, 1.0]).double()
    parts = [decompose(model, *asked) for asked in hooked.inputs]
    whole = table["whole_logits"].iloc[0]
    assert whole == pytest.approx(hooked.share @ (hooked.odds(1) - hooked.odds(0)))
    for name in ("L0H0", "L0H1", "L0 MLP"):
        rises = [hooked.effect(k, lambda own, other, name=name: ablate(model, name))[0] for k in (0, 1)]
        assert found(table, kind="ablation", site=name)[0] == pytest.approx(rises[0], abs=1e-9)
        # whole − (source ablated − clean ablated), and effect(1) is source − source ablated
        assert found(table, kind="removal", site=name)[0] == pytest.approx(rises[0] + rises[1], abs=1e-9)
        change = (parts[1][name] - parts[0][name])[:, 0] @ direction
        expected = hooked.share @ change.numpy()
        assert found(table, kind="attribution", site=name)[0] == pytest.approx(expected, abs=1e-9)
    direct = table[table["kind"] == "attribution"]["logits"].sum()
    logits = [model(*asked)[:, 0] @ direction for asked in hooked.inputs]
    assert direct == pytest.approx(hooked.share @ (logits[1] - logits[0]).numpy())


def test_the_head_shares_are_the_obstacle_scores(model, observations):
    table = causal_table(model, observations, [FRONT], timestep=10)
    scores = obstacle_head_scores(model, observations, 0.9, 10)
    for row in scores.itertuples():
        change = found(table, kind="activation", direction=INTO_CLEAN, token="state", site=f"L0H{row.head}")[
            0
        ]
        assert change == pytest.approx(row.change)
        assert change / table["whole_logits"].iloc[0] == pytest.approx(row.score)


def test_patching_everything_is_the_whole_change(model, observations):
    for case in (FRONT, ASKED):
        table = causal_table(model, observations, [case], TIMESTEP)
        token = "state" if case is FRONT else "RTG"
        for direction in (INTO_CLEAN, INTO_SOURCE):
            all_of_it = found(table, kind="activation", direction=direction, token=token, site="embedding")
            assert all_of_it == pytest.approx(table[["whole_logits", "whole_probability"]].iloc[0].tolist())


def test_cases_that_nothing_shows_are_left_out(observations, model):
    none = all_observations(size=5, n_obstacles=0)
    table = causal_table(model, none, CASES, TIMESTEP)
    assert set(table["situation"]) == {"wall", "goal", "goal from the top", "goal from the left"}
    assert not table.duplicated(["situation", "change", "rtg", "kind", "direction", "token", "site"]).any()


# Planted circuits


def shares(table, **where):
    """Effects in logits as shares of the whole change, by site."""
    chosen = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    return pd.Series((chosen["logits"] / chosen["whole_logits"]).to_numpy(), chosen["site"])


MODELS = {
    "head 1, to the logits": lambda: plant_head(blank(), 1, 1.0),
    "head 1, through the MLP": lambda: plant_mlp(plant_head(blank(), 1, 1.0, to=TOLD), TOLD, 2.0),
    "the MLP alone": lambda: plant_mlp(blank(), SEEN, 1.0),
}
CARRIERS = {
    "head 1, to the logits": ({"L0H1", "L0H1 V", "heads"}, {"L0H1 → logits"}, {"L0H1"}),
    "head 1, through the MLP": ({"L0H1", "L0H1 V", "heads", "L0 MLP"}, {"L0H1 → L0 MLP"}, {"L0 MLP"}),
    "the MLP alone": ({"L0 MLP"}, {"state → L0 MLP"}, {"L0 MLP"}),
}


@pytest.mark.parametrize("planted", MODELS)
@pytest.mark.parametrize("direction", [INTO_CLEAN, INTO_SOURCE])
def test_what_was_planted_is_found_and_nothing_else(observations, planted, direction):
    table = causal_table(MODELS[planted](), observations, [FRONT], TIMESTEP)
    activations, paths, attributed = CARRIERS[planted]
    state = shares(table, kind="activation", direction=direction, token="state")
    # a head's V is half of what it reads: attention is even, the rest goes to the RTG token
    assert {name for name in state.index if state[name] == pytest.approx(1)} == activations | {"embedding"}
    assert all(
        value == pytest.approx(0, abs=1e-12)
        for name, value in state.items()
        if name not in activations | {"embedding"}
    )
    path = shares(table, kind="path", direction=direction)
    assert path.to_dict() == pytest.approx({name: float(name in paths) for name in path.index}, abs=1e-12)
    direct = shares(table, kind="attribution")
    assert direct.to_dict() == pytest.approx(
        {name: float(name in attributed) for name in direct.index}, abs=1e-12
    )
    gone = shares(table, kind="removal")
    by_head_or_mlp = activations & {"L0H0", "L0H1", "L0 MLP"}
    assert gone.to_dict() == pytest.approx(
        {name: float(name in by_head_or_mlp) for name in gone.index}, abs=1e-12
    )
