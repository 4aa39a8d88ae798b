"""Causal effects over every observation: what carries the difference between a run and its counterfactual.

A *case* is a set of observations and one change: the front cell emptied, or another return asked for. The *clean* run
is the one before the change, the *source* run the one after it. Activation patching puts an activation of one run into
the other; path patching lets one reader only see the change of one writer. The measure is the forward preference,
logit F − logsumexp(logit L, logit R), and P(forward), its logistic function; effects are signed as the whole change is,
source − clean, so that effect ÷ whole change is a share: 1 for what does all of it, 0 for what does nothing of it.

One layer only: with two tokens, what another run's RTG token can change is the keys and values of the heads, and what
its state token can change is the queries too, the heads' outputs, the MLP, and what the embedding says directly.
All of this is exact (`population`); `interventions` does the same with hooks, for small batches.

Sources: https://arxiv.org/abs/2202.05262 (activation patching), https://arxiv.org/abs/2211.00593 (path patching).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.heads import forward_preference
from dtbook.analysis.population import BATCH_SIZE, Folded, Run
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.situations import SITUATIONS, select, weights, without_front
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, RTGS, TIMESTEP

FORWARD = (-0.5, -0.5, 1.0)
"""The weights of the logits in direct attribution: forward against the mean of left and right."""
INTO_CLEAN, INTO_SOURCE = "into the clean run", "into the source run"


class Case(NamedTuple):
    """Which observations are shown, and what is changed."""

    situation: str
    """One of `situations.SITUATIONS`."""
    rtg: float
    """The return asked for in the clean run."""
    source_rtg: float
    """That of the source run; where it is the same, the front cell is emptied instead."""

    @property
    def change(self) -> str:
        """What the source run has changed."""
        if self.rtg == self.source_rtg:
            return "front cell → empty"
        return f"RTG {self.rtg:g} → {self.source_rtg:g}".replace("-", "−")


FRONT_CASES = tuple(
    Case(situation, rtg, rtg) for rtg in RTGS for situation in SITUATIONS if situation != "empty"
)
CASES = (*FRONT_CASES, *(Case(situation, -1.0, HIGH) for situation in SITUATIONS if situation != "empty"))
"""obstacle, wall and goal → empty at each return of the post's Table 1, and RTG −1 → 0.9 with each of them in front."""


class Pair(NamedTuple):
    """A batch of observations in the clean and in the source run."""

    clean: Run
    source: Run
    weights: Float[Tensor, " n"]
    """Shares of the whole case, summing to 1 over its batches."""

    def swapped(self) -> "Pair":
        """Return the pair with the runs exchanged."""
        return Pair(self.source, self.clean, self.weights)


