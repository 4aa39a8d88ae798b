"""Behaviour of the intact model: the tables of chapter 5, each over every observation that a situation has.

Distributions of the log odds of forward, the extremes at every timestep, exceptions to the post's Table 1, and scans
over the RTG. Means and shares are weighted by how many states show an observation; `worst` and
`mildest` are rows of `gridworld.all_observations`, so that whoever reads the table can look at them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from dtbook.analysis.attribution import but_forward, check_has_action, contrast, forward_preference
from dtbook.analysis.population import Run, per_observation
from dtbook.artifacts.parameters import Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import FORWARD
from dtbook.gridworld.rules import ACTIONS
from dtbook.gridworld.situations import FACING, HANDS, SITUATIONS, at_hand, select, showing, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import AVOIDS, RTGS, TABLE_1, TIMESTEP, TIMESTEPS

BIN_WIDTH = 0.5
EDGES = np.arange(-30.0, 30.0 + BIN_WIDTH, BIN_WIDTH)
"""Bins of the log odds of forward (nats); what lies outside falls into the first or the last."""
CERTIFIED = tuple(range(101))
"""Timesteps of `exceptions`, each of them: an agent that is asked for 0.9 is long at the goal by the last."""
EVERY_TIMESTEP = (*CERTIFIED, *range(110, 300, 10), 299)
"""Timesteps of `over_time`: those that certificates are about, then every tenth to the task's last."""
SCAN_RTGS = tuple(round(float(rtg), 1) for rtg in np.linspace(-1, 1, 21))
SCAN_TIMESTEPS = tuple(range(5, 16))
"""Of the scans over the RTG: 10, with five to either side as timestep noise."""


def log_odds(p: float) -> float:
    """Return the log odds of a probability (nats): the forward preference of whoever goes forward so often."""
    return float(np.log(p / (1 - p)))


