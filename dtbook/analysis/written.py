"""What the components of a run write, and what follows from it: all ablations and patches are other things written.

A run is the sum of what its components write before the MLP. Put something else in the place of one, and `run_all`
evaluates the MLP anew: exactly what hooks on the model would give.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dtbook.analysis import sums
from dtbook.analysis.folded import Embedded, FoldedWeights


class Written(NamedTuple):
    """What one component writes, as W_in and W_U read it: weight · a part of the state + scale · vector + constant.

    What is not there is None. An ablated component writes a constant or nothing: `Written(constant)`.
    """

    constant: Float[Tensor, " column"]
    embedded: Embedded | None = None
    part: int = 0
    """0 for the state embedding itself, 1 for what it gives through head 0, …"""
    weight: Float[Tensor, " n"] | None = None
    """1 where it is None."""
    vector: Float[Tensor, " column"] | None = None
    scale: Float[Tensor, " n"] | None = None

    @property
    def varies(self) -> bool:
        """Whether it differs between observations."""
        return self.embedded is not None or self.vector is not None

    def columns(self, columns: slice) -> Float[Tensor, "*column #n"]:
        """Return some of its columns, the neurons' aside, for each observation."""
        total = self.constant[columns, None]
        if self.embedded is not None:
            first = self.embedded.folded.d_mlp
            last = None if columns.stop is None else columns.stop - first
            of_state = self.embedded.direct[self.part, columns.start - first : last]
            total = total + (of_state if self.weight is None else of_state * self.weight)
        if self.vector is not None and self.scale is not None:
            total = total + self.vector[columns, None] * self.scale
        return total

    def read(self) -> Float[Tensor, "#n column"]:
        """Return all of it for each observation, the mean of z last."""
        total = self.constant[None]
        if self.embedded is not None:
            of_state = self.embedded.read[self.part]
            total = total + (of_state if self.weight is None else of_state * self.weight[:, None])
        if self.vector is not None and self.scale is not None:
            total = total + self.vector * self.scale[:, None]
        return total

    def mean(self, share: Float[np.ndarray, " n"]) -> Float[Tensor, " column"]:
        """Return its sum over the observations, each by its share: from how often each row of the tables is in it."""
        total = self.constant * float(share.sum())
        if self.embedded is not None:
            weight = share if self.weight is None else share * self.weight.numpy()
            total = total + self.embedded.weighted_sum(weight, self.part)
        if self.vector is not None and self.scale is not None:
            total = total + self.vector * float(share @ self.scale.numpy())
        return total


Writes = Mapping[str, Written]
"""What the components of a run write before the MLP, by name: "state", "time and position", "L0 b_O" and each head."""


def nothing(f: FoldedWeights) -> Written:
    """Return what a zero-ablated component writes."""
    return Written(f.nothing)


def direct(f: FoldedWeights, written: Written) -> Float[Tensor, "*action #n"]:
    """Return what a component writes on the logits directly."""
    return written.columns(slice(f.d_mlp, f.n_read))


def mean_z(f: FoldedWeights, written: Written) -> Float[Tensor, " *#n"]:
    """Return the mean of a head's z over its features."""
    return written.columns(slice(f.n_read, None))[0]


def to_feature_mean(f: FoldedWeights, head: int, written: Written) -> Written:
    """Return what a head writes with the mean of its z in all features (the post's mean ablation)."""
    return Written(f.nothing, vector=f.feature_mean[head], scale=mean_z(f, written))


def without_mlp(f: FoldedWeights, writes: Writes) -> Float[Tensor, "*action #n"]:
    """Return the action logits without what the MLP writes, b_U included."""
    return sum((direct(f, written) for written in writes.values()), f.b_U[:, None])


class Outputs(NamedTuple):
    """What runs give on the logits, b_out and b_U included."""

    mlp_out: Float[Tensor, "run action n"]
    logits: Float[Tensor, "run action n"]
    mlp_feature_mean: Float[Tensor, "with_mean action n"]
    """What the MLP would write on them with the mean of its output's entries in all of them."""


