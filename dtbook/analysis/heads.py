"""The obstacle head: each head's score by the scorecard's rule, and a model whose heads are numbered by it.

The rule: an observation with an obstacle in front is run beside its counterfactual, the same with that one cell
empty. One head's output at the state token (`hook_z`) is patched from the counterfactual run into the clean one.
With the *forward preference* = logit F − logsumexp(logit L, logit R), the log odds of forward, a head's score is
the change it makes to the forward preference ÷ the change that the whole counterfactual makes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.attribution import forward_preference
from dtbook.analysis.counterfactuals import Case, HeadPatching, Pair, pairs
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.interventions import STATE_TOKENS, Site, patch
from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.situations import MODEL_BATCH, ObservationBatch, counterfactual_pairs, select
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, TIMESTEP

THRESHOLD = 0.25
"""The score a head needs to be the obstacle head (the scorecard's rule)."""

RULE = (
    "Head 1 is the head with the larger score: the change of logit F − logsumexp(logit L, logit R) when its hook_z at "
    "the state token is patched from the counterfactual run (front cell empty) ÷ the whole change, each a weighted "
    f"mean over all observations with an obstacle in front; below {THRESHOLD} there is no obstacle head."
)


class Changes(NamedTuple):
    """The changes that the counterfactual makes to the forward preference of each observation of a batch (logits)."""

    whole: Float[Tensor, " batch"]
    """Counterfactual run − clean run."""
    by_head: Float[Tensor, "layer head batch"]
    """Run with one head patched − clean run."""


@torch.inference_mode()
@checked
def obstacle_head_scores(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtg: float = HIGH,
    timestep: Whole = TIMESTEP,
    batch_size: Count = MODEL_BATCH,
    progress: bool = False,
) -> pd.DataFrame:
    """Return each head's obstacle score over the observations with an obstacle in front; one row a head.

    Columns: `layer`, `head`; `score`, weighted mean change by the head ÷ weighted mean whole change;
    `mean_ratio`, the weighted mean of the ratios of single observations; `change` and `whole_change`, the two means
    (logits).

    `score` decides, not `mean_ratio`: where the counterfactual hardly changes an observation's preference, the
    ratio divides two small numbers, and a handful of such observations, about which there is least to explain, can
    outweigh all others. The ratio of the means weights each observation's ratio by its whole change. Where all
    ratios agree, the two are equal. A score is a share and says nothing about the size of the effect: read
    `whole_change` beside it. Shares of several heads need not sum to 1: the state token itself and the MLP, which is
    not linear, have theirs. It is NaN where the whole change is exactly 0.

    Only what `observations` shows with an obstacle in front is used. A model with a longer context is shown a
    single timestep. Raises ValueError where no observation has an obstacle in front.
    """
    shape, weight = (model.cfg.n_layers, model.cfg.n_heads), 0.0
    whole, by_head, ratios = 0.0, torch.zeros(shape).double(), torch.zeros(shape).double()
    for share, changes in _changes(model, observations, rtg, timestep, batch_size, progress):
        whole_change, head_change = changes.whole.double(), changes.by_head.double()
        weight += float(share.sum())
        whole += float(share @ whole_change)
        by_head += head_change @ share
        ratios += (head_change / whole_change) @ share
    layer, head = np.indices(shape).reshape(2, -1)
    change, mean_ratio = (sums.flatten().numpy() / weight for sums in (by_head, ratios))
    with np.errstate(invalid="ignore", divide="ignore"):
        score = change / (whole / weight)
    columns = {"layer": layer, "head": head, "score": score, "mean_ratio": mean_ratio, "change": change}
    return pd.DataFrame(columns | {"whole_change": whole / weight})


def _changes(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtg: float,
    timestep: int,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Changes]]:
    obstacles = select(observations, "obstacle")
    if model.cfg.n_layers == 1:
        runs = pairs(FoldedWeights(model), obstacles, Case("obstacle", rtg, rtg), timestep, batch_size)
        changes = ((pair.weights, changes_fused(pair)) for pair in runs)
    else:
        inputs = counterfactual_pairs(obstacles, rtg, timestep, "obstacle", batch_size)
        changes = ((clean.weights, changes_by_patching(model, clean, other)) for clean, other in inputs)
    with tqdm(total=len(obstacles), desc="obstacle heads", disable=not progress) as bar:
        for share, batch in changes:
            yield share, batch
            bar.update(len(share))


