"""One timestep through one layer, forward and backward by hand: the Decision Transformer's fast path.

RTG and state token differ by δ = R·W_E_rtg + W_pos[0] − W_pos[1] − state embedding: time and biases cancel in the
difference of their keys and values. Only the state token's query is needed, so with s its residual stream

    a_h    = sigmoid((s W_Q[h] + b_Q[h]) · (δ W_K[h]) / √d_head)      attention to the RTG token
    z_h    = (s + a_h δ) W_V[h] + b_V[h]                              mixing comes before the one product with W_V
    m      = s + Σ_h z_h W_O[h] + b_O                                 the stream between attention and MLP
    logits = m W_U + relu(m W_in + b_in) (W_out W_U) + b_out W_U + b_U

Of the d_model numbers that the MLP writes only the three logits are read, so W_out W_U is multiplied out once instead
of row by row. Up to rounding this is `DecisionTransformer.forward`; the tests hold logits and gradients against it.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class _Activations(NamedTuple):
    """The activations that the backward pass reads again."""

    stream: Float[Tensor, "batch d_model"]
    delta: Float[Tensor, "batch d_model"]
    q: Float[Tensor, "batch head d_head"]
    dk: Float[Tensor, "batch head d_head"]
    to_rtg: Float[Tensor, "head batch 1"]
    """a_h."""
    mixed: Float[Tensor, "head batch d_model"]
    """s + a_h δ."""
    z: Float[Tensor, "batch head*d_head"]
    mid: Float[Tensor, "batch d_model"]
    post: Float[Tensor, "batch d_mlp"]


def one_timestep(
    state: Float[Tensor, "batch d_model"],
    time: Float[Tensor, "batch d_model"],
    rtgs: Float[Tensor, " batch"],
    weights: Weights,
) -> Float[Tensor, "batch action"]:
    """Return the logits, given state and time embeddings; all arguments receive gradients, of first order only."""
    if not torch.is_grad_enabled():
        return _forward(state, time, rtgs, weights)[0]
    return _OneTimestep.apply(state, time, rtgs, *weights)


def _wide(weight: Tensor) -> Tensor:
    """Return weights (head, d_model, d_head) as one matrix (d_model, head · d_head)."""
    return weight.transpose(0, 1).flatten(1)


def _forward(state: Tensor, time: Tensor, rtgs: Tensor, w: Weights) -> tuple[Tensor, _Activations]:
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
    logits = torch.addmm(W_U @ w.b_out + w.b_U, mid, W_U.T).addmm_(post, (W_U @ w.W_out.T).T)
    return logits, _Activations(stream, delta, q, dk, to_rtg, mixed, z, mid, post)


class _OneTimestep(torch.autograd.Function):
    """In `backward` a variable holds the gradient of what it is named after."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, time: Tensor, rtgs: Tensor, *weights: Tensor) -> Tensor:
        logits, activations = _forward(state, time, rtgs, Weights(*weights))
        ctx.save_for_backward(rtgs, *weights, *activations)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logits: Tensor) -> tuple[Tensor, ...]:
        rtgs, *saved = ctx.saved_tensors
        w, x = Weights(*saved[: len(Weights._fields)]), _Activations(*saved[len(Weights._fields) :])
        mid, end = _mlp_backward(logits, w, x)
        stream, delta, attention = _attention_backward(mid, w, x)
        W_pos, of_delta = torch.zeros_like(w.W_pos), delta.sum(0)
        W_pos[0], W_pos[1] = of_delta, stream.sum(0) - of_delta
        weights = Weights(W_E_rtg=rtgs @ delta, W_pos=W_pos, **attention, **end)
        return stream - delta, stream, delta @ w.W_E_rtg, *weights


def _mlp_backward(logits: Tensor, w: Weights, x: _Activations) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradients of the stream before the MLP, and of the weights from there to the logits."""
    W_U, rows, b_U = w.W_U.T.contiguous(), logits.T.contiguous(), logits.sum(0)
    product = rows @ x.post  # the gradient of (W_out W_U)ᵀ
    pre = torch.ops.aten.threshold_backward(logits @ (W_U @ w.W_out.T), x.post, 0)  # zero where post is
    mid = (logits @ W_U).addmm_(pre, w.W_in.T)
    return mid, {
        "W_in": x.mid.T @ pre,
        "b_in": pre.sum(0),
        "W_out": product.T @ W_U,
        "b_out": b_U @ W_U,
        "W_U": (rows @ x.mid).addmm_(product, w.W_out).addr_(b_U, w.b_out).T,
        "b_U": b_U,
    }


def _attention_backward(mid: Tensor, w: Weights, x: _Activations) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the gradients of the stream before attention, of δ, and of the layer's attention weights."""
    by_head = w.b_Q.shape
    z = (mid @ w.W_O.flatten(0, 1).T).unflatten(1, by_head).transpose(0, 1)
    mixed = z @ w.W_V.transpose(1, 2)
    slope = x.to_rtg * (1 - x.to_rtg) / by_head[1] ** 0.5  # of the sigmoid, and of the scores' scale
    scores = ((mixed * x.delta).sum(-1, keepdim=True) * slope).transpose(0, 1)
    q, dk = (scores * x.dk).flatten(1), (scores * x.q).flatten(1)
    gradients = {
        "W_Q": (x.stream.T @ q).unflatten(1, by_head).transpose(0, 1),
        "b_Q": q.sum(0).view(by_head),
        "W_K": (x.delta.T @ dk).unflatten(1, by_head).transpose(0, 1),
        "W_V": x.mixed.transpose(1, 2) @ z,
        "b_V": z.sum(1),
        "W_O": (x.z.T @ mid).view_as(w.W_O),
        "b_O": mid.sum(0),
    }
    stream = mid.add_(mixed.sum(0)).addmm_(q, _wide(w.W_Q).T)
    delta = mixed.mul_(x.to_rtg).sum(0).addmm_(dk, _wide(w.W_K).T)
    return stream, delta, gradients
