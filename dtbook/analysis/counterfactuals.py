"""Causal effects over every observation: what carries the difference between a run and its counterfactual.

A *case* is a set of observations and one change: the front cell emptied, or another return asked for. Its *clean* run
is the one before the change, its *source* the one after it. Activation patching puts an activation of the source into
the run that is edited, the *base*; path patching lets one reader only see the change of one writer. In a case either
run can be the base of a `Pair`. The measure is the forward preference, logit F − logsumexp(logit L, logit R), and
P(forward), its logistic function; effects are signed as the whole change is, source − clean, so that effect ÷ whole
change is a share: 1 for what does all of it, 0 for what does nothing of it.

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
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis.attribution import forward_over_turns, forward_preference
from dtbook.analysis.folded import FAST_BATCH_SIZE, FoldedWeights
from dtbook.analysis.population import STATE, Run, run_at
from dtbook.analysis.written import Writes, Written, logits_of, mlp_out_of, nothing, without_mlp
from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.situations import FACING, select, weights, without_front
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, RTGS, TIMESTEP, printed

INTO_CLEAN, INTO_SOURCE = "into the clean run", "into the source run"


class Case(NamedTuple):
    """A situation that observations show, and one change."""

    situation: str
    """One of `situations.FACING`."""
    rtg: float
    """The return asked for in the clean run."""
    source_rtg: float
    """That of the source run; where it is the same, the front cell is emptied instead."""

    @property
    def change(self) -> str:
        """The change in words."""
        if self.rtg == self.source_rtg:
            return "front cell → empty"
        return f"RTG {printed(self.rtg)} → {printed(self.source_rtg)}"


FRONT_CASES = tuple(Case(situation, rtg, rtg) for rtg in RTGS for situation in FACING)
CASES = (*FRONT_CASES, *(Case(situation, -1.0, HIGH) for situation in FACING))
"""obstacle, wall and goal → empty at each return of the post's Table 1, and RTG −1 → 0.9 with each of them in front."""


class Pair(NamedTuple):
    """A batch of observations in the run that is edited and in the one whose activations replace its own."""

    base: Run
    source: Run
    weights: Float[Tensor, " n"]
    """Shares of the whole case, summing to 1 over its batches."""

    def swapped(self) -> "Pair":
        """Return the pair with the runs exchanged."""
        return Pair(self.source, self.base, self.weights)


@checked
def pairs(
    folded: FoldedWeights,
    observations: ObservationSet,
    case: Case,
    timestep: Whole = TIMESTEP,
    batch_size: Count = FAST_BATCH_SIZE,
) -> Iterator[Pair]:
    """Yield a case's observations batch by batch, with float64 weights; raises ValueError where there are none."""
    seen = select(observations, case.situation)
    return pairs_of(folded, seen.images, weights(seen), case, timestep, batch_size)


@checked
def pairs_of(
    folded: FoldedWeights,
    images: UInt8[np.ndarray, "n 7 7 3"],
    share: Float[np.ndarray, " n"],
    case: Case,
    timestep: Whole,
    batch_size: Count = FAST_BATCH_SIZE,
) -> Iterator[Pair]:
    """Yield the pairs of these observations, the clean run as base, batch by batch."""
    embedded = other = folded.embed(images)
    if case.rtg == case.source_rtg:
        other = folded.embed(without_front(torch.from_numpy(images)))
    for rows, batch in embedded.batches(batch_size):
        clean = run_at(batch, case.rtg, timestep)
        source = run_at((batch if other is embedded else other[rows]), case.source_rtg, timestep)
        yield Pair(clean, source, torch.from_numpy(share[rows]))


