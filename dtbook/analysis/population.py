"""Every observation through a one-layer model: not a product of matrices, but a sum of a few rows of tables.

With one layer and no LayerNorm, two weights read resid_mid: W_in, which makes the neurons' `hook_pre`, and W_U, which
makes the direct logits. Side by side they are one matrix of d_mlp + n_actions columns, and everything is kept as what
it gives through it: the axis `read`, cut by `FoldedWeights.pre` and `.direct_logits`. An observation is a view without
obstacles and its obstacles (`gridworld.decomposition`), and the state embedding is linear: so what it gives to be
read, directly or through a head's W_OV, is a row of a table of views plus rows of a table of obstacles, and so are its
query and key. Only the attention's softmax and the neurons' ReLU are evaluated for each observation (`sums`).

Only the state token's query is needed. RTG and state token differ by δ = R·W_E_rtg + W_pos[0] − W_pos[1] − state
embedding, as time and biases cancel in their difference, so attention to RTG is sigmoid(q · δW_K / √d_head).

What a component writes is a `Written`. A run is the sum of those of its components; `logits` takes others in their
place, which ablates or patches them exactly: the MLP is evaluated anew. Tables are made in float64 and cast to the
model's dtype. In float32 logits differ from the model's own by about 1e-6 of the largest term that they are a sum of.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis import sums
from dtbook.artifacts.parameters import Count, checked
from dtbook.gridworld.decomposition import EMPTY_CELL, Parts, decompose
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import OBSTACLE
from dtbook.gridworld.situations import row_batches
from dtbook.model.config import one_hot
from dtbook.model.transformer import DecisionTransformer

BATCH_SIZE = 2048
"""Observations a batch where every neuron of each is kept: small enough for the processor's cache."""
FAST_BATCH_SIZE = 32_768
"""Observations a batch where they are not."""
COLUMNS = 16
"""The number of columns of a table is a multiple of it."""
STATE, MLP = "state", "L0 MLP"


class Condition(NamedTuple):
    """The return that a run is asked for, and its timestep."""

    rtg: float
    timestep: int


