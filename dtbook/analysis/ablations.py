"""Ablations over every observation: each situation with each component ablated, each neuron ablated, and such play.

Weights are the shares of states that show an observation; all means and quantiles are taken with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.attribution import check_has_action, contrast
from dtbook.analysis.folded import Embedded, FoldedWeights
from dtbook.analysis.interventions import ablate
from dtbook.analysis.population import MLP_OUT, Condition, Run, run_at
from dtbook.analysis.stats import weighted_quantile
from dtbook.analysis.written import Writes, Written, nothing, run_all, to_feature_mean, to_mlp_feature_mean
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

AT_ONCE = 2
"""Conditions that are evaluated together; P(forward) of every observation and ablation is kept for each."""
BATCH = 8192
"""Observations that are evaluated together."""

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
    for every ablation at `AT_ONCE` conditions. Raises ValueError as `population.FoldedWeights`, `variants` and
    `contrast`.
    """
    direction, ablations = contrast(preference, model.cfg.n_actions).to(model.W_U), variants(model, how)
    check_has_action(model.cfg.n_actions)
    donors = np.random.default_rng(seed).choice(len(observations), len(observations), p=weights(observations))
    population = _Population(FoldedWeights(model), observations, donors, ablations, direction)
    conditions = [Condition(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    parts: list[dict[str, list[dict[str, object]]]] = []
    with tqdm(total=len(conditions), desc="situations", disable=not progress) as bar:
        for some in row_batches(len(conditions), AT_ONCE):
            parts += population.at(conditions[some])
            bar.update(len(parts) - bar.n)
    return pd.DataFrame([row for name in population.situations for part in parts for row in part[name]])


class _Population:
    """All observations, those of a situation side by side, and what of them is the same at all conditions."""

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
        self.situations = {name: slice(int(first), int(last) + 1) for name, (first, last) in ends.items()}
        bounds = {0, len(order)}.union(*((rows.start, rows.stop) for rows in self.situations.values()))
        self.groups = [slice(start, stop) for start, stop in pairwise(sorted(bounds))]
        self.weights, self.embedded = weights(observations)[order], folded.embed(observations)[order]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.donors = place[donors[order]]

    def of_donors(self, rows: slice) -> Embedded:
        """Return the donors of some rows. Their patterns are known, so q · k is left out."""
        parts = self.embedded.parts[self.donors[rows]]
        return replace(self.embedded, parts=parts, products=np.empty((0, len(parts))))

    def share(self, rows: slice) -> Tensor:
        """Return the weights of some rows."""
        return self.folded.cast(torch.from_numpy(self.weights[rows]))

    def at(self, conditions: Sequence[Condition]) -> list[dict[str, list[dict[str, object]]]]:
        """Return the rows of each situation, one for each ablation, at each of a few conditions.

        These are evaluated together, as the sums over an observation's parts and its donor's are the same at all.
        """
        each = [_AtCondition(self, condition) for condition in conditions]
        for group, whole in enumerate(self.groups):
            for rows in _batches(whole):
                embedded, donors = self.embedded[rows], self.of_donors(rows)
                runs = [run for one in each for run in one.runs(rows, embedded, donors)]
                intact = range(0, len(runs), len(runs) // len(each))
                out = run_all(self.folded, runs, with_mlp=intact)
                for one, logits, *mlp in zip(
                    each, out.logits.chunk(len(each)), out.mlp_out, out.mlp_mean, strict=True
                ):
                    one.add(group, rows, logits, *mlp)
        return [each.pop(0).tables() for _ in conditions]  # and is forgotten


class _AtCondition:
    """Sums over each group of observations at one condition, and P(forward) of each observation for every ablation."""

    def __init__(self, population: _Population, condition: Condition) -> None:
        self.population, self.run = population, run_at(population.embedded, *condition)
        f, self.variants, n = population.folded, population.variants, len(population.weights)
        first = next((k for k, (name, _) in enumerate(self.variants) if name == MLP_OUT), len(self.variants))
        self.others, self.of_mlp = slice(first), slice(first, None)
        self.forward: dict[Variant, np.ndarray] = {}
        self.direct, self.mlp_out = torch.empty(2, len(f.b_U), n, dtype=f.dtype)
        self.mlp_mean, self.mean_mlp_out = torch.empty(n, dtype=f.dtype), torch.zeros(len(f.b_U)).double()
        self.acting = np.zeros((len(population.groups), len(self.variants), len(ACTIONS)))
        self.logits = np.zeros((len(population.groups), len(self.variants), len(f.b_U)))
        self.written = [self._written(group) for group in population.groups]
        self.means = {
            name: Written(sum((own[name] for own, _ in self.written), f.nothing)) for name in f.head_names
        }

    def _runs(self, rows: slice, embedded: Embedded, donors: Embedded) -> tuple[Run, Run]:
        """Return the run of some observations, and that of their donors."""
        pattern = self.run.pattern
        of_donors = torch.from_numpy(pattern.numpy().take(self.population.donors[rows], 1))
        return (
            self.run._replace(embedded=embedded, pattern=pattern[:, rows].contiguous()),
            self.run._replace(embedded=donors, pattern=of_donors),
        )

    def _written(self, group: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weighted sum over a group of what each component writes, and of what heads write on the donors."""
        share = self.population.weights[group]
        run, donor = self._runs(group, self.population.embedded[group], self.population.of_donors(group))
        own, given = (
            {name: one.mean(share) for name, one in part.items()} for part in (run.writes(), donor.heads())
        )
        return own, given

    def runs(self, rows: slice, embedded: Embedded, donors: Embedded) -> list[Writes]:
        """Return the runs of all ablations but the MLP's, on some rows; the first is intact."""
        run, donor = self._runs(rows, embedded, donors)
        writes, given = run.writes(), donor.heads()
        return [
            writes | _instead(run, variant, writes, given, self.means)
            for variant in self.variants[self.others]
        ]

    def add(self, group: int, rows: slice, logits: Tensor, mlp_out: Tensor, mlp_mean: Tensor) -> None:
        """Add what the runs on some rows of a group give to its sums."""
        self.mlp_out[:, rows], self.mlp_mean[rows] = mlp_out, mlp_mean
        self.direct[:, rows] = logits[0] - mlp_out
        self.mean_mlp_out += mlp_out @ self.population.share(rows)
        self._add(self.others, group, rows, logits)

    def _add(self, which: slice, group: int, rows: slice, logits: Tensor) -> None:
        share, probabilities = self.population.share(rows), logits.softmax(1)
        for variant, values in zip(self.variants[which], probabilities[:, FORWARD].numpy(), strict=True):
            if variant not in self.forward:
                self.forward[variant] = np.empty(len(self.population.weights), np.float32)
            self.forward[variant][rows] = values
        self.acting[group, which] += (probabilities[:, : len(ACTIONS)] @ share).numpy()
        self.logits[group, which] += (logits @ share).numpy()

    def _ablate_mlp(self) -> None:
        """Add what the MLP's ablations give, now that its output on all observations is known."""
        f, population = self.population.folded, self.population
        mean = f.cast(self.mean_mlp_out)
        for group, whole in enumerate(population.groups):
            for rows in _batches(whole):
                instead = {
                    "zero": torch.zeros_like(self.mlp_out[:, rows]),
                    "mean": mean[:, None].expand_as(self.mlp_out[:, rows]),
                    "resample": torch.from_numpy(self.mlp_out.numpy().take(population.donors[rows], 1)),
                    "feature mean": to_mlp_feature_mean(f, self.mlp_mean[rows]),
                }
                mlp_out = torch.stack([instead[how] for _, how in self.variants[self.of_mlp]])
                self._add(self.of_mlp, group, rows, self.direct[:, rows] + mlp_out)

    def _on_preference(self, group: int) -> np.ndarray:
        """Return the weighted sum over a group of what each part writes on the preference, for each ablation.

        What the MLP writes is what the others leave of the logits.
        """
        f, direction = self.population.folded, self.population.direction
        own, given = self.written[group]
        share = float(self.population.weights[self.population.groups[group]].sum())
        b_U, on_preference = float(direction @ f.b_U) * share, []
        for (name, how), logits in zip(self.variants, self.logits[group], strict=True):
            parts = dict(own)
            if name in f.head_names:
                parts[name] = {
                    "zero": f.nothing,
                    "mean": self.means[name].constant * share,
                    "resample": given[name],
                    "feature mean": f.feature_mean[f.head_names.index(name)] * own[name][-1],
                }[how]
            heads = [float(direction @ f.direct_logits(part)) for part in parts.values()]
            ablated = (name, how) == (MLP_OUT, "zero")
            mlp_out = 0.0 if ablated else float(direction.numpy() @ logits) - sum(heads) - b_U
            on_preference.append([*heads, mlp_out, b_U])
        return np.array(on_preference)

    def tables(self) -> dict[str, list[dict[str, object]]]:
        """Return the rows of each situation, once all rows were added."""
        quantiles = self._quantiles()
        if self.variants[self.of_mlp]:
            self._ablate_mlp()
            quantiles |= self._quantiles()
        on_preference = np.array([self._on_preference(group) for group in range(len(self.population.groups))])
        return {name: self._table(name, on_preference, quantiles) for name in self.population.situations}

    def _quantiles(self) -> dict[tuple[str, Variant], np.ndarray]:
        """Return the quantiles of P(forward) over each situation for the ablations added so far, and let go of it."""
        at, found = np.array(list(QUANTILES.values())), {}
        while self.forward:
            variant, forward = self.forward.popitem()
            for name, rows in self.population.situations.items():
                share = self.population.weights[rows]
                found[name, variant] = weighted_quantile(forward[rows], share, at)
        return found

    def _table(
        self, situation: str, on_preference: np.ndarray, quantiles: dict[tuple[str, Variant], np.ndarray]
    ) -> list[dict[str, object]]:
        rows, table = self.population.situations[situation], []
        share = self.population.weights[rows]
        whole = float(share.sum())
        groups = [k for k, group in enumerate(self.population.groups) if _holds(rows, group)]
        acting, parts = (sums[groups].sum(0) / whole for sums in (self.acting, on_preference))
        attention = self.run.pattern[:, rows].numpy() @ share / whole
        names = [*self.run.writes(), MLP_OUT, "b_U", *(f"attention {head}" for head in self.run.heads())]
        for k, variant in enumerate(self.variants):
            values = [*acting[k], parts[k].sum(), *parts[k], *attention, *quantiles[situation, variant]]
            columns = [*ACTIONS, "logit_diff", *names, *QUANTILES]
            what = {"situation": situation, **self.run.condition._asdict()}
            what |= dict(zip(("ablated", "how"), variant, strict=True))
            numbers = dict(zip(columns, map(float, values), strict=True))
            table.append(what | numbers | {"share": whole, "observations": len(share)})
        return table


def _batches(rows: slice) -> Iterator[slice]:
    for batch in row_batches(rows.stop - rows.start, BATCH):
        yield slice(rows.start + batch.start, rows.start + batch.stop)


def _holds(rows: slice, group: slice) -> bool:
    return rows.start <= group.start < group.stop <= rows.stop


def _instead(run: Run, variant: Variant, writes: Writes, given: Writes, means: Writes) -> dict[str, Written]:
    """Return what an ablated head writes instead, by its name; nothing where no head is ablated."""
    name, how = variant
    f = run.embedded.folded
    if name not in f.head_names:
        return {}
    if how == "feature mean":
        return {name: to_feature_mean(f, f.head_names.index(name), writes[name])}
    return {name: {"zero": nothing(f), "mean": means[name], "resample": given[name]}[how]}


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
