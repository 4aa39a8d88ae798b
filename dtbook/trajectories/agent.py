"""The agent: a small network with a policy and a critic, which sees the 7×7 view of object codes.

The initialisation (orthogonal, with a small gain in the last layer) follows CleanRL (Huang et al. 2022, JMLR 23(274)).
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dtbook.artifacts.parameters import Count, Positive, Share, check, checked, require

OBJECTS = (1, 2, 6, 8)
"""minigrid's codes of what Dynamic Obstacles can show: empty, wall, ball (an obstacle), goal. Nothing is ever
unseen (the view goes through walls), and in this task colour and state follow from the object."""
Encoding = Literal["one-hot", "index"]
ENCODINGS: dict[Encoding, int] = {"one-hot": len(OBJECTS), "index": 3}
"""What the agent may be shown, and how many inputs that makes for each cell of the view."""

ImageBatch = UInt8[Tensor, "batch view view 3"]
Inputs = Float32[Tensor, "batch inputs"]
Logits = Float32[Tensor, "batch actions"]


class ActorCritic(nn.Module):
    """A policy of two tanh layers, `actor`, and a linear `critic` of the last of them.

    Inputs are channel-major: slot·49 + i·7 + j for `images[:, i, j]`, where a slot is one of OBJECTS
    ("one-hot") or a channel ("index").
    """

    @checked
    def __init__(
        self,
        n_actions: Count = 3,
        view_size: Count = 7,
        hidden: Count = 64,
        encoding: Encoding = "one-hot",
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw orthogonal weights (from a generator seeded with 0 if none is given); biases are zero."""
        super().__init__()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.encoding = encoding
        sizes = (ENCODINGS[encoding] * view_size**2, hidden, hidden, n_actions)
        # skip_init: PyTorch's own initialisation would draw from the global generator
        first, second, last = (skip_init(nn.Linear, n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.actor = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        self.critic = skip_init(nn.Linear, hidden, 1)
        # The last layer's small gain makes the first policy all but uniform, whatever it sees.
        gains = {first: math.sqrt(2), second: math.sqrt(2), last: 0.01, self.critic: 1.0}
        for layer, gain in gains.items():
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "ActorCritic":
        """Return the agent that a checkpoint holds; the shapes of its tensors say which sizes it has."""
        hidden, n_inputs = state_dict["actor.0.weight"].shape
        views = {encoding: math.isqrt(n_inputs // slots) for encoding, slots in ENCODINGS.items()}
        encoding = next(e for e, view in views.items() if ENCODINGS[e] * view**2 == n_inputs)
        agent = cls(len(state_dict["actor.4.bias"]), views[encoding], hidden, encoding)
        agent.load_state_dict(state_dict)
        return agent

    def encode(self, images: ImageBatch) -> Inputs:
        """Return what the actor reads. Raises ValueError for an object that is not one of OBJECTS."""
        if self.encoding == "index":
            return images.movedim(-1, 1).flatten(1).float()
        objects = images[..., 0].flatten(1)  # (batch, cells)
        one_hot = objects[:, None] == torch.tensor(OBJECTS, dtype=torch.uint8)[:, None]
        if one_hot.sum() != objects.numel():
            require(False, "images[..., 0]", objects.unique().tolist(), f"of the objects {OBJECTS}")
        return one_hot.flatten(1).float()  # (batch, objects · cells)

    def heads(self, inputs: Inputs) -> tuple[Logits, Float32[Tensor, " batch"]]:
        """Return the action logits and the values of observations that are already encoded."""
        features = self.actor[:-1](inputs)
        return self.actor[-1](features), self.critic(features).squeeze(1)

    def forward(self, images: ImageBatch) -> tuple[Logits, Float32[Tensor, " batch"]]:
        """Return the action logits and the values (expected discounted returns) of observations."""
        return self.heads(self.encode(images))

    @torch.inference_mode()
    def act(
        self,
        images: ImageBatch,
        generator: torch.Generator,
        greedy: bool = False,
        temperature: float = 1.0,
        epsilon: float = 0.0,
    ) -> Int64[Tensor, " batch"]:
        """Return one action per observation: from softmax(logits / temperature), or the likeliest if greedy.

        With probability epsilon, each is replaced by an action drawn uniformly. Raises ValueError for a
        temperature that is not positive and an epsilon outside [0, 1].
        """
        check("temperature", temperature, Positive)
        check("epsilon", epsilon, Share)
        scores = self.actor(self.encode(images))
        if not greedy:  # adding Gumbel noise, −log of exponential noise, makes the argmax a sample
            noise = torch.empty_like(scores).exponential_(generator=generator).log()
            scores = scores / temperature - noise
        actions = scores.argmax(1)
        if epsilon > 0:
            explore = torch.rand(actions.shape, generator=generator) < epsilon
            uniform = torch.randint(scores.shape[1], actions.shape, generator=generator)
            actions = torch.where(explore, uniform, actions)
        return actions