class HeadPatching:
    """The base run of a pair with one head's result, or a part of it, from the source, and what that changes.

    Changes are those of each observation's forward preference (logits). They are not additive: pattern and values
    multiply, so the change by the head differs from the sum of both by how much each depends on the other.
    """

    def __init__(self, pair: Pair) -> None:
        self.base, self.source, _ = pair
        self.writes, self.source_writes = self.base.writes(), self.source.writes()
        self.preference = forward_preference(self.base.logits(self.writes))

    def total(self) -> Float[Tensor, " n"]:
        """Return the whole change, source − base."""
        return forward_preference(self.source.logits(self.source_writes)) - self.preference

    def by_head(self, head: int) -> Float[Tensor, " n"]:
        """Return the change when the head's result is the source's."""
        return self._change(self.patched(head))

    def by_pattern(self, head: int) -> Float[Tensor, " n"]:
        """Return the change when where the head looks is as in the source (the QK circuit)."""
        return self._change(self._with(head, self.base.head(head, self.source.pattern[head])))

    def by_values(self, head: int) -> Float[Tensor, " n"]:
        """Return the change when what the head reads from the state token is as in the source (the OV circuit)."""
        return self._change(self._with(head, self.base.head(head, values=self.source.embedded)))

    def by_mlp_view(self, head: int | None = None) -> Float[Tensor, " n"]:
        """Return the change when the MLP reads the source's state embedding; with a head, when its result is too."""
        writes = self.writes if head is None else self.patched(head)
        f, seen = self.base.embedded.folded, {**writes, STATE: self.source_writes[STATE]}
        return forward_preference((without_mlp(f, writes) + mlp_out_of(f, [seen])[0]).T) - self.preference

    def patched(self, head: int) -> Writes:
        """Return what the components of the base run write, with one head's from the source."""
        return self._with(head, self.source_writes[f"L0H{head}"])

    def _with(self, head: int, written: Written) -> Writes:
        return self.writes | {f"L0H{head}": written}

    def _change(self, writes: Writes) -> Tensor:
        return forward_preference(self.base.logits(writes)) - self.preference


# What attends, what is attended to, and what follows from another run's


class Scores(NamedTuple):
    """The vectors behind the attention of the state token, by head; time and biases that cancel are left out."""

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
    f, (rtg, timestep) = run.embedded.folded, run.condition
    query = f.query_of_time(timestep)[:, None] + run.embedded.q
    return Scores(query, f.key(f.rtg_token(rtg))[:, None], run.embedded.k)


def activation_patches(pair: Pair) -> Iterator[tuple[str, str, Float[Tensor, "n action"]]]:
    """Yield (token, site, logits): the base run with the source's activation at one site of one token.

    Sites of a token are its embedding and, for each head, "L0H1 Q", "L0H1 K" and "L0H1 V"; of the state token also the
    attention pattern, the head's output "L0H1", all "heads", and "L0 MLP". The logits are read at the state token, so
    of the RTG token nothing else matters. Where the runs share a token, its sites are left out: they change nothing.
    """
    base, source, _ = pair
    f, writes = base.embedded.folded, base.writes()
    patched: dict[tuple[str, str], Writes] = {}
    for head, name in enumerate(f.head_names):
        for token, part, written in _patched_results(pair, head):
            patched[token, f"{name} {part}".removesuffix(" output")] = writes | {name: written}
    patched["state", "heads"] = writes | source.heads()
    if base.condition != source.condition:
        patched["RTG", "embedding"] = run_at(base.embedded, *source.condition).writes()
    if base.embedded is not source.embedded:
        patched["state", "embedding"] = run_at(source.embedded, *base.condition).writes()
    for where, logits in zip(patched, logits_of(f, list(patched.values())), strict=True):
        yield *where, logits.T
        if where == ("state", "heads"):
            yield "state", "L0 MLP", without_mlp(f, writes).T + source.mlp_out()


def _patched_results(pair: Pair, head: int) -> Iterator[tuple[str, str, Written]]:
    """Yield (token, part, what the head writes) with one thing that it reads or makes taken from the source."""
    base, source, _ = pair
    own, donor = (Scores(*(part[head] for part in scores(run))) for run in (base, source))
    if base.condition != source.condition:
        yield "RTG", "K", base.head(head, own._replace(rtg_key=donor.rtg_key).pattern().to(base.pattern))
        yield "RTG", "V", base.head(head, rtg_result=source.rtg_result[head])
    if base.embedded is not source.embedded:
        yield "state", "Q", base.head(head, own._replace(query=donor.query).pattern().to(base.pattern))
        yield (
            "state",
            "K",
            base.head(head, own._replace(state_key=donor.state_key).pattern().to(base.pattern)),
        )
        yield "state", "V", base.head(head, values=source.embedded)
    yield "state", "pattern", base.head(head, source.pattern[head])
    yield "state", "output", source.head(head)


