"""What the components of a run write, and what follows from it: all ablations and patches are other things written.

A run is the sum of what its components write before the MLP. Put something else in the place of one, and `run_all`
evaluates the MLP anew: exactly what hooks on the model would give.
"""

from collections import Counter, defaultdict
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
    total = written.constant[-1]
    if written.embedded is not None:
        of_state = written.embedded.mean_z[written.part - 1]
        total = total + (of_state if written.weight is None else of_state * written.weight)
    if written.vector is not None and written.scale is not None:
        total = total + written.vector[-1] * written.scale
    return total


def to_feature_mean(f: FoldedWeights, head: int, written: Written) -> Written:
    """Return what a head writes with the mean of its z in all features (the post's mean ablation)."""
    return Written(f.nothing, vector=f.feature_mean[head], scale=mean_z(f, written))


def to_mlp_feature_mean(f: FoldedWeights, mean: Float[Tensor, " n"]) -> Float[Tensor, "action n"]:
    """Return what the MLP writes on the logits with the mean of its output's entries in all of them."""
    return f.mlp_mean[2][:, None] * mean


def without_mlp(f: FoldedWeights, writes: Writes) -> Float[Tensor, "*action #n"]:
    """Return the action logits without what the MLP writes, b_U included."""
    return sum((direct(f, written) for written in writes.values()), f.b_U[:, None])


class Outputs(NamedTuple):
    """What runs give on the logits, all biases included."""

    logits: Float[Tensor, "run action n"]
    mlp_out: Float[Tensor, "with_mlp action n"]
    mlp_mean: Float[Tensor, "with_mlp n"]
    """The mean of the entries of the MLP's output."""


def logits_of(f: FoldedWeights, runs: Sequence[Writes]) -> Float[Tensor, "run action n"]:
    """Return the logits of runs given by what their components write."""
    out = _evaluate(f, runs, _readout(f, f.W_mlp.T, direct=True))
    return out[:, : len(f.b_U)] + (f.b_mlp + f.b_U)[:, None]


def mlp_out_of(f: FoldedWeights, runs: Sequence[Writes]) -> Float[Tensor, "run action n"]:
    """Return what the MLP writes on the logits in runs given by what their components write, b_out included."""
    return _evaluate(f, runs, _readout(f, f.W_mlp.T))[:, : len(f.b_U)] + f.b_mlp[:, None]


def run_all(f: FoldedWeights, runs: Sequence[Writes], with_mlp: Sequence[int]) -> Outputs:
    """Return the logits of runs given by what their components write, and of some of them what the MLP writes."""
    logits = _readout(f, f.W_mlp.T, direct=True)
    mlp = _readout(f, torch.cat([f.W_mlp.T, f.mlp_mean[0][None]]))
    first, n_actions = len(logits), len(f.b_U)
    out = _evaluate(f, runs, torch.cat([logits, mlp]), (first, with_mlp))
    return Outputs(
        out[:, :n_actions] + (f.b_mlp + f.b_U)[:, None],
        out[with_mlp, first : first + n_actions] + f.b_mlp[:, None],
        out[with_mlp, first + n_actions] + f.mlp_mean[1],
    )


def _readout(
    f: FoldedWeights, of_neurons: Float[Tensor, "any neuron"], direct: bool = False
) -> Float[Tensor, "row read"]:
    """Return a matrix from what is read to logits: of the neurons, and of W_U's own columns. Rows come in threes."""
    W = torch.zeros(len(of_neurons) + -len(of_neurons) % 3, f.n_read, dtype=f.dtype)
    W[: len(of_neurons), : f.d_mlp] = of_neurons
    if direct:
        W[: len(f.b_U), f.d_mlp :] = torch.eye(len(f.b_U))
    return W


