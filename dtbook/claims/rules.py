"""The post's claims as data and as tests: what it says, the rule that decides it, and the verdict over replications.

The rules were fixed before the replications were run. A claim is an entry here and a function from a model's
`evidence.Evidence` to its effect and whether the rule is met: adding a claim is adding both, under `@claim`. C25 to C28
are about how models are trained, and are decided by the experiments of chapters 11 and 12.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from dtbook.claims.evidence import Evidence, curve_of
from dtbook.protocol import AVOIDS, DOES_NOT, HIGH, TABLE_1
from dtbook.rollout import calibration_error

TOP, LEFT = "goal from the top", "goal from the left"
T_49 = 2.0096
"""97.5 % point of Student's t with 49 degrees of freedom: the interval of a slope over 51 timesteps."""


class Finding(NamedTuple):
    """What a model says to a claim."""

    effect: float
    """In the claim's unit."""
    passed: bool


Rule = Callable[[Evidence], Finding | None]
"""None where the evidence is not there."""


@dataclass(frozen=True)
class Claim:
    """A claim of the post; numbers are the post's."""

    id: str
    group: str
    statement: str
    """In our words."""
    post: str
    """The post's number, or "" where it prints none."""
    where: str
    """Figure, table or section of the post."""
    effect: str
    """What the effect is, and its unit."""
    rule: str
    """What passes."""
    none: float
    """The effect that speaks against the claim, which the interval must exclude: no effect; for a claim that something
    is small, its bar; for avoidance, chance (1/3)."""
    section: str
    """The page, and the heading on it, that shows it."""
    needs_head: bool = False
    """Is about head 1, and fails for a model without an obstacle head."""


CLAIMS: dict[str, Claim] = {}
"""All claims, in order."""
RULES: dict[str, Rule] = {}
"""The functions of those that a single model decides."""


def claim(
    id: str, section: str, *, needs_head: bool = False, none: float = 0.0, **texts: str
) -> Callable[[Rule], Rule]:
    """Add a claim and the function that decides it."""
    CLAIMS[id] = Claim(id=id, section=section, needs_head=needs_head, none=none, **texts)

    def add(rule: Rule) -> Rule:
        RULES[id] = rule
        return rule

    return add


def measure(evidence: Evidence) -> pd.DataFrame:
    """Return a model's findings, one row a claim: `claim`, `effect`, `passed` (as 1.0, 0.0; NaN: not decided)."""
    rows = []
    for id, rule in RULES.items():
        finding = rule(evidence)
        effect, passed = (np.nan, np.nan) if finding is None else (finding.effect, float(finding.passed))
        if CLAIMS[id].needs_head and not evidence.has_obstacle_head:
            passed = 0.0
        rows.append({"claim": id, "effect": effect, "passed": passed})
    return pd.DataFrame(rows)


# Data and behaviour


_data = partial(claim, group="Data and behaviour")


@_data(
    "C01",
    "02_trajectories",
    statement="PPO's own trajectories hold returns of −1, 0 and above 0, and 0 means truncation.",
    post="",
    where="Fig. 4",
    effect="smallest class of PPO's history, share of its episodes",
    rule="each class ≥ 5 % of the episodes; every zero-return episode was truncated",
)
def _history_has_all_classes(e: Evidence) -> Finding | None:
    if e.history is None:
        return None
    share = float(np.bincount(e.history.classes, minlength=3).min() / len(e.history.classes))
    zero = e.history.lengths[e.history.classes == 1]
    return Finding(share, share >= 0.05 and bool((zero == e.history.task.max_steps).all()))


@_data(
    "C02",
    "04_calibration",
    statement="Returns are unbiased at RTG −1, 0 and 0.9.",
    post="−1, 0, ≈ 1",
    where="Fig. 5",
    effect="mean return at 0.9 − at −1, greedy or sampled, whichever is smaller",
    rule="mean ≤ −0.9 at −1, within ±0.15 at 0, ≥ 0.8 at 0.9, greedy and sampled",
)
def _unbiased_at_critical_points(e: Evidence) -> Finding | None:
    if e.calibration is None:
        return None
    at = [curve_of(e.calibration, acting)["mean"] for acting in ("greedy", "sampled")]
    passed = all(mean[-1.0] <= -0.9 and abs(mean[0.0]) <= 0.15 and mean[0.9] >= 0.8 for mean in at)
    return Finding(min(float(mean[0.9] - mean[-1.0]) for mean in at), passed)


