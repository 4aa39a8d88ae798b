"""Tables over every observation: what a model does in each situation, intact and with each component ablated.

Weights are the shares of states that show an observation; all means and quantiles are taken with them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.attribution import contrast
from dtbook.analysis.population import BATCH_SIZE, Condition, Folded, Run
from dtbook.analysis.stats import weighted_quantile
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.situations import SITUATIONS, showing, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import RTGS, TIMESTEPS

HOW = ("zero", "mean", "resample", "feature mean")
"""What an ablated component writes: nothing; its mean over all observations; what it writes on another observation,
drawn as often as states show it; the post's feature mean (the mean of its vector's own entries, in all of them)."""
INTACT = ("none", "none")
QUANTILES = {"low": 0.0, "q01": 0.01, "q05": 0.05, "q50": 0.5, "q95": 0.95, "q99": 0.99, "high": 1.0}

Variant = tuple[str, str]
"""Which component is ablated, and how."""
Means = tuple[Tensor, Tensor]
"""The mean output of each head (on the readers) and of the MLP (on the logits)."""


def variants(model: DecisionTransformer, how: Sequence[str] = HOW) -> list[Variant]:
    """Return the intact run and each head and the MLP ablated in each way. Raises ValueError for an unknown way."""
    if unknown := [name for name in how if name not in HOW]:
        raise ValueError(f"how is {unknown[0]!r}; it must be one of {', '.join(map(repr, HOW))}.")
    components = [f"L0H{head}" for head in range(model.cfg.n_heads)] + ["L0 MLP"]
    return [INTACT, *((component, way) for component in components for way in how)]


@torch.inference_mode()
def situation_table(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = TIMESTEPS,
    how: Sequence[str] = HOW,
    preference: str = "F-R",
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return one row for each situation, RTG, timestep and ablation.

    Columns: `situation`, `rtg`, `timestep`; `ablated` ("none", "L0H0", …, "L0 MLP") and `how` (`HOW`); weighted means
    `left`, `right` and `forward` of the three probabilities; quantiles of P(forward) over the situation (`QUANTILES`);
    `logit_diff`, the mean of the preference, and the mean contributions to it that sum to it: "state", "time and
    position", each head, "L0 b_O", "L0 MLP", "b_U"; `attention L0H0` …, the mean attention to RTG of the intact run;
    `share` of all states, and the number of `observations`.

    Situations that no observation shows are left out. Peak memory: the observations, and P(forward) of each of them for
    every condition and ablation. Raises ValueError as `population.Folded`, `variants` and `contrast`.
    """
    asked = variants(model, how)
    direction = contrast(preference).to(model.W_U)
    donors = np.random.default_rng(seed).choice(
        len(observations.images), len(observations.images), p=weights(observations)
    )
    conditions = [Condition(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    run_through = _Pass(Folded(model), observations, donors, conditions, asked, direction)
    with tqdm(
        total=2 * len(observations.images), desc="situations", disable=not progress, unit_scale=True
    ) as bar:
        return run_through.table(bar)


class _Pass:
    """All observations at all conditions: twice through, as mean ablation needs the means first."""

    def __init__(
        self,
        folded: Folded,
        observations: ObservationSet,
        donors: np.ndarray,
        conditions: list[Condition],
        asked: list[Variant],
        direction: Tensor,
    ) -> None:
        self.folded, self.conditions, self.asked = folded, conditions, asked
        self.observations, self.donors, self.direction = observations, donors, direction
        self.weights = weights(observations)
        rows = {name: showing(observations.images, name) for name in SITUATIONS}
        self.rows = {name: mask for name, mask in rows.items() if mask.any()}
        masks = torch.from_numpy(np.stack(list(self.rows.values()))).double()
        self.share = masks * torch.from_numpy(self.weights)
        self.forward = np.empty((len(conditions), len(asked), len(self.weights)), np.float32)
        self.sums: dict[tuple[Condition, Variant], Any] = {}
        self.direct = slice(folded.d_mlp, folded.n_readers)  # of the readers, the logits
        self.components: list[str] = []

    def table(self, bar: tqdm) -> pd.DataFrame:
        ways = {way for _, way in self.asked}
        means = self._means(bar) if "mean" in ways else {}
        for batch in self._batches():
            shared = self.folded.share(torch.from_numpy(self.observations.images[batch]))
            others = self.donors[batch] if "resample" in ways else self.donors[:0]
            donor = self.folded.share(torch.from_numpy(self.observations.images[others]))
            for k, condition in enumerate(self.conditions):
                pair = shared.at(*condition), donor.at(*condition)
                self._measure(k, batch, *pair, means.get(condition))
            bar.update(batch.stop - batch.start)
        return pd.DataFrame([self._row(*key) for key in self._keys()])

    def _batches(self) -> list[slice]:
        n = len(self.weights)
        return [slice(start, min(start + BATCH_SIZE, n)) for start in range(0, n, BATCH_SIZE)]

    def _means(self, bar: tqdm) -> dict[Condition, Means]:
        """The mean outputs at each condition."""
        sums: dict[Condition, Means] = {}
        for batch in self._batches():
            shared = self.folded.share(torch.from_numpy(self.observations.images[batch]))
            share = torch.from_numpy(self.weights[batch]).to(shared.state)
            for condition in self.conditions:
                run = shared.at(*condition)
                heads = run.heads()
                new = share @ heads, share @ run.mlp(run.read(heads))
                old = sums.get(condition)
                sums[condition] = new if old is None else (old[0] + new[0], old[1] + new[1])
            bar.update(batch.stop - batch.start)
        return sums

    def _measure(self, k: int, batch: slice, run: Run, donor: Run, means: Means | None) -> None:
        """Run a batch at one condition, intact and with each ablation."""
        heads, others = run.heads(), donor.heads()
        read = run.read(heads)
        own = dict(zip(self.folded.heads, heads[..., self.direct], strict=True)) | {"L0 MLP": run.mlp(read)}
        mlp_of_donor = donor.mlp(donor.read(others))
        for v, (component, how) in enumerate(self.asked):
            written, total = dict(own), read
            if component == "L0 MLP":
                written[component] = _instead_mlp(how, run, read, mlp_of_donor, means)
            elif component != "none":
                head = self.folded.heads.index(component)
                instead = _instead_head(how, head, run, heads, others, means)
                total = read - heads[head, :, :-1] + instead
                written |= {component: instead[:, self.direct], "L0 MLP": run.mlp(total)}
            self._add(k, v, batch, run, run.finish(total, written["L0 MLP"]), written)

    def _add(
        self, k: int, v: int, batch: slice, run: Run, logits: Tensor, written: dict[str, Tensor]
    ) -> None:
        """Add this batch to the weighted sums of one condition and ablation, and keep its P(forward)."""
        b_O, probabilities = self.folded.b_O[self.direct], logits.softmax(-1)
        self.forward[k, v, batch] = probabilities[:, 2].numpy()
        mlp = written.pop("L0 MLP")
        parts = {"state": run.shared.state[:, self.direct], "time and position": run.fixed[self.direct] - b_O}
        parts |= written | {"L0 b_O": b_O, "L0 MLP": mlp, "b_U": self.folded.b_U}
        on_preference = [part @ self.direction for part in (logits, *parts.values())]
        columns = [
            probabilities,
            *(value.expand(len(logits))[:, None] for value in on_preference),
            run.pattern.T,
        ]
        total = self.share[:, batch] @ torch.cat(columns, 1).double()
        key = self.conditions[k], self.asked[v]
        self.sums[key] = self.sums.get(key, 0) + total
        self.components = list(parts)

    def _keys(self) -> list[tuple[str, Condition, Variant]]:
        return [(s, c, v) for s in self.rows for c in self.conditions for v in self.asked]

    def _row(self, situation: str, condition: Condition, variant: Variant) -> dict[str, object]:
        row, mask = list(self.rows).index(situation), self.rows[situation]
        share = float(self.weights[mask].sum())
        means = (self.sums[condition, variant][row] / share).tolist()
        names = ["left", "right", "forward", "logit_diff", *self.components]
        names += [f"attention {head}" for head in self.folded.heads]
        forward = self.forward[self.conditions.index(condition), self.asked.index(variant)][mask]
        quantiles = weighted_quantile(forward, self.weights[mask], np.array(list(QUANTILES.values())))
        where = {"situation": situation, **condition._asdict()}
        named = dict(zip(QUANTILES, map(float, quantiles), strict=True))
        counts = {"share": share, "observations": int(mask.sum())}
        what = dict(zip(("ablated", "how"), variant, strict=True))
        return where | what | dict(zip(names, means, strict=True)) | named | counts


def _instead_head(
    how: str, head: int, run: Run, heads: Tensor, others: Tensor, means: Means | None
) -> Tensor:
    """What an ablated head writes on the readers instead, one row or a row an observation."""
    if how == "mean" and means:
        return means[0][head, None, :-1]
    if how == "resample":
        return others[head, :, :-1]
    if how == "feature mean":
        return heads[head, :, -1:] * run.shared.folded.feature_mean[head]
    return torch.zeros_like(heads[head, :1, :-1])


def _instead_mlp(how: str, run: Run, read: Tensor, of_donor: Tensor, means: Means | None) -> Tensor:
    """What an ablated MLP writes on the logits instead, one row or a row an observation."""
    if how == "mean" and means:
        return means[1][None]
    if how == "resample":
        return of_donor
    if how == "feature mean":
        return run.mlp_feature_mean(read)
    return torch.zeros_like(read[:1, : run.shared.folded.b_U.numel()])
