"""C01 to C13: what the data hold, how the model acts, and which component each behaviour goes with."""

from functools import partial

import numpy as np

from dtbook.claims.evidence import Evidence, curve_of
from dtbook.claims.rules import Effect, Finding, claim
from dtbook.protocol import ACTING, AVOIDS, DOES_NOT, HIGH, TABLE_1, TIMESTEP, Bar, printed
from dtbook.rollout import calibration_error

# Data and behaviour

_data = partial(claim, group="Data and behaviour")
_SMALLEST_CLASS = 0.05
_DIES, _NEAR_0, _SUCCEEDS = Bar("<=", -0.9), Bar("<=", 0.15), Bar(">=", 0.8)


@_data(
    "C01",
    "02_trajectories",
    statement="PPO's own trajectories hold returns of −1, 0 and above 0, and 0 means truncation.",
    where="Fig. 4",
    effect="smallest class of PPO's history, share of its episodes",
    rule=f"each class ≥ {100 * _SMALLEST_CLASS:g} % of the episodes; every zero-return episode was truncated",
)
def _history_has_all_classes(e: Evidence) -> Finding | None:
    if e.history is None:
        return None
    share = float(np.bincount(e.history.classes, minlength=3).min() / len(e.history.classes))
    zero = e.history.lengths[e.history.classes == 1]
    return Finding(share, share >= _SMALLEST_CLASS and bool((zero == e.history.task.max_steps).all()))


@_data(
    "C02",
    "04_calibration",
    statement=f"Returns are unbiased at RTG −1, 0 and {HIGH}.",
    post="−1, 0, ≈ 1",
    where="Fig. 5",
    effect=f"mean return at {HIGH} − at −1, greedy or sampled, whichever is smaller",
    rule=f"mean {_DIES} at −1, within ±{_NEAR_0.number} at 0, {_SUCCEEDS} at {HIGH}, greedy and sampled",
)
def _unbiased_at_critical_points(e: Evidence) -> Finding | None:
    if e.calibration is None:
        return None
    at = [curve_of(e.calibration, acting)["mean"] for acting in ACTING]
    passed = all(
        _DIES.meets(mean[-1.0]) and _NEAR_0.meets(abs(mean[0.0])) and _SUCCEEDS.meets(mean[HIGH])
        for mean in at
    )
    return Finding(min(float(mean[HIGH] - mean[-1.0]) for mean in at), passed)


@_data(
    "C03",
    "04_calibration",
    statement="Asked for 0, the agent survives the whole episode.",
    where="Fig. 5, text",
    effect="share of the episodes truncated at RTG 0, greedy or sampled, whichever is smaller",
    bar=Bar(">=", 0.8),
    rule="{bar}, greedy and sampled",
)
def _survives_at_zero(e: Evidence) -> float | None:
    if e.calibration is None:
        return None
    return min(float(curve_of(e.calibration, acting)["survived"][0.0]) for acting in ACTING)


@_data(
    "C04",
    "04_calibration",
    statement="Between those points the calibration curve is S-shaped, not linear.",
    where="Fig. 5",
    effect="mean |achieved − asked| over RTG 0.1 … 0.8, greedy (return)",
    bar=Bar(">=", 0.1),
)
def _is_s_shaped(e: Evidence) -> float | None:
    if e.calibration is None:
        return None
    return calibration_error(e.calibration[e.calibration["acting"] == "greedy"], 0.1, 0.8)


_A = {"wall": "a wall", "obstacle": "an obstacle", "goal": "the goal"}


def _goes_forward(situation: str, rtg: float) -> Effect:
    return lambda e: e.forward(situation, rtg)


