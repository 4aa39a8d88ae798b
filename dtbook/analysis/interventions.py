"""Ablation, activation patching and path patching: a run of the model with some activations replaced.

All of them are context managers: `with ablate(model, "L0H1"): logits = model(...)`. Inside, the model is edited,
whatever it is called with, any number of times and in batches of any size; afterwards, also after an
exception, no hook of theirs is left. Activations are copied before they are edited, so inputs and caches
stay as they are. Contexts nest: edits of one activation are made in the order in which they were entered.

What is edited is named as in TransformerLens: a hook name, "blocks.0.hook_mlp_out", for a whole activation, or a
component: "L0H1" (a head, at `hook_z`), "L0 MLP" (at `hook_mlp_out`, its b_out included), "L0N17" (a neuron, at
`mlp.hook_post`), each at the state tokens, where the actions are read. A `Site` says the same in full.

*Base* is the run that is edited, *source* the cached run whose activations replace its own. (TransformerLens calls
them corrupted and clean where it patches a clean activation into a corrupted run.)

Sources: https://arxiv.org/abs/2202.05262 (activation patching), https://arxiv.org/abs/2211.00593 (path patching).
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from dtbook.artifacts.parameters import Count, Integer, Whole, check, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.situations import MODEL_BATCH, batches
from dtbook.model.transformer import DecisionTransformer

Edit = Callable[[Tensor], Tensor]
"""From the part of an activation that is at a site to what replaces it; it must not edit it in place."""
Cache = Mapping[str, Tensor] | ActivationCache

EVERYWHERE = slice(None)
RTG_TOKENS, STATE_TOKENS, ACTION_TOKENS = (slice(offset, None, 3) for offset in range(3))

EMBEDDINGS = {"rtg": RTG_TOKENS, "state": STATE_TOKENS, "action": ACTION_TOKENS, "time": EVERYWHERE}
"""Embeddings that can send along a path, and the tokens they are in."""

_COMPONENT = re.compile(r"L(\d+)(?:H(\d+)|N(\d+)| MLP)")
_READER = re.compile(r"(L\d+H\d+) ([QKV])")
_HEAD_AXIS = {"hook_pattern": 1, "hook_attn_scores": 1} | {
    f"hook_{name}": 2 for name in ("q", "k", "v", "z", "result", "q_input", "k_input", "v_input")
}
_NEURONS = ("hook_pre", "hook_post")


@dataclass(frozen=True)
class Site:
    """Part of an activation: of one hook, all of it or one head, some tokens, one neuron."""

    hook: str
    """Its full name, such as "blocks.0.attn.hook_z"; the axes are in `dtbook.model`."""
    head: int | None = None
    """One head, of a hook that has heads; else all."""
    positions: slice | int | None = None
    """Tokens (R₀ s₀ a₀ R₁ …), or timesteps of an embedding; None: all. In attention scores and patterns: queries."""
    neuron: int | None = None
    """One neuron, of `mlp.hook_pre` and `mlp.hook_post`; else all."""

    def __post_init__(self) -> None:
        for name in ("head", "positions", "neuron"):
            if not isinstance(number := getattr(self, name), slice | None):
                object.__setattr__(self, name, check(f"Site.{name}", number, Integer))

    @property
    def index(self) -> tuple[slice, ...]:
        """The index that cuts the site out of the activation, keeping all its axes."""
        kind = self.hook.rsplit(".", 1)[-1]
        head, positions, neuron = _as_slice(self.head), _as_slice(self.positions), _as_slice(self.neuron)
        if kind in _NEURONS:
            return EVERYWHERE, positions, neuron
        return (EVERYWHERE, head, positions) if _HEAD_AXIS.get(kind) == 1 else (EVERYWHERE, positions, head)

    def of(self, value: Tensor, run: str) -> Tensor:
        """Return this part of an activation; raises ValueError where the run has none of these positions."""
        part, axis = value[self.index], 3 - _HEAD_AXIS.get(self.hook.rsplit(".", 1)[-1], 2)
        if value.numel() and not part.numel():
            raise ValueError(
                f"positions is {self.positions} at {self.hook}; {run} has positions 0 to {value.shape[axis] - 1}."
            )
        return part


def _as_slice(index: slice | int | None) -> slice:
    if index is None or isinstance(index, slice):
        return index or EVERYWHERE
    index = operator.index(index)
    return slice(index, index + 1 or None)  # −1 is the last, and −1 + 1 = 0 would end before it


def site(model: DecisionTransformer, where: Site | str, positions: slice | int | None = STATE_TOKENS) -> Site:
    """Return the site that `where` names, after checking that the model has it.

    `positions` is where a component ("L0H1", "L0 MLP", "L0N17") is taken; a hook name is the whole activation and
    a `Site` stays as it is. Raises ValueError for whatever the model does not have.
    """
    if isinstance(where, str) and (match := _COMPONENT.fullmatch(where)):
        layer, head, neuron = (None if number is None else int(number) for number in match.groups())
        kind = (
            "hook_mlp_out" if head is neuron is None else "attn.hook_z" if neuron is None else "mlp.hook_post"
        )
        _check_number("layer", layer, model.cfg.n_layers, where)
        where = Site(f"blocks.{layer}.{kind}", head, positions, neuron)
    where = where if isinstance(where, Site) else Site(where)
    _check_site(model, where)
    return where


def _check_site(model: DecisionTransformer, where: Site) -> None:
    if not isinstance(where.hook, str) or where.hook not in model.hook_dict:
        raise ValueError(
            f'There is no hook or component {where.hook!r}; name a hook of the model, such as "blocks.0.attn.hook_z", '
            f'or a component, such as "L0H1", "L0 MLP" or "L0N17", each by itself.'
        )
    kind = where.hook.rsplit(".", 1)[-1]
    for name, number, has in (
        ("head", where.head, kind in _HEAD_AXIS),
        ("neuron", where.neuron, kind in _NEURONS),
    ):
        if number is not None and not has:
            raise ValueError(f"{name} is {number}, but {where.hook} has no {name}s.")
    _check_number("head", where.head, model.cfg.n_heads, where.hook)
    _check_number("neuron", where.neuron, model.cfg.d_mlp, where.hook)
    if where.positions is None:
        return
    of_timesteps = kind in ("hook_rtg_embed", "hook_state_embed", "hook_action_embed", "hook_time_embed")
    n_pos = model.cfg.n_timesteps if of_timesteps else 3 * model.cfg.n_timesteps - 1
    is_there = isinstance(where.positions, slice | Integral) and range(n_pos)[_as_slice(where.positions)]
    if not is_there:
        raise ValueError(
            f"positions is {where.positions} at {where.hook}; this model has positions 0 to {n_pos - 1}: give one of "
            "them, a slice or None."
        )


def _check_number(name: str, number: int | None, count: int, where: str) -> None:
    if number is not None and not (isinstance(number, Integral) and number in range(count)):
        allowed = f"0 to {count - 1}" if count else "none"
        raise ValueError(f"{name} is {number} in {where!r}; this model has {name}s {allowed}.")


@contextmanager
def edited(model: DecisionTransformer, *edits: tuple[Site | str, Edit]) -> Iterator[DecisionTransformer]:
    """Run the model with each site's activation replaced by what its edit returns for it.

    Raises ValueError for a site the model does not have, before anything runs.
    """
    checked = [(site(model, where), edit) for where, edit in edits]
    with model.hooks(fwd_hooks=[(where.hook, _hook(where, edit)) for where, edit in checked]):
        yield model


def _hook(where: Site, edit: Edit) -> Callable[..., Tensor]:
    def hook_function(value: Tensor, hook: Any) -> Tensor:
        new, part = value.clone(), where.of(value, "this run")
        replacement = edit(part)
        if not isinstance(replacement, Tensor):
            raise ValueError(f"What replaces {where.hook} is {replacement!r}; it must be a tensor.")
        if not _fits(replacement, part):
            raise ValueError(
                f"What replaces {where.hook} has shape {tuple(replacement.shape)}; "
                f"it must fit {tuple(part.shape)}: run both on as many rows and timesteps."
            )
        new[where.index] = replacement
        return new

    return hook_function


def _fits(replacement: Tensor, part: Tensor) -> bool:
    missing = part.ndim - replacement.ndim
    pairs = zip(replacement.shape, part.shape[max(missing, 0) :], strict=False)
    return missing >= 0 and all(has in (1, wants) for has, wants in pairs)


# Ablation: what a component writes is replaced by something that says nothing about this input.


@contextmanager
def ablate(
    model: DecisionTransformer,
    *components: str | Site,
    to: Edit | Tensor | float = torch.zeros_like,
    positions: slice | int | None = STATE_TOKENS,
) -> Iterator[DecisionTransformer]:
    """Run the model with components ("L0H1", "L0 MLP", "L0N17") ablated at the state tokens.

    `to` says what they write instead: nothing (the default), a number or tensor such as their mean, or an edit such as
    `feature_mean`. To give each its own, nest contexts. Biases stay: b_O belongs to no head, while b_out is part of
    "L0 MLP". Raises ValueError for a component the model does not have, and for another `to`, before anything runs.
    """
    if not (callable(to) or isinstance(to, Tensor | Real)):
        raise ValueError(f"to is {to!r}; it must be a number, a tensor or an edit, such as feature_mean.")
    edit = to if callable(to) else constant(to)
    with edited(model, *((site(model, component, positions), edit) for component in components)):
        yield model


def feature_mean(value: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
    """Return each vector's own mean over its features, in all of them: what the post's app calls mean ablation.

    It averages over the width of a head (64) or of the stream (128), not over a data set, so what is left of
    the vector is one number, spread evenly: close to zero ablation. (A single neuron is its own mean.)
    """
    return value.mean(-1, keepdim=True).expand_as(value)


def constant(value: Float[Tensor, "..."] | float) -> Edit:
    """Return the edit that puts `value` everywhere, for instance a component's mean over a data set.

    Raises ValueError where one of its numbers is NaN. (Attention scores may well be −inf.)
    """
    numbers = torch.as_tensor(value)
    if numbers.isnan().any():
        raise ValueError(f"value has {int(numbers.isnan().sum())} entries that are NaN; there must be none.")
    return lambda part: numbers.to(part)


@torch.no_grad()
def component_outputs(
    model: DecisionTransformer, component: str | Site, *inputs: Tensor | None
) -> Float[Tensor, "batch time *width"]:
    """Return a component's activation at the state tokens: z (d_head) of a head, a number for a neuron.

    `inputs` are what the model is called with.
    """
    where = site(model, component)
    _, cache = model.run_with_cache(*inputs, names_filter=where.hook)
    value = where.of(cache[where.hook], "this run")
    if where.head is not None:
        value = value.squeeze(2)
    return value.squeeze(-1) if where.neuron is not None else value


@checked
def mean_output(
    model: DecisionTransformer,
    component: str | Site,
    observations: ObservationSet,
    rtg: float,
    timestep: Whole,
    batch_size: Count = MODEL_BATCH,
) -> Float[Tensor, "*width"]:
    """Return the weighted mean of a component's activation over a set of observations, for `constant`."""
    means = [
        torch.tensordot(batch.weights, component_outputs(model, component, *batch.inputs)[:, 0].double(), 1)
        for batch in batches(observations, rtg, timestep, batch_size)
    ]
    return torch.stack(means).sum(0).to(model.W_U.dtype)