def pairs(
    folded: Folded, observations: ObservationSet, case: Case, timestep: int = TIMESTEP
) -> Iterator[Pair]:
    """Yield a case's observations batch by batch, with float64 weights; raises ValueError where there are none."""
    chosen = select(observations, case.situation)
    share = torch.from_numpy(weights(chosen))
    for start in range(0, len(share), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        images = torch.from_numpy(chosen.images[rows])
        shared = folded.share(images)
        other = folded.share(without_front(images)) if case.rtg == case.source_rtg else shared
        yield Pair(shared.at(case.rtg, timestep), other.at(case.source_rtg, timestep), share[rows])


# What attends, what is attended to, and what follows from another run's


class Scores(NamedTuple):
    """What the attention of the state token is made of, head by head; time and biases that cancel are left out."""

    query: Float[Tensor, "*head n d_head"]
    rtg_key: Float[Tensor, "*head 1 d_head"]
    state_key: Float[Tensor, "*head n d_head"]

    def pattern(self) -> Float[Tensor, "*head n"]:
        """Return the attention to the RTG token."""
        products = (self.query * (self.rtg_key - self.state_key)).sum(-1)
        return torch.sigmoid(products / self.query.shape[-1] ** 0.5)


@torch.no_grad()
def scores(run: Run) -> Scores:
    """Return the queries and keys of a run; their `pattern()` is the run's own."""
    f, attn = run.shared.folded, run.shared.folded.model.blocks[0].attn
    rtg, timestep = run.condition
    query = (f.time[timestep] @ attn.W_Q + attn.b_Q)[:, None] + run.shared.q
    return Scores(query, ((rtg * f.rtg + f.key) @ attn.W_K)[:, None], run.shared.k)


Write = Float[Tensor, "n reader"]


def head_write(run: Run, head: int, pattern: Tensor | None = None, value: Tensor | None = None) -> Write:
    """Return what one head writes on the readers, with its own attention to RTG (n) and values or with others."""
    pattern = run.pattern[head] if pattern is None else pattern
    value = run.shared.value[head] if value is None else value
    written = torch.lerp(value, run.rtg_value[head], pattern.unsqueeze(-1)).add_(run.time_value[head])
    return written[:, :-1]


def activation_patches(pair: Pair) -> Iterator[tuple[str, str, Float[Tensor, "n action"]]]:
    """Yield (token, site, logits): the clean run with the source's activation at one site of one token.

    Sites of a token are its embedding and, for each head, "L0H1 Q", "L0H1 K" and "L0H1 V"; of the state token also the
    attention pattern, the head's output "L0H1", all "heads", and "L0 MLP". The logits are read at the state token, so
    of the RTG token nothing else matters. Where the runs share a token, its sites are left out: they change nothing.
    """
    clean, source, _ = pair
    read, other_read = (run.read(run.heads()) for run in (clean, source))
    for head, name in enumerate(clean.shared.folded.heads):
        own = head_write(clean, head)
        for token, part, write in _head_writes(pair, head):
            yield token, f"{name} {part}".removesuffix(" output"), clean.finish(read + (write - own))
    yield "state", "heads", clean.logits(source.heads())
    yield "state", "L0 MLP", clean.finish(read, source.mlp(other_read))
    if clean.condition != source.condition:
        yield "RTG", "embedding", clean.shared.at(*source.condition).logits()
    if clean.shared is not source.shared:
        yield "state", "embedding", source.shared.at(*clean.condition).logits()


def _head_writes(pair: Pair, head: int) -> Iterator[tuple[str, str, Write]]:
    """(token, part, what the head writes) with one thing that it reads or makes taken from the source."""
    clean, source, _ = pair
    mine, theirs = (Scores(*(part[head] for part in scores(run))) for run in (clean, source))
    if clean.condition != source.condition:
        yield "RTG", "K", head_write(clean, head, mine._replace(rtg_key=theirs.rtg_key).pattern())
        yield "RTG", "V", head_write(clean._replace(rtg_value=source.rtg_value), head)
    if clean.shared is not source.shared:
        yield "state", "Q", head_write(clean, head, mine._replace(query=theirs.query).pattern())
        yield "state", "K", head_write(clean, head, mine._replace(state_key=theirs.state_key).pattern())
        yield "state", "V", head_write(clean, head, value=source.shared.value[head])
    yield "state", "pattern", head_write(clean, head, source.pattern[head])
    yield "state", "output", head_write(source, head)


def path_patches(pair: Pair) -> Iterator[tuple[str, Float[Tensor, "n action"]]]:
    """Yield (path, logits): the clean run in which one reader sees the source's version of one writer.

    "state → logits", "state → L0 MLP", and for each head "L0H1 → logits" and "L0H1 → L0 MLP". Paths from an embedding
    into a head are the activation patches of its Q, K and V: nothing else is written before a head reads.
    """
    clean, source, _ = pair
    read, d_mlp = clean.read(clean.heads()), clean.shared.folded.d_mlp
    direct, mlp = read[:, d_mlp:], clean.mlp(read)
    changes = {}
    if clean.shared is not source.shared:
        changes["state"] = source.shared.state - clean.shared.state
    for head, name in enumerate(clean.shared.folded.heads):
        changes[name] = head_write(source, head) - head_write(clean, head)
    for sender, change in changes.items():
        yield f"{sender} → logits", direct + change[:, d_mlp:] + mlp + clean.shared.folded.b_U
        yield f"{sender} → L0 MLP", direct + clean.mlp(read + change) + clean.shared.folded.b_U


def ablations(run: Run) -> Iterator[tuple[str, Float[Tensor, "n action"]]]:
    """Yield (component, logits) of a run with each head, then the MLP, zero-ablated."""
    read = run.read(run.heads())
    for head, name in enumerate(run.shared.folded.heads):
        yield name, run.finish(read - head_write(run, head))
    yield "L0 MLP", run.finish(read, read.new_zeros(1, len(FORWARD)))


def attributions(pair: Pair) -> Iterator[tuple[str, Float[Tensor, " n"]]]:
    """Yield (component, change of its direct contribution to forward − mean of left and right), source − clean."""
    direction = torch.tensor(FORWARD).to(pair.clean.fixed)
    before, after = pair.clean.contributions(), pair.source.contributions()
    for name in ("state", *pair.clean.shared.folded.heads, "L0 MLP"):
        yield name, (after[name] - before[name]) @ direction


# Sums over a case


@torch.inference_mode()
def case_effects(
    folded: Folded, observations: ObservationSet, case: Case, timestep: int = TIMESTEP
) -> pd.DataFrame:
    """Return the mean effects of one case, a row an intervention; see `causal_table` for the columns."""
    sums: dict[tuple[str, str, str, str], np.ndarray] = {}
    totals = np.zeros(4)
    for pair in pairs(folded, observations, case, timestep):
        before, after = (forward_preference(run.logits()) for run in (pair.clean, pair.source))
        totals += _means(
            pair, after - before, after.sigmoid() - before.sigmoid(), before.sigmoid(), after.sigmoid()
        )
        for key, effect in _effects(pair, before, after):
            sums[key] = sums.get(key, 0) + _means(pair, *effect)
    rows = [
        dict(zip(("kind", "direction", "token", "site"), key, strict=True))
        | {"logits": means[0], "probability": means[1]}
        for key, means in sums.items()
    ]
    wholes = dict(zip(("whole_logits", "whole_probability", "clean", "source"), totals, strict=True))
    return pd.DataFrame(rows).assign(**wholes)


def _means(pair: Pair, *values: Tensor) -> np.ndarray:
    return np.array([float(pair.weights @ value.double()) for value in values])


def _effects(
    pair: Pair, before: Tensor, after: Tensor
) -> Iterator[tuple[tuple[str, str, str, str], tuple[Tensor, Tensor]]]:
    """Every intervention on a pair, with what it changes: (forward preference, P(forward)) of each observation."""
    for direction, runs, base, sign in (
        (INTO_CLEAN, pair, before, 1.0),
        (INTO_SOURCE, pair.swapped(), after, -1.0),
    ):
        patched = [("activation", token, site, logits) for token, site, logits in activation_patches(runs)]
        patched += [("path", path.split(" ")[0], path, logits) for path, logits in path_patches(runs)]
        for kind, token, site, logits in patched:
            yield (kind, direction, token, site), _change(forward_preference(logits), base, sign)
    without = {name: [forward_preference(logits)] for name, logits in ablations(pair.clean)}
    for name, logits in ablations(pair.source):
        without[name].append(forward_preference(logits))
    for name, (clean, source) in without.items():
        yield ("ablation", INTO_CLEAN, "state", name), _change(clean, before, 1.0)
        left = _change(source, clean, 1.0)
        whole = _change(after, before, 1.0)
        yield ("removal", "both", "state", name), (whole[0] - left[0], whole[1] - left[1])
    for name, change in attributions(pair):
        yield ("attribution", "both", "state", name), (change, torch.full_like(change, torch.nan))


def _change(now: Tensor, base: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    return sign * (now - base), sign * (now.sigmoid() - base.sigmoid())


def causal_table(
    model: DecisionTransformer,
    observations: ObservationSet,
    cases: Iterable[Case] = CASES,
    timestep: int = TIMESTEP,
    progress: bool = False,
) -> pd.DataFrame:
    """Return the weighted mean effect of every intervention in every case, one row each.

    Columns: `situation`, `change`, `rtg` (of the clean run), `timestep`; `kind`, `direction`, `token` and `site` of the
    intervention; `logits`, its effect on the forward preference, and `probability`, on P(forward); `whole_logits` and
    `whole_probability`, the whole change, source − clean; `clean` and `source`, P(forward) in the two runs.

    Kinds: "activation" and "path" patching, in both directions: into the clean run, what the change does alone
    (enough?); into the source run, what of the change is gone when this part is as before (needed?). "ablation" is
    the rise in the clean run when a component writes nothing, which is no share of the change. "removal" is what of the
    whole change is gone when a component writes nothing in either run. "attribution" is the direct effect on forward −
    mean of left and right; over all components it sums to the whole change of that.

    A mean effect says nothing of single observations, and shares of parts that act together need not sum to 1. Cases
    that no observation shows are left out. Raises ValueError as `population.Folded`.
    """
    folded, frames = Folded(model), []
    shown = [case for case in cases if len(select(observations, case.situation).images)]
    for case in tqdm(shown, desc="causal tests", disable=not progress):
        table = case_effects(folded, observations, case, timestep)
        names = {"situation": case.situation, "change": case.change, "rtg": case.rtg, "timestep": timestep}
        for position, (name, value) in enumerate(names.items()):
            table.insert(position, name, value)
        frames.append(table)
    return pd.concat(frames, ignore_index=True)
