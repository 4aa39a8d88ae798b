"""Circuits: which units carry a behaviour, and how much of it is left when only some of them are kept.

The *units* of a one-layer model are its heads, its neurons, and "state → logits", what the state embedding writes
on the logits directly. A unit that is not kept is *resampled*: it writes what it writes on another observation, the
same one for all units, drawn as often as states show it. A kept neuron sees the present observation, and of the heads
what they write now: their own output where they are kept, the other observation's where not.

The *behaviour* is how much likelier forward is in the source run of a case (`counterfactuals`) than in the clean one:
for an obstacle in front, by how much it lowers P(forward). With nothing kept both runs are the other observation's, so
it is exactly 0; with everything kept it is the model's own, so its share is exactly 1.

Sources: https://arxiv.org/abs/2304.14997 (resampling what is outside), https://arxiv.org/abs/2211.00593 (faithfulness).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dtbook.analysis.attribution import forward_over_turns, forward_preference
from dtbook.analysis.counterfactuals import Case, pairs_of
from dtbook.analysis.folded import BATCH_SIZE, FoldedWeights
from dtbook.analysis.population import STATE, Run, run_at
from dtbook.analysis.written import Writes, Written, direct, logits_of, nothing, without_mlp
from dtbook.artifacts.parameters import Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import FORWARD
from dtbook.gridworld.situations import select, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, TIMESTEP

DIRECT = "state → logits"
METHODS = ("patching", "ablation", "attribution")
KEEP = 0.95
"""The share of a behaviour that the smallest circuit must keep."""
SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""How many units the curves keep, where the model has as many; and all of them."""
LEAST_ROWS = 16_384
"""Cases of few observations meet that many others in all."""
SEARCH_ROWS = 2048
"""Rows that the smallest circuit is looked for on, drawn by weight; it is then measured on all."""
MOST = 64
"""Neurons after which the search gives up."""

CIRCUIT_CASES = (
    Case("obstacle", HIGH, HIGH),
    Case("goal from the top", -1.0, -1.0),
    Case("wall", HIGH, HIGH),
)
"""The behaviours that circuits are looked for: what the model avoids with each of them in front."""
RANDOM_ORDERS = 3

Kept = Bool[np.ndarray, "circuit unit"]


def unit_names(model: DecisionTransformer) -> list[str]:
    """Return the units: "state → logits", the heads, the neurons "L0N0" …."""
    heads = [f"L0H{head}" for head in range(model.cfg.n_heads)]
    return [DIRECT, *heads, *(f"L0N{neuron}" for neuron in range(model.cfg.d_mlp))]


class Trio(NamedTuple):
    """A batch of observations in the clean and the source run, and the observations that others are resampled from."""

    clean: Run
    source: Run
    other: Run
    weights: Float[Tensor, " n"]


class CaseRows(NamedTuple):
    """The observations of a case, their shares, and for each the observation that it is resampled from."""

    case: Case
    timestep: int
    images: np.ndarray
    weights: np.ndarray
    others: np.ndarray

    def drawn(self, n: int, rng: np.random.Generator) -> "CaseRows":
        """Return n rows drawn by weight, each then of the same weight."""
        rows = rng.choice(len(self.weights), n, p=self.weights)
        return self._replace(images=self.images[rows], weights=np.full(n, 1 / n), others=self.others[rows])

    def trios(self, folded: FoldedWeights) -> Iterator[Trio]:
        """Yield the runs batch by batch."""
        pairs = pairs_of(folded, self.images, self.weights, self.case, self.timestep, BATCH_SIZE)
        for pair, (_, other) in zip(pairs, folded.embed(self.others).batches(BATCH_SIZE), strict=True):
            yield Trio(*pair[:2], run_at(other, self.case.rtg, self.timestep), pair.weights)


