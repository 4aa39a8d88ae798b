"""One head's circuit over every observation: what its weights say by cell, where it looks, what it changes, and how.

Measured for one model of one layer and kept as tables (`Circuit.save`), so that a chapter shows a model whose weights
are not at hand. Effects are changes from the *clean* run to its *counterfactual*, in which the cell in front is empty
and nothing else differs: positive on the log odds of forward means that what stood there kept the agent from moving.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.numpy import load_file, save_file
from torch import Tensor

from dtbook.analysis.attribution import by_cell, contrast
from dtbook.analysis.counterfactuals import Case, HeadPatching, pairs
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.population import Run, per_observation
from dtbook.analysis.stats import weighted_quantile
from dtbook.analysis.weights import CELLS, ov_circuit, qk_circuit
from dtbook.artifacts.parameters import Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.rules import ACTIONS, FRONT
from dtbook.gridworld.situations import EMPTY_CELL, FACING, IN_FRONT, SITUATIONS, showing, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import HIGH, RTGS, TIMESTEP, TIMESTEPS

TERMS = ("state → RTG", "state → position", "state → itself", "time → RTG", "time → position", "time → state")
"""Of the score that decides attention to RTG; "time" stands for all the query has of time, position and b_Q."""
ALL_QUANTILES = np.array([0.05, 0.5, 0.95])


class Circuit(NamedTuple):
    """The tables and maps of one head; each table says its columns where it is made."""

    maps: dict[str, Float[np.ndarray, "..."]]
    attention: pd.DataFrame
    effects: pd.DataFrame
    terms: pd.DataFrame
    neurons: pd.DataFrame

    def save(self, folder: str | Path) -> None:
        """Write `maps.safetensors` and a Parquet file a table into a new folder."""
        Path(folder).mkdir()
        save_file({name: np.ascontiguousarray(value) for name, value in self.maps.items()}, _maps(folder))
        for name in self._fields[1:]:
            getattr(self, name).to_parquet(Path(folder) / f"{name}.parquet", index=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Circuit":
        """Return what `save` wrote."""
        tables = (pd.read_parquet(Path(folder) / f"{name}.parquet") for name in cls._fields[1:])
        return cls(load_file(_maps(folder)), *tables)


def _maps(folder: str | Path) -> Path:
    return Path(folder) / "maps.safetensors"


@checked
def measure_circuit(
    model: DecisionTransformer,
    observations: ObservationSet,
    head: Whole = 1,
    rtgs: Sequence[float] = RTGS,
    rtg: float = HIGH,
    timesteps: Sequence[int] = TIMESTEPS,
    timestep: Whole = TIMESTEP,
    situations: Sequence[str] = ("obstacle", "wall", "goal"),
    progress: bool = False,
) -> Circuit:
    """Measure one head of a one-layer model; its effects and neurons at `rtg` and `timestep`.

    `situations` are those that have counterfactuals; neurons are those of the first. Raises ValueError for a head or
    situation that does not exist, and as `population.FoldedWeights`.
    """
    maps = weight_maps(model, head)
    for situation in situations:
        if situation not in FACING:
            allowed = ", ".join(map(repr, FACING))
            raise ValueError(
                f"situation is {situation!r}; it must be one of {allowed}, which can be emptied."
            )
    attention = attention_table(model, observations, rtgs, timesteps, progress)
    by_situation = {
        name: counterfactual_effects(model, observations, head, name, rtg, timestep) for name in situations
    }
    effects, terms = (
        pd.concat(
            [getattr(one, kind).assign(situation=name) for name, one in by_situation.items()],
            ignore_index=True,
        )
        for kind in ("effects", "terms")
    )
    return Circuit(maps, attention, effects, terms, by_situation[situations[0]].neurons)


# What the weights say


@torch.no_grad()
@checked
def weight_maps(model: DecisionTransformer, head: Whole = 1) -> dict[str, Float[np.ndarray, "..."]]:
    """Return a head's circuits from every cell and channel of the state, and from RTG, bias terms beside them.

    "QK": state → RTG before softmax, for a return of 1, *without* 1/√d_head ("scale" is that factor), [channel i j];
    "QK position": state → what RTG has in its position that the state token has not; "QK bias": the same of b_Q, from
    no cell; "OV": a unit of each channel on each action's logit at full attention, [channel i j action]; "OV rtg",
    "OV position" (RTG's, the state's) and "OV bias" (b_V) on the actions; "b_O", "b_out" and "b_U" likewise. Raises
    ValueError for a head that does not exist.
    """
    sources = torch.stack([model.W_E_rtg, model.W_pos[0] - model.W_pos[1]])
    qk = qk_circuit(model, 0, head, model.W_E_state, sources, scaled=False)
    ov, rest = ov_circuit(model, 0, head, model.W_E_state), torch.cat([model.W_E_rtg[None], model.W_pos[:2]])
    others, block = ov_circuit(model, 0, head, rest), model.blocks[0]
    maps = {
        "QK": by_cell(model, qk.weight[:, 0]),
        "QK position": by_cell(model, qk.weight[:, 1]),
        "QK bias": qk.source_bias,
        "scale": torch.tensor([model.cfg.d_head**-0.5]),
        "OV": by_cell(model, ov.weight),
        "OV bias": ov.bias,
        "OV rtg": others.weight[0],
        "OV position": others.weight[1:],
        "b_O": block.attn.b_O @ model.W_U,
        "b_out": block.mlp.b_out @ model.W_U,
        "b_U": model.b_U,
    }
    return {name: value.detach().numpy().astype(np.float32) for name, value in maps.items()}


@torch.no_grad()
@checked
def written_by_head(
    model: DecisionTransformer, head: Whole, rtg: float = HIGH, timesteps: Sequence[int] = TIMESTEPS
) -> pd.DataFrame:
    """Return what a head writes on each action's logit of single things, at full attention to their token.

    Index: `token` and `what`. Of "state": what the front cell holds (`CELLS`), "time", "position". Of "RTG": all that
    the token is the sum of, its "embedding" times `rtg`, "time" and "position"; the post speaks of the first alone.
    Of "both": "bias", b_V. Time is the mean over the timesteps. Columns: `ACTIONS` (logits). Raises ValueError for a
    head that does not exist.
    """
    views = torch.zeros(len(CELLS), model.cfg.view_size, model.cfg.view_size, 3, dtype=torch.uint8)
    views[:, *FRONT] = torch.tensor([*CELLS.values()], dtype=torch.uint8)
    time = model.W_E_time[list(timesteps)].mean(0)
    of = {("state", name): row for name, row in zip(CELLS, model.embed_states(views), strict=True)}
    of |= {("state", "time"): time, ("state", "position"): model.W_pos[1]}
    of |= {
        ("RTG", "embedding"): rtg * model.W_E_rtg,
        ("RTG", "time"): time,
        ("RTG", "position"): model.W_pos[0],
    }
    weight, bias = ov_circuit(model, 0, head, torch.stack([*of.values()]))
    table = pd.DataFrame(
        torch.cat([weight, bias[None]])[:, : len(ACTIONS)].double().numpy(), columns=list(ACTIONS)
    )
    return table.set_index(pd.MultiIndex.from_tuples([*of, ("both", "bias")], names=["token", "what"]))


def written_by_heads(
    model: DecisionTransformer, rtg: float = HIGH, timesteps: Sequence[int] = TIMESTEPS
) -> pd.DataFrame:
    """Return `written_by_head` of every head: columns `head`, `token`, `what` and the actions' logits."""
    tables = {head: written_by_head(model, head, rtg, timesteps) for head in range(model.cfg.n_heads)}
    return pd.concat(tables, names=["head"]).reset_index()


