"""Weights without a forward pass: embeddings as view maps, and the QK and OV circuits of a head.

Circuits are matrices between embeddings (Elhage et al. 2021): rows are vectors, W_QK = W_Q W_Kᵀ, W_OV = W_V
W_O. Embeddings are any rows of width d_model: `model.W_E_state` (one row for each channel and cell),
`model.W_E_rtg`, `model.W_E_time[[10]]`, `model.W_pos[:2]`, or sums of them. They show linear effects only:
what softmax and the MLP make of them needs a forward pass.
"""

from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from torch import Tensor

from dtbook.analysis.attribution import by_cell, channel_slices, preference_direction
from dtbook.gridworld.rules import FRONT
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
def qk_circuit(
    model: DecisionTransformer,
    layer: int,
    head: int,
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
def ov_circuit(
    model: DecisionTransformer,
    layer: int,
    head: int,
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
