"""Weights without a forward pass: a head's QK and OV circuits, view maps, and what they say over every observation.

Circuits are matrices between embeddings (Elhage et al. 2021): rows are vectors, W_QK = W_Q W_Kᵀ, W_OV = W_V
W_O. Embeddings are any rows of width d_model: `model.W_E_state` (one row for each channel and cell),
`model.W_E_rtg`, `model.W_E_time[[10]]`, `model.W_pos[:2]`, or sums of them. They show linear effects only:
what softmax and the MLP make of them needs a forward pass.

The embedding is linear in what the cells hold, so its effect on any preference is a sum over 49 cells, each of which
holds one of four things. All that such a sum can do over the observations follows from one matrix, how often two cells
hold two things (`moments`), which does not depend on the model: means, variances, and which cells they come from are
exact, with no sample and no pass through the model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from safetensors.numpy import load_file, save_file
from torch import Tensor

from dtbook.analysis.attribution import by_cell, channel_slices, contrast, preference_direction
from dtbook.artifacts.parameters import Integer, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.rules import FRONT
from dtbook.gridworld.situations import row_batches
from dtbook.model.config import ONE_HOT_SIZES
from dtbook.model.transformer import Attention, DecisionTransformer

# What a cell can hold in Dynamic Obstacles, as minigrid encodes it: object, colour, state.
CELLS = {
    "empty": (OBJECT_TO_IDX["empty"], 0, 0),
    "wall": (OBJECT_TO_IDX["wall"], COLOR_TO_IDX["grey"], 0),
    "obstacle": (OBJECT_TO_IDX["ball"], COLOR_TO_IDX["blue"], 0),
    "goal": (OBJECT_TO_IDX["goal"], COLOR_TO_IDX["green"], 0),
}


class QKCircuit(NamedTuple):
    """The attention score before softmax between two tokens, as a sum over the embeddings that make them up.

    score = Σ weight + Σ destination_bias + Σ source_bias + constant, over the rows present in each token.
    """

    weight: Float[Tensor, "destination source"]
    """destination W_QK sourceᵀ: what the post draws."""
    destination_bias: Float[Tensor, " destination"]
    """destination W_Q b_K: the same for every source, so softmax does not see it."""
    source_bias: Float[Tensor, " source"]
    """b_Q W_Kᵀ sourceᵀ: what draws attention to a source whatever the destination."""
    constant: Float[Tensor, ""]
    """b_Q · b_K: softmax does not see it."""


@torch.no_grad()
@checked
def qk_circuit(
    model: DecisionTransformer,
    layer: Integer,
    head: Integer,
    destination: Float[Tensor, "destination d_model"],
    source: Float[Tensor, "source d_model"],
    scaled: bool = True,
) -> QKCircuit:
    """Return a head's QK circuit from destination (query) to source (key) embeddings.

    `scaled` divides by √d_head, as attention does; the post's figures do not. Raises ValueError for a head
    that does not exist.
    """
    attn = _attention(model, layer, head)
    scale = model.cfg.d_head**-0.5 if scaled else 1.0
    query, key = destination @ attn.W_Q[head], source @ attn.W_K[head]
    b_Q, b_K = attn.b_Q[head], attn.b_K[head]
    return QKCircuit(query @ key.T * scale, query @ b_K * scale, key @ b_Q * scale, b_Q @ b_K * scale)


class OVCircuit(NamedTuple):
    """The effect of a head on some directions when it attends to a token with weight 1.

    effect = Σ weight + bias, over the rows present in the token; bias once, as attention sums to 1. (b_O is
    the layer's, not the head's.)
    """

    weight: Float[Tensor, "source direction"]
    """source W_OV directions: what the post draws."""
    bias: Float[Tensor, " direction"]
    """b_V W_O directions."""


@torch.no_grad()
@checked
def ov_circuit(
    model: DecisionTransformer,
    layer: Integer,
    head: Integer,
    source: Float[Tensor, "source d_model"],
    directions: Float[Tensor, "d_model direction"] | None = None,
) -> OVCircuit:
    """Return a head's OV circuit from source embeddings to directions, by default the action logits (W_U).

    Raises ValueError for a head that does not exist.
    """
    attn = _attention(model, layer, head)
    written = attn.W_O[head] @ (model.W_U if directions is None else directions)
    return OVCircuit(source @ attn.W_V[head] @ written, attn.b_V[head] @ written)


@torch.no_grad()
def state_maps(model: DecisionTransformer, preference: str) -> Float[Tensor, "channel i j"]:
    """Return each row of the state embedding, dotted with a preference, as view maps (Figure 14).

    Entry [channel, i, j] is what one unit of the encoding's channel at image[i, j] adds to the logit
    difference directly.
    """
    return by_cell(model, model.W_E_state @ preference_direction(model, preference))


def front_cell_table(model: DecisionTransformer, preference: str = "F-R") -> pd.DataFrame:
    """Return what the front cell adds to a preference directly for each thing it can hold (Table 3).

    One row a thing (index "front"), columns object, colour, state (minigrid's codes) and contribution
    (logits).
    """
    front = state_maps(model, preference)[(slice(None), *FRONT)]
    rows = [
        {"front": name, "object": code[0], "colour": code[1], "state": code[2]}
        | {"contribution": _cell_effect(model, front, code)}
        for name, code in CELLS.items()
    ]
    return pd.DataFrame(rows).set_index("front")


def _cell_effect(
    model: DecisionTransformer, front: Float[Tensor, " channel"], code: tuple[int, int, int]
) -> float:
    if model.cfg.encoding == "index":
        return float(front @ torch.tensor(code).to(front))
    parts = channel_slices(model).values()
    return sum(float(front[part][index]) for part, index in zip(parts, code, strict=True))


def _attention(model: DecisionTransformer, layer: int, head: int) -> Attention:
    if layer not in range(model.cfg.n_layers) or head not in range(model.cfg.n_heads):
        raise ValueError(
            f"There is no head L{layer}H{head}; the model has {model.cfg.n_layers} layers "
            f"of {model.cfg.n_heads} heads, counted from 0."
        )
    return model.blocks[layer].attn


# Linear read-outs of the view over every observation

THINGS = tuple(CELLS)
MOMENTS_BATCH = 16384
ThingEffects = Float[np.ndarray, "7 7 4"]
"""What each thing (`THINGS`) in each cell adds to a preference: entry [i, j, thing] is about image[i, j] (logits)."""


class Embeddings(NamedTuple):
    """The direct effect of each row of the embeddings on the action logits: its dot product with W_U."""

    state: Float[np.ndarray, "channel 7 7 action"]
    """One unit of a channel of image[i, j]."""
    rtg: Float[np.ndarray, " action"]
    """A return of 1; it reaches the state token, and so the logits, only through heads."""
    time: Float[np.ndarray, "timestep action"]
    position: Float[np.ndarray, " action"]
    """Of the state token."""
    largest: Float[np.ndarray, " 3"]
    """The largest absolute weight of the object, colour and state channels, in the embedding itself."""

    def on(self, preference: str) -> dict[str, np.ndarray]:
        """Return state, rtg, time and position on a preference such as "F-R" (logits). Raises as `contrast`."""
        weights = contrast(preference, len(self.rtg)).numpy()
        return {name: getattr(self, name) @ weights for name in ("state", "rtg", "time", "position")}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({name: np.ascontiguousarray(value) for name, value in self._asdict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Embeddings":
        """Return what `save` wrote."""
        return cls(**load_file(path))


@torch.no_grad()
def embeddings(model: DecisionTransformer) -> Embeddings:
    """Return what the model's embeddings write on the logits directly. Raises ValueError for a view that is not 7×7."""
    if model.cfg.view_size != 7:
        raise ValueError(
            f"model sees {model.cfg.view_size}×{model.cfg.view_size} cells; the view maps are of 7×7."
        )
    weights = by_cell(model, model.W_E_state)
    largest = [float(weights[part].abs().max()) for part in channel_slices(model).values()]
    rows = (weights, model.W_E_rtg, model.W_E_time, model.W_pos[1])
    state, rtg, time, position = ((row @ model.W_U).numpy() for row in rows)
    return Embeddings(state, rtg, time, position, np.array(largest, np.float32))


def thing_effects(maps: Float[np.ndarray, "channel 7 7"]) -> ThingEffects:
    """Return what each thing in each cell adds, from maps by channel (3, index encoding; 20, one-hot).

    Raises ValueError for another number of channels.
    """
    codes = np.array([*CELLS.values()])
    if len(maps) == 3:
        inputs = codes.astype(np.float64)
    elif len(maps) == sum(ONE_HOT_SIZES):
        starts = np.cumsum((0, *ONE_HOT_SIZES[:-1]))
        inputs = np.zeros((len(codes), len(maps)))
        inputs[np.arange(len(codes))[:, None], codes + starts] = 1
    else:
        raise ValueError(f"maps are of {len(maps)} channels; they must be 3 (index) or 20 (one-hot).")
    return np.einsum("cij,tc->ijt", np.asarray(maps, np.float64), inputs)


class Moments(NamedTuple):
    """The second moments of the view: the share of the states whose observation shows two things in two cells."""

    second: Float64[np.ndarray, "cell_thing cell_thing"]
    """cell_thing counts (i, j, thing), thing fastest; the diagonal is how often a cell holds a thing."""

    @property
    def mean(self) -> Float64[np.ndarray, " cell_thing"]:
        """The share of the states in which each cell holds each thing."""
        return np.diagonal(self.second)

    @property
    def covariance(self) -> Float64[np.ndarray, "cell_thing cell_thing"]:
        """The covariance of these indicators over the states."""
        return self.second - np.outer(self.mean, self.mean)

    def given_front(self, thing: str) -> Float64[np.ndarray, " cell_thing"]:
        """Return how often each cell holds each thing where the cell in front holds `thing`."""
        row = self.second[np.ravel_multi_index((*FRONT, THINGS.index(thing)), (7, 7, len(THINGS)))]
        return row / row.reshape(7, 7, -1)[FRONT].sum()


def moments(observations: ObservationSet) -> Moments:
    """Return the second moments of the view over a set of observations, weighted by the states that show each.

    Raises ValueError where a cell shows something that is not in `THINGS`, or there is no observation.
    """
    objects = np.array([code[0] for code in CELLS.values()], np.uint8)
    total, second = observations.multiplicity.sum(), np.zeros((49 * len(THINGS),) * 2)
    if not total:
        raise ValueError("observations is empty: no mean can be taken over it.")
    for rows in row_batches(len(observations), MOMENTS_BATCH):
        seen = observations.images[rows, ..., 0].reshape(-1, 49, 1) == objects
        if not seen.any(-1).all():
            raise ValueError(f"observations show something else than {', '.join(THINGS)}.")
        x = seen.reshape(len(seen), -1).astype(np.float32)
        second += x.T @ (x * observations.multiplicity[rows, None].astype(np.float32))
    return Moments(second / total)


def _region(*cells: tuple[slice | int, slice | int]) -> Bool[np.ndarray, "7 7"]:
    mask = np.zeros((7, 7), bool)
    for cell in cells:
        mask[cell] = True
    return mask


REGIONS = {
    "front cell": _region((3, 5)),
    "column ahead": _region((3, slice(0, 5))),
    "left": _region((slice(0, 3), slice(None))),
    "right": _region((slice(4, 7), slice(None))),
    "own cell": _region((3, 6)),
}
"""Parts of the view, each cell in one: what is in front, farther ahead, on either side, and under the agent."""


def variance_shares(
    effects: ThingEffects, seen: Moments, groups: Mapping[str, Bool[np.ndarray, "7 7 *things"]] | None = None
) -> pd.DataFrame:
    """Return whose variance the effect's variance over the observations is, one row a group of cells (or of things).

    `share` = covariance of the group's sum with the whole ÷ variance of the whole: the shares of groups that make up
    the view sum to 1, and one is negative where a group works against the others. `alone` = variance of the group's
    sum ÷ that of the whole: larger than the share where groups cancel. `std` is the group's own (logits).
    """
    groups = REGIONS if groups is None else groups
    flat, covariance = effects.reshape(-1), seen.covariance
    whole, rows = flat @ covariance @ flat, {}
    for name, mask in groups.items():
        inside = np.broadcast_to(mask if mask.ndim == 3 else mask[..., None], effects.shape).reshape(-1)
        part = np.where(inside, flat, 0.0)
        variance = max(float(part @ covariance @ part), 0.0)
        share = float(part @ covariance @ flat)
        rows[name] = {"share": share / whole, "alone": variance / whole, "std": variance**0.5}
    return pd.DataFrame(rows).T.rename_axis("group")


class FrontCell(NamedTuple):
    """The part that the cell in front has in a linear effect of the view over the observations."""

    of_itself: float
    """1 − variance of (whole − front cell's own term) ÷ variance of the whole: what taking the rest as constant leaves
    right. Below 0 the rest would vary less if it were all there is."""
    by_content: float
    """Share of the variance that lies between what the front cell can hold (η²): all that knowing it tells, through
    whatever cells it shows."""
    table: pd.DataFrame
    """By what is in front: `share` of the states, `front` (its own term), `rest` and `whole` (means; logits)."""


def front_cell(effects: ThingEffects, seen: Moments) -> FrontCell:
    """Return how far the cell in front explains the effect; see `FrontCell`."""
    flat, covariance = effects.reshape(-1), seen.covariance
    front = np.where(np.broadcast_to(REGIONS["front cell"][..., None], effects.shape), effects, 0.0).reshape(
        -1
    )
    whole, rest = flat @ covariance @ flat, (flat - front) @ covariance @ (flat - front)
    occurring = seen.mean.reshape(7, 7, -1)[FRONT]
    rows = {}
    for k, thing in enumerate(THINGS):
        if occurring[k] > 0:
            mean = seen.given_front(thing)
            row = {"share": occurring[k], "front": effects[(*FRONT, k)], "whole": mean @ flat}
            rows[thing] = row | {"rest": row["whole"] - row["front"]}
    table = pd.DataFrame(rows).T.rename_axis("front")[["share", "front", "rest", "whole"]]
    between = table["share"] @ (table["whole"] - seen.mean @ flat) ** 2
    return FrontCell(float(1 - rest / whole), float(between / whole), table)