def _evaluate(
    f: FoldedWeights,
    runs: Sequence[Writes],
    W: Float[Tensor, "row read"],
    some: tuple[int, Sequence[int]] | None = None,
) -> Float[Tensor, "run row n"]:
    """Return W @ (the neurons' activations, then the direct logits) of runs, in one go over the observations.

    With `some` only so many rows are made of runs other than these. Raises ValueError for runs of constants alone.
    """
    rows, all_rows_of = some or (len(W), [])
    wanted = np.full(len(runs), rows)
    wanted[all_rows_of] = len(W)
    plan = _Plan(f, runs, all_rows_of)
    if not plan.sources:
        raise ValueError("runs hold constants alone; one part at least must be what an observation gives.")
    arrays = plan.arrays()
    W = torch.nn.functional.pad(W, (0, plan.tables[2].shape[2] - f.n_read))
    floor = torch.full(W.shape[1:], torch.finfo(f.dtype).min, dtype=f.dtype)
    floor[: f.d_mlp] = 0  # the ReLU
    out = torch.empty(len(runs), len(W), len(plan.sources[0]), dtype=f.dtype)
    sums.sum_runs(*arrays, floor.numpy(), W.numpy(), wanted, plan.room(), out.numpy())
    return out


RowKey = tuple[str, int]
"""A row that `sums.sum_runs` knows: the number of a sum, of one that is fixed, or of a step that makes it."""
Operand = tuple[int, RowKey]
"""A row times the coefficient of this number."""
ZERO, ONE = 0, 1
"""The first two coefficients."""


