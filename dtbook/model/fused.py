"""One timestep through one layer, by hand: the Decision Transformer's fast path.

RTG and state token differ by δ = R·W_E_rtg + W_pos[0] − W_pos[1] − state embedding: time and biases cancel in the
difference of their keys and values. Only the state token's query is needed, so with s its residual stream

    a_h    = sigmoid((s W_Q[h] + b_Q[h]) · (δ W_K[h]) / √d_head)      attention to the RTG token
    z_h    = (s + a_h δ) W_V[h] + b_V[h]                              mixing comes before the one product with W_V
    m      = s + Σ_h z_h W_O[h] + b_O                                 the stream between attention and MLP
    logits = m W_U + relu(m W_in + b_in) (W_out W_U) + b_out W_U + b_U

Of the d_model numbers that the MLP writes only the three logits are read, so W_out W_U is multiplied out once instead
of row by row. Up to rounding this is `DecisionTransformer.forward`; the tests hold the logits against it. The way back
is `gradients`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, fresh: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a module computes what a fresh one does, the values of its weights aside.

    It must be made of the same types and hold nothing that the fresh one lacks: no hook, no attribute (a method that
    was exchanged would be one), no buffer; its parameters must be leaves of the same shapes, all of one type and place.
    """
    mine, theirs = module.__dict__, fresh.__dict__
    if type(module) is not type(fresh) or mine.keys() != theirs.keys():
        return False
    for hooks in _HOOKS:
        if mine[hooks]:
            return False
    for kind in ("_parameters", "_buffers", "_modules"):
        if mine[kind].keys() != theirs[kind].keys():
            return False
    for name, weight in mine["_parameters"].items():
        if not _is_plain_weight(weight, theirs["_parameters"][name], dtype, device):
            return False
    parts = mine["_modules"].items()
    return all(is_plain(part, theirs["_modules"][name], dtype, device) for name, part in parts)


def _is_plain_weight(weight: Tensor, like: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    alike = type(weight) is nn.Parameter and weight.is_leaf and weight.shape == like.shape
    hooked = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return alike and not hooked and weight.dtype == dtype and weight.device == device


class Weights(NamedTuple):
    """The weights of a layer and its unembedding, and the embeddings that δ is made of; shapes as in the model."""

    W_E_rtg: Float[Tensor, " d_model"]
    W_pos: Float[Tensor, "pos d_model"]
    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    b_V: Float[Tensor, "head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    W_U: Float[Tensor, "d_model action"]
    b_U: Float[Tensor, " action"]


def _wide(weight: Tensor) -> Tensor:
    """Return weights (head, d_model, d_head) as one matrix (d_model, head · d_head)."""
    return weight.transpose(0, 1).flatten(1)


def one_timestep(
    state: Float[Tensor, "batch d_model"],
    time: Float[Tensor, "batch d_model"],
    rtgs: Float[Tensor, " batch"],
    w: Weights,
) -> Float[Tensor, "batch action"]:
    """Return the logits, given state and time embeddings."""
    heads, d_head = w.b_Q.shape
    stream = (state + time).add_(w.W_pos[1])
    delta = torch.addcmul(w.W_pos[0] - w.W_pos[1], rtgs.unsqueeze(1), w.W_E_rtg).sub_(state)
    q = torch.addmm(w.b_Q.flatten(), stream, _wide(w.W_Q)).unflatten(1, (heads, d_head))
    dk = (delta @ _wide(w.W_K)).unflatten(1, (heads, d_head))
    to_rtg = ((q * dk).sum(-1).T / d_head**0.5).sigmoid_().unsqueeze(-1)
    mixed = torch.addcmul(stream, to_rtg, delta)
    z = torch.baddbmm(w.b_V.unsqueeze(1), mixed, w.W_V).transpose(0, 1).flatten(1)
    mid = torch.addmm(stream, z, w.W_O.flatten(0, 1)).add_(w.b_O)
    post = torch.addmm(w.b_in, mid, w.W_in).relu_()
    W_U = w.W_U.T.contiguous()  # products with 3 long rows are four times as fast as with 3 short columns
    return torch.addmm(W_U @ w.b_out + w.b_U, mid, W_U.T).addmm_(post, (W_U @ w.W_out.T).T)
