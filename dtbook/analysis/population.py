"""Every observation through a one-layer model, with all that RTG, timestep and interventions share computed once.

With one layer and no LayerNorm, two weights read resid_mid: W_in, which makes the neurons' `hook_pre`, and W_U, which
makes the direct logits. Side by side they are one matrix of d_mlp + 3 columns, and everything is kept as what it gives
through it: the axis `read`, cut by `FoldedWeights.pre` and `.direct_logits`. What is written before is linear in the
state embedding once the attention is known, so a batch of observations meets the weights once (`FoldedWeights.embed`),
and a run at some RTG and timestep (`Embedded.at`) costs sums over columns, not matrix products. Ablating or patching a
head replaces its row of `Run.head_results`, and is exact: the MLP is evaluated anew.

Only the state token's query is needed. RTG and state token differ by δ = R·W_E_rtg + W_pos[0] − W_pos[1] − state
embedding, as time and biases cancel in their difference, so attention to RTG is sigmoid(q · δW_K / √d_head).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from dtbook.artifacts.parameters import Count, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import compiled
from dtbook.gridworld.situations import row_batches
from dtbook.model.config import one_hot
from dtbook.model.transformer import DecisionTransformer

BATCH_SIZE = 2048
"""Observations a batch: small enough that a run's rows stay in the processor's cache."""


class Condition(NamedTuple):
    """The return that a run is asked for, and its timestep."""

    rtg: float
    timestep: int


class FoldedWeights:
    """The weights of a one-layer model, multiplied out to what W_in and W_U read (in float64, then the model's dtype).

    A model with a longer context is taken as it is with a single timestep. Raises ValueError for another number of
    layers, and for a model with hooks or parts that were exchanged, which would be overlooked.
    """

    def __init__(self, model: DecisionTransformer) -> None:
        if model.cfg.n_layers != 1:
            raise ValueError(f"model has {model.cfg.n_layers} layers; only one can be folded.")
        if not model.is_plain():
            raise ValueError(
                "model has hooks or exchanged parts; only a plain DecisionTransformer can be folded."
            )
        self.model = model
        self.head_names = [f"L0H{head}" for head in range(model.cfg.n_heads)]
        with torch.no_grad():
            self._fold({name: weight.detach().double() for name, weight in model.named_parameters()})

    def _fold(self, w: Mapping[str, Tensor]) -> None:
        def of(name: str) -> Tensor:
            return w[f"blocks.0.{name}"]

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self.model.W_U)

        d_head, U = self.model.cfg.d_head, w["W_U"]
        W_read = torch.cat([of("mlp.W_in"), U], 1)
        mean = torch.full((self.model.cfg.n_heads, d_head, 1), 1 / d_head, dtype=torch.double)
        # the last column: the mean of z over its features
        written = torch.cat([of("attn.W_O") @ W_read, mean], 2)
        self.d_mlp, self.n_read = self.model.cfg.d_mlp, W_read.shape[1]
        self.W_V = cast(of("attn.W_V") @ written)  # head d_model column (read, or the mean)
        self.b_V = cast((of("attn.b_V")[:, None] @ written)[:, 0])
        self.W_read, self.feature_mean = cast(W_read), cast(of("attn.W_O").sum(1) @ W_read)
        self.b_O = cast(of("attn.b_O") @ W_read)
        self.b_read = cast(torch.nn.functional.pad(of("mlp.b_in"), (0, U.shape[1])))  # 0 for the logits
        self.W_mlp, self.b_mlp = cast(of("mlp.W_out") @ U), cast(of("mlp.b_out") @ U)
        self.b_U = cast(w["b_U"])
        self.mlp_mean = cast(of("mlp.W_out").mean(1)), cast(of("mlp.b_out").mean()), cast(U.sum(0))
        view, m = self.model.cfg.view_size, self.model.cfg.d_model
        image = w["W_E_state"].view(-1, view, view, m).permute(1, 2, 0, 3).reshape(-1, m)  # as images lie
        columns = W_read[None], of("attn.W_V") @ written, torch.cat([of("attn.W_Q"), of("attn.W_K")])
        self.from_image = [cast(image @ weight) for weight in columns]  # each: part input column
        self.rtg, self.position = cast(w["W_E_rtg"]), cast(w["W_pos"][0] - w["W_pos"][1])
        self.time = cast(w["W_E_time"] + w["W_pos"][1])  # of the state token, its position included

    def rtg_token(self, rtg: float) -> Float[Tensor, " d_model"]:
        """Return what the RTG token has that the state token has not, time and the state embedding aside."""
        return rtg * self.rtg + self.position

    @torch.no_grad()
    def query_of_time(self, timestep: int) -> Float[Tensor, "head d_head"]:
        """Return the part of the state token's query that time, its position and b_Q make."""
        attn = self.model.blocks[0].attn
        return self.time[timestep] @ attn.W_Q + attn.b_Q

    @torch.no_grad()
    def key(self, token: Float[Tensor, " d_model"]) -> Float[Tensor, "head d_head"]:
        """Return the key that a vector makes, without b_K, which both tokens have and softmax does not see."""
        return token @ self.model.blocks[0].attn.W_K

    def pre(self, read: Float[Tensor, "*axes read"]) -> Float[Tensor, "*axes d_mlp"]:
        """Return the neurons' part of what is read."""
        return read[..., : self.d_mlp]

    def direct_logits(self, read: Float[Tensor, "*axes columns"]) -> Float[Tensor, "*axes action"]:
        """Return the part of what is read that W_U makes; further columns are left out."""
        return read[..., self.d_mlp : self.n_read]

    @torch.no_grad()
    def embed(self, images: UInt8[Tensor, "n 7 7 3"]) -> "Embedded":
        """Return a batch of observations after they have met the weights: the same at every RTG and timestep."""
        cfg = self.model.cfg
        x = (one_hot(images) if cfg.encoding == "one-hot" else images).flatten(-3).to(self.model.W_U)
        # observations of a batch look alike: one product for all, and one of the inputs in which they differ
        differ = (x != x[:1]).any(0).nonzero()[:, 0]
        x, same = x[:, differ], x[:1].index_fill(1, differ, 0)
        state, value, qk = (
            torch.baddbmm(same @ weight, x.expand(len(weight), -1, -1), weight[:, differ])
            for weight in self.from_image
        )
        q, k = qk.tensor_split(2)
        return Embedded(self, images, state[0], value, q, k, (q * k).sum(-1))


class Embedded(NamedTuple):
    """A batch of embedded observations: what the state embedding makes, without RTG, time and biases."""

    folded: FoldedWeights
    images: UInt8[Tensor, "n 7 7 3"]
    state: Float[Tensor, "n read"]
    """What the state embedding itself gives to be read."""
    state_result: Float[Tensor, "head n column"]
    """A head's result if it attends to the state token alone, as it is read; then the mean of its z over features."""
    q: Float[Tensor, "head n d_head"]
    k: Float[Tensor, "head n d_head"]
    qk: Float[Tensor, "head n"]
    """q · k of the state embedding with itself."""

    @torch.no_grad()
    def at(self, rtg: float, timestep: int) -> "Run":
        """Return the run of this batch at an RTG and a timestep. Raises ValueError where the model has none such."""
        f = self.folded
        if not 0 <= timestep < len(f.time):
            raise ValueError(f"timestep is {timestep}; this model has timesteps 0 to {len(f.time) - 1}.")
        if not np.isfinite(rtg):
            raise ValueError(f"rtg is {rtg}; it must be a finite number.")
        time, token = f.time[timestep], f.rtg_token(rtg)
        # (q of the state + q of the time) · (k of the RTG token − k of the state), multiplied out
        query, key = f.query_of_time(timestep).unsqueeze(2), f.key(token).unsqueeze(2)
        scores = (self.q @ key - self.k @ query + query.transpose(1, 2) @ key).squeeze(2) - self.qk
        scores = scores / f.model.cfg.d_head**0.5
        pattern = torch.sigmoid(scores)
        rtg_result, time_result = token @ f.W_V, time @ f.W_V + f.b_V
        fixed = time @ f.W_read + f.b_O + f.b_read
        return Run(self, Condition(rtg, timestep), pattern, rtg_result, time_result, fixed)


class Run(NamedTuple):
    """A batch at one RTG and timestep, up to the MLP."""

    embedded: Embedded
    condition: Condition
    pattern: Float[Tensor, "head n"]
    """Attention of the state token to RTG; the rest is to itself."""
    rtg_result: Float[Tensor, "head column"]
    """A head's result of the RTG token's own value (RTG and position, without time and biases)."""
    time_result: Float[Tensor, "head column"]
    """That of time, the state token's position and b_V, to whatever it attends."""
    fixed: Float[Tensor, " read"]
    """What time, position and b_O give to be read directly, and b_in."""

    def head_results(
        self,
        pattern: Float[Tensor, "head n"] | None = None,
        state_result: Float[Tensor, "head n column"] | None = None,
    ) -> Float[Tensor, "head n column"]:
        """Return `hook_result` as it is read, with the run's own pattern and values or those of another run."""
        pattern = (self.pattern if pattern is None else pattern).unsqueeze(-1)
        result = self.embedded.state_result if state_result is None else state_result
        return torch.lerp(result, self.rtg_result.unsqueeze(1), pattern).add_(self.time_result.unsqueeze(1))

    def resid_mid(
        self, head_results: Float[Tensor, "head n column"] | None = None
    ) -> Float[Tensor, "n read"]:
        """Return resid_mid as it is read: the neurons' `hook_pre`, then the logits without MLP and b_U."""
        read = self.embedded.state + self.fixed
        for result in self.head_results() if head_results is None else head_results:
            read += result[:, :-1]
        return read

    def post(self, resid_mid: Float[Tensor, "n read"] | None = None) -> Float[Tensor, "n d_mlp"]:
        """Return the activations of the neurons (`mlp.hook_post`)."""
        return self.embedded.folded.pre(self.resid_mid() if resid_mid is None else resid_mid).relu()

    def mlp_out(self, resid_mid: Float[Tensor, "n read"] | None = None) -> Float[Tensor, "n action"]:
        """Return what the MLP writes on the logits, b_out included."""
        f, read = self.embedded.folded, (self.resid_mid() if resid_mid is None else resid_mid).numpy()
        out = np.empty((len(read), f.W_mlp.shape[1]), read.dtype)
        _relu_matmul(read, f.W_mlp.T.contiguous().numpy(), out)
        return torch.from_numpy(out).add_(f.b_mlp)

    def mlp_feature_mean(self, resid_mid: Float[Tensor, "n read"]) -> Float[Tensor, "n action"]:
        """Return what the MLP would write on the logits with the mean of its output's entries in all of them."""
        weight, bias, on_logits = self.embedded.folded.mlp_mean
        return (self.post(resid_mid) @ weight + bias).unsqueeze(1) * on_logits

    def logits(self, head_results: Float[Tensor, "head n column"] | None = None) -> Float[Tensor, "n action"]:
        """Return the action logits, with the heads' own results or others in their place."""
        return self.unembed(self.resid_mid(head_results))

    def unembed(
        self, resid_mid: Float[Tensor, "n read"], mlp_out: Float[Tensor, "#n action"] | None = None
    ) -> Float[Tensor, "n action"]:
        """Return the action logits that follow from resid_mid, with the MLP's own output or another."""
        mlp_out = self.mlp_out(resid_mid) if mlp_out is None else mlp_out
        return self.embedded.folded.direct_logits(resid_mid) + mlp_out + self.embedded.folded.b_U

    def contributions(self) -> dict[str, Float[Tensor, "n action"]]:
        """Return the logits as a sum of components: the keys of `attribution.decompose`, channels taken together.

        "state", "time and position", "L0H0", …, "L0 b_O", "L0 MLP" (its b_out included) and "b_U".
        """
        f, results = self.embedded.folded, self.head_results()
        b_O = f.direct_logits(f.b_O)
        parts = {"state": f.direct_logits(self.embedded.state)}
        parts |= {"time and position": f.direct_logits(self.fixed) - b_O}
        parts |= dict(zip(f.head_names, f.direct_logits(results), strict=True))
        parts |= {"L0 b_O": b_O, "L0 MLP": self.mlp_out(self.resid_mid(results)), "b_U": f.b_U}
        return {name: part.expand(len(self.embedded.images), -1) for name, part in parts.items()}


@partial(compiled, fastmath=True)
@no_type_check
def _relu_matmul(pre: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Write relu(pre[:, :n]) @ weightᵀ into `out`, for a weight of three rows of n, in one go over `pre`."""
    n = weight.shape[1]
    for i in range(len(pre)):
        left = right = forward = pre[i, 0] * 0
        for j in range(n):
            active = max(pre[i, j], 0)
            left += active * weight[0, j]
            right += active * weight[1, j]
            forward += active * weight[2, j]
        out[i, 0], out[i, 1], out[i, 2] = left, right, forward


Measure = Callable[[Run], Mapping[str, Tensor]]
"""From a run to named values, each with a row for every observation of the batch."""


@checked
def embedded_batches(
    folded: FoldedWeights,
    images: UInt8[np.ndarray, "n 7 7 3"],
    batch_size: Count = BATCH_SIZE,
    progress: str | None = None,
) -> Iterator[tuple[slice, Embedded]]:
    """Yield the rows of each batch of observations, and the batch embedded; `progress` names the bar that is shown."""
    with tqdm(total=len(images), desc=progress, disable=progress is None, unit_scale=True) as bar:
        for rows in row_batches(len(images), batch_size):
            yield rows, folded.embed(torch.from_numpy(images[rows]))
            bar.update(rows.stop - rows.start)


@torch.inference_mode()
@checked
def per_observation(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    measure: Measure,
    batch_size: Count = BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "condition n *rest"]]:
    """Return what `measure` says of every observation at every (rtg, timestep), in their order.

    Raises ValueError for a model of more than one layer, another view size, and a condition it does not have.
    """
    folded, at = FoldedWeights(model), [Condition(*condition) for condition in conditions]
    images, view = observations.images, model.cfg.view_size
    if images.shape[1:] != (view, view, 3):
        raise ValueError(f"observations show {images.shape[1:]}; this model sees a view of {view} cells.")
    results: dict[str, np.ndarray] = {}
    for rows, embedded in embedded_batches(folded, images, batch_size, "observations" if progress else None):
        for k, condition in enumerate(at):
            for name, value in measure(embedded.at(*condition)).items():
                if name not in results:
                    kind = np.float64 if value.dtype == torch.float64 else np.float32
                    results[name] = np.empty((len(at), len(images), *value.shape[1:]), kind)
                results[name][k, rows] = value.numpy()
    return results


def logits(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    progress: bool = False,
) -> Float[np.ndarray, "condition n action"]:
    """Return the action logits of every observation at every (rtg, timestep); `model` itself, up to rounding."""
    values = per_observation(
        model, observations, conditions, lambda run: {"logits": run.logits()}, progress=progress
    )
    return values["logits"]