def path_patches(pair: Pair) -> Iterator[tuple[str, Float[Tensor, "n action"]]]:
    """Yield (path, logits): the base run in which one reader sees the source's version of one writer.

    "state → logits", "state → L0 MLP", and for each head "L0H1 → logits" and "L0H1 → L0 MLP". Paths from an embedding
    into a head are the activation patches of its Q, K and V: nothing else is written before a head reads.
    """
    base, source, _ = pair
    f, writes, others = base.embedded.folded, base.writes(), source.writes()
    senders = [*([STATE] if base.embedded is not source.embedded else []), *f.head_names]
    patched = [writes | {name: others[name]} for name in senders]
    mlp_out, *changed = mlp_out_of(f, [writes, *patched])
    direct = without_mlp(f, writes)
    for name, run, out in zip(senders, patched, changed, strict=True):
        yield f"{name} → logits", (without_mlp(f, run) + mlp_out).T
        yield f"{name} → L0 MLP", (direct + out).T


def ablations(run: Run) -> Iterator[tuple[str, Float[Tensor, "n action"]]]:
    """Yield (component, logits) of a run with each head, then the MLP, zero-ablated."""
    f, writes = run.embedded.folded, run.writes()
    without = logits_of(f, [writes | {name: nothing(f)} for name in f.head_names])
    yield from zip(f.head_names, without.transpose(1, 2), strict=True)
    yield "L0 MLP", without_mlp(f, writes).T


def attributions(pair: Pair) -> Iterator[tuple[str, Float[Tensor, " n"]]]:
    """Yield (component, change of its direct contribution to forward − mean of left and right), source − base."""
    b_U = pair.base.embedded.folded.b_U
    direction = forward_over_turns(len(b_U)).to(b_U)
    before, after = pair.base.contributions(), pair.source.contributions()
    for name in (STATE, *pair.base.embedded.folded.head_names, "L0 MLP"):
        yield name, (after[name] - before[name]) @ direction


# Sums over a case


@torch.inference_mode()
@checked
def case_effects(
    folded: FoldedWeights, observations: ObservationSet, case: Case, timestep: Whole = TIMESTEP
) -> pd.DataFrame:
    """Return the mean effects of one case, a row an intervention; see `causal_table` for the columns."""
    sums: dict[tuple[str, str, str, str], np.ndarray] = {}
    totals = np.zeros(4)
    for pair in pairs(folded, observations, case, timestep):
        before, after = (forward_preference(run.logits()) for run in (pair.base, pair.source))
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
    """Yield every intervention on a pair, and its changes of each observation's (forward preference, P(forward))."""
    for direction, runs, unpatched, sign in (
        (INTO_CLEAN, pair, before, 1.0),
        (INTO_SOURCE, pair.swapped(), after, -1.0),
    ):
        patched = [("activation", token, site, logits) for token, site, logits in activation_patches(runs)]
        patched += [("path", path.split(" ")[0], path, logits) for path, logits in path_patches(runs)]
        for kind, token, site, logits in patched:
            yield (kind, direction, token, site), _change(forward_preference(logits), unpatched, sign)
    without = {name: [forward_preference(logits)] for name, logits in ablations(pair.base)}
    for name, logits in ablations(pair.source):
        without[name].append(forward_preference(logits))
    for name, (clean, source) in without.items():
        yield ("ablation", INTO_CLEAN, "state", name), _change(clean, before, 1.0)
        left = _change(source, clean, 1.0)
        whole = _change(after, before, 1.0)
        yield ("removal", "both", "state", name), (whole[0] - left[0], whole[1] - left[1])
    for name, change in attributions(pair):
        yield ("attribution", "both", "state", name), (change, torch.full_like(change, torch.nan))


def _change(now: Tensor, before: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    return sign * (now - before), sign * (now.sigmoid() - before.sigmoid())


@checked
def causal_table(
    model: DecisionTransformer,
    observations: ObservationSet,
    cases: Iterable[Case] = CASES,
    timestep: Whole = TIMESTEP,
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
    that no observation shows are left out. Raises ValueError as `population.FoldedWeights`.
    """
    folded, frames = FoldedWeights(model), []
    shown = [case for case in cases if len(select(observations, case.situation))]
    for case in tqdm(shown, desc="causal tests", disable=not progress):
        table = case_effects(folded, observations, case, timestep)
        names = {"situation": case.situation, "change": case.change, "rtg": case.rtg, "timestep": timestep}
        for position, (name, value) in enumerate(names.items()):
            table.insert(position, name, value)
        frames.append(table)
    return pd.concat(frames, ignore_index=True)
