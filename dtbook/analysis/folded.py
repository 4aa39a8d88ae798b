"""A one-layer model's weights multiplied out, and observations as sums over the tables that they make.

With one layer and no LayerNorm, two weights read resid_mid: W_in, which makes the neurons' `hook_pre`, and W_U, which
makes the direct logits. Side by side they are one matrix of d_mlp + n_actions columns, and everything is kept as what
it gives through it: the axis `read`, cut by `FoldedWeights.pre` and `.direct_logits`. An observation is a view without
obstacles and its obstacles (`gridworld.decomposition`), and the state embedding is linear: so what it gives to be
read, directly or through a head's W_OV, is a row of a table of views plus rows of a table of obstacles, and so are its
query and key. Tables are made in float64 and cast to the model's dtype.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis import sums
from dtbook.gridworld.decomposition import EMPTY_CELL, Parts, take_apart
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


class FoldedWeights:
    """The weights of a one-layer model, multiplied out to what W_in and W_U read (in float64, then the model's dtype).

    A model with a longer context is taken as it is with a single timestep. Raises ValueError for another number of
    layers or precision, and for a model with hooks or parts that were exchanged, which would be overlooked.
    """

    def __init__(self, model: DecisionTransformer) -> None:
        if model.cfg.n_layers != 1:
            raise ValueError(f"model has {model.cfg.n_layers} layers; only one can be folded.")
        self.model, self.dtype = model, model.W_U.dtype
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model is in {self.dtype}; only float32 and float64 can be folded: take `model.float()`."
            )
        if not model.is_plain():
            raise ValueError(
                "model has hooks or exchanged parts; only a plain DecisionTransformer can be folded."
            )
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
        self.b_U, self.nothing = self.cast(w["b_U"]), torch.zeros(self.n_read + 1, dtype=self.dtype)
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
            take_apart(np.asarray(observations))
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
            for rows in row_batches(max(len(self), 1), size):  # of none, one batch of none
                yield rows, self[rows]
                bar.update(len(self[rows]))

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
        """What each part gives to W_U."""
        columns = slice(self.folded.d_mlp, self.folded.n_read)
        return self._sum(*(table[:, :, columns] for table in self.tables[:2])).permute(1, 2, 0).contiguous()

    @cached_property
    def mean_z(self) -> Float[Tensor, "head n"]:
        """The mean of each head's z over its features, if it attends to the state alone."""
        numbers = (table[:, 1:, self.folded.n_read].contiguous().numpy() for table in self.tables[:2])
        out = torch.zeros(len(self.folded.head_names), len(self), dtype=self.folded.dtype)
        sums.sum_numbers(self.parts.view, self.parts.obstacle, *numbers, out.numpy())
        return out

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