@torch.no_grad()
def changes_by_patching(
    model: DecisionTransformer, clean: ObservationBatch, counterfactual: ObservationBatch
) -> Changes:
    """Return the changes by running the model with each head patched: for any model, and to check the fast way."""
    before = forward_preference(model(*clean.inputs)[:, 0])
    logits, source = model.run_with_cache(
        *counterfactual.inputs, names_filter=lambda name: name.endswith("hook_z")
    )
    by_head = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, len(before), dtype=before.dtype)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            with patch(model, source, Site(f"blocks.{layer}.attn.hook_z", head, STATE_TOKENS)):
                by_head[layer, head] = forward_preference(model(*clean.inputs)[:, 0]) - before
    return Changes(forward_preference(logits[:, 0]) - before, by_head)


@torch.no_grad()
def changes_fused(pair: Pair) -> Changes:
    """Return the changes for one layer, sharing all that is linear; up to rounding those of `changes_by_patching`."""
    patching, n_heads = HeadPatching(pair), len(pair.base.pattern)
    by_head = torch.stack([patching.by_head(head) for head in range(n_heads)])
    return Changes(patching.total(), by_head[None])


def order_heads(model: DecisionTransformer, scores: pd.DataFrame) -> DecisionTransformer:
    """Return a copy of the model, the same function, in which head 1 has the largest score of its layer.

    Of two heads the other is head 0; of more, the best changes places with head 1 and the others stay. A layer
    of one head, and one whose scores are NaN, stays as it is. `scores` are `obstacle_head_scores(model, ...)`.

    `metadata["obstacle_head"]` of the copy says: `head`, the name of the head with the largest score of all, as
    "L0H1", or "no obstacle head" where it does not reach 0.25; `score` and `mean_ratio` by the heads' new names (None
    for NaN); `whole_change` in logits; and the `rule`. `metadata["head_order"]` says which head each was.
    Raises ValueError where `scores` are not one row for each of this model's heads.
    """
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    table = scores.set_index(["layer", "head"]).sort_index()
    if list(table.index) != list(np.ndindex(shape)):
        raise ValueError(
            f"scores has {len(table)} rows; this model needs one for each of {shape[0]} layers × {shape[1]} heads."
        )
    named: dict[str, dict[str, float | None]] = {"score": {}, "mean_ratio": {}}
    columns = {name: table[name].to_numpy(dtype=float).reshape(shape) for name in named}
    for layer in range(shape[0]):
        order = _order(columns["score"][layer])
        model = model.permute_heads(layer, order)
        for name, values in columns.items():
            named[name] |= {
                f"L{layer}H{head}": _or_none(values[layer, was]) for head, was in enumerate(order)
            }
    whole = _or_none(float(table["whole_change"].mean()))
    head = _obstacle_head(named["score"])
    model.metadata["obstacle_head"] = {"head": head, **named, "whole_change": whole, "rule": RULE}
    return model


def _order(scores: np.ndarray) -> list[int]:
    """Return the heads in their new order: the best exchanged with head 1."""
    order = list(range(len(scores)))
    if len(order) > 1 and not np.isnan(scores).any():
        best = int(scores.argmax())
        order[1], order[best] = best, 1
    return order


def _or_none(number: float) -> float | None:
    """Return the number, or None for one that JSON cannot hold."""
    return float(number) if np.isfinite(number) else None


def _obstacle_head(scores: dict[str, float | None]) -> str:
    reached = {name: score for name, score in scores.items() if score is not None and score >= THRESHOLD}
    return max(reached, key=lambda name: reached[name]) if reached else "no obstacle head"
