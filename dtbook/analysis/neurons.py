"""Neuron by neuron over every observation: what each does in a situation, and what its ablation changes."""

from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import numpy as np
import pandas as pd
import torch

from dtbook.analysis.attribution import check_has_action, contrast
from dtbook.analysis.folded import BATCH_SIZE, Embedded, FoldedWeights
from dtbook.analysis.population import run_at
from dtbook.artifacts.parameters import Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import FORWARD, compiled
from dtbook.gridworld.rules import ACTIONS
from dtbook.gridworld.situations import FACING, select, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import RTGS, TIMESTEPS

NEURON_WAYS = ("zero", "mean", "resample")
"""What an ablated neuron has in place of its activation: nothing; its mean over all observations, at that RTG and
timestep; that on another observation, drawn as often as states show it. The post's feature mean is none of a single
neuron: it averages the entries of a vector, and a neuron has one."""


@checked
def neuron_table(
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
    check_has_action(model.cfg.n_actions)
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
    for rows, embedded in folded.embed(observations).batches(BATCH_SIZE, name):
        for condition in conditions:
            sums[condition] += (
                share[None, rows].astype(np.float32) @ run_at(embedded, *condition).post().numpy()
            )
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
        self.embedded, self.share = folded.embed(seen), weights(seen)
        drawn = rng.choice(len(observations), len(seen), p=weights(observations))
        self.others = folded.embed(observations)[drawn] if "resample" in how else self.embedded

    def table(self, conditions: Sequence[tuple[float, int]], preference: str, progress: bool) -> pd.DataFrame:
        """Return a row for each neuron and way, averaged over the conditions."""
        sums = np.zeros((len(self.how) + 1, 2, self.folded.d_mlp))
        name = f"neurons, {self.situation}" if progress else None
        for rows, embedded in self.embedded.batches(BATCH_SIZE, name):
            self._add(rows, embedded, conditions, sums)
        weights_of = contrast(preference, len(self.folded.b_U)).to(self.folded.W_mlp)
        on_preference = (self.folded.W_mlp @ weights_of).double().numpy()
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
        donor = self.others[rows]
        share, weight = self.share[rows], self.folded.W_mlp.numpy()
        for condition in conditions:
            run = run_at(embedded, *condition)
            writes = run.writes()
            logits, post = np.ascontiguousarray(run.logits(writes).numpy()), run.post(writes).numpy()
            sums[0] += share @ (post > 0), share @ post
            for k, way in enumerate(self.how, start=1):
                if way == "resample":
                    instead = run_at(donor, *condition).post().numpy()
                elif way == "mean":
                    instead = self.means[condition].astype(post.dtype)
                else:
                    instead = np.zeros_like(post[:1])
                replace = _replace_each if weight.shape[1] == len(ACTIONS) else _replace_each_of_many
                replace(logits, post, np.broadcast_to(instead, post.shape), weight, share, sums[k])


@partial(compiled, fastmath=True)
@no_type_check
def _replace_each(logits, post, instead, weight, share, sums) -> None:
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


@no_type_check
def _replace_each_of_many(logits, post, instead, weight, share, sums) -> None:
    """Do what `_replace_each` does where there are more actions than left, right and forward."""
    others = np.delete(np.arange(weight.shape[1]), FORWARD)
    odds, gain = (x[:, others] - x[:, [FORWARD]] for x in (logits, weight))
    change, odds = instead - post, np.exp(odds)
    turned = sum(odds[:, [k]] * np.exp(change * gain[:, k]) for k in range(len(others)))
    sums[0] += share @ change
    sums[1] += share @ (1 / (1 + turned) - 1 / (1 + odds.sum(1, keepdims=True)))