@_data(
    "C03",
    "04_calibration",
    statement="Asked for 0, the agent survives the whole episode.",
    post="",
    where="Fig. 5, text",
    effect="share of the episodes truncated at RTG 0, greedy or sampled, whichever is smaller",
    rule="≥ 0.8, greedy and sampled",
)
def _survives_at_zero(e: Evidence) -> Finding | None:
    if e.calibration is None:
        return None
    share = min(float(curve_of(e.calibration, a)["survived"][0.0]) for a in ("greedy", "sampled"))
    return Finding(share, share >= 0.8)


@_data(
    "C04",
    "04_calibration",
    statement="Between those points the calibration curve is S-shaped, not linear.",
    post="",
    where="Fig. 5",
    effect="mean |achieved − asked| over RTG 0.1 … 0.8, greedy (return)",
    rule="≥ 0.1",
)
def _is_s_shaped(e: Evidence) -> Finding | None:
    if e.calibration is None:
        return None
    error = calibration_error(e.calibration[e.calibration["acting"] == "greedy"], 0.1, 0.8)
    return Finding(error, error >= 0.1)


_A = {"wall": "a wall", "obstacle": "an obstacle", "goal": "the goal"}


def _avoids(situation: str, rtg: float) -> Rule:
    def rule(e: Evidence) -> Finding:
        p = e.forward(situation, rtg)
        return Finding(p, p <= AVOIDS if TABLE_1[rtg][situation] else p >= DOES_NOT)

    return rule


for _letter, (_rtg, _thing) in zip(
    "abcdefghi", [(r, t) for r, row in TABLE_1.items() for t in row], strict=True
):
    _yes, _asked = TABLE_1[_rtg][_thing], f"{_rtg:g}".replace("-", "−")
    _data(
        f"C05{_letter}",
        "05_behaviours",
        statement=f"At RTG {_asked} the agent {'avoids' if _yes else 'does not avoid'} {_A[_thing]} in front of it.",
        post="yes" if _yes else "no",
        where="Table 1",
        effect=f"P(forward | {_thing}, {_asked})",
        rule=f"≤ {AVOIDS}" if _yes else f"≥ {DOES_NOT}",
        none=1 / 3 if _yes else 0.0,
    )(_avoids(_thing, _rtg))


@_data(
    "C06",
    "05_behaviours",
    statement="The logits of left and right go together.",
    post="heavily",
    where="Attribution",
    effect="Pearson's r over all observations, the three RTGs pooled, t = 10",
    rule="≥ 0.8",
)
def _turns_correlate(e: Evidence) -> Finding:
    return Finding(e.whole[0], e.whole[0] >= 0.8)


# Where it lives (zero ablation)


_lives = partial(claim, section="06_ablations", group="Where it lives")


@_lives(
    "C07",
    statement="Wall avoidance and goal seeking come with the state embedding.",
    post="",
    where="Ablation, text",
    effect="its direct contribution to F−R: the weaker of (empty − wall) and (goal − empty), in units of their bars",
    rule="wall ≤ empty − 1 and goal ≥ empty + 0.5 (logits)",
)
def _state_embedding_knows_walls_and_goals(e: Evidence) -> Finding:
    empty, wall, goal = (e.state_contribution(name) for name in ("empty", "wall", "goal"))
    effect = min(empty - wall, (goal - empty) / 0.5)
    return Finding(effect, effect >= 1)


def _rises(situation: str, rtg: float, without: str) -> Rule:
    def rule(e: Evidence) -> Finding:
        rise = e.rise(situation, rtg, without)
        return Finding(rise, rise >= 0.3)

    return rule


_lives(
    "C08",
    statement="Without head 0 the agent enters the goal from the top at RTG −1.",
    post="0 → 0.48",
    where="Fig. 8",
    effect="rise of P(forward)",
    rule="≥ 0.3",
)(_rises(TOP, -1.0, "L0H0"))
_lives(
    "C09",
    statement="Without head 1 the agent hits obstacles at RTG 0.9.",
    post="0 → 0.9",
    where="Fig. 9",
    effect="rise of P(forward)",
    rule="≥ 0.3",
    needs_head=True,
)(_rises("obstacle", HIGH, "L0H1"))
_lives(
    "C10",
    statement="Without the MLP the agent enters the goal from the left at RTG −1.",
    post="0 → 0.88",
    where="Fig. 10",
    effect="rise of P(forward)",
    rule="≥ 0.3",
)(_rises(LEFT, -1.0, "L0 MLP"))


