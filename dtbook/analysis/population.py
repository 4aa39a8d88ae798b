"""Every observation through a one-layer model: not a product of matrices, but a sum of a few rows of tables.

`folded` has the tables, `written` what components write, and here is a run of observations at one return and timestep.
Only the attention's softmax and the neurons' ReLU are evaluated for each observation.

Only the state token's query is needed. RTG and state token differ by δ = R·W_E_rtg + W_pos[0] − W_pos[1] − state
embedding, as time and biases cancel in their difference, so attention to RTG is sigmoid(q · δW_K / √d_head).

In float32 logits differ from those in float64 by less than 1e-5 of the largest term that they are a sum of.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dtbook.analysis import sums
from dtbook.analysis.folded import BATCH_SIZE, FAST_BATCH_SIZE, Embedded, FoldedWeights
from dtbook.analysis.written import Writes, Written, direct, logits_of, mlp_out_of
from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.model.transformer import DecisionTransformer

STATE, MLP_OUT = "state", "L0 MLP"


class Condition(NamedTuple):
    """The return that a run is asked for, and its timestep."""

    rtg: float
    timestep: int


class Run(NamedTuple):
    """Observations at one RTG and timestep, up to the MLP."""

    embedded: Embedded
    condition: Condition
    pattern: Float[Tensor, "head n"]
    """Attention of the state token to RTG; the rest is to itself."""
    rtg_result: Float[Tensor, "head column"]
    """A head's result of the RTG token's own value (RTG and position, without time and biases), as it is read."""
    time_result: Float[Tensor, "head column"]
    """That of time, the state token's position and b_V, to whatever it attends."""
    fixed: Float[Tensor, " column"]
    """What time and position give to be read directly, and b_in."""

    def head(
        self,
        head: int,
        pattern: Float[Tensor, " n"] | None = None,
        values: Embedded | None = None,
        rtg_result: Float[Tensor, " column"] | None = None,
    ) -> Written:
        """Return what a head writes (`hook_result`), with its own attention to RTG and values or with others."""
        pattern = self.pattern[head] if pattern is None else pattern
        vector = self.rtg_result[head] if rtg_result is None else rtg_result
        values = self.embedded if values is None else values
        return Written(self.time_result[head], values, 1 + head, 1 - pattern, vector, pattern)

    def writes(self) -> dict[str, Written]:
        """Return what each component writes; put others in their place to ablate or patch them."""
        f = self.embedded.folded
        writes = {STATE: Written(f.nothing, self.embedded), "time and position": Written(self.fixed)}
        return writes | self.heads() | {"L0 b_O": Written(f.b_O)}

    def heads(self) -> dict[str, Written]:
        """Return what each head writes."""
        return {name: self.head(head) for head, name in enumerate(self.embedded.folded.head_names)}

    def resid_mid(self, writes: Writes | None = None) -> Float[Tensor, "n read"]:
        """Return resid_mid as it is read: the neurons' `hook_pre`, then the logits without MLP and b_U."""
        parts = (self.writes() if writes is None else writes).values()
        return sum(
            (part.read() for part in parts), torch.zeros(len(self.embedded), 1, dtype=self.fixed.dtype)
        )[:, :-1]

    def post(self, writes: Writes | None = None) -> Float[Tensor, "n d_mlp"]:
        """Return the activations of the neurons (`mlp.hook_post`)."""
        return self.embedded.folded.pre(self.resid_mid(writes)).relu()

    def mlp_out(self, writes: Writes | None = None) -> Float[Tensor, "n action"]:
        """Return what the MLP writes on the logits, b_out included."""
        return mlp_out_of(self.embedded.folded, [self.writes() if writes is None else writes])[0].T

    def logits(self, writes: Writes | None = None) -> Float[Tensor, "n action"]:
        """Return the action logits, with what the components write themselves or others in their place."""
        return logits_of(self.embedded.folded, [self.writes() if writes is None else writes])[0].T

    def probabilities(self, writes: Writes | None = None) -> Float[Tensor, "n action"]:
        """Return the actions' probabilities."""
        return self.logits(writes).T.softmax(0).T  # over the axis that is not contiguous: it is vectorised

    def contributions(self) -> dict[str, Float[Tensor, "n action"]]:
        """Return the logits as a sum of components: the keys of `attribution.decompose`, channels taken together.

        "state", "time and position", "L0H0", …, "L0 b_O", "L0 MLP" (its b_out included) and "b_U".
        """
        f, writes = self.embedded.folded, self.writes()
        parts = {name: direct(f, written) for name, written in writes.items()}
        parts |= {MLP_OUT: mlp_out_of(f, [writes])[0], "b_U": f.b_U[:, None]}
        return {name: part.expand(-1, len(self.embedded)).T for name, part in parts.items()}