@checked
def case_rows(observations: ObservationSet, case: Case, seed: Whole, timestep: Whole = TIMESTEP) -> CaseRows:
    """Return a case's observations, each with one other observation of all there are, drawn by weight.

    A case of fewer than `LEAST_ROWS` observations has each of them several times, with as many others. Raises
    ValueError where no observation shows the situation.
    """
    seen = select(observations, case.situation)
    share = weights(seen)
    times = -(-LEAST_ROWS // len(share)) if len(share) < LEAST_ROWS else 1
    rng = np.random.default_rng(seed)
    others = rng.choice(len(observations), times * len(share), p=weights(observations))
    images = np.tile(seen.images, (times, 1, 1, 1))
    return CaseRows(case, timestep, images, np.tile(share / times, times), observations.images[others])


# How much each unit does, by three methods


@torch.inference_mode()
def importance(model: DecisionTransformer, rows: CaseRows) -> pd.DataFrame:
    """Return each unit's weighted mean effect by each method, in logits of the forward preference; one row a unit.

    Columns: `unit`; `patching`, the change when the unit's output in the clean run is the source's; `ablation`, that
    when it is zero; `attribution`, source − clean of its direct contribution to forward − mean of left and right.
    Positive is what holds forward down in the clean run. Of a head, patching and ablation include what the MLP makes of
    it.
    """
    sums = np.zeros((len(METHODS), len(unit_names(model))))
    for trio in rows.trios(FoldedWeights(model)):
        effects = torch.stack([_patching(trio), _ablation(trio), _attribution(trio)]).double()
        sums += (effects @ trio.weights).numpy()
    return pd.DataFrame({"unit": unit_names(model), **dict(zip(METHODS, sums, strict=True))})


def _preference_with_each(
    logits: Float[Tensor, "n action"],
    changes: Float[Tensor, "n neuron"],
    weight: Float[Tensor, "neuron action"],
) -> Float[Tensor, "n neuron"]:
    """Return the forward preference when one neuron's activation is changed by so much, for each neuron."""
    others = (
        torch.addcmul(
            logits[:, k, None] - logits[:, FORWARD, None], changes, weight[:, k] - weight[:, FORWARD]
        )
        for k in range(logits.shape[1])
        if k != FORWARD
    )
    return -reduce(torch.logaddexp, others)


def _one_by_one(
    run: Run, beside: Tensor, heads: Mapping[str, Written], neurons: Tensor
) -> Float[Tensor, "unit n"]:
    """Return the change of the forward preference by each unit: what it writes changed by so much, or put in place."""
    f, writes = run.embedded.folded, run.writes()
    logits, *changed = logits_of(f, [writes, *(writes | {name: written} for name, written in heads.items())])
    changed = [forward_preference(each.T) for each in (logits + beside, *changed)]
    each_neuron = _preference_with_each(logits.T, neurons, f.W_mlp).T
    return torch.cat([torch.stack(changed), each_neuron]) - forward_preference(logits.T)


def _direct(run: Run) -> Float[Tensor, "action n"]:
    return direct(run.embedded.folded, run.writes()[STATE])


def _patching(trio: Trio) -> Float[Tensor, "unit n"]:
    clean, source = trio.clean, trio.source
    return _one_by_one(clean, _direct(source) - _direct(clean), source.heads(), source.post() - clean.post())


def _ablation(trio: Trio) -> Float[Tensor, "unit n"]:
    clean, f = trio.clean, trio.clean.embedded.folded
    return _one_by_one(clean, -_direct(clean), dict.fromkeys(f.head_names, nothing(f)), -clean.post())


def _attribution(trio: Trio) -> Float[Tensor, "unit n"]:
    f, clean, source = trio.clean.embedded.folded, trio.clean, trio.source
    direction = forward_over_turns(len(f.b_U)).to(f.b_U)
    (before, *heads_before), (after, *heads_after) = (
        [_direct(run), *(direct(f, head) for head in run.heads().values())] for run in (clean, source)
    )
    units = torch.stack([after, *heads_after]) - torch.stack([before, *heads_before])
    neurons = (source.post() - clean.post()) * (f.W_mlp @ direction)
    return torch.cat([direction @ units, neurons.T])


# What is left when only some units are kept


@torch.inference_mode()
def faithfulness(model: DecisionTransformer, rows: CaseRows, kept: Kept) -> pd.DataFrame:
    """Return how much of the behaviour is left for each set of kept units; one row a set.

    Columns: `size`, units kept; `behaviour`, weighted mean of P(forward) in the source run − in the clean run, and
    `share`, that ÷ the model's own; `match`, 1 − the mean distance from the model's own behaviour, observation by
    observation, ÷ the mean of that behaviour without its sign: at most 1, and 0 when nothing is kept; `agreement`,
    weight of the observations whose likeliest action in the clean run is the model's. A share above 1 overdoes it.
    """
    sums, of_model, size = np.zeros((3, len(kept))), np.zeros(2), kept.sum(1)
    for trio in rows.trios(FoldedWeights(model)):
        full = _behaviour(trio.source.logits()[:, None], trio.clean.logits()[:, None])[:, 0]
        of_model += [float(trio.weights @ full), float(trio.weights @ full.abs())]
        after, before = (circuit_logits(run, trio.other, kept) for run in (trio.source, trio.clean))
        left = _behaviour(after, before)
        agree = before.argmax(2) == trio.clean.logits().argmax(1)[:, None]
        sums += np.stack([trio.weights @ x.double() for x in (left, (left - full[:, None]).abs(), agree)])
    table = pd.DataFrame({"size": size, "behaviour": sums[0], "share": sums[0] / of_model[0]})
    return table.assign(match=1 - sums[1] / of_model[1], agreement=sums[2])


def _behaviour(after: Tensor, before: Tensor) -> Tensor:
    return (forward_preference(after).sigmoid() - forward_preference(before).sigmoid()).double()


def circuit_logits(run: Run, other: Run, kept: Kept) -> Float[Tensor, "n circuit action"]:
    """Return the logits of a run in which only the kept units are its own, for each set of them."""
    f = run.embedded.folded
    first = 1 + len(f.head_names)
    other_post = other.post()
    other_out = other_post @ f.W_mlp + f.b_mlp
    result = other_post.new_empty(len(run.embedded), len(kept), len(f.b_U))
    parts, group = np.unique(kept[:, :first], axis=0, return_inverse=True)
    for k, part in enumerate(parts):
        members = np.flatnonzero(group.reshape(-1) == k)
        writes = _mixed(run, other, part)
        beside = without_mlp(f, writes) + (0 if part[0] else _direct(other) - _direct(run))
        change, neurons = run.post(writes) - other_post, torch.from_numpy(kept[members, first:])
        weight = (f.W_mlp[:, None] * neurons.T[:, :, None]).flatten(1)  # neuron (circuit action)
        mlp_out = (change @ weight).unflatten(1, (len(members), -1)) + other_out[:, None]
        result[:, members] = beside.T[:, None] + mlp_out
    return result


def _mixed(run: Run, other: Run, part: np.ndarray) -> Writes:
    """Return what the components of a run write, with the heads that are not kept as in the other."""
    others = other.heads().items()
    return run.writes() | {
        name: written for (name, written), own in zip(others, part[1:], strict=True) if not own
    }


def curve_masks(order: Sequence[int] | Int[np.ndarray, " unit"], sizes: Sequence[int] = SIZES) -> Kept:
    """Return, for each size up to all units, which are kept when the first so many of an order are."""
    rank = np.argsort(order)
    return np.stack([rank < size for size in [*(s for s in sizes if s < len(rank)), len(rank)]])


def subset_masks(model: DecisionTransformer) -> tuple[list[str], Kept]:
    """Return every subset of "state → logits", the heads and the whole MLP, by name and as units."""
    names = [DIRECT, *(f"L0H{head}" for head in range(model.cfg.n_heads)), "L0 MLP"]
    members = (np.arange(2 ** len(names))[:, None] >> np.arange(len(names)) & 1).astype(bool)
    labels = [" + ".join(np.array(names)[row]) or "nothing" for row in members]
    return labels, np.concatenate([members[:, :-1], np.repeat(members[:, -1:], model.cfg.d_mlp, 1)], 1)


# The smallest circuit


@torch.inference_mode()
@checked
def smallest_circuit(
    model: DecisionTransformer, rows: CaseRows, seed: Whole, keep: float = KEEP
) -> pd.DataFrame:
    """Return the smallest circuit found that keeps a share of the behaviour, growing; one row a unit.

    Columns: `unit`, the unit added, and those of `faithfulness` for all units up to it, over all rows. For every subset
    of heads and direct path, neurons are added one by one, each time the one that brings most of the behaviour, on
    `SEARCH_ROWS` rows drawn with `seed`; the smallest is then measured on all rows and cut where it first keeps enough.
    A greedy search proves that so many units are enough, not that fewer are not. Where no circuit with at most `MOST`
    neurons is enough, the best one is returned, whose last `share` is then below `keep`.
    """
    drawn = rows.drawn(SEARCH_ROWS, np.random.default_rng(seed))
    trio = next(drawn.trios(FoldedWeights(model)))
    full = float(_behaviour(trio.source.logits(), trio.clean.logits()).mean())
    n_parts = 1 + model.cfg.n_heads
    parts = (np.arange(2**n_parts)[:, None] >> np.arange(n_parts) & 1).astype(bool)
    circuits: list[tuple[int, float, np.ndarray, list[int]]] = []
    most = min(MOST, model.cfg.d_mlp)
    for part in sorted(parts, key=lambda part: int(part.sum())):
        smallest = min((size for size, share, *_ in circuits if share >= keep), default=n_parts + most)
        room = min(smallest - int(part.sum()), most)
        if room >= 0:
            neurons, share = _grow(trio, part, full, room, keep)
            circuits.append((int(part.sum()) + len(neurons), share, part, neurons))
    _, _, part, neurons = min(
        circuits, key=lambda one: (one[1] < keep, one[0] if one[1] >= keep else 0, -one[1])
    )
    neurons, _ = _grow(trio, part, full, min(len(neurons) + 8, model.cfg.d_mlp), np.inf)
    units = [int(unit) for unit in np.flatnonzero(part)] + [n_parts + neuron for neuron in neurons]
    order = units + [unit for unit in range(n_parts + model.cfg.d_mlp) if unit not in units]
    masks = curve_masks(order, range(1, len(units) + 1))[: len(units)]
    table = faithfulness(model, rows, masks)
    table.insert(0, "unit", [unit_names(model)[unit] for unit in units])
    enough = np.flatnonzero((table["share"] >= keep) & (table["size"] >= part.sum()))
    return table[: enough[0] + 1] if len(enough) else table


def _grow(trio: Trio, part: np.ndarray, full: float, room: int, keep: float) -> tuple[list[int], float]:
    """Return the neurons added to some heads and direct path until the share is kept or there is no room, and it."""
    runs, f = (trio.clean, trio.source), trio.other.embedded.folded
    kept = np.concatenate([part, np.zeros(f.d_mlp, bool)])[None]
    logits = [circuit_logits(run, trio.other, kept)[:, 0] for run in runs]
    changes = [run.post(_mixed(run, trio.other, part)) - trio.other.post() for run in runs]
    share = float(_behaviour(logits[1], logits[0]).mean()) / full
    neurons: list[int] = []
    left = torch.ones(f.d_mlp, dtype=torch.bool)
    while share < keep and len(neurons) < room:
        after, before = (_preference_with_each(logits[k], changes[k], f.W_mlp).sigmoid() for k in (1, 0))
        shares = (after - before).double().mean(0) / full
        best = int(shares.where(left, -torch.inf).argmax())
        share, left[best] = float(shares[best]), False
        logits = [logits[k] + changes[k][:, best, None] * f.W_mlp[best] for k in (0, 1)]
        neurons.append(best)
    return neurons, share


@checked
def circuit_tables(
    model: DecisionTransformer, observations: ObservationSet, case: Case, seed: Whole
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return each unit's importance for a case, and what is left when only some units are kept.

    The second table has the columns of `faithfulness`, and `order` with the units' `kept`: "patching", "ablation" and
    "attribution" keep the units with the largest effect by that method, whatever its sign; "random 0" … are the
    control; "subsets" are all subsets of "state → logits", heads and MLP; "smallest" grows the smallest circuit found,
    where `kept` is the unit added. Both tables begin with the case's `situation` and `rtg`.
    """
    rows, rng = case_rows(observations, case, seed), np.random.default_rng(seed)
    units = importance(model, rows)
    orders = {name: np.argsort(-units[name].abs(), kind="stable") for name in METHODS}
    orders |= {f"random {k}": rng.permutation(len(units)) for k in range(RANDOM_ORDERS)}
    labels, subsets = subset_masks(model)
    curves = {name: curve_masks(np.asarray(order)) for name, order in orders.items()}
    names = [(name, "") for name, masks in curves.items() for _ in masks]
    names += [("subsets", label) for label in labels]
    left = faithfulness(model, rows, np.concatenate([*curves.values(), subsets]))
    named = pd.DataFrame(names, columns=["order", "kept"])
    smallest = smallest_circuit(model, rows, seed).rename(columns={"unit": "kept"}).assign(order="smallest")
    table = pd.concat([pd.concat([named, left], axis=1), smallest], ignore_index=True)
    for frame in (units, table):
        frame.insert(0, "situation", case.situation)
        frame.insert(1, "rtg", case.rtg)
    return units, table
