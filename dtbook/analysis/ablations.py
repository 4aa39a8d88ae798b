"""Ablations over every observation: each situation with each component ablated, each neuron ablated, and such play.

Weights are the shares of states that show an observation; all means and quantiles are taken with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.attribution import check_has_action, contrast
from dtbook.analysis.folded import FAST_BATCH_SIZE, FoldedWeights
from dtbook.analysis.interventions import ablate
from dtbook.analysis.population import MLP_OUT, Condition, Run, run_at
from dtbook.analysis.stats import weighted_quantile
from dtbook.analysis.written import Writes, Written, direct, nothing, run_all, to_feature_mean
from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import FORWARD
from dtbook.gridworld.rules import ACTIONS, Task
from dtbook.gridworld.situations import SITUATIONS, row_batches, showing, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import ACTING, RTGS, TIMESTEPS
from dtbook.rollout import CALIBRATION_RTGS, OUTCOMES, episode_table, rollout, summarise

HOW = ("zero", "mean", "resample", "feature mean")
"""What an ablated component writes: nothing; its mean over all observations; what it writes on another observation,
drawn as often as states show it; the post's feature mean (the mean of its vector's own entries, in all of them)."""
INTACT = ("none", "none")
QUANTILES = {"low": 0.0, "q01": 0.01, "q05": 0.05, "q50": 0.5, "q95": 0.95, "q99": 0.99, "high": 1.0}

Variant = tuple[str, str]
"""Which component is ablated, and how."""


def components(model: DecisionTransformer) -> list[str]:
    """Return the heads and the MLP of a one-layer model, as `interventions.ablate` names them."""
    return [f"L0H{head}" for head in range(model.cfg.n_heads)] + ["L0 MLP"]


def variants(model: DecisionTransformer, how: Sequence[str] = HOW) -> list[Variant]:
    """Return the intact run and each head and the MLP ablated in each way. Raises ValueError for an unknown way."""
    if unknown := [name for name in how if name not in HOW]:
        raise ValueError(f"how is {unknown[0]!r}; it must be one of {', '.join(map(repr, HOW))}.")
    return [INTACT, *((component, way) for component in components(model) for way in how)]


@torch.inference_mode()
@checked
def situation_table(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = TIMESTEPS,
    how: Sequence[str] = HOW,
    preference: str = "F-R",
    seed: Whole = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return one row for each situation, RTG, timestep and ablation.

    Columns: `situation`, `rtg`, `timestep`; `ablated` ("none", "L0H0", …, "L0 MLP") and `how` (`HOW`); weighted means
    `left`, `right` and `forward` of these probabilities; quantiles of P(forward) over the situation (`QUANTILES`);
    `logit_diff`, the mean of the preference, and the mean contributions to it that sum to it: "state", "time and
    position", each head, "L0 b_O", "L0 MLP", "b_U"; `attention L0H0` …, the mean attention to RTG of the intact run;
    `share` of all states, and the number of `observations`.

    Situations that no observation shows are left out. Peak memory: the observations, and P(forward) of each of them
    for every ablation at one condition. Raises ValueError as `population.FoldedWeights`, `variants` and `contrast`.
    """
    direction, ablations = contrast(preference, model.cfg.n_actions).to(model.W_U), variants(model, how)
    check_has_action(model.cfg.n_actions)
    donors = np.random.default_rng(seed).choice(len(observations), len(observations), p=weights(observations))
    situations = _Situations(FoldedWeights(model), observations, donors, ablations, direction)
    conditions = [Condition(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    parts = [
        situations.at(condition) for condition in tqdm(conditions, desc="situations", disable=not progress)
    ]
    return pd.DataFrame([row for name in situations.rows for part in parts for row in part[name]])


class _Situations:
    """All observations, those of a situation side by side, and sums over each situation at one condition."""

    def __init__(
        self,
        folded: FoldedWeights,
        observations: ObservationSet,
        donors: np.ndarray,
        ablations: list[Variant],
        direction: Tensor,
    ) -> None:
        self.folded, self.variants, self.direction = folded, ablations, direction
        shown = {name: showing(observations.images, name) for name in SITUATIONS}
        order = np.lexsort([~mask for mask in reversed(shown.values())])
        ends = {name: np.flatnonzero(mask[order])[[0, -1]] for name, mask in shown.items() if mask.any()}
        self.rows = {name: slice(int(first), int(last) + 1) for name, (first, last) in ends.items()}
        self.weights, embedded = weights(observations)[order], folded.embed(observations)
        self.embedded, self.donors = embedded[order], embedded[donors[order]]
        self.ways = {how for _, how in ablations}
        self.forward = np.empty((len(ablations), len(order)), np.float32)
        self.direct = torch.empty(len(folded.b_U), len(order), dtype=folded.dtype)
        self.parts = [*run_at(embedded[:1], 0.0, 0).writes(), MLP_OUT, "b_U"]

    def at(self, condition: Condition) -> dict[str, list[dict[str, object]]]:
        """Return the rows of each situation at one condition, one for each ablation."""
        means, self.mlp_mean = {}, torch.zeros_like(self.folded.b_U)
        if "mean" in self.ways:
            heads = run_at(self.embedded, *condition).heads()
            means = {name: Written(written.mean(self.weights)) for name, written in heads.items()}
        ends = {
            0,
            len(self.weights),
            *(end for rows in self.rows.values() for end in (rows.start, rows.stop)),
        }
        groups = [slice(start, stop) for start, stop in pairwise(sorted(ends))]
        sums = [
            np.sum([self._sums(condition, rows, means) for rows in _batches(group)], 0) for group in groups
        ]
        if (MLP_OUT, "mean") in self.variants:
            self._ablate_mlp_to_mean(groups, sums)
        tables = {}
        for name, rows in self.rows.items():
            held = [total for group, total in zip(groups, sums, strict=True) if _holds(rows, group)]
            tables[name] = self._table(name, condition, np.sum(held, 0))
        return tables

    def _sums(self, condition: Condition, rows: slice, means: Writes) -> np.ndarray:
        """Return the weighted sum of each column for each ablation over some rows, and keep their P(forward).

        Columns: the three probabilities, what each of `parts` writes on the preference, and each head's attention.
        """
        f, run = self.folded, run_at(self.embedded[rows], *condition)
        donor = run_at(self.donors[rows], *condition) if "resample" in self.ways else run
        writes, share = run.writes(), f.cast(torch.from_numpy(self.weights[rows]))
        instead = [_instead(variant, run, donor, means) for variant in self.variants]
        of_donor = {name: written for name, written in donor.writes().items() if written.varies}
        others = [writes | of_donor] if "resample" in self.ways else []
        runs = [writes, *others, *(writes | written for written in instead if written)]
        out = run_all(f, runs, with_mean=int("feature mean" in self.ways))
        beside, heads = out.logits - out.mlp_out, iter(range(1 + len(others), len(runs)))
        self.direct[:, rows], self.mlp_mean = beside[0], self.mlp_mean + out.mlp_out[0] @ share
        which = [next(heads) if written else 0 for written in instead]
        mlp_out = out.mlp_out[which]
        of_mlp = {"resample": out.mlp_out[1:2], "feature mean": out.mlp_feature_mean}
        for k, (component, how) in enumerate(self.variants):
            if component == MLP_OUT:
                mlp_out[k] = of_mlp[how][0] if how in of_mlp else 0
        probabilities = (beside[which] + mlp_out).softmax(1)
        self.forward[:, rows] = probabilities[:, FORWARD].numpy()
        own = {name: self._on_preference(written, share) for name, written in writes.items()}
        changed = [
            {name: self._on_preference(one, share) for name, one in written.items()} for written in instead
        ]
        on_preference = (self.direction @ (mlp_out @ share).T).tolist()
        b_U, attention = float(self.direction @ f.b_U * share.sum()), (run.pattern @ share).tolist()
        parts = [[*(own | new).values(), mlp, b_U] for new, mlp in zip(changed, on_preference, strict=True)]
        actions = (probabilities[:, : len(ACTIONS)] @ share).numpy()
        return np.column_stack([actions, parts, np.tile(attention, (len(parts), 1))]).astype(np.float64)

    def _on_preference(self, written: Written, share: Tensor) -> float:
        return float((self.direction @ direct(self.folded, written)).expand(len(share)) @ share)

    def _ablate_mlp_to_mean(self, groups: Sequence[slice], sums: Sequence[np.ndarray]) -> None:
        """Put in what the MLP's mean output gives, now that all of it is known: `_sums` left zero ablation there."""
        k, whole = self.variants.index((MLP_OUT, "mean")), self.mlp_mean
        for group, total in zip(groups, sums, strict=True):
            probabilities = (self.direct[:, group] + whole[:, None]).softmax(0)
            share = self.folded.cast(torch.from_numpy(self.weights[group]))
            self.forward[k, group] = probabilities[FORWARD].numpy()
            total[k, : len(ACTIONS)] = (probabilities[: len(ACTIONS)] @ share).numpy()
            total[k, len(ACTIONS) + self.parts.index(MLP_OUT)] = float(self.direction @ whole * share.sum())

    def _table(self, situation: str, condition: Condition, sums: np.ndarray) -> list[dict[str, object]]:
        rows = self.rows[situation]
        share, table = self.weights[rows], []
        whole = float(share.sum())
        attention = [f"attention {head}" for head in self.folded.head_names]
        for variant, row, forward in zip(self.variants, sums / whole, self.forward[:, rows], strict=True):
            actions, parts, patterns = np.split(row, [len(ACTIONS), len(ACTIONS) + len(self.parts)])
            quantiles = weighted_quantile(forward, share, np.array(list(QUANTILES.values())))
            names = [*ACTIONS, "logit_diff", *self.parts, *attention, *QUANTILES]
            values = [*actions, parts.sum(), *parts, *patterns, *quantiles]
            what = {"situation": situation, **condition._asdict()}
            what |= dict(zip(("ablated", "how"), variant, strict=True))
            numbers = dict(zip(names, map(float, values), strict=True))
            table.append(what | numbers | {"share": whole, "observations": len(share)})
        return table


def _batches(rows: slice) -> Iterator[slice]:
    for batch in row_batches(rows.stop - rows.start, FAST_BATCH_SIZE // 2):
        yield slice(rows.start + batch.start, rows.start + batch.stop)


def _holds(rows: slice, group: slice) -> bool:
    return rows.start <= group.start < group.stop <= rows.stop


def _instead(variant: Variant, run: Run, donor: Run, means: Writes) -> dict[str, Written]:
    """Return what an ablated head writes instead, by its name; nothing where no head is ablated."""
    name, how = variant
    f = run.embedded.folded
    if name not in f.head_names:
        return {}
    head = f.head_names.index(name)
    if how == "mean":
        return {name: means[name]}
    if how == "resample":
        return {name: donor.head(head)}
    if how == "feature mean":
        return {name: to_feature_mean(f, head, run.head(head))}
    return {name: nothing(f)}


# Play


@checked
def ablated_play(
    model: DecisionTransformer,
    rtgs: Sequence[float] = CALIBRATION_RTGS,
    episodes: Count = 100,
    max_steps: Count = 300,
    seed: Whole = 0,
    ways: Sequence[str] = ACTING,
    progress: bool = False,
    task: Task | None = None,
) -> pd.DataFrame:
    """Return calibration and causes of death, intact and with each component zero-ablated at every step.

    Columns: `ablated` ("none", "L0H0", …), `acting`, those of `rollout.summarise`, and the share of the episodes with
    each of `rollout.OUTCOMES`. All play from one seed.
    """
    each, parts = np.repeat(np.asarray(rtgs, dtype=float), episodes), []
    ways_to_play = [(name, acting) for name in ("none", *components(model)) for acting in ways]
    for name, acting in tqdm(ways_to_play, desc="play", disable=not progress):
        context: AbstractContextManager[Any] = nullcontext() if name == "none" else ablate(model, name)
        with context:
            table = episode_table(rollout(model, each, acting == "greedy", max_steps, seed, task), each)
        shares = pd.crosstab(table["rtg"], table["outcome"], normalize="index")
        shares = shares.reindex(columns=list(OUTCOMES), fill_value=0.0).rename_axis(columns=None)
        curve = summarise(table).merge(shares.reset_index(), on="rtg")
        parts.append(curve.assign(ablated=name, acting=acting))
    return pd.concat(parts, ignore_index=True)