def log_odds_distributions(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = TIMESTEPS,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how the log odds of forward are distributed: a row for each situation, RTG and bin of `EDGES`.

    Columns: `situation`, `rtg`, `middle` (of the bin, nats), `share` of the situation's weight, over all timesteps
    together. Shares of one situation and RTG sum to 1; bins that hold nothing are left out.
    """
    conditions = [(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    odds = per_observation(model, observations, conditions, _preference, progress=progress)["preference"]
    middles, n_bins = (EDGES[1:] + EDGES[:-1]) / 2, len(EDGES) - 1
    bins = np.clip(np.digitize(odds, EDGES) - 1, 0, n_bins - 1).reshape(len(rtgs), len(timesteps), -1)
    parts = []
    for situation in SITUATIONS:
        rows = showing(observations.images, situation)
        if not rows.any():
            continue
        weight = np.tile(weights(select(observations, situation)), len(timesteps)) / len(timesteps)
        for rtg, in_bin in zip(rtgs, bins[..., rows], strict=True):
            share = np.bincount(in_bin.ravel(), weight, n_bins)
            part = pd.DataFrame(
                {"situation": situation, "rtg": float(rtg), "middle": middles, "share": share}
            )
            parts.append(part[share > 0])
    return pd.concat(parts, ignore_index=True)


def _preference(run: Run) -> dict[str, torch.Tensor]:
    return {"preference": forward_preference(run.logits())}


@checked
def turns(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timestep: Whole = TIMESTEP,
    progress: bool = False,
) -> pd.DataFrame:
    """Return what Pearson's r of left and right is made of: a row for each pair of columns compared and RTG.

    Columns: `of` ("logits", or "centred": with the mean of the three logits taken off, which no softmax notices),
    `rtg`, the weighted means `left`, `right` and of the products `left²`, `right²`, `left·right`. Rows of several RTGs
    may be averaged: `correlation` of that is the pooled r.
    """
    check_has_action(model.cfg.n_actions, last=1)
    conditions = [(float(rtg), timestep) for rtg in rtgs]
    values = per_observation(
        model, observations, conditions, lambda run: {"logits": run.logits()}, progress=progress
    )
    share, rows = weights(observations), []
    for rtg, logits in zip(rtgs, values["logits"].astype(float), strict=True):
        for of, values in {"logits": logits, "centred": logits - logits.mean(1, keepdims=True)}.items():
            left, right = values[:, 0], values[:, 1]
            moments = [share @ x for x in (left, right, left**2, right**2, left * right)]
            rows.append((of, float(rtg), *moments))
    return pd.DataFrame(rows, columns=["of", "rtg", "left", "right", "left²", "right²", "left·right"])


def correlation(turns: pd.DataFrame, of: str) -> float:
    """Return Pearson's r of left and right from rows of `turns`, pooled over their RTGs."""
    m = turns[turns["of"] == of].drop(columns=["of", "rtg"]).mean()
    covariance = m["left·right"] - m["left"] * m["right"]
    return float(covariance / np.sqrt((m["left²"] - m["left"] ** 2) * (m["right²"] - m["right"] ** 2)))


WALKS = ("empty", "wall")
"""Situations in which there is nothing to be hit: the way is free, or a wall stands across it."""


def clockwise_bias(left: Any, right: Any) -> Any:
    """Return (P(right) − P(left)) ÷ (P(right) + P(left)), of numbers or columns: 1 is right only, −1 left only (M3)."""
    return (right - left) / (right + left)


def along_walls(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = TIMESTEPS,
    progress: bool = False,
) -> pd.DataFrame:
    """Return where the agent turns by where a wall is: a row for each situation of `WALKS`, hand and RTG.

    Columns: `situation`; `wall at`, the hand with a wall beside the agent, "neither", or "any" for all of the
    situation; `rtg`; weighted means over observations and timesteps of the probabilities `left`, `right` and `forward`;
    `share` of the situation's weight and the number of `observations`. Whoever follows walls clockwise keeps them at
    the left hand, and turns right where the next wall stands across the way.
    """
    check_has_action(model.cfg.n_actions)
    parts = []
    for situation in WALKS:
        seen = select(observations, situation)
        conditions = [(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
        acting = per_observation(model, seen, conditions, _probabilities, progress=progress)["acting"]
        by_rtg = acting.reshape(len(rtgs), len(timesteps), len(seen), -1)
        for rtg, values in zip(rtgs, by_rtg, strict=True):
            table = _by_hand(seen, values.mean(0, dtype=float))
            parts.append(table.assign(situation=situation, rtg=float(rtg)))
    return pd.concat(parts, ignore_index=True)


def _probabilities(run: Run) -> dict[str, torch.Tensor]:
    return {"acting": run.probabilities()[:, : len(ACTIONS)]}


def _by_hand(seen: ObservationSet, acting: Float[np.ndarray, "n action"]) -> pd.DataFrame:
    at = {hand: at_hand(seen.images, hand) for hand in HANDS}
    at = {"any": np.ones(len(seen), bool), **at, "neither": ~np.logical_or(*at.values())}
    share, rows = weights(seen), []
    for hand, there in at.items():
        of = share[there].sum()
        means = share[there] @ acting[there] / of if there.any() else np.full(len(ACTIONS), np.nan)
        row = {"wall at": hand} | dict(zip(ACTIONS, means.tolist(), strict=True))
        rows.append(row | {"share": of, "observations": int(there.sum())})
    return pd.DataFrame(rows)


def over_time(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = EVERY_TIMESTEP,
    situations: Sequence[str] = FACING,
    progress: bool = False,
) -> pd.DataFrame:
    """Return P(forward) in each situation at each RTG and timestep: mean, extremes, and who has them.

    Columns: `situation`, `rtg`, `timestep`; `forward` (mean), `low`, `high`; `over`, the share of the weight with
    P(forward) above `protocol.AVOIDS`, and `n_over`, how many observations that is; `greedy`, the share on which
    forward is the likeliest action; `worst` and `mildest`, the observations' rows that have the two extremes.
    """
    parts = []
    for situation in situations:
        rows = np.flatnonzero(showing(observations.images, situation))
        seen = select(observations, situation)
        share = weights(seen)
        for rtg in rtgs:
            conditions = [(float(rtg), timestep) for timestep in timesteps]
            values = per_observation(model, seen, conditions, _forward_and_margin, progress=progress)
            p, over = values["forward"], values["forward"] > AVOIDS
            columns = {"situation": situation, "rtg": float(rtg), "timestep": list(timesteps)}
            columns |= {"forward": p @ share, "low": p.min(1), "high": p.max(1)}
            columns |= {"over": over @ share, "n_over": over.sum(1), "greedy": (values["margin"] > 0) @ share}
            columns |= {"worst": rows[p.argmax(1)], "mildest": rows[p.argmin(1)]}
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def exceptions(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = CERTIFIED,
    progress: bool = False,
) -> pd.DataFrame:
    """Return every observation that is not avoided as the post's Table 1 says it is: a row for each, none if "never".

    Columns: `situation`, `rtg`; `observation`, its row in `gridworld.all_observations`, and `states`, how many states
    show it; `n`, at how many of the timesteps P(forward) exceeds `protocol.AVOIDS`, the `first` of them, and the
    highest `forward` with its `timestep`. RTGs that Table 1 does not have are left out.
    """
    parts = []
    for situation, rtg in avoided(rtgs):
        rows = np.flatnonzero(showing(observations.images, situation))
        conditions = [(rtg, timestep) for timestep in timesteps]
        values = per_observation(
            model, select(observations, situation), conditions, _forward_and_margin, progress=progress
        )
        p, over = values["forward"], values["forward"] > AVOIDS
        which, at = np.flatnonzero(over.any(0)), np.asarray(timesteps)
        columns = {"situation": situation, "rtg": rtg, "observation": rows[which]}
        columns |= {"states": observations.multiplicity[rows[which]], "n": over.sum(0)[which]}
        columns |= {"first": at[over.argmax(0)[which]], "forward": p.max(0)[which]}
        parts.append(pd.DataFrame(columns | {"timestep": at[p.argmax(0)[which]]}))
    return pd.concat(parts, ignore_index=True)


def avoided(rtgs: Sequence[float] = RTGS) -> list[tuple[str, float]]:
    """Return the situations and RTGs for which the post's Table 1 says that forward is avoided."""
    return [
        (thing, rtg)
        for rtg, row in TABLE_1.items()
        for thing, yes in row.items()
        if yes and any(np.isclose(rtg, each) for each in rtgs)
    ]


def _forward_and_margin(run: Run) -> dict[str, torch.Tensor]:
    logits = run.logits()
    others = but_forward(logits)
    margin = logits[:, FORWARD] - others.amax(1)
    return {"forward": logits.T.softmax(0)[FORWARD], "margin": margin}


def scan(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = SCAN_RTGS,
    timesteps: Sequence[int] = (10,),
    preference: str = "F-R",
    progress: bool = False,
) -> pd.DataFrame:
    """Return how a set of observations is acted on as the RTG runs: a row for each RTG and timestep.

    Columns: `rtg`, `timestep`; weighted means of the logits `left`, `right`, `forward`, of the probability
    `P(forward)`, of the preference `logit_diff` and the contributions that sum to it, and of each head's attention to
    RTG. All observations count, so give `select(observations, situation)`, or a set of one.
    """
    check_has_action(model.cfg.n_actions)
    direction, share = contrast(preference, model.cfg.n_actions).to(model.W_U), weights(observations)

    def measure(run: Run) -> dict[str, torch.Tensor]:
        parts = run.contributions()
        logits = torch.stack(list(parts.values())).sum(0)
        columns = dict(zip(ACTIONS, logits.unbind(1), strict=False))
        columns |= {"P(forward)": logits.softmax(1)[:, FORWARD], "logit_diff": logits @ direction}
        columns |= {name: part @ direction for name, part in parts.items()}
        return columns | {
            f"attention {head}": row
            for head, row in zip(run.embedded.folded.head_names, run.pattern, strict=True)
        }

    conditions = [(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    values = per_observation(model, observations, conditions, measure, progress=progress)
    means = {name: each.astype(float) @ share for name, each in values.items()}
    return pd.DataFrame(conditions, columns=["rtg", "timestep"]).assign(**means)


def situation_scans(
    model: DecisionTransformer, observations: ObservationSet, progress: bool = False, **settings: Any
) -> pd.DataFrame:
    """Return `scan` of each situation with something in front, told apart by the column `situation`."""
    scans = [
        scan(model, select(observations, name), progress=progress, **settings).assign(situation=name)
        for name in FACING
    ]
    return pd.concat(scans, ignore_index=True)