def score_terms(run: Run) -> Float[Tensor, "term head n"]:
    """Return the attention score of RTG minus that of the state token, as a sum of `TERMS`.

    Invariant: their sum is log(pattern ÷ (1 − pattern)). "state → RTG" is the post's Figure 16, times the RTG, over
    √d_head; "state → itself" is quadratic in the view: no map by cell shows it.
    """
    embedded, f = run.embedded, run.embedded.folded
    query, itself = f.query_of_time(run.condition.timestep).unsqueeze(2), torch.from_numpy(embedded.products)
    keys = [f.key(token).unsqueeze(2) for token in (run.condition.rtg * f.rtg, f.position)]
    of_state = [(embedded.q @ key).squeeze(2) for key in keys]
    of_time = [(query.transpose(1, 2) @ key).squeeze(2).expand_as(itself) for key in keys]
    terms = [*of_state, -itself, *of_time, -(embedded.k @ query).squeeze(2)]
    return torch.stack(terms) * f.model.cfg.d_head**-0.5


# Where it looks


def attention_table(
    model: DecisionTransformer,
    observations: ObservationSet,
    rtgs: Sequence[float],
    timesteps: Sequence[int],
    progress: bool = False,
) -> pd.DataFrame:
    """Return each head's attention to RTG over all observations, one row a (head, situation, rtg, timestep).

    Columns: those, `mean` and the weighted quantiles `q05`, `q50`, `q95` over the observations of the situation.
    """
    conditions = [(rtg, t) for rtg in rtgs for t in timesteps]
    patterns = per_observation(
        model, observations, conditions, lambda run: {"pattern": run.pattern.T}, progress=progress
    )["pattern"]
    share, rows = weights(observations), []
    for situation in SITUATIONS:
        seen = showing(observations.images, situation)
        if seen.any():
            of, shown = share[seen] / share[seen].sum(), patterns[:, seen]
            for (rtg, t), values in zip(conditions, shown, strict=True):
                for head, column in enumerate(values.T.astype(np.float64)):
                    low, middle, high = weighted_quantile(column, of, ALL_QUANTILES)
                    row = {"head": head, "situation": situation, "rtg": rtg, "timestep": t}
                    rows.append(row | {"mean": of @ column, "q05": low, "q50": middle, "q95": high})
    return pd.DataFrame(rows)


