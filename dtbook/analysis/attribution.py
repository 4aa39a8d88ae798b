"""Direct effects on the logits: preference directions, and the exact sum that the logits are.

A *preference* "A-B" is the logit of action A minus that of action B, in minigrid's letters L, R, F; it is
signed so that a positive number favours A. A single letter stands for that logit. A component's contribution
is its dot product with the preference's direction in the residual stream (the post's Figure 3). Without
LayerNorm nothing is approximated: contributions and biases sum to the logits.

What a contribution does not show is what a component does through others: the MLP reads what the heads write.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dtbook.gridworld.kernels import FORWARD
from dtbook.gridworld.rules import ACTIONS
from dtbook.model.config import ONE_HOT_SIZES, Actions, Rtgs, States, Timesteps, one_hot
from dtbook.model.transformer import DecisionTransformer

IMAGE_CHANNELS = ("object", "colour", "state")
LETTERS = {name[0].upper(): index for index, name in enumerate(ACTIONS)}


def contrast(preference: str, n_actions: int = len(ACTIONS)) -> Float[Tensor, " action"]:
    """Return the weights a preference gives the logits: "F-R" is +1 for forward and −1 for right.

    `logits @ contrast("F-R")` is the logit difference. Actions have minigrid's numbers, however many a model has.
    Raises ValueError for any other string, and for an action that is not among them.
    """
    weights = torch.zeros(n_actions)
    letters = preference.split("-")
    if len(letters) > 2 or len(set(letters)) < len(letters) or not set(letters) <= set(LETTERS):
        raise ValueError(f'preference is {preference!r}; it must be L, R, F or a pair of them such as "F-R".')
    check_has_action(n_actions, max(LETTERS[letter] for letter in letters))
    for letter, sign in zip(letters, (1.0, -1.0), strict=False):
        weights[LETTERS[letter]] = sign
    return weights


def check_has_action(n_actions: int, last: int = FORWARD) -> None:
    """Raise ValueError unless there is the action of that number, minigrid's."""
    if n_actions <= last:
        raise ValueError(
            f"n_actions of model is {n_actions}; it must be more than {last}, minigrid's number of {ACTIONS[last]}."
        )


def but_forward(logits: Float[Tensor, "*batch action"]) -> Float[Tensor, "*batch other"]:
    """Return the logits of all other actions: left and right, and what else a model has."""
    check_has_action(logits.shape[-1])
    turns = logits[..., :FORWARD]
    return turns if logits.shape[-1] == len(ACTIONS) else torch.cat([turns, logits[..., FORWARD + 1 :]], -1)


def forward_preference(logits: Float[Tensor, "*batch action"]) -> Float[Tensor, "*batch"]:
    """Return logit F − logsumexp(logit L, logit R, and of any other action): the log odds of moving forward."""
    others = but_forward(logits).logsumexp(-1)
    return logits[..., FORWARD] - others


def forward_over_turns(n_actions: int) -> Float[Tensor, " action"]:
    """Return the weights of the logits in direct attribution: forward against the mean of left and right."""
    left, right, forward = (contrast(letter, n_actions) for letter in LETTERS)
    return forward - (left + right) / 2


def preference_direction(model: DecisionTransformer, preference: str) -> Float[Tensor, " d_model"]:
    """Return the residual-stream direction of a preference (W_U @ contrast).

    Detached, in the model's dtype. The bias b_U @ contrast belongs to no direction and is not in it. Raises as
    `contrast`.
    """
    return model.W_U.detach() @ contrast(preference, model.cfg.n_actions).to(model.W_U)


def channel_slices(model: DecisionTransformer) -> dict[str, slice]:
    """Return which of the encoding's channels hold each of minigrid's three."""
    sizes = (1, 1, 1) if model.cfg.encoding == "index" else ONE_HOT_SIZES
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return {name: slice(end - size, end) for name, end, size in zip(IMAGE_CHANNELS, ends, sizes, strict=True)}


def by_cell(
    model: DecisionTransformer, rows: Float[Tensor, " row *rest"]
) -> Float[Tensor, " channel i j *rest"]:
    """Return what belongs to the rows of W_E_state as view maps: entry [channel, i, j] is about image[i, j].

    `channel` counts the encoding's channels: 3 for indices, 20 for one-hot.
    """
    return rows.unflatten(0, (model.cfg.n_channels, model.cfg.view_size, model.cfg.view_size))


@torch.no_grad()
def state_logits_by_channel(
    model: DecisionTransformer, states: Integer[Tensor, "batch time view view 3"]
) -> dict[str, Float[Tensor, "batch time action"]]:
    """Return what the state embedding adds to the logits directly, split by minigrid's three channels."""
    to_logits = by_cell(model, model.W_E_state @ model.W_U)
    x = one_hot(states) if model.cfg.encoding == "one-hot" else states
    x = x.to(to_logits)
    return {
        name: torch.einsum("btijc,cija->bta", x[..., part], to_logits[part])
        for name, part in channel_slices(model).items()
    }


@torch.no_grad()
def decompose(
    model: DecisionTransformer,
    states: States,
    rtgs: Rtgs,
    timesteps: Timesteps,
    actions: Actions | None = None,
) -> dict[str, Float[Tensor, "batch time action"]]:
    """Return the logits at the state tokens as a sum of components, in the order in which they are written.

    Keys: "state: object", "state: colour", "state: state" (the state embedding by channel), "time",
    "position", then for each layer its heads "L0H0", … (their b_V included), "L0 b_O" and "L0 MLP" (its
    b_out included), at last "b_U". RTG is not among them: it reaches the state token only through heads.
    Multiply by `contrast("F-R")` for contributions to a preference.

    Heads are read at `hook_z` and the MLP at `hook_mlp_out`, so under `model.hooks(...)` that ablate those,
    the sum is that of the ablated run. Invariant: the values sum to the logits of this run; RuntimeError is
    raised where they do not to 1e-5 of the largest component (another activation is being edited). Raises ValueError
    for a model of half precision, whose sums are not exact.
    """
    if model.W_U.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"model is in {model.W_U.dtype}; its logits are a sum only in float32 or float64: model.float()."
        )
    logits, cache = model.run_with_cache(
        states, rtgs, timesteps, actions, names_filter=lambda name: name.endswith(("hook_z", "hook_mlp_out"))
    )
    at_state, W_U = slice(1, None, 3), model.W_U
    parts = {f"state: {name}": value for name, value in state_logits_by_channel(model, states).items()}
    parts["time"] = model.W_E_time[timesteps] @ W_U
    parts["position"] = (model.W_pos[: 3 * states.shape[1]][at_state] @ W_U).expand_as(logits)
    for layer, block in enumerate(model.blocks):
        z, mlp_out = cache["z", layer][:, at_state], cache["mlp_out", layer][:, at_state]
        for head, W_O in enumerate(block.attn.W_O):
            parts[f"L{layer}H{head}"] = z[:, :, head] @ (W_O @ W_U)
        parts[f"L{layer} b_O"] = (block.attn.b_O @ W_U).expand_as(logits)
        parts[f"L{layer} MLP"] = mlp_out @ W_U
    parts["b_U"] = model.b_U.expand_as(logits)
    _assert_sum(parts, logits)
    return parts


def _assert_sum(parts: dict[str, Tensor], logits: Tensor) -> None:
    if not logits.numel():
        return
    stacked = torch.stack(list(parts.values()))
    error = (stacked.sum(0) - logits).abs().max()
    if not error <= 1e-5 * max(1.0, float(stacked.abs().max())):
        raise RuntimeError(f"The components miss the logits by {error:.1e}: an activation between is edited.")
