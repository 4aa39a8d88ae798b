"""The evidence against hooked runs, the rules on the post's own weights, the verdicts at their bars."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
import torch
from planted import blank
from scipy import stats

from dtbook.analysis.attribution import contrast, decompose, forward_preference
from dtbook.analysis.interventions import Site, ablate, patch
from dtbook.claims import CLAIMS, RULES, decide_claims
from dtbook.claims.evidence import CircuitParts, Evidence
from dtbook.claims.rules import A_SHARE_OF_NOTHING, meets
from dtbook.claims.scorecard import decide, scorecard
from dtbook.gridworld import all_observations
from dtbook.gridworld.situations import select, weights, without_front
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.protocol import Bar

TIMESTEPS = (0, 10)


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


@pytest.fixture(scope="module")
def evidence(model, observations):
    return Evidence(model, observations, timesteps=TIMESTEPS)


@pytest.fixture(scope="module")
def post():
    return DecisionTransformer.from_post_checkpoint()


def inputs(chosen, rtg, timestep):
    n = len(chosen.images)
    states = torch.from_numpy(chosen.images).unsqueeze(1)
    return states, torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)


def over_timesteps(measured):
    return np.mean([measured(t) for t in TIMESTEPS])


@torch.no_grad()
def test_forward_and_rise_are_those_of_the_hooked_model(model, observations, evidence):
    for situation, rtg, without in (
        ("obstacle", 0.9, "L0H1"),
        ("goal from the top", -1.0, "L0H0"),
        ("goal from the left", -1.0, "L0 MLP"),
        ("wall", 0.0, "L0H1"),
    ):
        chosen = select(observations, situation)

        def p(t, chosen=chosen, rtg=rtg):
            return weights(chosen) @ model(*inputs(chosen, rtg, t))[:, 0].softmax(-1)[:, 2].numpy()

        intact = over_timesteps(p)
        with ablate(model, without):
            ablated = over_timesteps(p)
        assert evidence.forward(situation, rtg) == pytest.approx(intact, abs=1e-9)
        assert evidence.rise(situation, rtg, without) == pytest.approx(ablated - intact, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("situation", ["empty", "obstacle", "wall", "goal"])
def test_attention_and_contribution_are_those_of_the_hooked_model(model, observations, evidence, situation):
    chosen = select(observations, situation)

    def attention(t):
        _, cache = model.run_with_cache(*inputs(chosen, 0.9, t))
        return weights(chosen) @ cache["pattern", 0][:, 1, 1, 0].numpy()

    assert evidence.attention(situation) == pytest.approx(over_timesteps(attention), abs=1e-9)
    parts = decompose(model, *inputs(chosen, 0.9, 0))
    state = (
        sum(parts[f"state: {name}"] for name in ("object", "colour", "state"))[:, 0]
        @ contrast("F-R").double()
    )
    assert evidence.state_contribution(situation) == pytest.approx(weights(chosen) @ state.numpy(), abs=1e-9)


@torch.no_grad()
def test_turns_correlate_as_numpy_says(model, observations, evidence):
    counts = observations.multiplicity
    logits = np.concatenate(
        [np.repeat(model(*inputs(observations, r, 10))[:, 0].numpy(), counts, 0) for r in (-1, 0, 0.9)]
    )
    assert evidence.turn_correlation == pytest.approx(np.corrcoef(logits[:, 0], logits[:, 1])[0, 1], abs=1e-6)


@torch.no_grad()
def test_the_mlp_rises_where_the_hooked_one_does(model, observations, evidence):
    chosen = select(observations, "obstacle")

    def contribution(t):
        return (decompose(model, *inputs(chosen, 0.9, t))["L0 MLP"][:, 0] @ contrast("F-R").double()).numpy()

    intact = [contribution(t) for t in TIMESTEPS]
    with ablate(model, "L0H1"):
        ablated = [contribution(t) for t in TIMESTEPS]
    share = np.mean(
        [weights(chosen) @ (after > before) for before, after in zip(intact, ablated, strict=True)]
    )
    assert evidence.mlp_rises == pytest.approx(share, abs=1e-12)
    assert 0 < share < 1


@torch.no_grad()
def test_circuit_parts_are_patches(model, observations, evidence):
    chosen = select(observations, "obstacle")
    clean = inputs(chosen, 0.9, 10)
    other = (without_front(clean[0]), *clean[1:])
    _, source = model.run_with_cache(*other)
    before = forward_preference(model(*clean)[:, 0])

    def change(*sites):
        with patch(model, source, *sites):
            after = forward_preference(model(*clean)[:, 0])
        return float(weights(chosen) @ (after - before).numpy())

    z, pattern, v = (Site(f"blocks.0.attn.hook_{name}", 1) for name in ("z", "pattern", "v"))
    expected = change("blocks.0.hook_resid_post"), change(z), change(pattern), change(v)
    assert evidence.circuit == pytest.approx(CircuitParts(*expected), abs=1e-9)


def test_time_slope_is_numpys(model, evidence):
    y = (model.W_E_time.detach()[:51] @ model.W_U.detach() @ contrast("F-R").double()).numpy()
    (slope, _), covariance = np.polyfit(np.arange(51), y, 1, cov=True)
    line, margin = evidence.time_slope(50), stats.t.ppf(0.975, 49) * covariance[0, 0] ** 0.5
    assert (line.slope, line.low, line.high) == pytest.approx((slope, slope - margin, slope + margin))


def test_a_bar_decides_what_it_says():
    """Every bar printed in a rule is the one that decides: at it, and beside it on either side."""
    decides = {
        "≥": (False, True, True),
        ">": (False, False, True),
        "≤": (True, True, False),
        "<": (True, False, False),
    }
    barred = {id: claim for id, claim in CLAIMS.items() if claim.bar and str(claim.bar) in claim.rule}
    assert len(barred) > 20
    for id, claim in barred.items():
        sign, number = re.search(r"([≥>≤<]) (−?[\d.]+(?:e−\d+)?)", claim.rule).groups()
        at = float(number.replace("−", "-"))
        beside = np.nextafter(at, -np.inf), at, np.nextafter(at, np.inf)
        assert tuple(meets(id, float(effect)) for effect in beside) == decides[sign], claim.rule
    assert not Bar("<", 1.0).meets(np.nan)
    with pytest.raises(ValueError, match="comparison is '=='; it must be one of '>='"):
        Bar("==", 1.0)
    with pytest.raises(ValueError, match="C24 has no single bar; its rule is: OV part ≥ QK part"):
        meets("C24", 1.0)


def test_the_table_has_every_claim():
    numbers = sorted({re.fullmatch(r"C(\d\d)[a-i]?", id)[1] for id in CLAIMS})
    assert numbers == [f"{k:02d}" for k in range(1, 29)]
    assert [id for id in CLAIMS if id.startswith("C05")] == [f"C05{x}" for x in "abcdefghi"]
    assert set(CLAIMS) - set(RULES) == {"C25", "C26", "C27", "C28"}


@pytest.mark.post_weights
def test_the_posts_weights_give_the_posts_numbers(post, observations):
    """RTG, Table 3, Figs. 14, 16 and 17: what it printed of its own weights."""
    e = Evidence(post, observations)
    findings = {id: RULES[id](e) for id in ("C14", "C15", "C17", "C18", "C19", "C20", "C22")}
    assert all(finding.passed for finding in findings.values())
    assert findings["C14"].effect == pytest.approx(1.13, abs=0.005)
    assert findings["C15"].effect == pytest.approx(0.16 / 1.13, abs=0.01)
    assert e.front_weight("colour")[0] == pytest.approx(-0.742, abs=0.0005)
    assert (e.qk_front["object"], e.qk_front["colour"]) == pytest.approx((-0.244, -0.217), abs=0.0005)
    assert (e.ov_front["object"], e.ov_front["colour"]) == pytest.approx((-0.864, 0.168), abs=0.0005)
    assert findings["C22"].effect == pytest.approx(0.864 * 5 - 0.168 * 2, abs=0.005)


def test_claims_about_head_1_fail_without_an_obstacle_head(model, observations):
    evidence = Evidence(model.permute_heads(0, [0, 1]), observations, timesteps=TIMESTEPS)
    evidence.head_scores = (0.1, 0.2)
    findings = decide_claims(evidence).set_index("claim")
    about_head_1 = [id for id, claim in CLAIMS.items() if claim.needs_head]
    assert (findings.loc[about_head_1, "passed"] == 0).all()
    assert findings.loc[["C01", "C02", "C03", "C04"], "passed"].isna().all()


def test_findings_are_decided_at_their_bars(model, observations):
    curve = {
        "rtg": [-1.0, 0.0, *np.arange(1, 10) / 10],
        "survived": 0.8,
        "mean": [-0.9, 0.15, *[0.5] * 8, 0.8],
    }
    table = pd.concat([pd.DataFrame(curve).assign(acting=acting) for acting in ("greedy", "sampled")])
    e = Evidence(model, observations, calibration=table)
    assert RULES["C02"](e).passed
    assert RULES["C03"](e) == (pytest.approx(0.8), True)
    assert RULES["C04"](e) == (pytest.approx(0.2), True)
    e.calibration = table.assign(survived=0.79, mean=table["mean"] + 0.001)
    assert not RULES["C02"](e).passed
    assert not RULES["C03"](e).passed


@pytest.mark.parametrize(
    ("passed", "effects", "verdict"),
    [
        (8, np.linspace(0.5, 1.5, 10), "replicated"),
        (8, np.linspace(-1.5, 1.5, 10), "mixed"),  # the interval holds no effect
        (7, np.linspace(0.5, 1.5, 10), "mixed"),
        (3, np.linspace(0.5, 1.5, 10), "mixed"),
        (2, np.linspace(0.5, 1.5, 10), "not replicated"),
    ],
)
def test_verdicts_follow_the_rule(passed, effects, verdict):
    decided = decide("C09", effects, np.arange(10) < passed)
    assert decided.verdict == verdict
    assert (decided.passed, decided.n) == (passed, 10)


@pytest.mark.parametrize(("wrong", "passed"), [(np.inf, 0.0), (np.nan, 1.0), (-np.inf, 1.0)])
def test_a_verdict_rests_on_finite_numbers(wrong, passed):
    effects, all_passed = np.linspace(0.5, 1.5, 10), np.ones(10)
    effects[3], all_passed[3] = wrong, passed
    with pytest.raises(
        ValueError, match=f"effects of C09 hold {wrong} where it is decided; that must be a finite"
    ):
        decide("C09", effects, all_passed)
    all_passed[3] = np.nan  # undecided
    assert decide("C09", effects[effects < np.inf], all_passed[effects < np.inf]).passed >= 8


def test_a_share_of_nothing_passes_nowhere(observations):
    e = Evidence(blank(max_steps=60), observations)
    assert RULES["C15"](e) == A_SHARE_OF_NOTHING
    with np.errstate(invalid="ignore", divide="ignore"):
        assert not any(
            finding.passed for rule in RULES.values() if (finding := rule(e)) and np.isnan(finding.effect)
        )


def test_evidence_is_made_of_finite_numbers(model, observations):
    curve = pd.DataFrame({"acting": "greedy", "rtg": [0.0, 0.9], "mean": [0.1, np.nan]})
    with pytest.raises(
        ValueError, match="calibration holds nan in its column 'mean'; every number must be finite"
    ):
        Evidence(model, observations, calibration=curve)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.b_U[0] = np.inf
    with pytest.raises(
        ValueError, match="model has numbers in b_U that are not finite; every weight must be finite"
    ):
        Evidence(broken, observations)


def test_scorecard_has_a_row_for_every_claim():
    rows = [
        {"model": f"seed_{k}", "claim": id, "effect": 1.0, "passed": 1.0} for k in range(10) for id in RULES
    ]
    ours = pd.DataFrame(rows)
    post = ours[ours["model"] == "seed_0"].assign(effect=2.0)
    card = scorecard(ours, post, ours[ours["model"] < "seed_3"].assign(passed=0.0)).set_index("claim")
    assert list(card.index) == list(CLAIMS)
    assert card.loc["C09", ["passed", "n", "posts_weights", "controls_passed", "controls_n"]].tolist() == [
        10,
        10,
        2.0,
        0,
        3,
    ]
    assert card.loc["C25", "verdict"] == "undecided"


def test_another_shape_gets_one_sentence(observations):
    other = DecisionTransformer(DTConfig(d_model=8, n_heads=4, d_head=2, d_mlp=4))
    with pytest.raises(ValueError, match="model has 1 layers, 4 heads and the index encoding"):
        Evidence(other, observations)