# What it changes


class CounterfactualEffects(NamedTuple):
    """Weighted mean changes from clean to counterfactual over the observations of a situation."""

    effects: pd.DataFrame
    """One row: `whole` (log odds of forward: logits), that with the head's output patched (`head`), its pattern alone
    (`QK`), its values alone (`OV`); with the head patched, on F−R, what it writes itself (`direct F-R`) and what the
    MLP then does (`MLP F-R`); attention to RTG, `pattern` clean and `pattern empty`; `n` observations."""
    terms: pd.DataFrame
    """One row a term of the attention score: `term`, `clean` mean and `change`."""
    neurons: pd.DataFrame
    """One row a neuron (see `neuron_directions`): and `pre`, the mean change of its input with the head patched;
    `change`, that of its contribution to F−R (logits; they sum to `MLP F-R`); `active`, how often it is on, clean."""


class _Sums:
    """Weighted sums over batches, by name."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, share: Tensor, **values: Tensor) -> None:
        """Add each value's weighted sum over its last axis."""
        for name, value in values.items():
            self.values[name] = self.values.get(name, torch.zeros(())) + value.double() @ share.double()


@torch.inference_mode()
@checked
def counterfactual_effects(
    model: DecisionTransformer,
    observations: ObservationSet,
    head: Whole,
    situation: str,
    rtg: float,
    timestep: Whole,
) -> CounterfactualEffects:
    """Return what emptying the front cell changes, and how much of it goes through one head's pattern and values.

    The parts of a change are not additive: pattern and values multiply, so `QK` + `OV` differs from `head` by how much
    each depends on the other. Raises ValueError for a situation that no observation shows.
    """
    sums, n, folded = _Sums(), 0, FoldedWeights(model)
    on_F_R = contrast("F-R", model.cfg.n_actions).to(model.W_U)
    output = folded.W_mlp @ on_F_R
    for pair in pairs(folded, observations, Case(situation, rtg, rtg), timestep):
        n += len(pair.weights)
        patching, (clean, other, share) = HeadPatching(pair), pair
        before, after = clean.resid_mid(patching.writes), clean.resid_mid(patching.patched(head))
        sums.add(share, whole=patching.total(), head=patching.by_head(head))
        sums.add(share, QK=patching.by_pattern(head), OV=patching.by_values(head))
        on, off = folded.pre(before).relu(), folded.pre(after).relu()
        direct = folded.direct_logits(after - before) @ on_F_R
        sums.add(share, direct=direct, neurons=((off - on) * output).T, active=(on > 0).T)
        sums.add(share, read=(after - before).T, pattern=clean.pattern[head], empty=other.pattern[head])
        sums.add(share, terms=score_terms(clean)[:, head], other=score_terms(other)[:, head])
    return _tables(model, head, situation, rtg, n, sums.values)


