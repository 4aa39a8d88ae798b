"""Steering and weight edits: pushing a run along a direction, and running the model with other weights.

*Steering* adds a multiple of a vector to an activation, whatever is there (https://arxiv.org/abs/2308.10248); patching
puts another run's activation in its place, ablation one that says nothing. A *weight edit* changes the model itself:
`weights_edited` does it for the length of a `with` and, like all interventions, leaves nothing behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dtbook.analysis.interventions import STATE_TOKENS, Edit, Site, edited, site
from dtbook.model.transformer import DecisionTransformer

STREAM = "blocks.0.hook_resid_pre"
"""The residual stream before the first block: what a direction is added to where nothing else is said."""

WeightEdit = Callable[[Tensor], Tensor]
"""From a weight to what replaces it, of the same shape; it is given a copy."""


def add(vector: Float[Tensor, " width"], multiple: float = 1.0) -> Edit:
    """Return the edit that adds `multiple` · `vector` to an activation."""
    return lambda part: part + multiple * vector.to(part)


@contextmanager
def steer(
    model: DecisionTransformer,
    vector: Float[Tensor, " width"],
    multiple: float = 1.0,
    where: Site | str = STREAM,
    positions: slice | int | None = STATE_TOKENS,
) -> Iterator[DecisionTransformer]:
    """Run the model with `multiple` · `vector` added to an activation at the state tokens.

    `where` is a hook name, a `Site` or a component ("L0H1": its z, "L0 MLP": its output); `positions` are the tokens,
    unless a `Site` says them. Steering by 0 changes nothing, and by a sum is steering by its parts one after the other.
    Added to "blocks.0.hook_resid_post", a vector changes the logits by multiple · vector @ W_U, exactly; added earlier
    it also moves what reads it. Raises ValueError for a site the model does not have, a vector of another width and
    numbers that are not finite, before anything runs.
    """
    pushed = multiple * vector
    if not pushed.isfinite().all():
        wrong = pushed[~pushed.isfinite()][0]
        raise ValueError(
            f"multiple · vector holds {wrong} (multiple is {multiple}); every number must be finite."
        )
    if isinstance(where, str):
        where = replace(site(model, where), positions=positions)
    width = _width(model, site(model, where))
    if vector.shape != (width,):
        raise ValueError(
            f"vector has shape {tuple(vector.shape)}; {where.hook} is steered by one of shape ({width},)."
        )
    with edited(model, (where, add(vector, multiple))):
        yield model


def _width(model: DecisionTransformer, where: Site) -> int:
    """Return how many numbers a vector at a site has."""
    cfg, kind = model.cfg, where.hook.rsplit(".", 1)[-1]
    if kind in ("hook_attn_scores", "hook_pattern"):
        raise ValueError(
            f"where is {where.hook!r}; attention is no vector, so nothing can be added to it: patch it."
        )
    if kind in ("hook_pre", "hook_post"):
        return 1 if where.neuron is not None else cfg.d_mlp
    return cfg.d_head if kind in ("hook_q", "hook_k", "hook_v", "hook_z") else cfg.d_model


def without(direction: Float[Tensor, " d_model"]) -> WeightEdit:
    """Return the weight edit that takes a direction out of what a weight writes: rows @ (1 − d dᵀ / d·d)."""

    def edit(weight: Tensor) -> Tensor:
        d = direction.to(weight)
        return weight - (weight @ d).unsqueeze(-1) * d / (d @ d)

    return edit


@contextmanager
def weights_edited(model: DecisionTransformer, **edits: WeightEdit) -> Iterator[DecisionTransformer]:
    """Run the model with weights replaced by what their edits return; afterwards it has its own again, bit by bit.

    Weights have the names of `model.named_parameters()`, with "_" for "." ("blocks_0_attn_W_Q"), or those of
    TransformerLens for one layer ("W_Q", stacked by head). All edits are made before one is put in. Raises ValueError
    for a weight the model does not have and an edit that changes a shape.
    """
    weights = {_find(model, name): edit for name, edit in edits.items()}
    parameters = dict(model.named_parameters())
    changed = {name: _changed(name, parameters[name].detach(), edit) for name, edit in weights.items()}
    originals = {name: parameters[name].detach().clone() for name in weights}
    try:
        _put(parameters, changed)
        yield model
    finally:
        _put(parameters, originals)


def _find(model: DecisionTransformer, name: str) -> str:
    """Return the parameter that a name means."""
    full = [parameter for parameter, _ in model.named_parameters()]
    matches = [parameter for parameter in full if parameter.replace(".", "_") == name]
    matches = matches or [parameter for parameter in full if parameter.rsplit(".", 1)[-1] == name]
    if len(matches) != 1:
        raise ValueError(f"There is no one weight {name!r}; the model has {', '.join(full)}.")
    return matches[0]


def _changed(name: str, weight: Tensor, edit: WeightEdit) -> Tensor:
    new = edit(weight.clone())
    if new.shape != weight.shape:
        raise ValueError(
            f"The edit of {name} gives shape {tuple(new.shape)}; it must stay {tuple(weight.shape)}."
        )
    return new


@torch.no_grad()
def _put(parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