class FoldedWeights:
    """The weights of a one-layer model, multiplied out to what W_in and W_U read (in float64, then the model's dtype).

    A model with a longer context is taken as it is with a single timestep. Raises ValueError for another number of
    layers, and for a model with hooks or parts that were exchanged, which would be overlooked.
    """

    def __init__(self, model: DecisionTransformer) -> None:
        if model.cfg.n_layers != 1:
            raise ValueError(f"model has {model.cfg.n_layers} layers; only one can be folded.")
        if not model.is_plain():
            raise ValueError(
                "model has hooks or exchanged parts; only a plain DecisionTransformer can be folded."
            )
        self.model, self.dtype = model, model.W_U.dtype
        self.head_names = [f"L0H{head}" for head in range(model.cfg.n_heads)]
        with torch.no_grad():
            self._fold({name: weight.detach().double() for name, weight in model.named_parameters()})

    def _fold(self, w: Mapping[str, Tensor]) -> None:
        def of(name: str) -> Tensor:
            return w[f"blocks.0.{name}"]

        cfg, U = self.model.cfg, w["W_U"]
        W_read = torch.cat([of("mlp.W_in"), U], 1)
        self.d_mlp, self.n_read = cfg.d_mlp, W_read.shape[1]
        # the last column: the mean of a head's z over its features
        mean = torch.full((cfg.n_heads, cfg.d_head, 1), 1 / cfg.d_head, dtype=torch.double)
        written = torch.cat([of("attn.W_O") @ W_read, mean], 2)
        through = torch.cat([_one_more(W_read)[None], of("attn.W_V") @ written])  # part d_model column
        image = w["W_E_state"].view(-1, cfg.view_size, cfg.view_size, cfg.d_model).permute(1, 2, 0, 3)
        image = image.reshape(-1, cfg.d_model)  # as images lie
        self.from_image = _by_input(image @ through)
        self.W_Q, self.W_K, self.b_Q = of("attn.W_Q"), of("attn.W_K"), of("attn.b_Q")
        self.query_and_key = _by_input(image @ torch.cat([self.W_Q, self.W_K]))
        self.rtg, self.position = w["W_E_rtg"], w["W_pos"][0] - w["W_pos"][1]
        self.time = w["W_E_time"] + w["W_pos"][1]  # of the state token, its position included
        self.through, self.b_V = through, (of("attn.b_V")[:, None] @ written)[:, 0]
        self.b_O, self.b_in = (
            self.cast(_one_more(of("attn.b_O") @ W_read)),
            _one_more(self._of_mlp(of("mlp.b_in"))),
        )
        self.feature_mean = self.cast(_one_more(of("attn.W_O").sum(1) @ W_read))
        self.W_mlp, self.b_mlp = self.cast(of("mlp.W_out") @ U), self.cast(of("mlp.b_out") @ U)
        self.b_U, self.nothing = self.cast(w["b_U"]), Written(torch.zeros(self.n_read + 1, dtype=self.dtype))
        self.mlp_mean = tuple(map(self.cast, (of("mlp.W_out").mean(1), of("mlp.b_out").mean(), U.sum(0))))

    def _of_mlp(self, bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(bias, (0, self.n_read - self.d_mlp))  # 0 for the logits

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the model's dtype."""
        return tensor.to(self.dtype)

    def rtg_token(self, rtg: float) -> Float[Tensor, " d_model"]:
        """Return what the RTG token has that the state token has not, time and the state embedding aside (float64)."""
        return rtg * self.rtg + self.position

    def query_of_time(self, timestep: int) -> Float[Tensor, "head d_head"]:
        """Return the part of the state token's query that time, its position and b_Q make (float64)."""
        return self.time[timestep] @ self.W_Q + self.b_Q

    def key(self, token: Float[Tensor, " d_model"]) -> Float[Tensor, "head d_head"]:
        """Return the key (float64) of a vector, without b_K, which both tokens have and softmax does not see."""
        return token @ self.W_K

    def pre(self, read: Float[Tensor, "*axes read"]) -> Float[Tensor, "*axes d_mlp"]:
        """Return the neurons' part of what is read."""
        return read[..., : self.d_mlp]

    def direct_logits(self, read: Float[Tensor, "*axes columns"]) -> Float[Tensor, "*axes action"]:
        """Return the part of what is read that W_U makes; further columns are left out."""
        return read[..., self.d_mlp : self.n_read]

    def embed(
        self,
        observations: ObservationSet | UInt8[np.ndarray, "n view view 3"] | UInt8[Tensor, "n view view 3"],
    ) -> "Embedded":
        """Return observations as sums over the tables: the same at every RTG and timestep.

        Raises ValueError for observations of another view size.
        """
        parts = (
            decompose(np.asarray(observations))
            if not isinstance(observations, ObservationSet)
            else observations.parts
        )
        side = self.model.cfg.view_size
        if parts.views.shape[1:] != (side, side, 3):
            raise ValueError(
                f"observations show {parts.views.shape[1:]}; this model sees a view of {side} cells."
            )
        tables = self._tables(parts)
        products = np.empty((self.model.cfg.n_heads, len(parts)))
        sums.sum_products(parts.view, parts.obstacle, *tables.products(), products)
        return Embedded(self, parts, tables, products)

    def _tables(self, parts: Parts) -> "Tables":
        """Return what each view gives, and what each obstacle adds to an empty cell."""
        contents = np.zeros((2, len(parts.obstacles), 3), np.uint8)
        contents[0, :, 0], contents[0, :, 1:], contents[1] = OBSTACLE, parts.obstacles[:, 2:], EMPTY_CELL
        cells = np.zeros((2, len(parts.obstacles), *parts.views.shape[1:]), np.uint8)
        cells[:, np.arange(len(parts.obstacles)), parts.obstacles[:, 0], parts.obstacles[:, 1]] = contents
        views, obstacle, empty = map(self._inputs, (parts.views, *cells))
        inputs = views, obstacle - empty
        filled = -(self.n_read + 1) % COLUMNS  # with columns of 0, which kernels like
        read = [self.cast(x @ self.from_image).unflatten(1, (len(self.through), -1)) for x in inputs]
        read = [torch.nn.functional.pad(x, (0, filled)) for x in read]
        return Tables(
            *read, *((x @ self.query_and_key).unflatten(1, (2, len(self.head_names), -1)) for x in inputs)
        )

    def _inputs(self, images: UInt8[np.ndarray, "n view view 3"]) -> Float[Tensor, "n input"]:
        x = torch.from_numpy(images)
        return (one_hot(x) if self.model.cfg.encoding == "one-hot" else x).flatten(1).double()

    def direct(self, written: "Written") -> Float[Tensor, "*action #n"]:
        """Return what a component writes on the logits directly."""
        return written.columns(slice(self.d_mlp, self.n_read))

    def mean_z(self, written: "Written") -> Float[Tensor, " *#n"]:
        """Return the mean of a head's z over its features."""
        return written.columns(slice(self.n_read, None))[0]

    def without_mlp(self, writes: "Writes") -> Float[Tensor, "*action #n"]:
        """Return the action logits without what the MLP writes, b_U included."""
        return sum((self.direct(written) for written in writes.values()), self.b_U[:, None])

    def mlp_out(self, runs: Sequence["Writes"]) -> Float[Tensor, "run action n"]:
        """Return what the MLP writes on the logits in each run, b_out included: all runs in one go."""
        return run_all(self, runs).mlp_out

    def logits(self, runs: Sequence["Writes"]) -> Float[Tensor, "run action n"]:
        """Return the action logits of runs given by what their components write: all runs in one go."""
        return run_all(self, runs).logits


def _one_more(read: Tensor) -> Tensor:
    """Return what is read with one more column of 0, where a head's result has the mean of z."""
    return torch.nn.functional.pad(read, (0, 1))


def _by_input(weight: Float[Tensor, "part input column"]) -> Float[Tensor, "input column_of_part"]:
    return weight.transpose(0, 1).flatten(1)


class Tables(NamedTuple):
    """What each view gives and what each obstacle adds; part 0 is the state embedding itself, then each head's OV."""

    view_read: Float[Tensor, "view part columns"]
    """What is read of it, then a head's mean of z; filled up with columns of 0."""
    obstacle_read: Float[Tensor, "obstacle part columns"]
    view_qk: Float[Tensor, "view 2 head d_head"]
    """Queries and keys, in float64."""
    obstacle_qk: Float[Tensor, "obstacle 2 head d_head"]

    def products(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return q · k of a view with itself, of view and obstacle, and of two obstacles, both orders added."""
        (q, k), (q_more, k_more) = (x.permute(1, 2, 0, 3) for x in (self.view_qk, self.obstacle_qk))
        crossed, more = q @ k_more.mT + k @ q_more.mT, q_more @ k_more.mT
        both = more + more.mT - torch.diag_embed(more.diagonal(dim1=1, dim2=2))
        return (q * k).sum(-1).numpy(), crossed.numpy(), both.numpy()


@dataclass(frozen=True, eq=False)
class Embedded:
    """Observations as sums over the tables of a model. Indexed by rows, it is these observations."""

    folded: FoldedWeights
    parts: Parts
    tables: Tables
    products: Float[np.ndarray, "head n"]
    """q · k of the state embedding with itself, in float64."""

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, rows: slice | np.ndarray) -> "Embedded":
        return replace(self, parts=self.parts[rows], products=self.products[:, rows])

    def batches(
        self, size: int = FAST_BATCH_SIZE, progress: str | None = None
    ) -> Iterator[tuple[slice, "Embedded"]]:
        """Yield the rows of each batch, and the batch; `progress` names the bar that is shown."""
        with tqdm(total=len(self), desc=progress, disable=progress is None, unit_scale=True) as bar:
            for rows in row_batches(len(self), size):
                yield rows, self[rows]
                bar.update(rows.stop - rows.start)

    def _sum(self, of_view: Tensor, of_obstacle: Tensor) -> Tensor:
        """Return (n, …), the sum of each observation's rows."""
        rows, more = (x.flatten(1).contiguous().numpy() for x in (of_view, of_obstacle))
        out = np.empty((len(self), rows.shape[1]), rows.dtype)
        sums.sum_rows(self.parts.view, self.parts.obstacle, rows, more, out)
        return torch.from_numpy(out).unflatten(1, of_view.shape[1:])

    @cached_property
    def read(self) -> Float[Tensor, "part n column"]:
        """What the state embedding itself gives to be read, then a head's result if it attends to the state alone."""
        rows = (table[:, :, : self.folded.n_read + 1] for table in self.tables[:2])
        return self._sum(*rows).transpose(0, 1).contiguous()

    @cached_property
    def _qk(self) -> Float[Tensor, "2 head n d_head"]:
        return self._sum(*self.tables[2:]).permute(1, 2, 0, 3)

    @property
    def q(self) -> Float[Tensor, "head n d_head"]:
        """What the state embedding adds to the query (float64)."""
        return self._qk[0]

    @property
    def k(self) -> Float[Tensor, "head n d_head"]:
        """The key of the state embedding (float64)."""
        return self._qk[1]

    @cached_property
    def direct(self) -> Float[Tensor, "part column n"]:
        """What each part gives to W_U, and the mean of z."""
        columns = slice(self.folded.d_mlp, self.folded.n_read + 1)
        return self._sum(*(table[:, :, columns] for table in self.tables[:2])).permute(1, 2, 0).contiguous()

    def weighted_sum(self, weight: Float[np.ndarray, " n"], part: int) -> Float[Tensor, " column"]:
        """Return the sum over all observations of weight · what a part gives to be read."""
        views, obstacles = np.zeros(len(self.parts.views)), np.zeros(len(self.parts.obstacles))
        sums.add_weights(self.parts.view, self.parts.obstacle, weight, views, obstacles)
        columns, total = (
            slice(self.folded.n_read + 1),
            torch.zeros(self.folded.n_read + 1, dtype=torch.double),
        )
        for often, table in zip((views, obstacles), self.tables[:2], strict=True):
            total += torch.from_numpy(often) @ table[:, part, columns].double()
        return self.folded.cast(total)

    def at(self, rtg: float, timestep: int) -> "Run":
        """Return the run of these observations at an RTG and a timestep. Raises ValueError where there is none such."""
        f = self.folded
        if not 0 <= timestep < len(f.time):
            raise ValueError(f"timestep is {timestep}; this model has timesteps 0 to {len(f.time) - 1}.")
        if not np.isfinite(rtg):
            raise ValueError(f"rtg is {rtg}; it must be a finite number.")
        time, token = f.time[timestep], f.rtg_token(rtg)
        # (q of the state + q of the time) · (k of the RTG token − k of the state), multiplied out
        query, key = f.query_of_time(timestep), f.key(token)
        scores = (query * key).sum(1, keepdim=True).numpy() - self.products
        numbers = (((qk[:, 0] * key) - (qk[:, 1] * query)).sum(-1).numpy() for qk in self.tables[2:])
        sums.sum_numbers(self.parts.view, self.parts.obstacle, *numbers, scores)
        pattern = f.cast(torch.sigmoid(torch.from_numpy(scores) / f.model.cfg.d_head**0.5))
        rtg_result, time_result = (token @ f.through)[1:], (time @ f.through)[1:] + f.b_V
        fixed = time @ f.through[0] + f.b_in
        return Run(self, Condition(rtg, timestep), pattern, *map(f.cast, (rtg_result, time_result, fixed)))


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


class Run(NamedTuple):
    """Observations at one RTG and timestep, up to the MLP."""

    embedded: Embedded
    condition: Condition
    pattern: Float[Tensor, "head n"]
    """Attention of the state token to RTG; the rest is to itself."""
    rtg_result: Float[Tensor, "head column"]
    """A head's result of the RTG token's own value (RTG and position, without time and biases), as it is read."""
    time_result: Float[Tensor, "head column"]
    """That of time, the state token's position and b_V, to whatever it attends."""
    fixed: Float[Tensor, " column"]
    """What time and position give to be read directly, and b_in."""

    def head(
        self,
        head: int,
        pattern: Float[Tensor, " n"] | None = None,
        values: Embedded | None = None,
        rtg_result: Float[Tensor, " column"] | None = None,
    ) -> Written:
        """Return what a head writes (`hook_result`), with its own attention to RTG and values or with others."""
        pattern = self.pattern[head] if pattern is None else pattern
        vector = self.rtg_result[head] if rtg_result is None else rtg_result
        values = self.embedded if values is None else values
        return Written(self.time_result[head], values, 1 + head, 1 - pattern, vector, pattern)

    def writes(self) -> dict[str, Written]:
        """Return what each component writes; put others in their place to ablate or patch them."""
        f = self.embedded.folded
        writes = {STATE: Written(f.nothing.constant, self.embedded), "time and position": Written(self.fixed)}
        return writes | self.heads() | {"L0 b_O": Written(f.b_O)}

    def heads(self) -> dict[str, Written]:
        """Return what each head writes."""
        return {name: self.head(head) for head, name in enumerate(self.embedded.folded.head_names)}

    def resid_mid(self, writes: Writes | None = None) -> Float[Tensor, "n read"]:
        """Return resid_mid as it is read: the neurons' `hook_pre`, then the logits without MLP and b_U."""
        parts = (self.writes() if writes is None else writes).values()
        return sum(
            (part.read() for part in parts), torch.zeros(len(self.embedded), 1, dtype=self.fixed.dtype)
        )[:, :-1]

    def post(self, writes: Writes | None = None) -> Float[Tensor, "n d_mlp"]:
        """Return the activations of the neurons (`mlp.hook_post`)."""
        return self.embedded.folded.pre(self.resid_mid(writes)).relu()

    def mlp_out(self, writes: Writes | None = None) -> Float[Tensor, "n action"]:
        """Return what the MLP writes on the logits, b_out included."""
        return self.embedded.folded.mlp_out([self.writes() if writes is None else writes])[0].T

    def logits(self, writes: Writes | None = None) -> Float[Tensor, "n action"]:
        """Return the action logits, with what the components write themselves or others in their place."""
        return self.embedded.folded.logits([self.writes() if writes is None else writes])[0].T

    def probabilities(self, writes: Writes | None = None) -> Float[Tensor, "n action"]:
        """Return the actions' probabilities."""
        return self.logits(writes).T.softmax(0).T  # over the axis that is not contiguous: it is vectorised

    def contributions(self) -> dict[str, Float[Tensor, "n action"]]:
        """Return the logits as a sum of components: the keys of `attribution.decompose`, channels taken together.

        "state", "time and position", "L0H0", …, "L0 b_O", "L0 MLP" (its b_out included) and "b_U".
        """
        f, writes = self.embedded.folded, self.writes()
        parts = {name: f.direct(written) for name, written in writes.items()}
        parts |= {MLP: f.mlp_out([writes])[0], "b_U": f.b_U[:, None]}
        return {name: part.expand(-1, len(self.embedded)).T for name, part in parts.items()}


class Outputs(NamedTuple):
    """What runs give on the logits, b_out and b_U included."""

    mlp_out: Float[Tensor, "run action n"]
    logits: Float[Tensor, "run action n"]
    mlp_feature_mean: Float[Tensor, "with_mean action n"]
    """What the MLP would write on them with the mean of its output's entries in all of them."""


def run_all(f: FoldedWeights, runs: Sequence[Writes], with_mean: int = 0) -> Outputs:
    """Evaluate runs given by what their components write, all in one go over the observations (`sums.run_all`).

    Of the first `with_mean` runs the MLP's feature mean is returned too.
    """
    terms, choice = _terms(f, runs)
    sources = list(
        {id(one.embedded.parts): one.embedded for one in terms if one.embedded is not None}.values()
    )
    n, width, n_actions = len(sources[0]), f.n_read + 1, len(f.b_U)
    one, none, nothing = torch.ones(n), torch.zeros(n), f.nothing.constant
    weight = [none if t.embedded is None else one if t.weight is None else t.weight for t in terms]
    scale = [none if t.scale is None else t.scale for t in terms]
    used = [x for t in terms for x in (nothing if t.vector is None else t.vector, t.constant)]
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
    sums.run_all(*rows, source, part, *numbers, vector, constant, choice, W.numpy(), wanted, out.numpy())
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
    common = sum(constants.values(), f.nothing.constant)
    places: dict[tuple[int, bool], int] = {}
    terms, chosen = [f.nothing], []
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
    obstacle = np.full((*view.shape, most), -1, np.int16)
    for k, one in enumerate(sources):
        views, obstacles = first[[one.tables is table for table in tables].index(True)]
        seen = one.parts.obstacle
        view[k] = one.parts.view + views
        obstacle[k, :, : seen.shape[1]] = seen + (seen >= 0) * obstacles if obstacles else seen
    of_view, of_obstacle = (torch.cat([table[k] for table in tables]).numpy() for k in (0, 1))
    return view, obstacle, of_view, of_obstacle


Measure = Callable[[Run], Mapping[str, Tensor]]
"""From a run to named values, each with a row for every observation of the batch."""


@torch.inference_mode()
@checked
def per_observation(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    measure: Measure,
    batch_size: Count = FAST_BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "condition n *rest"]]:
    """Return what `measure` says of every observation at every (rtg, timestep), in their order.

    Raises ValueError for a model of more than one layer, another view size, and a condition it does not have.
    """
    embedded, at = (
        FoldedWeights(model).embed(observations),
        [Condition(*condition) for condition in conditions],
    )
    results: dict[str, np.ndarray] = {}
    for rows, batch in embedded.batches(batch_size, "observations" if progress else None):
        for k, condition in enumerate(at):
            for name, value in measure(batch.at(*condition)).items():
                if name not in results:
                    kind = np.float64 if value.dtype == torch.float64 else np.float32
                    results[name] = np.empty((len(at), len(embedded), *value.shape[1:]), kind)
                results[name][k, rows] = value.numpy()
    return results


def logits(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    progress: bool = False,
) -> Float[np.ndarray, "condition n action"]:
    """Return the action logits of every observation at every (rtg, timestep); `model` itself, up to rounding."""
    values = per_observation(
        model, observations, conditions, lambda run: {"logits": run.logits()}, progress=progress
    )
    return values["logits"]
