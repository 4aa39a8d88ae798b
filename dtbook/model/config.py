"""The shape of a Decision Transformer, and what may enter it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64, Integer, UInt8
from torch import Tensor

from dtbook.artifacts.parameters import Checked, Count, Whole

# The arguments of a model; `time` counts timesteps.
States = UInt8[Tensor, "batch time view view 3"]
Rtgs = Float[Tensor, "batch time"]
Timesteps = Integer[Tensor, "batch time"] | Bool[Tensor, "batch time"]
Actions = Integer[Tensor, "batch time-1"] | Bool[Tensor, "batch time-1"]

# Indices minigrid may write into the object, colour and state channel (minigrid.core.constants).
ONE_HOT_SIZES = (11, 6, 3)


@dataclass(frozen=True)
class DTConfig(Checked):
    """Shape of a Decision Transformer; the defaults are the post's. Raises ValueError for a wrong field."""

    d_model: Count = 128
    """Width of the residual stream."""
    n_heads: Count = 2
    """Attention heads a layer."""
    d_head: Count = 64
    """Width of a head; n_heads · d_head need not equal d_model."""
    d_mlp: Count = 256
    """Neurons a layer."""
    n_layers: Whole = 1
    """Blocks; 0 leaves embeddings and unembedding."""
    n_timesteps: Count = 1
    """Context, in timesteps of three tokens (RTG, state, action)."""
    max_steps: Count = 300
    """Largest timestep the time embedding knows."""
    encoding: Literal["index", "one-hot"] = "index"
    """How a cell enters: "index" (minigrid's three numbers, as in the post) or "one-hot" (20 bits)."""
    n_actions: Count = 3
    """Actions: left, right, forward."""
    view_size: Count = 7
    """Side of the agent's view, in cells."""
    init: Literal["first", "post", "book"] = "first"
    """How a new model's weights are drawn: see `DecisionTransformer`."""

    # What TransformerLens's ActivationCache and patching functions ask a configuration.
    act_fn: ClassVar[str] = "relu"
    attn_only: ClassVar[bool] = False
    normalization_type: ClassVar[None] = None
    n_key_value_heads: ClassVar[None] = None
    device: ClassVar[None] = None

    @classmethod
    def post(cls) -> "DTConfig":
        """Return the post's shape with the original's initial weights (its `src/decision_transformer/model.py`)."""
        return cls(init="post")

    @classmethod
    def book(cls) -> "DTConfig":
        """Return the shape and the initial weights of the book's models: the post's, but for the RTG embedding."""
        return cls(init="book")

    @property
    def n_ctx(self) -> int:
        """Return the rows of the positional embedding: three tokens a timestep (the last action is never given)."""
        return 3 * self.n_timesteps

    @property
    def n_channels(self) -> int:
        """Return how many numbers enter for each cell of the view: 3 indices or 20 bits."""
        return 3 if self.encoding == "index" else sum(ONE_HOT_SIZES)


def check_inputs(
    cfg: DTConfig, states: Tensor, rtgs: Tensor, timesteps: Tensor, actions: Tensor | None = None
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time-1"] | None]:
    """Return timesteps and actions as int64, whatever integers they are: a tensor of uint8 or bool would be a mask.

    Raises TypeError or ValueError for inputs that would fail later with a riddle or, worse, pass silently.
    """
    view = (cfg.view_size, cfg.view_size, 3)
    if states.dtype != torch.uint8:
        raise TypeError(f"states is {states.dtype}; it must be torch.uint8, as minigrid gives it.")
    if states.ndim != 5 or states.shape[2:] != view:
        raise ValueError(f"states has shape {tuple(states.shape)}; it must be (batch, time, *{view}).")
    batch, time = states.shape[:2]
    if not 1 <= time <= cfg.n_timesteps:
        raise ValueError(f"states holds {time} timesteps; this model's context is 1 to {cfg.n_timesteps}.")
    if not rtgs.is_floating_point() or timesteps.is_floating_point():
        raise TypeError(f"rtgs is {rtgs.dtype}, timesteps {timesteps.dtype}; they must be float and integer.")
    if rtgs.shape != (batch, time) or timesteps.shape != (batch, time):
        raise ValueError(
            f"rtgs has shape {tuple(rtgs.shape)}, timesteps {tuple(timesteps.shape)}; "
            f"both must be (batch, time) = {(batch, time)}, as in states."
        )
    if not rtgs.isfinite().all():
        raise ValueError(f"rtgs holds {rtgs[~rtgs.isfinite()][0]}; every RTG must be a finite number.")
    timesteps = timesteps.long()
    check_range("timesteps", timesteps, cfg.max_steps)
    if actions is None and time > 1:
        raise ValueError(
            f"actions is absent but states holds {time} timesteps; give (batch, {time - 1}) of them."
        )
    if actions is not None:
        if actions.shape != (batch, time - 1) or actions.is_floating_point():
            raise ValueError(
                f"actions is {actions.dtype} of shape {tuple(actions.shape)}; "
                f"it must be integers of shape (batch, time − 1) = {(batch, time - 1)}."
            )
        actions = actions.long()
        check_range("actions", actions, cfg.n_actions - 1)
    return timesteps, actions


def check_range(name: str, values: Tensor, largest: int) -> None:
    """Raise ValueError if a value of tensor `name` lies outside 0 … `largest`."""
    if not values.numel():
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > largest:
        raise ValueError(f"{name} reaches from {low} to {high}; allowed is 0 to {largest}.")


def check_one_hot(states: UInt8[Tensor, "*batch view view 3"]) -> None:
    """Raise ValueError for an index that has no bit."""
    for channel, size in enumerate(ONE_HOT_SIZES):
        check_range(f"states[..., {channel}]", states[..., channel], size - 1)


def one_hot(states: UInt8[Tensor, "*batch view view 3"]) -> Bool[Tensor, "*batch view view 20"]:
    """Return the 20 bits of each cell: 11 objects, 6 colours, 3 states, as OneHotPartialObsWrapper does.

    Raises ValueError for an index minigrid does not know (it would light no bit, or another channel's).
    """
    check_one_hot(states)
    bits = [
        states[..., channel, None] == torch.arange(size, dtype=torch.uint8, device=states.device)
        for channel, size in enumerate(ONE_HOT_SIZES)
    ]
    return torch.cat(bits, dim=-1)