# Activation patching: an activation is replaced by that of another run.


@contextmanager
def patch(model: DecisionTransformer, source: Cache, *sites: Site | str) -> Iterator[DecisionTransformer]:
    """Run the model with these activations taken from another run: `_, source = model.run_with_cache(...)`.

    Called on as many rows as the source run had, or after a source run of one row on any number. Patching a
    run with itself changes nothing; patching "blocks.0.hook_resid_pre" gives the source's logits. Raises
    ValueError for a site that the model does not have or the source did not cache, before anything runs.
    """
    checked = [site(model, where) for where in sites]
    parts = [where.of(_cached(source, where.hook, "source"), "source") for where in checked]
    with edited(model, *((where, constant(part)) for where, part in zip(checked, parts, strict=True))):
        yield model


def _cached(cache: Cache, hook: str, name: str) -> Tensor:
    if hook not in cache.keys():  # noqa: SIM118 (`in` an ActivationCache goes through its items)
        raise ValueError(f"{name} holds no {hook}; cache it in that run.")
    return cache[hook]


# Path patching: one component's change reaches one other that reads it, and nothing else.


@contextmanager
def path_patch(
    model: DecisionTransformer,
    base: Cache,
    source: Cache,
    sender: str,
    receiver: str,
    positions: slice | int | None = None,
) -> Iterator[DecisionTransformer]:
    """Run the model on the base inputs with one edge, sender → receiver, carrying what the source run sent.

    Senders: "L0H1", "L0 MLP", "L0N17", and the embeddings "rtg", "state", "action", "time". Receivers: "L0H1 Q",
    "L0H1 K", "L0H1 V", "L0 MLP", "logits". `positions` are the tokens at which the receiver gets it.

    A receiver reads the sum of what is written before it, and no LayerNorm stands between, so replacing one
    writer adds (its write in the source run − in the base run) to what this receiver reads: nothing need be
    frozen and nothing is approximated. What the receiver makes of it flows on as usual; to stop it at a later
    MLP, nest `patch(model, base, "blocks.0.hook_mlp_out")`. `base` and `source` are caches of the two runs and must
    hold what the sender writes. Raises ValueError for an edge that does not exist, before anything runs.
    """
    writes, reads = _depth_of_sender(model, sender), _receiving_site(model, receiver, positions)
    if writes >= reads[0]:
        raise ValueError(f"{receiver} reads before {sender} writes, so there is no path between them.")
    change = written(model, source, sender) - written(model, base, sender)
    if reads[1].head is not None:
        change = change.unsqueeze(2)  # one copy of the stream a head
    # index without the head: the change has but one
    sent = change[replace(reads[1], head=None).index]
    with edited(model, (reads[1], lambda part: part + sent.to(part))):
        yield model


