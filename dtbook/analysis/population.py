"""Every observation through a one-layer model, with all that RTG, timestep and interventions share computed once.

With one layer and no LayerNorm, what reads the residual stream after attention are the MLP's input (W_in) and the
action logits (W_U): side by side, the *readers*, d_mlp + 3 columns. All that is written before them is linear in the
state embedding once the attention is known, so a batch of observations meets the weights once (`Folded.share`), and a
run at some RTG and timestep (`Shared.at`) costs sums over the readers' columns, not matrix products. Ablating or
patching a head replaces its row of `Run.heads`, and is exact: the MLP is evaluated anew.

Only the state token's query is needed. RTG and state token differ by δ = R·W_E_rtg + W_pos[0] − W_pos[1] − state
embedding, as time and biases cancel in their difference, so attention to RTG is sigmoid(q · δW_K / √d_head).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import compiled
from dtbook.model.config import one_hot
from dtbook.model.transformer import DecisionTransformer

BATCH_SIZE = 2048
"""Observations a batch: small enough that a run's rows stay in the processor's cache."""


class Condition(NamedTuple):
    """What a run is asked, whatever it sees."""

    rtg: float
    timestep: int


class Folded:
    """The weights of a one-layer model, multiplied out to the readers (in float64, then in the model's dtype).

    A model with a longer context is taken as it is with a single timestep. Raises ValueError for another number of
    layers.
    """

    def __init__(self, model: DecisionTransformer) -> None:
        if model.cfg.n_layers != 1:
            raise ValueError(f"model has {model.cfg.n_layers} layers; only one can be folded.")
        self.model = model
        self.heads = [f"L0H{head}" for head in range(model.cfg.n_heads)]
        with torch.no_grad():
            self._fold({name: weight.detach().double() for name, weight in model.named_parameters()})

    def _fold(self, w: Mapping[str, Tensor]) -> None:
        def of(name: str) -> Tensor:
            return w[f"blocks.0.{name}"]

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self.model.W_U)

        d_head, U = self.model.cfg.d_head, w["W_U"]
        reader = torch.cat([of("mlp.W_in"), U], 1)
        mean = torch.full((self.model.cfg.n_heads, d_head, 1), 1 / d_head, dtype=torch.double)
        written = torch.cat(
            [of("attn.W_O") @ reader, mean], 2
        )  # last column: the mean of z over its features
        self.n_readers = reader.shape[1]
        self.W_V = cast(of("attn.W_V") @ written)  # head d_model column (a reader, or the mean)
        self.b_V = cast((of("attn.b_V")[:, None] @ written)[:, 0])
        self.reader, self.feature_mean = cast(reader), cast(of("attn.W_O").sum(1) @ reader)
        self.b_O = cast(of("attn.b_O") @ reader)
        self.d_mlp = self.model.cfg.d_mlp
        self.b_in = cast(
            torch.nn.functional.pad(of("mlp.b_in"), (0, U.shape[1]))
        )  # a reader's: 0 for the logits
        self.W_mlp, self.b_mlp = cast(of("mlp.W_out") @ U), cast(of("mlp.b_out") @ U)
        self.b_U = cast(w["b_U"])
        self.mlp_mean = cast(of("mlp.W_out").mean(1)), cast(of("mlp.b_out").mean()), cast(U.sum(0))
        view, m = self.model.cfg.view_size, self.model.cfg.d_model
        image = w["W_E_state"].view(-1, view, view, m).permute(1, 2, 0, 3).reshape(-1, m)  # as images lie
        columns = reader[None], of("attn.W_V") @ written, torch.cat([of("attn.W_Q"), of("attn.W_K")])
        self.from_image = [cast(image @ weight) for weight in columns]  # each: part input column
        self.rtg, self.key = cast(w["W_E_rtg"]), cast(w["W_pos"][0] - w["W_pos"][1])
        self.time = cast(w["W_E_time"] + w["W_pos"][1])  # of the state token, its position included

    @torch.no_grad()
    def share(self, images: UInt8[Tensor, "n 7 7 3"]) -> "Shared":
        """Return what a batch of observations has in common at every RTG and timestep."""
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
        return Shared(self, images, state[0], value, q, k, (q * k).sum(-1))


class Shared(NamedTuple):
    """A batch of observations after they have met the weights: without RTG, time and biases."""

    folded: Folded
    images: UInt8[Tensor, "n 7 7 3"]
    state: Float[Tensor, "n reader"]
    """What the state embedding writes on the readers directly."""
    value: Float[Tensor, "head n column"]
    """What a head that attends to the state token alone writes on them; then the mean of its z over features."""
    q: Float[Tensor, "head n d_head"]
    k: Float[Tensor, "head n d_head"]
    qk: Float[Tensor, "head n"]
    """q · k of the state embedding with itself."""

    @torch.no_grad()
    def at(self, rtg: float, timestep: int) -> "Run":
        """Return the run of this batch at an RTG and a timestep. Raises ValueError where the model has none such."""
        f, attn = self.folded, self.folded.model.blocks[0].attn
        if not 0 <= timestep < len(f.time):
            raise ValueError(f"timestep is {timestep}; this model has timesteps 0 to {len(f.time) - 1}.")
        if not np.isfinite(rtg):
            raise ValueError(f"rtg is {rtg}; it must be a finite number.")
        time, token = f.time[timestep], rtg * f.rtg + f.key
        # (q of the state + q of the time) · (k of the RTG token − k of the state), multiplied out
        query, key = (time @ attn.W_Q + attn.b_Q).unsqueeze(2), (token @ attn.W_K).unsqueeze(2)
        scores = (self.q @ key - self.k @ query + query.transpose(1, 2) @ key).squeeze(2) - self.qk
        scores = scores / f.model.cfg.d_head**0.5
        pattern = torch.sigmoid(scores)
        rtg_value, time_value = token @ f.W_V, time @ f.W_V + f.b_V
        fixed = time @ f.reader + f.b_O + f.b_in
        return Run(self, Condition(rtg, timestep), pattern, rtg_value, time_value, fixed)


class Run(NamedTuple):
    """A batch at one RTG and timestep, up to the MLP."""

    shared: Shared
    condition: Condition
    pattern: Float[Tensor, "head n"]
    """Attention of the state token to RTG; the rest is to itself."""
    rtg_value: Float[Tensor, "head column"]
    """What a head writes of the RTG token's own value (RTG and position, without time and biases)."""
    time_value: Float[Tensor, "head column"]
    """What it writes of time, the state token's position and b_V, to whatever it attends."""
    fixed: Float[Tensor, " reader"]
    """What time, position and b_O write on the readers directly, and b_in."""

    def heads(
        self,
        pattern: Float[Tensor, "head n"] | None = None,
        value: Float[Tensor, "head n column"] | None = None,
    ) -> Float[Tensor, "head n column"]:
        """Return what each head writes on the readers, with its own pattern and values or those of another run."""
        pattern = (self.pattern if pattern is None else pattern).unsqueeze(-1)
        value = self.shared.value if value is None else value
        return torch.lerp(value, self.rtg_value.unsqueeze(1), pattern).add_(self.time_value.unsqueeze(1))

    def read(self, heads: Float[Tensor, "head n column"]) -> Float[Tensor, "n reader"]:
        """Return what the readers get in all: the neurons' `hook_pre`, then the logits without MLP and b_U."""
        read = self.shared.state + self.fixed
        for head in heads:
            read += head[:, :-1]
        return read

    def neurons(self, read: Float[Tensor, "n reader"]) -> Float[Tensor, "n d_mlp"]:
        """Return the activations of the neurons (`mlp.hook_post`)."""
        return read[:, : self.shared.folded.d_mlp].relu()

    def mlp(self, read: Float[Tensor, "n reader"]) -> Float[Tensor, "n action"]:
        """Return what the MLP writes on the logits, b_out included."""
        f, out = (
            self.shared.folded,
            np.empty((len(read), self.shared.folded.W_mlp.shape[1]), read.numpy().dtype),
        )
        _relu_matmul(read.numpy(), f.W_mlp.T.contiguous().numpy(), out)
        return torch.from_numpy(out).add_(f.b_mlp)

    def mlp_feature_mean(self, read: Float[Tensor, "n reader"]) -> Float[Tensor, "n action"]:
        """Return what the MLP would write on the logits with the mean of its output's entries in all of them."""
        weight, bias, on_logits = self.shared.folded.mlp_mean
        return (self.neurons(read) @ weight + bias).unsqueeze(1) * on_logits

    def logits(
        self,
        heads: Float[Tensor, "head n column"] | None = None,
        mlp: Float[Tensor, "#n action"] | None = None,
    ) -> Float[Tensor, "n action"]:
        """Return the action logits, with the heads' and the MLP's own outputs or with others in their place."""
        return self.finish(self.read(self.heads() if heads is None else heads), mlp)

    def finish(
        self, read: Float[Tensor, "n reader"], mlp: Float[Tensor, "#n action"] | None = None
    ) -> Float[Tensor, "n action"]:
        """Return the action logits from what the readers get, with the MLP's own output or another."""
        mlp = self.mlp(read) if mlp is None else mlp
        return read[:, self.shared.folded.d_mlp :] + mlp + self.shared.folded.b_U

    def contributions(self) -> dict[str, Float[Tensor, "n action"]]:
        """Return the logits as a sum of components: the keys of `attribution.decompose`, channels taken together.

        "state", "time and position", "L0H0", …, "L0 b_O", "L0 MLP" (its b_out included) and "b_U".
        """
        f, heads = self.shared.folded, self.heads()
        first, last = f.d_mlp, f.n_readers
        b_O = f.b_O[first:]
        parts = {"state": self.shared.state[:, first:], "time and position": self.fixed[first:] - b_O}
        parts |= {name: part[:, first:last] for name, part in zip(f.heads, heads, strict=True)}
        parts |= {"L0 b_O": b_O, "L0 MLP": self.mlp(self.read(heads)), "b_U": f.b_U}
        return {name: part.expand(len(self.shared.images), -1) for name, part in parts.items()}


@partial(compiled, fastmath=True)
@no_type_check
def _relu_matmul(pre: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """out = relu(pre[:, :n]) @ weightᵀ for a weight of three rows of n, in one go over `pre`."""
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


@torch.inference_mode()
def collect(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    measure: Measure,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "condition n *rest"]]:
    """Return what `measure` says of every observation at every (rtg, timestep), in their order.

    Raises ValueError for a model of more than one layer, another view size, and a condition it cannot be asked.
    """
    folded, asked = Folded(model), [Condition(*condition) for condition in conditions]
    if observations.images.shape[1:] != (model.cfg.view_size, model.cfg.view_size, 3):
        raise ValueError(
            f"observations show {observations.images.shape[1:]}; this model sees a view of {model.cfg.view_size} cells."
        )
    results: dict[str, np.ndarray] = {}
    n = len(observations.images)
    with tqdm(total=n, desc="observations", disable=not progress, unit_scale=True) as bar:
        for start in range(0, n, batch_size):
            rows = slice(start, min(start + batch_size, n))
            shared = folded.share(torch.from_numpy(observations.images[rows]))
            for k, condition in enumerate(asked):
                for name, value in measure(shared.at(*condition)).items():
                    if name not in results:
                        kind = np.float64 if value.dtype == torch.float64 else np.float32
                        results[name] = np.empty((len(asked), n, *value.shape[1:]), kind)
                    results[name][k, rows] = value.numpy()
            bar.update(rows.stop - rows.start)
    return results


def logits(
    model: DecisionTransformer,
    observations: ObservationSet,
    conditions: Iterable[tuple[float, int]],
    progress: bool = False,
) -> Float[np.ndarray, "condition n action"]:
    """Return the action logits of every observation at every (rtg, timestep); `model` itself, up to rounding."""
    return collect(model, observations, conditions, lambda run: {"logits": run.logits()}, progress=progress)[
        "logits"
    ]
