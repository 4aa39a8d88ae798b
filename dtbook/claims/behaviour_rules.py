"""C01 to C13: what the data hold, how the model acts, and which component each behaviour goes with."""

from collections.abc import Iterable
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dtbook.analysis.behaviour import log_odds
from dtbook.claims.evidence import Evidence, curve_of
from dtbook.claims.rules import A_SHARE_OF_NOTHING, FIRST_EDITION, LOG_ODDS, Effect, Finding, beside, claim
from dtbook.protocol import ACTING, AVOIDS, DOES_NOT, HIGH, TABLE_1, TIMESTEP, Bar, printed
from dtbook.rollout import calibration_error

# Data and behaviour

_data = partial(claim, group="Data and behaviour")
_SMALLEST_CLASS = 0.05
_DIES, _NEAR_0, _SUCCEEDS = Bar("<=", -0.9), Bar("<=", 0.15), Bar(">=", 0.8)
_FITS, _FITS_MORE = Bar(">=", 0.9), Bar(">=", 0.15)
_FIRST_DOES_NOT = Bar(">=", 0.2)


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
    effect="share of the greedy curve's variance that three plateaus explain − that a line does",
    rule=f"three rising plateaus explain {_FITS} of the variance, and {_FITS_MORE} more than a line",
)
def _is_three_plateaus(e: Evidence) -> Finding | None:
    if e.calibration is None:
        return None
    plateaus, line = plateaus_and_line(curve_of(e.calibration, "greedy")["mean"])
    return Finding(plateaus - line, _FITS.meets(plateaus) and _FITS_MORE.meets(plateaus - line))


def plateaus_and_line(curve: pd.Series) -> tuple[float, float]:
    """Return which shares of a curve's variance three rising plateaus and a line over its index explain.

    Both are NaN for a flat curve.
    """
    if curve.nunique() == 1:
        return np.nan, np.nan
    curve = curve.sort_index()
    return explained_by_plateaus(curve.to_numpy()), explained_by_line(curve)


def explained_by_plateaus(values: Float[np.ndarray, " n"]) -> float:
    """Return the largest share of the values' variance that a step function of three rising levels explains.

    NaN for values that are all the same.
    """
    whole = len(values) * values.var()
    cuts = [np.split(values, cut) for cut in combinations(range(1, len(values)), 2)]
    rising = [parts for parts in cuts if np.all(np.diff([part.mean() for part in parts]) >= 0)]
    return 1 - min((sum(len(part) * part.var() for part in parts) for parts in rising), default=whole) / whole


def explained_by_line(curve: pd.Series) -> float:
    """Return the share of a curve's variance that the least-squares line over its index explains."""
    return float(np.corrcoef(curve.index, curve)[0, 1] ** 2)


@beside(
    "C04",
    FIRST_EDITION,
    effect="mean |achieved − asked| over RTG 0.1 … 0.8, greedy (return)",
    bar=Bar(">=", 0.1),
)
def _is_off_the_line(e: Evidence) -> float | None:
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
    if not _avoided:
        beside(f"C05{_letter}", FIRST_EDITION, bar=_FIRST_DOES_NOT)(_goes_forward(_thing, _rtg))


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
_HALF_BACK, _LESS_THAN_HALF = Bar(">=", 0.5), Bar("<", 0.5)
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


_Ablation = tuple[str, float, str]
"""A situation, an RTG and the component that is zero-ablated."""


def _log_odds_returned(e: Evidence, situation: str, rtg: float, without: str) -> float | Finding:
    """Of the log odds that speak against forward, the share that ablation takes away; of none, a share of nothing."""
    before, after = (log_odds(e.forward(situation, rtg, ablated)) for ablated in ("none", without))
    return A_SHARE_OF_NOTHING if before >= 0 else 1 - after / before


def _ablated(id: str, bar: Bar, odds_bar: Bar, *ablations: _Ablation, **texts: Any) -> None:
    """Add a claim about the rise of P(forward), the largest of some, and beside it that of its log odds."""
    _lives(id, bar=bar, **texts)(lambda e: max(e.rise(*ablation) for ablation in ablations))
    beside(
        id,
        LOG_ODDS,
        bar=odds_bar,
        rule=texts.get("rule", "{bar}"),
        effect="share of the log odds against forward that the ablation takes away",
    )(lambda e: _largest(_log_odds_returned(e, *ablation) for ablation in ablations))


def _largest(shares: Iterable[float | Finding]) -> float | Finding:
    numbers = [share for share in shares if not isinstance(share, Finding)]
    return max(numbers) if numbers else A_SHARE_OF_NOTHING


_RISE = "rise of P(forward)"
_ablated(
    "C08",
    _RISES,
    _HALF_BACK,
    (_TOP, -1.0, "L0H0"),
    statement="Without head 0 the agent enters the goal from the top at RTG −1.",
    post="0 → 0.48",
    where="Fig. 8",
    effect=_RISE,
)
_ablated(
    "C09",
    _RISES,
    _HALF_BACK,
    ("obstacle", HIGH, "L0H1"),
    statement=f"Without head 1 the agent hits obstacles at RTG {HIGH}.",
    post="0 → 0.9",
    where="Fig. 9",
    effect=_RISE,
    needs_head=True,
)
_ablated(
    "C10",
    _RISES,
    _HALF_BACK,
    (_LEFT, -1.0, "L0 MLP"),
    statement="Without the MLP the agent enters the goal from the left at RTG −1.",
    post="0 → 0.88",
    where="Fig. 10",
    effect=_RISE,
)
_ablated(
    "C11",
    _STAYS,
    _LESS_THAN_HALF,
    (_LEFT, -1.0, "L0H0"),
    statement="Head 0 does not guard the goal from the left.",
    where="Ablation, text",
    effect="rise of P(forward) without head 0 at RTG −1",
)
_lives(
    "C12",
    statement="The MLP amplifies the heads: without head 1 it inhibits forward less.",
    where="Fig. 9, text",
    effect=f"share of the weight of obstacles in front (RTG {HIGH}) on which the MLP's F−R rises without head 1",
    bar=Bar(">=", 0.8),
    none=0.5,
    needs_head=True,
)(lambda e: e.mlp_rises)
_ablated(
    "C13",
    _STAYS,
    _LESS_THAN_HALF,
    (_TOP, -1.0, "L0H1"),
    ("obstacle", HIGH, "L0H0"),
    statement="The roles are separate: head 1 does not guard the goal from the top, nor head 0 against obstacles.",
    where="Fig. 7",
    effect="larger of the two rises of P(forward)",
    rule="both {bar}",
    needs_head=True,
)