for _letter, (_rtg, _thing) in zip(
    "abcdefghi", [(rtg, thing) for rtg, row in TABLE_1.items() for thing in row], strict=True
):
    _avoided = TABLE_1[_rtg][_thing]
    _data(
        f"C05{_letter}",
        "05_behaviours",
        statement=f"At RTG {printed(_rtg)} the agent {'avoids' if _avoided else 'does not avoid'} {_A[_thing]} "
        "in front of it.",
        post="yes" if _avoided else "no",
        where="Table 1",
        effect=f"P(forward | {_thing}, {printed(_rtg)})",
        bar=Bar("<=", AVOIDS) if _avoided else Bar(">=", DOES_NOT),
        none=1 / 3 if _avoided else 0.0,
    )(_goes_forward(_thing, _rtg))


@_data(
    "C06",
    "05_behaviours",
    statement="The logits of left and right go together.",
    post="heavily",
    where="Attribution",
    effect=f"Pearson's r over all observations, the three RTGs pooled, t = {TIMESTEP}",
    bar=Bar(">=", 0.8),
)
def _turns_correlate(e: Evidence) -> float:
    return e.turn_correlation


# Where it lives (zero ablation)

_lives = partial(claim, section="06_ablations", group="Where it lives")
_TOP, _LEFT = "goal from the top", "goal from the left"
_RISES, _STAYS = Bar(">=", 0.3), Bar("<", 0.1)
_REPELS, _DRAWS = 1.0, 0.5


@_lives(
    "C07",
    statement="Wall avoidance and goal seeking come with the state embedding.",
    where="Ablation, text",
    effect="its direct contribution to F−R: the weaker of (empty − wall) and (goal − empty), in units of their bars",
    bar=Bar(">=", 1.0),
    rule=f"wall ≤ empty − {_REPELS:g} and goal ≥ empty + {_DRAWS} (logits)",
)
def _state_embedding_knows_walls_and_goals(e: Evidence) -> float:
    empty, wall, goal = (e.state_contribution(name) for name in ("empty", "wall", "goal"))
    return min((empty - wall) / _REPELS, (goal - empty) / _DRAWS)


_lives(
    "C08",
    statement="Without head 0 the agent enters the goal from the top at RTG −1.",
    post="0 → 0.48",
    where="Fig. 8",
    effect="rise of P(forward)",
    bar=_RISES,
)(lambda e: e.rise(_TOP, -1.0, "L0H0"))
_lives(
    "C09",
    statement=f"Without head 1 the agent hits obstacles at RTG {HIGH}.",
    post="0 → 0.9",
    where="Fig. 9",
    effect="rise of P(forward)",
    bar=_RISES,
    needs_head=True,
)(lambda e: e.rise("obstacle", HIGH, "L0H1"))
_lives(
    "C10",
    statement="Without the MLP the agent enters the goal from the left at RTG −1.",
    post="0 → 0.88",
    where="Fig. 10",
    effect="rise of P(forward)",
    bar=_RISES,
)(lambda e: e.rise(_LEFT, -1.0, "L0 MLP"))
_lives(
    "C11",
    statement="Head 0 does not guard the goal from the left.",
    where="Ablation, text",
    effect="rise of P(forward) without head 0 at RTG −1",
    bar=_STAYS,
)(lambda e: e.rise(_LEFT, -1.0, "L0H0"))
_lives(
    "C12",
    statement="The MLP amplifies the heads: without head 1 it inhibits forward less.",
    where="Fig. 9, text",
    effect=f"share of the weight of obstacles in front (RTG {HIGH}) on which the MLP's F−R rises without head 1",
    bar=Bar(">=", 0.8),
    none=0.5,
    needs_head=True,
)(lambda e: e.mlp_rises)


@_lives(
    "C13",
    statement="The roles are separate: head 1 does not guard the goal from the top, nor head 0 against obstacles.",
    where="Fig. 7",
    effect="larger of the two rises of P(forward)",
    bar=_STAYS,
    rule="both {bar}",
    needs_head=True,
)
def _roles_are_separate(e: Evidence) -> float:
    return max(e.rise(_TOP, -1.0, "L0H1"), e.rise("obstacle", HIGH, "L0H0"))