@_lives(
    "C11",
    statement="Head 0 does not guard the goal from the left.",
    post="",
    where="Ablation, text",
    effect="rise of P(forward) without head 0 at RTG −1",
    rule="< 0.1",
    none=0.1,
)
def _head_0_leaves_the_left(e: Evidence) -> Finding:
    rise = e.rise(LEFT, -1.0, "L0H0")
    return Finding(rise, rise < 0.1)


@_lives(
    "C12",
    statement="The MLP amplifies the heads: without head 1 it inhibits forward less.",
    post="",
    where="Fig. 9, text",
    effect="share of the weight of obstacles in front (RTG 0.9) on which the MLP's F−R rises without head 1",
    rule="≥ 0.8",
    none=0.5,
    needs_head=True,
)
def _mlp_amplifies(e: Evidence) -> Finding:
    return Finding(e.mlp_rises, e.mlp_rises >= 0.8)


@_lives(
    "C13",
    statement="The roles are separate: head 1 does not guard the goal from the top, nor head 0 against obstacles.",
    post="",
    where="Fig. 7",
    effect="larger of the two rises of P(forward)",
    rule="both < 0.1",
    none=0.1,
    needs_head=True,
)
def _roles_are_separate(e: Evidence) -> Finding:
    rise = max(e.rise(TOP, -1.0, "L0H1"), e.rise("obstacle", HIGH, "L0H0"))
    return Finding(rise, rise < 0.1)


# Embeddings


_embeds = partial(claim, section="07_embeddings", group="Embeddings")


@_embeds(
    "C14",
    statement="The RTG embedding points along forward − right.",
    post="1.13",
    where="RTG",
    effect="RTG embedding · (F−R) (logits per unit of return)",
    rule="≥ 0.5",
)
def _rtg_points_forward(e: Evidence) -> Finding:
    effect = e.preference_of_rtg("F-R")
    return Finding(effect, effect >= 0.5)


@_embeds(
    "C15",
    statement="The RTG embedding hardly tells right from left.",
    post="−0.16",
    where="RTG",
    effect="|RTG embedding · (R−L)| ÷ |RTG embedding · (F−R)|",
    rule="< 0.3",
    none=0.3,
)
def _rtg_is_ambivalent_on_turns(e: Evidence) -> Finding:
    ratio = abs(e.preference_of_rtg("R-L")) / abs(e.preference_of_rtg("F-R"))
    return Finding(ratio, ratio < 0.3)


@_embeds(
    "C16",
    statement="The time embedding's F−R rises slightly with the timestep.",
    post="slight",
    where="Fig. 11",
    effect="least-squares rise over t = 0 … 50 (logits)",
    rule="95 % interval of the slope above 0",
)
def _time_pushes_forward(e: Evidence) -> Finding:
    slope, error = e.time_slope()
    return Finding(50 * slope, slope - T_49 * error > 0)


@_embeds(
    "C17",
    statement="The front cell's embedding repels from walls, draws to the goal and is indifferent to obstacles.",
    post="empty 0.27, wall −3.17, obstacle 0.136, goal 1.42",
    where="Table 3",
    effect="weakest of −wall, (goal − empty) ÷ 0.5 and 2 − |obstacle − empty| ÷ 0.5",
    rule="wall ≤ −1, goal ≥ empty + 0.5, obstacle within 0.5 of empty (logits)",
)
def _front_cell_is_table_3(e: Evidence) -> Finding:
    f = e.front_cell
    apart = abs(f["obstacle"] - f["empty"])
    effect = min(-f["wall"], (f["goal"] - f["empty"]) / 0.5, 2 - apart / 0.5)
    return Finding(effect, effect >= 1)


@_embeds(
    "C18",
    statement="The front cell stands out among the weights on F−R: colour against, object for.",
    post="colour −0.742, object 0.27",
    where="Figs. 14, 15",
    effect="−z of its colour weight among the 49 cells",
    rule="colour weight negative with |z| ≥ 3, object weight positive",
)
def _front_cell_stands_out(e: Evidence) -> Finding:
    colour, z = e.front_weight("colour")
    return Finding(-z, colour < 0 and abs(z) >= 3 and e.front_weight("object")[0] > 0)


@_embeds(
    "C19",
    statement="The weights of the state channel, which is always 0, vanish.",
    post="≈ 1e−38",
    where="Fig. 14",
    effect="largest absolute weight",
    rule="< 1e−6",
    none=1e-6,
)
def _state_channel_vanishes(e: Evidence) -> Finding:
    cells = e.model.cfg.view_size**2
    largest = float(e.model.W_E_state.detach()[2 * cells :].abs().max())
    return Finding(largest, largest < 1e-6)