def run_all(f: FoldedWeights, runs: Sequence[Writes], with_mean: int = 0) -> Outputs:
    """Evaluate runs given by what their components write, all in one go over the observations (`sums.sum_runs`).

    Of the first `with_mean` runs the MLP's feature mean is returned too. Raises ValueError for runs of constants alone.
    """
    terms, choice = _terms(f, runs)
    sources = list(
        {id(one.embedded.parts): one.embedded for one in terms if one.embedded is not None}.values()
    )
    if not sources:
        raise ValueError("runs hold constants alone; one part at least must be what an observation gives.")
    n, width, n_actions = len(sources[0]), f.n_read + 1, len(f.b_U)
    one, none = torch.ones(n), torch.zeros(n)
    weight = [none if t.embedded is None else one if t.weight is None else t.weight for t in terms]
    scale = [none if t.scale is None else t.scale for t in terms]
    used = [x for t in terms for x in (f.nothing if t.vector is None else t.vector, t.constant)]
    vectors = {x.data_ptr(): x for x in used}
    vector, constant = np.array([list(vectors).index(x.data_ptr()) for x in used]).reshape(-1, 2).T
    rows = _side_by_side(sources)
    columns = torch.nn.functional.pad(torch.stack(list(vectors.values())), (0, rows[2].shape[2] - width))
    source, part = np.array([_place(term, sources) for term in terms]).T
    W = torch.cat([f.W_mlp.T, f.mlp_mean[0][None]]) if with_mean else f.W_mlp.T
    W = torch.nn.functional.pad(W, (0, 0, 0, -len(W) % 3)).contiguous()
    wanted = np.full(len(runs), n_actions + -n_actions % 3)
    wanted[:with_mean] = len(W)
    out = torch.empty(len(runs), len(W) + n_actions, n, dtype=f.dtype)
    numbers = (f.cast(x).numpy() for x in (torch.stack(weight), torch.stack(scale), columns))
    sums.sum_runs(*rows, source, part, *numbers, vector, constant, choice, W.numpy(), wanted, out.numpy())
    mlp_out = out[:, :n_actions] + f.b_mlp[:, None]
    _, bias, on_logits = f.mlp_mean
    mean = on_logits[:, None] * (out[:with_mean, n_actions, None] + bias)
    return Outputs(mlp_out, mlp_out + out[:, len(W) :] + f.b_U[:, None], mean)


def _terms(f: FoldedWeights, runs: Sequence[Writes]) -> tuple[list[Written], np.ndarray]:
    """Return all that runs are sums of, once each, and which of them each run is the sum of, three at least.

    Constants that all runs have are added to what varies first in each.
    """
    everywhere = set.intersection(*({id(one) for one in run.values()} for run in runs))
    constants = {
        id(one): one.constant for one in runs[0].values() if id(one) in everywhere and not one.varies
    }
    common = sum(constants.values(), f.nothing)
    places: dict[tuple[int, bool], int] = {}
    terms, chosen = [nothing(f)], []
    for run in runs:
        parts = [one for one in run.values() if id(one) not in constants]
        first = next((one for one in parts if one.varies), None)
        for one in parts:
            if (id(one), one is first) not in places:
                places[id(one), one is first] = len(terms)
                terms.append(one._replace(constant=one.constant + common) if one is first else one)
        chosen.append([places[id(one), one is first] for one in parts])
    most = max(3, *map(len, chosen))
    return terms, np.array([row + [0] * (most - len(row)) for row in chosen])


def _place(term: Written, sources: Sequence[Embedded]) -> tuple[int, int]:
    """Return which observations a term is of, and which part; −1 for none."""
    if term.embedded is None:
        return 0, 0 if term.vector is not None else -1
    return next(k for k, one in enumerate(sources) if one.parts is term.embedded.parts), term.part


def _side_by_side(sources: Sequence[Embedded]) -> tuple[np.ndarray, ...]:
    """Return view and obstacles of several sets of observations as rows of one table of each, and these tables."""
    tables = list({id(one.tables): one.tables for one in sources}.values())
    lengths = [[len(table.view_read), len(table.obstacle_read)] for table in tables]
    first = np.cumsum([[0, 0], *lengths], 0)
    most = max(one.parts.obstacle.shape[1] for one in sources)
    view = np.empty((len(sources), len(sources[0])), np.int32)
    obstacle = np.full((*view.shape, most), -1, np.int32)
    for k, one in enumerate(sources):
        views, obstacles = first[[one.tables is table for table in tables].index(True)]
        seen = one.parts.obstacle
        view[k] = one.parts.view + views
        obstacle[k, :, : seen.shape[1]] = seen + (seen >= 0) * obstacles if obstacles else seen
    of_view, of_obstacle = (torch.cat([table[k] for table in tables]).numpy() for k in (0, 1))
    return view, obstacle, of_view, of_obstacle
