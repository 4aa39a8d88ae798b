"""A model that sees several timesteps: what it makes of those before the last.

A window's tokens are R s a R s a … R s. *Lag* counts timesteps back from the last one, whose state token says the
action. The task is Markov, so the last observation tells all that matters for what happens next; but the data come
from many policies, and which of them an episode is from shows in what went before.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.model.transformer import DecisionTransformer
from dtbook.training import Batch, Sampler, TrainConfig
from dtbook.trajectories.episodes import Trajectories

KINDS = ("RTG", "state", "action")
EXCHANGES = ("RTG", "earlier states", "earlier actions", "last state")
"""Parts of a window that `exchange` takes from another."""
CHUNK = 256


@checked
def windows(data: Trajectories, n_timesteps: Count, n: Whole, seed: Whole = 0) -> Batch:
    """Return n whole windows of consecutive timesteps, drawn as in training: the three classes of return equally.

    They end at any step of an episode that has as many before it. Raises ValueError where there is none.
    """
    if data.lengths.max() < n_timesteps:
        raise ValueError(
            f"n_timesteps is {n_timesteps}; it must be at most the longest episode's, {data.lengths.max()}."
        )
    sampler = Sampler(data, n_timesteps, TrainConfig(batch_size=max(n, 1), last_step_share=0.0))
    rng, parts, n_drawn = np.random.default_rng(seed), [], 0
    while n_drawn < n:
        batch = sampler.batch(rng)
        complete = batch.real.all(1)
        parts.append([value[complete] for value in batch])
        n_drawn += int(complete.sum())
    return Batch(*(torch.cat(values)[:n] for values in zip(*parts, strict=True)))


def _inputs(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield what the model is called with, a chunk of windows at a time."""
    for start in range(0, len(batch.states), CHUNK):
        states, rtgs, timesteps, actions, _ = (value[start : start + CHUNK] for value in batch)
        yield states, rtgs, timesteps, actions[:, :-1]


@torch.inference_mode()
def attention(model: DecisionTransformer, batch: Batch) -> Float[Tensor, "window head query key"]:
    """Return the attention patterns of a model's first layer in each window."""
    hook = "blocks.0.attn.hook_pattern"
    return torch.cat([model.run_with_cache(*inputs, names_filter=hook)[1][hook] for inputs in _inputs(batch)])


@torch.inference_mode()
def last_action(model: DecisionTransformer, batch: Batch) -> Float[Tensor, "window action"]:
    """Return the probabilities of the three actions at the last timestep of each window."""
    return torch.cat([model(*inputs)[:, -1].softmax(-1) for inputs in _inputs(batch)])


def token_names(n_tokens: int) -> list[str]:
    """Return short names of a window's tokens: R-8, s-8, a-8, …, R0, s0; the number is minus the lag."""
    last = (n_tokens - 1) // 3
    return [f"{'Rsa'[pos % 3]}{pos // 3 - last}" for pos in range(n_tokens)]


def looks_back(pattern: Float[Tensor, "window head query key"]) -> pd.DataFrame:
    """Return where the last state token looks: one row a head and token, `head`, `token` (of `KINDS`) and `lag`.

    `mean` is the mean attention over the windows, `low` and `high` its 5 % and 95 % quantiles. Invariant: the means of
    a head sum to 1.
    """
    last = pattern[:, :, -1].double().numpy()
    low, high = np.quantile(last, [0.05, 0.95], axis=0)
    n_timesteps, rows = (last.shape[2] + 2) // 3, []
    for head in range(last.shape[1]):
        for pos in range(last.shape[2]):
            row = {"head": f"L0H{head}", "token": KINDS[pos % 3], "lag": n_timesteps - 1 - pos // 3}
            row |= {"mean": last[:, head, pos].mean(), "low": low[head, pos], "high": high[head, pos]}
            rows.append(row)
    return pd.DataFrame(rows)


def exchange(batch: Batch, part: str) -> Batch:
    """Return the windows with one part taken from the window before it in the batch; inputs stay as they are.

    Timesteps and all other parts stay a window's own. Raises ValueError for a part that is not one of `EXCHANGES`.
    """
    if part not in EXCHANGES:
        raise ValueError(f"part is {part!r}; it must be one of {', '.join(map(repr, EXCHANGES))}.")
    states, actions = batch.states.clone(), batch.actions.clone()
    if part == "earlier states":
        states[:, :-1] = batch.states.roll(1, 0)[:, :-1]
    elif part == "last state":
        states[:, -1] = batch.states.roll(1, 0)[:, -1]
    elif part == "earlier actions":
        actions[:, :-1] = batch.actions.roll(1, 0)[:, :-1]
    rtgs = batch.rtgs.roll(1, 0) if part == "RTG" else batch.rtgs
    return batch._replace(states=states, actions=actions, rtgs=rtgs)


def moved(model: DecisionTransformer, batch: Batch) -> pd.Series:
    """Return by how much each exchange moves the action probabilities: mean total variation distance, from 0 to 1."""
    intact = last_action(model, batch)
    distances = {
        part: float((last_action(model, exchange(batch, part)) - intact).abs().sum(1).mean() / 2)
        for part in EXCHANGES
    }
    return pd.Series(distances)
