"""What the claims are decided on: a model's measures over every observation, each computed once, when first asked for.

Terms are those of the scorecard. P(F | situation, R) is the weighted mean probability of forward, averaged over
`timesteps`; a rise is that with a component zero-ablated − that of the intact model; head 1 is the obstacle head.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from dtbook.analysis.ablations import situation_table
from dtbook.analysis.attribution import contrast, preference_direction
from dtbook.analysis.heads import THRESHOLD, forward_preference, obstacle_head_scores
from dtbook.analysis.population import BATCH_SIZE, Folded, Run, collect
from dtbook.analysis.stats import Line, least_squares, weighted_correlation
from dtbook.analysis.weights import front_cell_table, ov_circuit, qk_circuit, state_maps
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.rules import FRONT
from dtbook.gridworld.situations import counterfactual_pairs, select, showing, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, RTGS, TIMESTEP, TIMESTEPS
from dtbook.trajectories.recording import Trajectories

FRONT_ROWS = {"object": 26, "colour": 75}
"""Rows of W_E_state for the cell in front, in the index encoding."""


def check_shape(model: DecisionTransformer) -> None:
    """Raise ValueError for a model that the claims are not about: of other layers, heads or encoding."""
    cfg = model.cfg
    if (cfg.n_layers, cfg.n_heads, cfg.encoding) != (1, 2, "index"):
        raise ValueError(
            f"model has {cfg.n_layers} layers, {cfg.n_heads} heads and the {cfg.encoding} encoding; the claims are "
            "about one layer, two heads and the index encoding."
        )


class Evidence:
    """A model with two heads in one layer, and what the claims ask of it.

    `calibration` is a table of `pipeline.calibrate`; `history` PPO's own episodes. Where one is absent, the claims that
    need it are not decided. Raises ValueError for a model of another shape.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        observations: ObservationSet,
        calibration: pd.DataFrame | None = None,
        history: Trajectories | None = None,
        timesteps: tuple[int, ...] = TIMESTEPS,
    ) -> None:
        check_shape(model)
        self.model, self.observations, self.timesteps = model, observations, timesteps
        self.calibration, self.history = calibration, history

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
    def situations(self) -> pd.DataFrame:
        """`ablations.situation_table` of all that is no empty cell in front, zero ablation, timesteps averaged."""
        facing = self.observations[~showing(self.observations.images, "empty")]
        table = situation_table(self.model, facing, RTGS, self.timesteps, how=("zero",))
        keys = ["situation", "rtg", "ablated"]
        return table.drop(columns="how").groupby(keys).mean()

    def forward(self, situation: str, rtg: float, without: str = "none") -> float:
        """P(F | situation, R), with a component zero-ablated or none."""
        return self._mean(situation, rtg, without, "forward")

    def _mean(self, situation: str, rtg: float, ablated: str, column: str) -> float:
        return float(self.situations[column].to_dict()[situation, rtg, ablated])

    def rise(self, situation: str, rtg: float, without: str) -> float:
        """How much P(F | situation, R) rises when a component is zero-ablated."""
        return self.forward(situation, rtg, without) - self.forward(situation, rtg)

    @cached_property
    def _over_all(self) -> tuple[float, float]:
        """What takes a run of all observations: `turn_correlation`, and `attention` with an empty cell in front."""
        share, folded = weights(self.observations), Folded(self.model)
        turns = np.empty((len(RTGS), len(share), 2), np.float32)
        attention, empty = 0.0, showing(self.observations.images, "empty")
        for start in range(0, len(share), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            shared = folded.share(torch.from_numpy(self.observations.images[rows]))
            for k, rtg in enumerate(RTGS):
                turns[k, rows] = shared.at(rtg, TIMESTEP).logits()[:, :2].numpy()
            part = share[rows] * empty[rows]
            attention += sum(part @ shared.at(HIGH, t).pattern[1].double().numpy() for t in self.timesteps)
        left, right = turns.reshape(-1, 2).astype(np.float64).T
        r = weighted_correlation(left, right, np.tile(share, len(RTGS)))
        return r, float(attention / share[empty].sum() / len(self.timesteps))

    @property
    def turn_correlation(self) -> float:
        """Pearson's r of the left and right logits over all observations: t = `TIMESTEP`, the three RTGs pooled."""
        return self._over_all[0]

    def attention(self, situation: str) -> float:
        """Return the weighted mean attention of head 1 to RTG at R = 0.9, averaged over the timesteps."""
        if situation == "empty":
            return self._over_all[1]
        return self._mean(situation, HIGH, "none", "attention L0H1")

    def state_contribution(self, situation: str) -> float:
        """Mean of what the state embedding adds to F−R directly (logits): linear, so that of the mean image."""
        chosen = select(self.observations, situation)
        mean = np.tensordot(weights(chosen), chosen.images.astype(np.float64), 1)
        return float((state_maps(self.model, "F-R").double().numpy() * mean.transpose(2, 0, 1)).sum())

    @cached_property
    def mlp_rises(self) -> float:
        """Share of the weight of obstacles in front (R = 0.9, mean over the timesteps) on which the MLP's
        contribution to F−R rises when head 1 is zero-ablated.
        """
        obstacles, direction = select(self.observations, "obstacle"), contrast("F-R").to(self.model.W_U)

        def measure(run: Run) -> dict[str, torch.Tensor]:
            heads = run.heads()
            intact = run.mlp(run.read(heads)) @ direction
            heads[1] = 0
            return {"rises": ((run.mlp(run.read(heads)) @ direction) > intact).double()}

        asked = [(HIGH, t) for t in self.timesteps]
        rises = collect(self.model, obstacles, asked, measure)["rises"]
        return float((rises @ weights(obstacles)).mean())

    @cached_property
    def circuit(self) -> "CircuitParts":
        """How the counterfactual's effect through head 1 divides into its pattern and its values."""
        totals, folded = np.zeros(4), Folded(self.model)
        for clean, other in counterfactual_pairs(self.observations, HIGH, TIMESTEP, "obstacle", BATCH_SIZE):
            runs = [folded.share(batch.states[:, 0]).at(HIGH, TIMESTEP) for batch in (clean, other)]
            own = runs[0].heads()
            patched = [
                runs[1].heads(),
                runs[0].heads(pattern=runs[1].pattern),
                runs[0].heads(value=runs[1].shared.value),
            ]
            before = forward_preference(runs[0].logits(own))
            changed = [forward_preference(runs[1].logits())]
            for heads in patched:
                changed.append(forward_preference(runs[0].logits(torch.stack([own[0], heads[1]]))))
            totals += (
                torch.stack([after - before for after in changed]).double().numpy() @ clean.weights.numpy()
            )
        whole, head, qk, ov = totals.tolist()
        return CircuitParts(whole, head, qk, ov)

    def preference_of_rtg(self, preference: str) -> float:
        """The RTG embedding's dot product with a preference direction (logits per unit of return)."""
        return float(self.model.W_E_rtg.detach() @ preference_direction(self.model, preference))

    def time_slope(self, last: int) -> Line:
        """Return the least-squares line through the time embedding's F−R over t = 0 … `last` (logits a step)."""
        on_forward = self.model.W_E_time.detach()[: last + 1] @ preference_direction(self.model, "F-R")
        return least_squares(on_forward.double().numpy())

    @cached_property
    def front_cell(self) -> dict[str, float]:
        """What the front cell adds to F−R directly by what it holds (the post's Table 3)."""
        table = front_cell_table(self.model)["contribution"]
        return {str(name): float(value) for name, value in table.items()}

    def front_weight(self, channel: str) -> tuple[float, float]:
        """The weight of the front cell of a channel on F−R, and its z-score among the channel's 49 cells."""
        maps = state_maps(self.model, "F-R")[["object", "colour", "state"].index(channel)].double()
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

    def rtg_through_head(self) -> float:
        """0.9 times the RTG embedding through head 1's W_OV on F−R, at full attention (logits)."""
        direction = preference_direction(self.model, "F-R")[:, None]
        return HIGH * float(ov_circuit(self.model, 0, 1, self.model.W_E_rtg[None], direction).weight)


class CircuitParts(NamedTuple):
    """Weighted mean changes of the forward preference from clean to counterfactual (obstacle → empty; logits)."""

    whole: float
    head: float
    """Head 1's output patched."""
    qk: float
    """Its pattern alone patched."""
    ov: float
    """Its values alone patched."""


def curve_of(calibration: pd.DataFrame, acting: str) -> pd.DataFrame:
    """Return the curve of one way of acting, indexed by RTG."""
    return calibration[calibration["acting"] == acting].set_index("rtg")
