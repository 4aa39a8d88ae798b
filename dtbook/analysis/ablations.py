"""Ablations over every observation: each situation with each component ablated, each neuron ablated, and such play.

Weights are the shares of states that show an observation; all means and quantiles are taken with them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, no_type_check

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.attribution import contrast
from dtbook.analysis.interventions import ablate
from dtbook.analysis.population import Condition, Embedded, FoldedWeights, Run, embedded_batches
from dtbook.analysis.stats import weighted_quantile
from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import compiled
from dtbook.gridworld.rules import Task
from dtbook.gridworld.situations import FACING, SITUATIONS, select, showing, weights
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
Means = tuple[Tensor, Tensor]
"""The mean result of each head (as it is read) and output of the MLP (on the logits)."""


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
    `left`, `right` and `forward` of the three probabilities; quantiles of P(forward) over the situation (`QUANTILES`);
    `logit_diff`, the mean of the preference, and the mean contributions to it that sum to it: "state", "time and
    position", each head, "L0 b_O", "L0 MLP", "b_U"; `attention L0H0` …, the mean attention to RTG of the intact run;
    `share` of all states, and the number of `observations`.

    Situations that no observation shows are left out. Peak memory: the observations, and P(forward) of each of them for
    every condition and ablation. Raises ValueError as `population.FoldedWeights`, `variants` and `contrast`.
    """
    direction = contrast(preference).to(model.W_U)
    donors = np.random.default_rng(seed).choice(len(observations), len(observations), p=weights(observations))
    conditions = [Condition(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    sums = _Sums(FoldedWeights(model), observations, donors, conditions, variants(model, how), direction)
    return sums.table(progress)


class _Sums:
    """Sums over all observations at all conditions: twice through, as mean ablation needs the means first."""

    def __init__(
        self,
        folded: FoldedWeights,
        observations: ObservationSet,
        donors: np.ndarray,
        conditions: list[Condition],
        ablations: list[Variant],
        direction: Tensor,
    ) -> None:
        self.folded, self.conditions, self.variants = folded, conditions, ablations
        self.images, self.donors, self.direction = observations.images, donors, direction
        self.weights = weights(observations)
        rows = {name: showing(self.images, name) for name in SITUATIONS}
        self.rows = {name: mask for name, mask in rows.items() if mask.any()}
        masks = torch.from_numpy(np.stack(list(self.rows.values()))).double()
        self.share = masks * torch.from_numpy(self.weights)
        self.forward = np.empty((len(conditions), len(ablations), len(self.weights)), np.float32)
        self.sums: dict[tuple[Condition, Variant], Any] = {}
        self.components: list[str] = []

    def table(self, progress: bool) -> pd.DataFrame:
        ways = {way for _, way in self.variants}
        means = self._means(progress) if "mean" in ways else {}
        for batch, embedded in embedded_batches(
            self.folded, self.images, progress="situations" if progress else None
        ):
            others = self.donors[batch] if "resample" in ways else self.donors[:0]
            donor = self.folded.embed(torch.from_numpy(self.images[others]))
            for k, condition in enumerate(self.conditions):
                pair = embedded.at(*condition), donor.at(*condition)
                self._measure(k, batch, *pair, means.get(condition))
        return pd.DataFrame([self._row(*key) for key in self._keys()])

    def _means(self, progress: bool) -> dict[Condition, Means]:
        """Return the mean outputs at each condition."""
        sums: dict[Condition, Means] = {}
        for batch, embedded in embedded_batches(
            self.folded, self.images, progress="mean outputs" if progress else None
        ):
            share = torch.from_numpy(self.weights[batch]).to(embedded.state)
            for condition in self.conditions:
                run = embedded.at(*condition)
                results = run.head_results()
                new = share @ results, share @ run.mlp_out(run.resid_mid(results))
                old = sums.get(condition)
                sums[condition] = new if old is None else (old[0] + new[0], old[1] + new[1])
        return sums

    def _measure(self, k: int, batch: slice, run: Run, donor: Run, means: Means | None) -> None:
        """Run a batch at one condition, intact and with each ablation."""
        f, results, donor_results = self.folded, run.head_results(), donor.head_results()
        resid_mid = run.resid_mid(results)
        intact = dict(zip(f.head_names, f.direct_logits(results), strict=True))
        intact["L0 MLP"] = run.mlp_out(resid_mid)
        donor_mlp_out = donor.mlp_out(donor.resid_mid(donor_results))
        for v, (component, how) in enumerate(self.variants):
            written, total = dict(intact), resid_mid
            if component == "L0 MLP":
                written[component] = _instead_mlp(how, run, resid_mid, donor_mlp_out, means)
            elif component != "none":
                head = f.head_names.index(component)
                instead = _instead_head(how, head, run, results, donor_results, means)
                total = resid_mid - results[head, :, :-1] + instead
                written |= {component: f.direct_logits(instead), "L0 MLP": run.mlp_out(total)}
            self._add(k, v, batch, run, run.unembed(total, written["L0 MLP"]), written)

    def _add(
        self, k: int, v: int, batch: slice, run: Run, logits: Tensor, written: dict[str, Tensor]
    ) -> None:
        """Add this batch to the weighted sums of one condition and ablation, and keep its P(forward)."""
        f, probabilities = self.folded, logits.softmax(-1)
        b_O = f.direct_logits(f.b_O)
        self.forward[k, v, batch] = probabilities[:, 2].numpy()
        mlp_out = written.pop("L0 MLP")
        parts = {"state": f.direct_logits(run.embedded.state)}
        parts |= {"time and position": f.direct_logits(run.fixed) - b_O}
        parts |= written | {"L0 b_O": b_O, "L0 MLP": mlp_out, "b_U": f.b_U}
        on_preference = [part @ self.direction for part in (logits, *parts.values())]
        columns = [
            probabilities,
            *(value.expand(len(logits))[:, None] for value in on_preference),
            run.pattern.T,
        ]
        total = self.share[:, batch] @ torch.cat(columns, 1).double()
        key = self.conditions[k], self.variants[v]
        self.sums[key] = self.sums.get(key, 0) + total
        self.components = list(parts)

    def _keys(self) -> list[tuple[str, Condition, Variant]]:
        return [(s, c, v) for s in self.rows for c in self.conditions for v in self.variants]

    def _row(self, situation: str, condition: Condition, variant: Variant) -> dict[str, object]:
        row, mask = list(self.rows).index(situation), self.rows[situation]
        share = float(self.weights[mask].sum())
        means = (self.sums[condition, variant][row] / share).tolist()
        names = ["left", "right", "forward", "logit_diff", *self.components]
        names += [f"attention {head}" for head in self.folded.head_names]
        forward = self.forward[self.conditions.index(condition), self.variants.index(variant)][mask]
        quantiles = weighted_quantile(forward, self.weights[mask], np.array(list(QUANTILES.values())))
        where = {"situation": situation, **condition._asdict()}
        named = dict(zip(QUANTILES, map(float, quantiles), strict=True))
        counts = {"share": share, "observations": int(mask.sum())}
        what = dict(zip(("ablated", "how"), variant, strict=True))
        return where | what | dict(zip(names, means, strict=True)) | named | counts


def _instead_head(
    how: str, head: int, run: Run, results: Tensor, of_donor: Tensor, means: Means | None
) -> Float[Tensor, "#n read"]:
    """Return what is read of an ablated head instead, one row or a row an observation."""
    if how == "mean" and means:
        return means[0][head, None, :-1]
    if how == "resample":
        return of_donor[head, :, :-1]
    if how == "feature mean":
        return results[head, :, -1:] * run.embedded.folded.feature_mean[head]
    return torch.zeros_like(results[head, :1, :-1])


def _instead_mlp(
    how: str, run: Run, resid_mid: Tensor, of_donor: Tensor, means: Means | None
) -> Float[Tensor, "#n action"]:
    """Return what an ablated MLP writes on the logits instead, one row or a row an observation."""
    if how == "mean" and means:
        return means[1][None]
    if how == "resample":
        return of_donor
    if how == "feature mean":
        return run.mlp_feature_mean(resid_mid)
    return torch.zeros_like(resid_mid[:1, : run.embedded.folded.b_U.numel()])


# Neuron by neuron

NEURON_WAYS = ("zero", "mean", "resample")
"""What an ablated neuron has in place of its activation: nothing; its mean over all observations, at that RTG and
timestep; that on another observation, drawn as often as states show it. The post's feature mean is none of a single
neuron: it averages the entries of a vector, and a neuron has one."""


@checked
def neurons(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float] = RTGS,
    timesteps: Sequence[int] = TIMESTEPS,
    situations: Sequence[str] = FACING,
    how: Sequence[str] = NEURON_WAYS,
    preference: str = "F-R",
    seed: Whole = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return what each neuron does in each situation: a row for each situation, RTG, neuron and way to ablate it.

    Columns: `situation`, `rtg`, `neuron`, `how` (`NEURON_WAYS`); weighted means over observations and timesteps of
    `active` (1 where it fires), of its `contribution` to the preference, and of what ablating it changes: of the
    preference (`change`) and of P(forward) (`rise`). All is exact: a neuron writes its activation times its row of
    W_out W_U on the logits, so that other activation gives other logits without another run. Raises ValueError for an
    unknown way.
    """
    if unknown := [name for name in how if name not in NEURON_WAYS]:
        raise ValueError(f"how is {unknown[0]!r}; it must be one of {', '.join(map(repr, NEURON_WAYS))}.")
    folded = FoldedWeights(model)
    conditions = [(float(rtg), timestep) for rtg in rtgs for timestep in timesteps]
    means = _neuron_means(folded, observations, conditions, progress) if "mean" in how else {}
    parts = []
    for situation in situations:
        ablate_each = _NeuronByNeuron(folded, observations, situation, how, means, seed)
        for k, rtg in enumerate(rtgs):
            of_rtg = conditions[k * len(timesteps) : (k + 1) * len(timesteps)]
            parts.append(ablate_each.table(of_rtg, preference, progress).assign(situation=situation, rtg=rtg))
    table = pd.concat(parts, ignore_index=True)
    return table[["situation", "rtg", *table.columns.drop(["situation", "rtg"])]]


@torch.inference_mode()
def _neuron_means(
    folded: FoldedWeights,
    observations: ObservationSet,
    conditions: Sequence[tuple[float, int]],
    progress: bool,
) -> dict[tuple[float, int], np.ndarray]:
    """Return the mean activation of each neuron over all observations, at each condition."""
    share = weights(observations)
    sums = {condition: np.zeros((1, folded.d_mlp)) for condition in conditions}
    name = "means of the neurons" if progress else None
    for rows, embedded in embedded_batches(folded, observations.images, progress=name):
        for condition in conditions:
            sums[condition] += share[None, rows].astype(np.float32) @ embedded.at(*condition).post().numpy()
    return sums


class _NeuronByNeuron:
    """The observations of a situation, and the others whose activations resampling takes."""

    def __init__(
        self,
        folded: FoldedWeights,
        observations: ObservationSet,
        situation: str,
        how: Sequence[str],
        means: dict[tuple[float, int], np.ndarray],
        seed: int,
    ) -> None:
        seen, rng = select(observations, situation), np.random.default_rng(seed)
        self.folded, self.how, self.means, self.situation = folded, how, means, situation
        self.images, self.share = seen.images, weights(seen)
        drawn = rng.choice(len(observations), len(seen), p=weights(observations))
        self.others = observations.images[drawn] if "resample" in how else None

    def table(self, conditions: Sequence[tuple[float, int]], preference: str, progress: bool) -> pd.DataFrame:
        """Return a row for each neuron and way, averaged over the conditions."""
        sums = np.zeros((len(self.how) + 1, 2, self.folded.d_mlp))
        name = f"neurons, {self.situation}" if progress else None
        for rows, embedded in embedded_batches(self.folded, self.images, progress=name):
            self._add(rows, embedded, conditions, sums)
        on_preference = (self.folded.W_mlp @ contrast(preference).to(self.folded.W_mlp)).double().numpy()
        (active, fired), *ablated = sums / len(conditions)
        intact = {
            "neuron": np.arange(self.folded.d_mlp),
            "active": active,
            "contribution": fired * on_preference,
        }
        return pd.concat(
            [
                pd.DataFrame(intact | {"change": moved * on_preference, "rise": rise}).assign(how=way)
                for way, (moved, rise) in zip(self.how, ablated, strict=True)
            ],
            ignore_index=True,
        )

    @torch.inference_mode()
    def _add(
        self, rows: slice, embedded: Embedded, conditions: Sequence[tuple[float, int]], sums: np.ndarray
    ) -> None:
        others = None if self.others is None else torch.from_numpy(self.others[rows])
        donor = embedded if others is None else self.folded.embed(others)
        share, weight = self.share[rows], self.folded.W_mlp.numpy()
        for condition in conditions:
            run = embedded.at(*condition)
            resid_mid = run.resid_mid()
            logits, post = run.unembed(resid_mid).numpy(), run.post(resid_mid).numpy()
            sums[0] += share @ (post > 0), share @ post
            for k, way in enumerate(self.how, start=1):
                if way == "resample":
                    instead = donor.at(*condition).post().numpy()
                elif way == "mean":
                    instead = self.means[condition].astype(post.dtype)
                else:
                    instead = np.zeros_like(post[:1])
                _replace_each(logits, post, np.broadcast_to(instead, post.shape), weight, share, sums[k])


@partial(compiled, fastmath=True)
@no_type_check
def _replace_each(
    logits: np.ndarray,
    post: np.ndarray,
    instead: np.ndarray,
    weight: np.ndarray,
    share: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Add a batch to the sums (change of the activation, rise of P(forward)) of each neuron, in place."""
    for i in range(len(logits)):
        left, right = np.exp(logits[i, 0] - logits[i, 2]), np.exp(logits[i, 1] - logits[i, 2])
        intact = 1 / (1 + left + right)
        for n in range(post.shape[1]):
            change = instead[i, n] - post[i, n]
            if change != 0:
                turned = left * np.exp(change * (weight[n, 0] - weight[n, 2]))
                turned += right * np.exp(change * (weight[n, 1] - weight[n, 2]))
                sums[0, n] += share[i] * change
                sums[1, n] += share[i] * (1 / (1 + turned) - intact)


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