def _tables(
    model: DecisionTransformer, head: int, situation: str, rtg: float, n: int, sums: dict[str, Tensor]
) -> CounterfactualEffects:
    row = {name: float(sums[name]) for name in ("whole", "head", "QK", "OV")}
    row |= {"direct F-R": float(sums["direct"]), "MLP F-R": float(sums["neurons"].sum())}
    row |= {"pattern": float(sums["pattern"]), "pattern empty": float(sums["empty"])}
    change = (sums["other"] - sums["terms"]).numpy()
    terms = pd.DataFrame({"term": TERMS, "clean": sums["terms"].numpy(), "change": change})
    neurons = neuron_directions(model, head, situation, rtg, sums["read"])
    pre = sums["read"].numpy()[: model.cfg.d_mlp]
    neurons = neurons.assign(pre=pre, change=sums["neurons"].numpy(), active=sums["active"].numpy())
    return CounterfactualEffects(pd.DataFrame([row | {"n": n}]), terms, neurons)


# What reads it


@torch.no_grad()
@checked
def neuron_directions(
    model: DecisionTransformer,
    head: Whole,
    situation: str,
    rtg: float,
    read: Float[Tensor, " read"] | None = None,
    preference: str = "F-R",
) -> pd.DataFrame:
    """Return, one row a neuron, the cosine of its input direction with what the head writes, and its own output.

    `state`: with the change that emptying the front cell makes through W_OV (the post's next step); `rtg`: with what
    the RTG embedding gives through W_OV; `written`: with the mean change of what the head really writes, found from
    `read`, that change as it is read (by the columns of W_in, then W_U); `output`: W_out on the preference (logits).
    """
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    W_OV = attn.W_V[head] @ attn.W_O[head]
    directions = {"state": emptying(model, situation) @ W_OV, "rtg": rtg * model.W_E_rtg @ W_OV}
    if read is not None:
        W_read = torch.cat([mlp.W_in, model.W_U], 1).double()
        directions["written"] = torch.linalg.pinv(W_read.T) @ read
    unit = torch.nn.functional.normalize(mlp.W_in.double(), dim=0)
    columns = {
        name: (torch.nn.functional.normalize(direction.double(), dim=0) @ unit).numpy()
        for name, direction in directions.items()
    }
    output = mlp.W_out @ model.W_U @ contrast(preference, model.cfg.n_actions).to(model.W_U)
    return pd.DataFrame({"neuron": np.arange(model.cfg.d_mlp), **columns, "output": output.double().numpy()})


def emptying(model: DecisionTransformer, situation: str) -> Float[Tensor, " d_model"]:
    """Return the change of the state embedding when what is in front goes and the cell is empty."""
    thing = situation if situation in IN_FRONT else "goal"
    views = torch.zeros(2, model.cfg.view_size, model.cfg.view_size, 3, dtype=torch.uint8)
    for view, code in zip(views, (CELLS[thing], EMPTY_CELL), strict=True):
        view[FRONT] = torch.tensor(code, dtype=torch.uint8)
    clean, empty = model.embed_states(views)
    return empty - clean


def carried(neurons: pd.DataFrame, by: str | np.ndarray) -> pd.Series:
    """Return which share of the MLP's change the first k neurons carry, by k from 0, in an order.

    `by` is a column, whose largest absolute values come first, or an order of the rows. Invariant: it begins at 0 and
    ends at 1.
    """
    order = np.argsort(-neurons[by].abs().to_numpy(), kind="stable") if isinstance(by, str) else by
    cumulated = np.cumsum(neurons["change"].to_numpy()[order])
    shares = np.concatenate([[0.0], cumulated / cumulated[-1]])
    return pd.Series(shares, index=pd.RangeIndex(len(shares), name="neurons"))