@torch.no_grad()
def written(model: DecisionTransformer, cache: Cache, sender: str) -> Float[Tensor, "batch pos d_model"]:
    """Return what a sender of `path_patch` writes into the residual stream in a cached run.

    Raises ValueError for an unknown sender and one whose activation is not in the cache.
    """
    if sender in EMBEDDINGS:
        return _embedding(_cached(cache, f"hook_{sender}_embed", "The cache"), sender, model)
    where = site(model, sender)
    value, block = _cached(cache, where.hook, "The cache"), model.blocks[_layer(where)]
    if where.head is not None:
        return value[:, :, where.head] @ block.attn.W_O[where.head]
    if where.neuron is not None:
        return value[:, :, where.neuron, None] * block.mlp.W_out[where.neuron]
    return value


def _embedding(value: Tensor, sender: str, model: DecisionTransformer) -> Tensor:
    """Return an embedding, one vector a timestep, at the tokens it is in."""
    n_timesteps = value.shape[1] + (sender == "action")  # the last timestep's action is never given
    stream = value.new_zeros(value.shape[0], 3 * n_timesteps - 1, model.cfg.d_model)
    stream[:, EMBEDDINGS[sender]] = (
        value.repeat_interleave(3, 1)[:, :-1] if sender == "time" else value  # all three tokens have the time
    )
    return stream


