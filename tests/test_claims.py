"""The evidence against hooked runs, the rules on the post's own weights, the verdicts at their bars."""

import copy
import re
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from planted import blank
from scipy import stats

from dtbook.analysis.attribution import contrast, decompose, forward_preference
from dtbook.analysis.interventions import Site, ablate, patch
from dtbook.claims import CLAIMS, RULES, decide_claims
from dtbook.claims.behaviour_rules import explained_by_line, explained_by_plateaus
from dtbook.claims.circuit_rules import WHOLE_CIRCUIT
from dtbook.claims.evidence import CircuitParts, Evidence
from dtbook.claims.rules import (
    A_SHARE_OF_NOTHING,
    FIRST_EDITION,
    LOG_ODDS,
    Finding,
    decide_claim,
    meets,
    own_rules,
)
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


@pytest.fixture(scope="module")
def attends_to_both(model):
    """The model with weaker state embeddings: its heads attend to both tokens, so each part of the circuit counts."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
        model.W_E_state *= 0.1
    return model


@torch.no_grad()
def test_circuit_parts_are_patches(attends_to_both, observations):
    model = attends_to_both
    chosen = select(observations, "obstacle")
    clean = inputs(chosen, 0.9, 10)
    other = (without_front(clean[0]), *clean[1:])
    _, source = model.run_with_cache(*other)
    before = forward_preference(model(*clean)[:, 0])
    cell = (source["hook_state_embed"] - model.run_with_cache(*clean)[1]["hook_state_embed"])[:, 0]

    def other_view(seen, hook):
        return seen + torch.stack([torch.zeros_like(cell), cell], dim=1)

    view = [("blocks.0.hook_mlp_in", other_view)]

    def change(*sites, hooks=()):
        with patch(model, source, *sites), model.hooks(fwd_hooks=list(hooks)):
            after = forward_preference(model(*clean)[:, 0])
        return float(weights(chosen) @ (after - before).numpy())

    z, pattern, v = (Site(f"blocks.0.attn.hook_{name}", 1) for name in ("z", "pattern", "v"))
    expected = change("blocks.0.hook_resid_post"), change(z), change(pattern), change(v)
    expected += change(hooks=view), change(z, hooks=view)
    found = Evidence(model, observations).circuit
    assert found == pytest.approx(CircuitParts(*expected), abs=1e-9)
    assert min(map(abs, found)) > 0.001, "each part must count, or it could be anything"


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
        sign, number = re.search(r"([≥>≤<]) (1/3|−?[\d.]+(?:e−\d+)?)", claim.rule).groups()
        at = float(Fraction(number.replace("−", "-")))
        beside = np.nextafter(at, -np.inf), at, np.nextafter(at, np.inf)
        assert tuple(meets(id, float(effect)) for effect in beside) == decides[sign], claim.rule
    assert not Bar("<", 1.0).meets(np.nan)
    with pytest.raises(ValueError, match="comparison is '=='; it must be one of '>='"):
        Bar("==", 1.0)
    with pytest.raises(ValueError, match="C24 has no single bar; its rule is: OV part ≥ QK part"):
        meets("C24", 1.0)


def test_the_table_has_every_claim():
    lettered = {5: "abcdefghi", 21: "abc"}
    posts = {f"C{n:02}{letter}" for n in range(1, 29) for letter in lettered.get(n, [""])}
    assert set(own_rules()) == posts | {"M1", "M2", "M3", "M4"}
    assert {*own_rules()} - {*RULES} == {"C25", "C26", "C27", "C28"}


def test_rules_that_were_replaced_or_doubled_stand_after_the_claims_own():
    beside = {id: claim for id, claim in CLAIMS.items() if claim.of}
    replaced = ("C04", "C05b", "C05i", "C14", "C15", "C16", "C20", "C23")
    expected = {f"{id} {FIRST_EDITION}" for id in replaced}
    assert {*beside} == expected | {f"C{n:02} {LOG_ODDS}" for n in (8, 9, 10, 11, 13)}
    order = list(CLAIMS)
    for id, claim in beside.items():
        own = CLAIMS[claim.of]
        assert id == f"{claim.of} {claim.kind}"
        assert order[order.index(id) - 1] == claim.of
        assert (own.statement, own.post, own.section) == (claim.statement, claim.post, claim.section)
        assert (own.effect, own.rule, own.needs_learnt) != (claim.effect, claim.rule, claim.needs_learnt)


@pytest.mark.post_weights
def test_the_posts_weights_give_the_posts_numbers(post, observations):
    """RTG, Table 3, Figs. 14, 16 and 17: what it printed of its own weights."""
    e = Evidence(post, observations)
    findings = {
        id: RULES[id](e) for id in ("C14", "C15", "C15 first edition", "C17", "C18", "C19", "C20", "C22")
    }
    assert all(finding.passed for finding in findings.values())
    assert findings["C14"].effect == pytest.approx(1.13, abs=0.005)
    assert findings["C15 first edition"].effect == pytest.approx(0.16 / 1.13, abs=0.01)
    assert findings["C15"].effect == pytest.approx(0.16 - 0.3 * 1.13, abs=0.005)
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
    assert findings.loc[["C01", "C02", "C03", "C04", "C04 first edition"], "passed"].isna().all()


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
    assert RULES["C04 first edition"](e) == (pytest.approx(0.2), True)
    e.calibration = table.assign(survived=0.79, mean=table["mean"] + 0.001)
    assert not RULES["C02"](e).passed
    assert not RULES["C03"](e).passed


@pytest.mark.parametrize("failing", [None, *WHOLE_CIRCUIT])
def test_the_whole_circuit_is_six_claims(failing, observations, evidence, monkeypatch):
    e = Evidence(evidence.model, observations)
    e.head_scores = (0.0, 1.0)
    for id in WHOLE_CIRCUIT:
        monkeypatch.setitem(RULES, id, lambda e, passed=id != failing: Finding(1.0, passed))
    assert decide_claim("M4", e) == ((6, 1) if failing is None else (5, 0))
    e.start = e.model.W_E_rtg.detach()  # C20 is undecided
    assert decide_claim("M4", e) == (5 if failing in (None, "C20") else 4, 0)


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ([0, 0, 1, 1, 5, 5], 1),
        ([0, 0, 0, 0, 1, 5], 1),  # as short as a plateau can be
        ([5, 5, 1, 1, 0, 0], 0),  # none that rises
        ([0, 2, 10, 10, 20, 20], 1 - 2 / (1004 - 62**2 / 6)),  # off by 1 each from a plateau of 1
    ],
)
def test_plateaus_explain_what_they_do_not_leave(values, share):
    assert explained_by_plateaus(np.array(values, float)) == pytest.approx(share)


def test_a_line_explains_what_scipys_does():
    curve = pd.Series(np.random.default_rng(0).normal(size=21).cumsum(), index=np.arange(-10, 11) / 10)
    assert explained_by_line(curve) == pytest.approx(stats.linregress(curve.index, curve).rvalue ** 2)


@pytest.mark.filterwarnings("error")
def test_of_a_flat_curve_nothing_explains_a_share(model, observations):
    curve = pd.DataFrame({"rtg": np.arange(-10, 11) / 10, "mean": 0.0, "acting": "greedy"})
    for level in (0.0, 0.951):  # of which the mean is exact, and rounded
        e = Evidence(model, observations, calibration=curve.assign(mean=level))
        assert RULES["C04"](e) == A_SHARE_OF_NOTHING


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


@pytest.mark.parametrize(
    ("right", "left", "passed", "verdict"),
    [(10, 0, 10, "replicated"), (1, 9, 9, "replicated"), (7, 3, 7, "mixed"), (5, 5, 5, "mixed")],
)
def test_of_a_claim_with_a_sign_those_on_one_side_count(right, left, passed, verdict):
    effects = np.concatenate([np.linspace(0.2, 1.8, right), -np.linspace(0.2, 1.8, left)])
    decided = decide("M3", effects, np.ones(10))
    assert (decided.passed, decided.n, decided.verdict) == (passed, 10, verdict)
    assert decide("M1", effects, np.ones(10)).passed == 10


def test_one_side_counts_only_where_it_passes():
    decided = decide("M3", np.repeat([1.0, 0.01, -1.0], [2, 6, 2]), np.repeat([1.0, 0.0, 1.0], [2, 6, 2]))
    assert (decided.passed, decided.verdict) == (2, "not replicated")


def test_where_none_decides_there_is_no_verdict():
    nowhere = np.full(10, np.nan)
    for effects in (np.ones(10), nowhere):
        decided = decide("C14", effects, nowhere)
        assert decided[:3] == ("undecided", 0, 0)
        assert np.isnan(decided.effect).all()


def test_replications_that_do_not_decide_do_not_count():
    effects, passed = np.append(np.linspace(0.5, 1.5, 7), [9, 9, 9]), np.repeat([1, 0, np.nan], [6, 1, 3])
    decided = decide("C14", effects, passed)
    assert decided[:3] == ("replicated", 6, 7)
    assert decided.effect == decide("C14", effects[:7], passed[:7]).effect


def test_a_share_of_nothing_everywhere_is_not_replicated():
    decided = decide("C09 log odds", np.full(10, np.nan), np.zeros(10))
    assert decided[:3] == ("not replicated", 0, 10)
    assert np.isnan(decided.effect).all()


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
    assert RULES["C15 first edition"](e) == A_SHARE_OF_NOTHING
    assert RULES["C15"](e) == (pytest.approx(-0.03), True)
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


def found(n, effect, passed):
    """Findings of so many models, of which some pass every rule."""
    rows = [
        {"model": f"model_{k}", "claim": id, "effect": effect + k / 100, "passed": float(k < passed)}
        for k in range(n)
        for id in RULES
    ]
    return pd.DataFrame(rows)


def test_scorecard_has_a_row_for_every_rule():
    card = scorecard(found(10, 1.0, 9), found(1, 2.0, 1), found(6, 0.0, 2)).set_index("claim")
    assert list(card.index) == list(CLAIMS)
    shown = card.loc["C09", ["passed", "n", "verdict", "posts_weights", "controls_passed", "controls_n"]]
    assert shown.tolist() == [9, 10, "replicated", 2.0, 2, 6]
    assert card.loc["C09", "controls"] == "2 of 6"
    assert card.loc["C09 log odds", ["of", "kind"]].tolist() == ["C09", "log odds"]
    assert card.loc["C09", ["of", "kind"]].tolist() == ["", ""]
    assert card.loc["C25", ["verdict", "n"]].tolist() == ["undecided", 0]


def test_robustness_has_columns_of_its_own_and_does_not_decide():
    ours, post, controls = found(10, 1.0, 9), found(1, 2.0, 1), found(6, 0.0, 2)
    alone = scorecard(ours, post, controls).set_index("claim")
    card = scorecard(ours, post, controls, robustness=found(5, -3.0, 1)).set_index("claim")
    own = [name for name in alone if not name.startswith("book_")]
    pd.testing.assert_frame_equal(card[own], alone[own])
    books = card.loc["C09", ["book_passed", "book_n", "book_verdict"]]
    assert books.tolist() == [1, 5, "not replicated"]
    assert card.loc["C09", "book_effect"] == pytest.approx(-2.98)
    assert card.loc["C09", "book_low"] < -2.98 < card.loc["C09", "book_high"]
    assert alone.loc["C09", ["book_verdict", "book_n"]].tolist() == ["undecided", 0]


@pytest.mark.parametrize(("passing", "says"), [(2, "replicated"), (3, "uninformative"), (6, "uninformative")])
def test_a_rule_that_half_of_the_controls_pass_is_uninformative(passing, says):
    ours = found(10, 1.0, 9)
    ours.loc[ours["claim"] == "C14", "passed"] = np.nan
    card = scorecard(ours, found(1, 2.0, 1), found(6, 0.0, passing), robustness=ours).set_index("claim")
    assert card.loc["C09", ["verdict", "book_verdict"]].tolist() == [says, says]
    assert card.loc["C09", "effect"] == pytest.approx(1.045), "the number is shown all the same"
    assert card.loc["C14", "verdict"] == "undecided"


def test_controls_that_do_not_decide_say_nothing():
    controls = found(6, 0.0, 2)
    controls.loc[controls["passed"] == 0, "passed"] = np.nan
    card = scorecard(found(10, 1.0, 9), found(1, 2.0, 1), controls).set_index("claim")
    assert card.loc["C09", ["controls", "verdict"]].tolist() == ["2 of 2", "uninformative"]
    none = scorecard(found(10, 1.0, 9), found(1, 2.0, 1), controls.iloc[:0]).set_index("claim")
    assert none.loc["C09", ["controls", "verdict"]].tolist() == ["", "replicated"]


def test_another_shape_gets_one_sentence(observations):
    other = DecisionTransformer(DTConfig(d_model=8, n_heads=4, d_head=2, d_mlp=4))
    with pytest.raises(ValueError, match="model has 1 layers, 4 heads and the index encoding"):
        Evidence(other, observations)