class _Plan:
    """Runs as sums of rows, and which of them go together: what `sums.sum_runs` is given.

    Runs that differ in what one component writes are a group: what all the others write is added up once.
    """

    def __init__(self, f: FoldedWeights, runs: Sequence[Writes], alone: Sequence[int]) -> None:
        self.f = f
        self.sources: list[Embedded] = []
        self.sums: dict[tuple[int, int], int] = {}
        self.fixed = {f.nothing.data_ptr(): f.nothing}
        self.coefficients: dict[int, Tensor] = {}
        self.steps: list[list[Operand]] = []
        self.made: dict[int, Operand] = {}
        self.lifetime = 1  # how many steps later at most a row is used that one has made
        self.groups: list[tuple[int, RowKey, list[int]]] = []
        self.run: list[Operand] = [(ZERO, ("fixed", 0))] * len(runs)
        for members in _alike(runs).values():
            self._add_group(runs, members, alone)

    def _add_group(self, runs: Sequence[Writes], members: Mapping[int, str], alone: Sequence[int]) -> None:
        index, name = next(iter(members.items()))
        base = self._shared([one for other, one in runs[index].items() if other != name])
        for index, name in members.items():
            self.run[index] = self._single(runs[index][name])
        together = [index for index in members if index not in alone]
        fours = len(together) // 4 * 4
        for first in range(0, fours, 4):
            self._emit(base, together[first : first + 4])
        for index in members:
            if index in alone or index in together[fours:]:
                self._emit(base, [index, -1, -1, -1])

    def _emit(self, base: RowKey, members: list[int]) -> None:
        for row in (base, *(self.run[index][1] for index in members if index >= 0)):
            self._use(row, len(self.steps))
        self.groups.append((len(self.steps), base, members))

    def _shared(self, parts: Sequence[Written]) -> RowKey:
        """Return the row of the sum of what components write."""
        operands = [(ONE, self._fixed(sum((part.constant for part in parts), self.f.nothing)))]
        for part in parts:
            operands += self._operands(part._replace(constant=self.f.nothing))
        return self._sum(operands)[1]

    def _single(self, written: Written) -> Operand:
        if id(written) not in self.made:
            self.made[id(written)] = self._sum(self._operands(written))
        return self.made[id(written)]

    def _sum(self, operands: list[Operand]) -> Operand:
        """Return what a sum is one of; steps make it."""
        while len(operands) > 1:
            for _, row in operands[:4]:
                self._use(row, len(self.steps) + 1)
            self.steps.append(operands[:4])
            operands = [(ONE, ("made", len(self.steps) - 1)), *operands[4:]]
        return operands[0] if operands else (ZERO, ("fixed", 0))

    def _use(self, row: RowKey, steps: int) -> None:
        kind, number = row
        if kind == "made":
            self.lifetime = max(self.lifetime, steps - number)

    def _operands(self, written: Written) -> list[Operand]:
        found = [] if written.constant is self.f.nothing else [(ONE, self._fixed(written.constant))]
        if written.embedded is not None:
            found.append((self._coefficient(written.weight), self._sum_of(written.embedded, written.part)))
        if written.vector is not None:
            found.append((self._coefficient(written.scale), self._fixed(written.vector)))
        return found

    def _fixed(self, vector: Tensor) -> RowKey:
        self.fixed.setdefault(vector.data_ptr(), vector)
        return "fixed", list(self.fixed).index(vector.data_ptr())

    def _coefficient(self, values: Tensor | None) -> int:
        if values is None:
            return ONE
        self.coefficients.setdefault(values.data_ptr(), values)
        return 2 + list(self.coefficients).index(values.data_ptr())

    def _sum_of(self, embedded: Embedded, part: int) -> RowKey:
        known = [k for k, one in enumerate(self.sources) if one.parts is embedded.parts]
        if not known:
            self.sources.append(embedded)
        source = known[0] if known else len(self.sources) - 1
        return "sum", self.sums.setdefault((source, part), len(self.sums))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return the first arguments of `sums.sum_runs`, to `run`."""
        self.tables = _side_by_side(self.sources)
        width = self.tables[2].shape[2] - self.f.n_read - 1
        n = len(self.sources[0])
        coefficient = torch.stack([torch.zeros(n), torch.ones(n), *self.coefficients.values()])
        fixed = torch.nn.functional.pad(torch.stack(list(self.fixed.values())), (0, width))
        first = {"sum": 0, "fixed": len(self.sums), "made": len(self.sums) + len(self.fixed)}

        def number(row: RowKey) -> int:
            kind, k = row
            return first[kind] + (k % self.lifetime if kind == "made" else k)

        filled = [[*step, *[(ZERO, ("fixed", 0))] * (4 - len(step))] for step in self.steps]
        step = [[[coefficient, number(row)] for coefficient, row in operands] for operands in filled]
        group = [[steps, number(row), *members] for steps, row, members in self.groups]
        run = [[coefficient, number(row)] for coefficient, row in self.run]
        source, part = np.array(list(self.sums)).T
        numbers = (np.array(step, np.int64).reshape(-1, 4, 2), np.array(group), np.array(run))
        values = (fixed.numpy(), self.f.cast(coefficient).numpy())
        return *self.tables, source.copy(), part.copy(), *values, *numbers

    def room(self) -> np.ndarray:
        """Return rows to work in: partial sums, what is fixed, what is made."""
        _, obstacle, of_view, _ = self.tables
        stack = len(self.sources) * (obstacle.shape[2] + 1) * of_view.shape[1]
        rows = stack + len(self.fixed) + self.lifetime
        return torch.empty(rows, of_view.shape[2], dtype=self.f.dtype).numpy()


def _alike(runs: Sequence[Writes]) -> dict[frozenset[tuple[str, int]], dict[int, str]]:
    """Return groups of runs that differ in what one component writes: by the rest, which runs, and that component."""
    parts = [frozenset((name, id(written)) for name, written in run.items()) for run in runs]
    without = [
        {name: every - {(name, id(run[name]))} for name in run}
        for run, every in zip(runs, parts, strict=True)
    ]
    often = Counter(rest for each in without for rest in each.values())
    groups: dict[frozenset[tuple[str, int]], dict[int, str]] = defaultdict(dict)
    for index, each in enumerate(without):
        name = max(each, key=lambda name: (often[each[name]], runs[index][name].varies))
        groups[each[name]][index] = name
    return groups


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