# The head-1 circuit


_circuit = partial(claim, section="08_the_obstacle_circuit", group="The head-1 circuit", needs_head=True)


@_circuit(
    "C20",
    statement="Through head 1's QK circuit, object and colour in front inhibit attention to RTG.",
    post="object −0.244, colour −0.217",
    where="Fig. 16",
    effect="larger of the two weights (without 1/√d_head)",
    rule="both < 0",
)
def _qk_inhibits(e: Evidence) -> Finding:
    effect = max(e.qk_front.values())
    return Finding(effect, effect < 0)


def _attends_less(situation: str) -> Rule:
    def rule(e: Evidence) -> Finding:
        effect = e.attention("empty") - e.attention(situation)
        return Finding(effect, effect >= 0.1)

    return rule


for _letter, _thing in zip("abc", ("obstacle", "wall", "goal"), strict=True):
    _circuit(
        f"C21{_letter}",
        statement=f"So head 1 attends less to RTG with {_A[_thing]} in front than with an empty cell.",
        post="",
        where="Fig. 16, text",
        effect=f"attention to RTG, empty − {_thing} (RTG 0.9)",
        rule="≥ 0.1",
    )(_attends_less(_thing))


@_circuit(
    "C22",
    statement="Through head 1's OV circuit, obstacle and goal in front lower the forward logit.",
    post="object −0.864, colour 0.168",
    where="Fig. 17",
    effect="empty − obstacle or empty − goal, whichever is smaller (logits at full attention)",
    rule="both ≥ 1",
)
def _ov_lowers_forward(e: Evidence) -> Finding:
    by_thing = {name: codes @ np.array([*e.ov_front.values()]) for name, codes in _CODES.items()}
    effect = float(min(by_thing["empty"] - by_thing[name] for name in ("obstacle", "goal")))
    return Finding(effect, effect >= 1)


_CODES: Mapping[str, np.ndarray] = {
    "empty": np.array([1, 0]),
    "obstacle": np.array([6, 2]),
    "goal": np.array([8, 1]),
}
"""Object and colour, as minigrid encodes them."""


@_circuit(
    "C23",
    statement="Not attending to RTG lowers forward, as RTG through head 1 writes along F−R.",
    post="",
    where="Circuit, text",
    effect="0.9 · RTG embedding through head 1's OV on F−R (logits at full attention)",
    rule="> 0",
)
def _rtg_through_ov(e: Evidence) -> Finding:
    effect = e.rtg_through_head()
    return Finding(effect, effect > 0)


@_circuit(
    "C24",
    statement="Obstacle avoidance is carried by what head 1 reads from the state (OV), not by where it looks (QK).",
    post="",
    where="Circuit, text",
    effect="(OV part − QK part) ÷ head 1's whole effect on the log odds of forward",
    rule="OV part ≥ QK part",
)
def _ov_carries_it(e: Evidence) -> Finding:
    effect = (e.circuit.ov - e.circuit.qk) / e.circuit.head if e.circuit.head else np.nan
    return Finding(effect, e.circuit.ov >= e.circuit.qk)


# Inductive bias and training: decided by experiments, not by a model


def _by_experiment(id: str, section: str, none: float = 0.0, **texts: str) -> None:
    texts = {"group": "Inductive bias and training", "post": ""} | texts
    claim(id, section, needs_head=False, none=none, **texts)


_by_experiment(
    "C25",
    "11_encodings",
    statement="Indices made early models avoid the goal; over-sampling the last step mended it.",
    where="State embeddings",
    effect="greedy success at 0.9 with − without over-sampling",
    rule="without < 0.5, with ≥ 0.9",
)
_by_experiment(
    "C26",
    "11_encodings",
    statement="A one-hot model would not need over-sampling.",
    where="State embeddings",
    effect="greedy success at 0.9, one-hot without over-sampling",
    rule="≥ 0.9",
)
_by_experiment(
    "C27",
    "12_dynamics_and_size",
    statement="One layer, width 128, two heads and one timestep are robustly good.",
    where="Training",
    effect="best mean return at 0.9 in the sweep − this shape's",
    rule="≤ 0.05",
    none=0.05,
)
_by_experiment(
    "C28",
    "12_dynamics_and_size",
    statement="Performance comes long before interpretability.",
    where="Discussion",
    effect="step at which head scores settle ÷ step at which the return at 0.9 does",
    rule="≥ 2",
    none=1.0,
)
