"""What chapter 6 shows of single frames and of sampled states, as tables of one model.

The frame that stands for each of the post's three cases, what two kinds of mean keep of what a component writes, and
how much of what head 1 writes lies along a preference. `observation` is a row of `gridworld.all_observations`.
"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from dtbook.analysis.ablations import components
from dtbook.analysis.attribution import contrast, preference_direction
from dtbook.analysis.interventions import component_outputs, feature_mean
from dtbook.analysis.population import Run, per_observation
from dtbook.analysis.written import nothing
from dtbook.artifacts.parameters import Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.situations import sample, select, showing, weights
from dtbook.model.transformer import DecisionTransformer

FRAME_CASES = {
    "C09": ("obstacle", 0.9, "L0H1"),
    "C08": ("goal from the top", -1.0, "L0H0"),
    "C10": ("goal from the left", -1.0, "L0 MLP"),
}
"""The post's three ablations, by the claim about each: what is in front, the RTG, what is removed."""
REPORTED = {"C09": 0.9, "C08": 0.48, "C10": 0.88}
"""P(forward) in the post's own frames of them (its Figs. 9, 8, 10), with the component removed."""
RUNS = ("intact", "without")
N_SAMPLED, N_DIRECTIONS = 512, 10_000
"""States that means are taken over, and random directions."""


@checked
def median_frames(
    model: DecisionTransformer,
    observations: ObservationSet,
    timestep: Whole = 10,
    preference: str = "F-R",
    progress: bool = False,
) -> pd.DataFrame:
    """Return the frame of each of `FRAME_CASES` whose rise is the weighted median of its situation: a row for each run.

    Columns: `claim`; `run` ("intact", or "without" the component); `observation`; `left`, `right`, `forward`, the
    action probabilities; each component's contribution to the preference (logits). Of both rows: `rise`, of
    P(forward) by the removal; `over`, the share of the situation's weight where it is 0.3 or more; `below`, the
    share whose P(forward) without the component is not above what the post reports (`REPORTED`).
    """
    parts = []
    for claim, (situation, rtg, removed) in FRAME_CASES.items():
        chosen, rows = (
            select(observations, situation),
            np.flatnonzero(showing(observations.images, situation)),
        )
        measure = partial(
            _with_and_without, removed=removed, direction=contrast(preference, model.cfg.n_actions)
        )
        found = per_observation(model, chosen, [(rtg, timestep)], measure, progress=progress)
        found, share = {name: value[0] for name, value in found.items()}, weights(chosen)
        forward = {run: found[f"{run} forward"] for run in RUNS}
        rise = forward["without"] - forward["intact"]
        order = np.argsort(rise, kind="stable")
        row = int(order[np.searchsorted(np.cumsum(share[order]), 0.5)])
        both: dict[str, Any] = {"claim": claim, "observation": int(rows[row]), "rise": float(rise[row])}
        both |= {"over": float(share[rise >= 0.3].sum())}
        both |= {"below": float(share[forward["without"] <= REPORTED[claim]].sum())}
        for run in RUNS:
            own = {k.removeprefix(f"{run} "): float(v[row]) for k, v in found.items() if k.startswith(run)}
            parts.append(both | {"run": run} | own)
    return pd.DataFrame(parts)


def _with_and_without(run: Run, removed: str, direction: Tensor) -> dict[str, Tensor]:
    """Probabilities and contributions of the intact run, and of the one without the component."""
    intact, writes = run.contributions(), run.writes()
    if removed in writes:
        writes[removed] = nothing(run.embedded.folded)
    edited = intact | {"L0 MLP": run.mlp_out(writes)}  # what the MLP reads changes with the heads
    edited |= {removed: 0 * intact[removed]}
    both: dict[str, Tensor] = {}
    for name, parts in zip(RUNS, (intact, edited), strict=True):
        p = torch.stack(list(parts.values())).sum(0).softmax(1)
        both |= {f"{name} {action}": p[:, k] for k, action in enumerate(("left", "right", "forward"))}
        both |= {f"{name} {part}": value @ direction.to(value) for part, value in parts.items()}
    return both


@torch.no_grad()
@checked
def kept_by_means(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtg: float = 0.9,
    timestep: Whole = 10,
    seed: Whole = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return which share of its squared length each component keeps when it is ablated to a mean: a row for each.

    Columns: `component`; `feature mean`, the average of a vector's own entries, as the post's app takes it;
    `data mean`, over `N_SAMPLED` states drawn by how often they occur.
    """
    drawn, _ = sample(observations, N_SAMPLED, np.random.default_rng(seed))
    rows = []
    for name in components(model):
        written = component_outputs(model, name, *_inputs(drawn, rtg, timestep))[:, 0]
        whole = written.square().sum()
        of_features, of_data = feature_mean(written), written.mean(0).expand_as(written)
        kept = {"feature mean": of_features.square().sum(), "data mean": of_data.square().sum()}
        rows.append({"component": name} | {mean: float(value / whole) for mean, value in kept.items()})
    return pd.DataFrame(rows)


@torch.no_grad()
@checked
def along_preference(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtg: float = 0.9,
    timestep: Whole = 10,
    preference: str = "F-R",
    seed: Whole = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how much of what head 1 writes in front of an obstacle lies along a preference, in one row.

    Columns: `along` (logits, mean of 1,000 states drawn by how often they occur); `random`, what 95 % of `N_DIRECTIONS`
    random directions of the same length stay below; `p`, the share of them with at least as much.
    """
    drawn, _ = sample(select(observations, "obstacle"), 1000, np.random.default_rng(seed))
    z = component_outputs(model, "L0H1", *_inputs(drawn, rtg, timestep))[:, 0].mean(0)
    written, direction = z @ model.blocks[0].attn.W_O[1], preference_direction(model, preference)
    generator = torch.Generator().manual_seed(seed)
    others = normalize(torch.randn(N_DIRECTIONS, model.cfg.d_model, generator=generator), dim=1)
    projected = (others.to(written) * direction.norm() @ written).abs()
    along = written @ direction
    row = {"along": along, "random": projected.quantile(0.95)}
    row |= {"p": (projected >= along.abs()).double().mean()}
    return pd.DataFrame([{name: float(value) for name, value in row.items()}])


def _inputs(drawn: ObservationSet, rtg: float, timestep: int) -> tuple[Tensor, Float[Tensor, "n 1"], Tensor]:
    n = len(drawn.images)
    states = torch.from_numpy(drawn.images).unsqueeze(1)
    return states, torch.full((n, 1), rtg), torch.full((n, 1), timestep)
