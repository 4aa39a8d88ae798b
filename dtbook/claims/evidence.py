"""The evidence that claims are decided on: a model's measures over every observation, each computed when first used.

Terms are those of the scorecard. P(F | situation, R) is the weighted mean probability of forward, averaged over
`timesteps`; a rise is that with a component zero-ablated − that of the intact model; head 1 is the obstacle head.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dtbook.analysis.ablations import situation_table
from dtbook.analysis.attribution import IMAGE_CHANNELS, contrast, preference_direction
from dtbook.analysis.counterfactuals import Case, HeadPatching, pairs
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.head_circuit import written_by_head
from dtbook.analysis.heads import THRESHOLD, obstacle_head_scores
from dtbook.analysis.population import Run, per_observation, run_at
from dtbook.analysis.stats import Line, check_table, correlation_of, least_squares, weighted_products
from dtbook.analysis.weights import front_cell_table, ov_circuit, qk_circuit, state_maps
from dtbook.analysis.written import mlp_out_of, nothing
from dtbook.artifacts.parameters import check_finite
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.rules import FRONT
from dtbook.gridworld.situations import MODEL_BATCH, row_batches, select, showing, weights
from dtbook.model.config import DTConfig
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, RTGS, TIMESTEP, TIMESTEPS, Bar
from dtbook.trajectories.episodes import Trajectories

FRONT_ROWS = {"object": 26, "colour": 75}
"""Rows of W_E_state for the cell in front, in the index encoding."""

LEARNT = Bar("<=", 0.9)
"""Cosine of the RTG embedding to its start: above, what is in it is the random draw that training began with."""


def are_claims_about(cfg: DTConfig) -> bool:
    """Return whether the claims are about models of a shape: of these layers, heads and encoding."""
    return (cfg.n_layers, cfg.n_heads, cfg.encoding) == (1, 2, "index")


def check_shape(model: DecisionTransformer) -> None:
    """Raise ValueError for a model that the claims are not about: of other layers, heads or encoding."""
    cfg = model.cfg
    if not are_claims_about(cfg):
        raise ValueError(
            f"model has {cfg.n_layers} layers, {cfg.n_heads} heads and the {cfg.encoding} encoding; the claims are "
            "about one layer, two heads and the index encoding."
        )


class Evidence:
    """A model with two heads in one layer, and all measures that the claims are about.

    `calibration` is a table of `pipeline.calibrate`; `history` PPO's own episodes. Where one is absent, the claims that
    need it are not decided. `start` is the RTG embedding (d_model,) before the first step; where it is not known, the
    model is taken to have learnt another. Raises ValueError for a model of another shape, and for numbers that are not
    finite.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        observations: ObservationSet,
        calibration: pd.DataFrame | None = None,
        history: Trajectories | None = None,
        timesteps: tuple[int, ...] = TIMESTEPS,
        start: Tensor | None = None,
    ) -> None:
        check_shape(model)
        check_finite("model", model.state_dict())
        if calibration is not None:
            check_table("calibration", calibration)
        self.model, self.observations, self.timesteps = model, observations, timesteps
        self.calibration, self.history, self.start = calibration, history, start

    @cached_property
    def head_scores(self) -> tuple[float, float]:
        """The obstacle scores of heads 0 and 1."""
        zero, one = obstacle_head_scores(self.model, self.observations)["score"]
        return float(zero), float(one)

    @property
    def has_obstacle_head(self) -> bool:
        """Whether head 1 is the obstacle head: the larger score, of at least `heads.THRESHOLD`."""
        return self.head_scores[1] >= max(THRESHOLD, self.head_scores[0])

    @cached_property
    def cosine_to_start(self) -> float:
        """The cosine of the RTG embedding to its start; NaN where that is not known."""
        if self.start is None:
            return np.nan
        now, then = self.model.W_E_rtg.detach().double(), self.start.double()
        return float(torch.cosine_similarity(now, then, dim=0))

    @property
    def has_learnt_rtg(self) -> bool:
        """Whether the RTG embedding has left its start: their cosine is at most 0.9. Taken for granted if not known."""
        return self.start is None or LEARNT.meets(self.cosine_to_start)

    @cached_property
    def situations(self) -> pd.DataFrame:
        """`ablations.situation_table` of all that is no empty cell in front, zero ablation, timesteps averaged."""
        facing = self.observations[~showing(self.observations.images, "empty")]
        table = situation_table(self.model, facing, RTGS, self.timesteps, how=("zero",))
        keys = ["situation", "rtg", "ablated"]
        return table.drop(columns="how").groupby(keys).mean()

    def forward(self, situation: str, rtg: float, without: str = "none") -> float:
        """Return P(F | situation, R), with a component zero-ablated or none."""
        return self._mean(situation, rtg, without, "forward")

    def _mean(self, situation: str, rtg: float, ablated: str, column: str) -> float:
        return float(self.situations[column].to_dict()[situation, rtg, ablated])

    def rise(self, situation: str, rtg: float, without: str) -> float:
        """Return how much P(F | situation, R) rises when a component is zero-ablated."""
        return self.forward(situation, rtg, without) - self.forward(situation, rtg)

    @cached_property
    def _over_all(self) -> "OverAll":
        """What takes a run of all observations, batch by batch."""
        share, folded = weights(self.observations), FoldedWeights(self.model)
        turns = np.zeros((3, 3))
        free, empty = np.zeros(3), showing(self.observations.images, "empty")
        for rows, embedded in folded.embed(self.observations).batches():
            for rtg in RTGS:
                left, right = run_at(embedded, rtg, TIMESTEP).logits()[:, :2].double().numpy().T
                turns += weighted_products(left, right, share[rows])
            part = share[rows] * empty[rows]
            for timestep in self.timesteps:
                run = run_at(embedded, HIGH, timestep)
                each = torch.cat([run.pattern[1:], run.probabilities()[:, :2].T.to(run.pattern)])
                free += each.double().numpy() @ part
        return OverAll(correlation_of(turns), *(free / share[empty].sum() / len(self.timesteps)).tolist())

    @property
    def turn_correlation(self) -> float:
        """Pearson's r of the left and right logits over all observations: t = `TIMESTEP`, the three RTGs pooled."""
        return self._over_all.turn_correlation

    @property
    def turns_when_free(self) -> tuple[float, float]:
        """P(left | empty, R = 0.9) and P(right | empty, R = 0.9)."""
        return self._over_all.left, self._over_all.right

    def attention(self, situation: str) -> float:
        """Return the weighted mean attention of head 1 to RTG at R = 0.9, averaged over the timesteps."""
        if situation == "empty":
            return self._over_all.attention
        return self._mean(situation, HIGH, "none", "attention L0H1")

    def state_contribution(self, situation: str) -> float:
        """Return the mean direct contribution of the state embedding to F−R (logits): that of the mean image."""
        seen = select(self.observations, situation)
        share, mean = weights(seen), np.zeros(seen.images.shape[1:])
        for rows in row_batches(len(seen), MODEL_BATCH):
            mean += np.tensordot(share[rows], seen.images[rows].astype(np.float64), 1)
        return float((state_maps(self.model, "F-R").double().numpy() * mean.transpose(2, 0, 1)).sum())

    @cached_property
    def mlp_rises(self) -> float:
        """The share of the weight of obstacles in front (R = 0.9, mean over the timesteps) on which the MLP's
        contribution to F−R rises when head 1 is zero-ablated.
        """
        obstacles = select(self.observations, "obstacle")
        direction = contrast("F-R", self.model.cfg.n_actions).to(self.model.W_U)

        def measure(run: Run) -> dict[str, torch.Tensor]:
            f, writes = run.embedded.folded, run.writes()
            intact, without = direction @ mlp_out_of(f, [writes, writes | {"L0H1": nothing(f)}])
            return {"rises": (without > intact).double()}

        conditions = [(HIGH, t) for t in self.timesteps]
        rises = per_observation(self.model, obstacles, conditions, measure)["rises"]
        return float((rises @ weights(obstacles)).mean())

    @cached_property
    def circuit(self) -> "CircuitParts":
        """The counterfactual's effect through head 1, and that of its pattern and of its values alone."""
        totals = np.zeros(6)
        for pair in pairs(FoldedWeights(self.model), self.observations, Case("obstacle", HIGH, HIGH)):
            by = HeadPatching(pair)
            parts = [by.by_pattern(1), by.by_values(1), by.by_mlp_view(), by.by_mlp_view(1)]
            changes = torch.stack([by.total(), by.by_head(1), *parts])
            totals += changes.double().numpy() @ pair.weights.numpy()
        return CircuitParts(*totals.tolist())

    def preference_of_rtg(self, preference: str) -> float:
        """Return the RTG embedding's dot product with a preference direction (logits per unit of return)."""
        return float(self.model.W_E_rtg.detach() @ preference_direction(self.model, preference))

    def time_slope(self, last: int) -> Line:
        """Return the least-squares line through the time embedding's F−R over t = 0 … `last` (logits a step)."""
        on_forward = self.model.W_E_time.detach()[: last + 1] @ preference_direction(self.model, "F-R")
        return least_squares(on_forward.double().numpy())

    @cached_property
    def front_cell(self) -> dict[str, float]:
        """The direct contributions of the front cell to F−R, by what it holds (the post's Table 3)."""
        table = front_cell_table(self.model)["contribution"]
        return {str(name): float(value) for name, value in table.items()}

    def front_weight(self, channel: str) -> tuple[float, float]:
        """Return the weight of the front cell of a channel on F−R, and its z-score among the channel's 49 cells."""
        maps = state_maps(self.model, "F-R")[IMAGE_CHANNELS.index(channel)].double()
        front = maps[FRONT]
        return float(front), float((front - maps.mean()) / maps.std())

    @cached_property
    def qk_front(self) -> dict[str, float]:
        """Front cell → RTG through head 1's W_QK, without 1/√d_head, as the post draws it."""
        rows = self.model.W_E_state[list(FRONT_ROWS.values())]
        circuit = qk_circuit(self.model, 0, 1, rows, self.model.W_E_rtg[None], scaled=False)
        return dict(zip(FRONT_ROWS, circuit.weight[:, 0].tolist(), strict=True))

    @cached_property
    def ov_front(self) -> dict[str, float]:
        """Front cell → forward logit through head 1's W_OV, a unit of each channel."""
        circuit = ov_circuit(self.model, 0, 1, self.model.W_E_state[list(FRONT_ROWS.values())])
        return dict(zip(FRONT_ROWS, circuit.weight[:, 2].tolist(), strict=True))

    @cached_property
    def rtg_through_head(self) -> dict[str, float]:
        """What the RTG token at R = 0.9 writes on F−R through head 1's W_OV, at full attention (logits), by its parts.

        "embedding", "time" (mean over the timesteps) and "position"; the token, as the head reads it, is their sum.
        """
        written = written_by_head(self.model, 1, HIGH, self.timesteps).loc["RTG"]
        on_forward = written["forward"] - written["right"]
        return {str(part): float(value) for part, value in on_forward.items()}


class OverAll(NamedTuple):
    """What is summed over all observations."""

    turn_correlation: float
    attention: float
    """Head 1's to RTG, where the cell in front is empty (R = 0.9)."""
    left: float
    right: float
    """Mean probabilities there."""


class CircuitParts(NamedTuple):
    """Weighted mean changes of the forward preference from clean to counterfactual (obstacle → empty; logits)."""

    total: float
    head: float
    """Head 1's output patched."""
    qk: float
    """Its pattern alone patched."""
    ov: float
    """Its values alone patched."""
    view: float
    """The state embedding patched for the MLP alone: its own view of the cell."""
    head_and_view: float


def curve_of(calibration: pd.DataFrame, acting: str) -> pd.DataFrame:
    """Return the curve of one way of acting, indexed by RTG."""
    return calibration[calibration["acting"] == acting].set_index("rtg")