@checked
def run_at(embedded: Embedded, rtg: float, timestep: Whole) -> "Run":
    """Return the run of these observations at an RTG and a timestep. Raises ValueError where there is none such."""
    f = embedded.folded
    if not 0 <= timestep < len(f.time):
        raise ValueError(f"timestep is {timestep}; this model has timesteps 0 to {len(f.time) - 1}.")
    if not np.isfinite(rtg):
        raise ValueError(f"rtg is {rtg}; it must be a finite number.")
    time, token = f.time[timestep], f.rtg_token(rtg)
    # (q of the state + q of the time) · (k of the RTG token − k of the state), multiplied out
    query, key = f.query_of_time(timestep), f.key(token)
    scores = (query * key).sum(1, keepdim=True).numpy() - embedded.products
    numbers = (((qk[:, 0] * key) - (qk[:, 1] * query)).sum(-1).numpy() for qk in embedded.tables[2:])
    sums.sum_numbers(embedded.parts.view, embedded.parts.obstacle, *numbers, scores)
    pattern = f.cast(torch.sigmoid(torch.from_numpy(scores) / f.model.cfg.d_head**0.5))
    rtg_result, time_result = (token @ f.through)[1:], (time @ f.through)[1:] + f.b_V
    fixed = time @ f.through[0] + f.b_in
    return Run(embedded, Condition(rtg, timestep), pattern, *map(f.cast, (rtg_result, time_result, fixed)))


Measure = Callable[[Run], Mapping[str, Tensor]]
"""From a run to named values, each with a row for every observation of the batch."""


@torch.inference_mode()
@checked
def per_observation(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    measure: Measure,
    batch_size: Count = FAST_BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "condition n *rest"]]:
    """Return what `measure` says of every observation at every (rtg, timestep), in their order.

    Raises ValueError for a model of more than one layer, another view size, and a condition it does not have.
    """
    embedded, at = (
        FoldedWeights(model).embed(observations),
        [Condition(*condition) for condition in conditions],
    )
    results: dict[str, np.ndarray] = {}
    for rows, batch in embedded.batches(batch_size, "observations" if progress else None):
        for k, condition in enumerate(at):
            for name, value in measure(run_at(batch, *condition)).items():
                if name not in results:
                    kind = np.float64 if value.dtype == torch.float64 else np.float32
                    results[name] = np.empty((len(at), len(embedded), *value.shape[1:]), kind)
                results[name][k, rows] = value.numpy()
    return results


def logits(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    progress: bool = False,
    device: str | None = None,
) -> Float[np.ndarray, "condition n action"]:
    """Return the action logits of every observation at every (rtg, timestep); `model` itself, up to rounding.

    With a `device` of PyTorch, such as "cuda", plain PyTorch makes them there.
    """
    if device is not None:
        return _logits_on(torch.device(device), model, observations, list(conditions), progress)
    values = per_observation(
        model, observations, conditions, lambda run: {"logits": run.logits()}, progress=progress
    )
    return values["logits"]


@torch.inference_mode()
def _logits_on(
    device: torch.device,
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: list[tuple[float, int]],
    progress: bool,
) -> Float[np.ndarray, "condition n action"]:
    """Do what `logits` does, with PyTorch's own functions on a device: rows are gathered, added up and kept."""
    f = FoldedWeights(model)
    embedded, result = f.embed(observations), np.empty((len(conditions), len(observations), len(f.b_U)))
    tables = [
        torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 1)).to(device) for t in embedded.tables[:2]
    ]  # −1: a row of 0
    W, bias = f.W_mlp.to(device), (f.b_mlp + f.b_U).to(device)
    for rows, batch in embedded.batches(BATCH_SIZE, "observations" if progress else None):
        view, obstacle = (
            torch.from_numpy(x).long().to(device) for x in (batch.parts.view, batch.parts.obstacle)
        )
        state, *values = (tables[0][view] + tables[1][obstacle].sum(1))[:, :, : f.n_read].unbind(1)
        for k, condition in enumerate(conditions):
            run = run_at(batch, *condition)
            given = (
                (run.fixed + f.b_O)[: f.n_read],
                run.rtg_result[:, : f.n_read],
                run.time_result[:, : f.n_read],
            )
            fixed, rtg_result, time_result = (x.to(device) for x in given)
            read = state + fixed + time_result.sum(0)
            for value, pattern, of_rtg in zip(values, run.pattern.to(device), rtg_result, strict=True):
                read = read + torch.lerp(value, of_rtg, pattern[:, None])
            result[k, rows] = (f.pre(read).relu() @ W + f.direct_logits(read) + bias).cpu().numpy()
    return result.astype(np.float64 if f.dtype == torch.float64 else np.float32)