def _layer(where: Site) -> int:
    return int(where.hook.split(".")[1])


def _depth_of_sender(model: DecisionTransformer, sender: str) -> int:
    """Return when a sender has written: 0 for embeddings, 1 and 2 for heads and MLP of layer 0, and so on."""
    if sender in tuple(EMBEDDINGS):
        return 0
    if not _COMPONENT.fullmatch(f"{sender}"):
        allowed = ", ".join(f'"{name}"' for name in EMBEDDINGS)
        raise ValueError(f'sender is {sender!r}; it must be {allowed}, or like "L0H1", "L0 MLP" or "L0N17".')
    where = site(model, sender)
    return 2 * _layer(where) + (1 if where.head is not None else 2)


def _receiving_site(
    model: DecisionTransformer, receiver: str, positions: slice | int | None
) -> tuple[int, Site]:
    """Return where a receiver reads, and the first depth whose writes it does not see."""
    n_layers = model.cfg.n_layers
    if not n_layers:
        raise ValueError(
            f"receiver is {receiver!r}, but in a model without layers the embedding is all there is."
        )
    if receiver == "logits":
        return 2 * n_layers + 1, site(model, Site(f"blocks.{n_layers - 1}.hook_resid_post", None, positions))
    if match := _READER.fullmatch(f"{receiver}"):
        head = site(model, match[1])
        hook = f"blocks.{_layer(head)}.hook_{match[2].lower()}_input"
        return 2 * _layer(head) + 1, site(model, Site(hook, head.head, positions))
    if f"{receiver}".endswith(" MLP") and _COMPONENT.fullmatch(f"{receiver}"):
        layer = _layer(site(model, receiver))
        return 2 * layer + 2, site(model, Site(f"blocks.{layer}.hook_mlp_in", None, positions))
    raise ValueError(
        f'receiver is {receiver!r}; it must be like "L0H1 Q", "L0H1 K", "L0H1 V" or "L0 MLP", or "logits".'
    )
