"""Models compared: what they do, what their weights weigh, and when along training a measure settles."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dtbook.analysis.attribution import check_has_action
from dtbook.analysis.heads import obstacle_head_scores
from dtbook.artifacts.parameters import Whole, checked
from dtbook.gridworld.env import ObservationSet, all_observations
from dtbook.gridworld.kernels import FORWARD
from dtbook.gridworld.rules import Task
from dtbook.gridworld.situations import batches, sample, select
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import RTGS, TIMESTEP

Record = dict[str, float]

PROBED = ("obstacle", "wall", "goal")
"""What is in front of the agent when a model's P(forward) is looked at."""
TOLERANCE = 0.1
"""How near its end a measure must stay to be settled: logit shares and returns alike (the scorecard's rule)."""


class Probe(NamedTuple):
    """Observations that models are compared on."""

    facing: Mapping[str, ObservationSet]
    task: Task


@checked
def make_probe(task: Task | None = None, n: Whole = 10_000, seed: Whole = 0) -> Probe:
    """Return, for each of `PROBED`, all observations; where there are more than `n`, so many drawn by weight."""
    task = task or Task()
    observations, rng = all_observations(task.size, task.n_obstacles), np.random.default_rng(seed)
    facing = {name: select(observations, name) for name in PROBED}
    drawn = {name: sample(o, n, rng)[0] if len(o.images) > n else o for name, o in facing.items()}
    return Probe(drawn, task)


@torch.inference_mode()
def forward_probability(model: DecisionTransformer, observations: ObservationSet, rtg: float) -> float:
    """Return the weighted mean probability of forward at t = `TIMESTEP`; a longer context sees this one timestep."""
    check_has_action(model.cfg.n_actions)
    total = 0.0
    for batch in batches(observations, rtg, TIMESTEP):
        chance = model.fast_forward(*batch.inputs)[:, 0].softmax(-1)[:, FORWARD]
        total += float(chance.double() @ batch.weights)
    return total


def inspect(model: DecisionTransformer, probe: Probe) -> Record:
    """Return what a model does when facing things (`forward goal 0.9` …) and the obstacle score of each head.

    `score L0H1` … are those of `heads.obstacle_head_scores`, `whole_change` the effect they are shares of (logits),
    `best score` the largest; the three are NaN for a model without layers.
    """
    row = {
        f"forward {name} {rtg:g}": forward_probability(model, observations, rtg)
        for name, observations in probe.facing.items()
        for rtg in RTGS
    }
    row |= {"whole_change": np.nan, "best score": np.nan}
    if model.cfg.n_layers:
        scores = obstacle_head_scores(model, probe.facing["obstacle"])
        named = zip(scores["layer"], scores["head"], scores["score"], strict=True)
        row |= {f"score L{layer}H{head}": float(score) for layer, head, score in named}
        row |= {
            "whole_change": float(scores["whole_change"].iloc[0]),
            "best score": float(scores["score"].max()),
        }
    return row


@torch.inference_mode()
def weight_norms(model: DecisionTransformer) -> Record:
    """Return the Euclidean norm of all weights together, `norm`, and of each: `norm W_E_rtg`, `norm W_Q` ….

    A weight of a block goes by its name alone; those of several blocks are taken together.
    """
    squares: Record = {}
    for name, weight in model.state_dict().items():
        short = f"norm {name.rpartition('.')[2]}"
        squares[short] = squares.get(short, 0.0) + float(weight.double().square().sum())
    whole = {"norm": sum(squares.values())}
    return {name: float(np.sqrt(square)) for name, square in (whole | squares).items()}


def moved_from(now: Float[Tensor, " d_model"], start: Float[Tensor, " d_model"]) -> Record:
    """Return a vector's distance from where its training started, and the cosine of the angle between the two."""
    now, start = now.detach().double(), start.detach().double()
    cosine = torch.cosine_similarity(now, start, dim=0)
    return {"distance": float((now - start).norm()), "cosine": float(cosine)}


def settles(steps: Sequence[int] | np.ndarray, values: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Return the first step from which on every measure stays within `tolerance` of where it ends.

    It is known only to the spacing of the snapshots. A measure that never moves settles at the first of them. Raises
    ValueError for no snapshot.
    """
    if not len(steps):
        raise ValueError("steps must name at least one snapshot; there is none.")
    values = np.asarray(values, dtype=np.float64).reshape(len(steps), -1)
    near = (np.abs(values - values[-1]) <= tolerance).all(1)
    away = np.flatnonzero(~near)
    return float(steps[away[-1] + 1]) if len(away) else float(steps[0])
