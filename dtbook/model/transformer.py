"""The Decision Transformer, hooked under TransformerLens's names; saving, loading, and reading the post's checkpoint.

The architecture is the post's (Figure 6): tokens R₀ s₀ a₀ R₁ s₁ …, no LayerNorm and no tanh anywhere, so the
action logits at a state token are exactly the sum of what each component writes there, times `W_U`, plus
`b_U`.

Vectors are rows, as in TransformerLens: a weight `W` of shape (in, out) is applied as `x @ W`, W_QK = W_Q
W_Kᵀ and W_OV = W_V W_O. Axes of the activations (`time` counts timesteps, `pos` tokens; pos = 3·time − 1):

| hook | axes |
|---|---|
| hook_rtg_embed, hook_state_embed, hook_time_embed | batch time d_model |
| hook_action_embed (absent when there is one timestep) | batch time−1 d_model |
| hook_embed (token + time), hook_pos_embed, blocks.L.hook_resid_pre / mid / post, hook_attn_out, hook_mlp_in, hook_mlp_out | batch pos d_model |
| blocks.L.attn.hook_q / k / v / z | batch pos head d_head |
| blocks.L.attn.hook_result, blocks.L.hook_q_input / k_input / v_input (computed only when hooked) | batch pos head d_model |
| blocks.L.attn.hook_attn_scores / pattern | batch head query key |
| blocks.L.mlp.hook_pre / post | batch pos d_mlp |

Sources: the post, https://www.lesswrong.com/posts/bBuBDJBYHt39Q5zZy/decision-transformer-interpretability;
Chen et al. 2021, https://arxiv.org/abs/2106.01345; Elhage et al. 2021 (the circuits' vocabulary).
"""  # noqa: E501

import copy
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from dtbook.artifacts.parameters import Integer, Integers, Whole, check, check_finite, checked
from dtbook.artifacts.post_weights import POST_MODEL_SHA256, POST_MODEL_URL
from dtbook.model.config import Actions, DTConfig, Rtgs, States, Timesteps, check_inputs, one_hot
from dtbook.model.files import FolderMixin, read_folder, read_post_checkpoint
from dtbook.model.fused import Weights, is_plain, one_timestep
from dtbook.model.original import convert

# The weights of a block, and where in it they are.
STACKED = {f"{kind}_{part}": "attn" for kind in "Wb" for part in "QKVO"}
STACKED |= {f"{kind}_{part}": "mlp" for kind in "Wb" for part in ("in", "out")}
RTG_STD = 0.1
"""Standard deviation of the RTG embedding at the start of the book's models; in the post it is 1/128."""


def _linear(n_inputs: int, *shape: int, generator: torch.Generator) -> nn.Parameter:
    """Draw weights uniformly within ±1/√inputs, as PyTorch draws a linear layer."""
    return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) / n_inputs**0.5)


def _normal(std: float, *shape: int, generator: torch.Generator, mean: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator) * std + mean)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (batch, pos, [head,] d_model) times weight (head, d_model, d_head): (batch, pos, head, d_head)."""
    if x.ndim == 4:
        return torch.einsum("bphm,hmd->bphd", x, weight)
    return (x @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (weight.shape[0], weight.shape[2]))


class Attention(nn.Module):
    """Causal multi-head attention, weights by head."""

    def __init__(self, cfg: DTConfig, std: float, generator: torch.Generator) -> None:
        """Draw the weights; see `DecisionTransformer` for their scale."""
        super().__init__()
        h, m, d = cfg.n_heads, cfg.d_model, cfg.d_head
        self.W_Q, self.W_K, self.W_V = (_normal(std, h, m, d, generator=generator) for _ in range(3))
        self.W_O = _normal(std, h, d, m, generator=generator)
        self.b_Q, self.b_K, self.b_V, self.b_O = _zeros(h, d), _zeros(h, d), _zeros(h, d), _zeros(m)
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = (HookPoint() for _ in range(4))
        self.hook_attn_scores, self.hook_pattern, self.hook_result = (HookPoint() for _ in range(3))

    def forward(
        self, q_input: Tensor, k_input: Tensor, v_input: Tensor
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what all heads and b_O write."""
        q = self.hook_q(_by_head(q_input, self.W_Q) + self.b_Q)
        k = self.hook_k(_by_head(k_input, self.W_K) + self.b_K)
        v = self.hook_v(_by_head(v_input, self.W_V) + self.b_V)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.W_Q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = self.hook_attn_scores(scores.masked_fill(future, float("-inf")))
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        if self.hook_result.has_hooks():
            return self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O)).sum(2) + self.b_O
        return z.flatten(2) @ self.W_O.flatten(0, 1) + self.b_O


class MLP(nn.Module):
    """One hidden layer of ReLU neurons."""

    def __init__(self, cfg: DTConfig, std: float, generator: torch.Generator) -> None:
        """Draw the weights; see `DecisionTransformer` for their scale."""
        super().__init__()
        self.W_in = _normal(std, cfg.d_model, cfg.d_mlp, generator=generator)
        self.W_out = _normal(std, cfg.d_mlp, cfg.d_model, generator=generator)
        self.b_in, self.b_out = _zeros(cfg.d_mlp), _zeros(cfg.d_model)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return what all neurons and b_out write."""
        return self.hook_post(self.hook_pre(x @ self.W_in + self.b_in).relu()) @ self.W_out + self.b_out


class Block(nn.Module):
    """Attention, then MLP, each reading the residual stream as it is and adding to it."""

    def __init__(self, cfg: DTConfig, std: float, generator: torch.Generator) -> None:
        """Draw the weights; see `DecisionTransformer` for their scale."""
        super().__init__()
        self.n_heads = cfg.n_heads
        self.attn, self.mlp = Attention(cfg, std, generator), MLP(cfg, std, generator)
        self.hook_q_input, self.hook_k_input, self.hook_v_input = (HookPoint() for _ in range(3))
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = (HookPoint() for _ in range(3))
        self.hook_attn_out, self.hook_mlp_in, self.hook_mlp_out = (HookPoint() for _ in range(3))

    def _fork(self, hook: HookPoint, resid: Tensor) -> Tensor:
        """Return a copy of the stream for each head where a hook is attached (path patching), else the stream."""
        return hook(resid.unsqueeze(2).repeat(1, 1, self.n_heads, 1)) if hook.has_hooks() else resid

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block."""
        resid = self.hook_resid_pre(resid)
        inputs = (self._fork(h, resid) for h in (self.hook_q_input, self.hook_k_input, self.hook_v_input))
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(*inputs)))
        return self.hook_resid_post(resid + self.hook_mlp_out(self.mlp(self.hook_mlp_in(resid))))


class DecisionTransformer(HookedRootModule, FolderMixin):
    """The Decision Transformer; called as model(states, rtgs, timesteps, actions=None), see `forward`."""

    blocks: Sequence[Block]

    def __init__(
        self, cfg: DTConfig, seed: int | torch.Generator = 0, metadata: dict[str, Any] | None = None
    ) -> None:
        """Draw the weights of a new model from `seed`, an integer or a torch.Generator on the CPU, as `cfg.init` says.

        "post", as the original has it: normal with standard deviation 1 for time and positions, these around
        0.8/√d_model (which its call of `normal_` gives as the mean), 1/d_model for RTG, 1/((n_actions + 1)·d_model)
        for actions, 0.02 for observations, 0.8/√d_model for attention and MLP, whose biases are 0; W_U and b_U
        uniformly within ±1/√d_model.

        "book": the same, but RTG with standard deviation `RTG_STD`: one that starts smaller leaves returns near 0 hard
        to tell apart (chapter 12).

        "first", as in the first edition of the book: the maps of RTG and observation as PyTorch draws a linear layer,
        uniformly within ±1/√inputs; all else normal with standard deviation 0.02 (W_U: 0.8/√d_model), biases 0.

        `metadata` is a JSON-like dict saved with the weights: where the model comes from, which head is which.
        """
        super().__init__()
        self.cfg, self.metadata = cfg, dict(metadata or {})
        if isinstance(seed, torch.Generator):
            generator = seed
        else:
            generator = torch.Generator().manual_seed(check("seed", seed, Whole))
        linear, normal = partial(_linear, generator=generator), partial(_normal, generator=generator)
        m, n_inputs, first = cfg.d_model, cfg.n_channels * cfg.view_size**2, cfg.init == "first"
        std, scale = 0.02, 0.8 / m**0.5
        self.W_E_rtg = linear(1, m) if first else normal(RTG_STD if cfg.init == "book" else 1 / m, m)
        self.W_E_state = linear(n_inputs, n_inputs, m) if first else normal(std, n_inputs, m)
        self.W_E_action = normal(std if first else 1 / ((cfg.n_actions + 1) * m), cfg.n_actions, m)
        self.W_E_time = normal(std if first else 1.0, cfg.max_steps + 1, m)
        self.W_pos = normal(std, cfg.n_ctx, m) if first else normal(1.0, cfg.n_ctx, m, mean=scale)
        blocks = nn.ModuleList(Block(cfg, std if first else scale, generator) for _ in range(cfg.n_layers))
        self.blocks = blocks  # type: ignore[assignment]
        self.W_U = normal(scale, m, cfg.n_actions) if first else linear(m, m, cfg.n_actions)
        self.b_U = _zeros(cfg.n_actions) if first else linear(m, cfg.n_actions)
        self.hook_rtg_embed, self.hook_state_embed, self.hook_action_embed = (HookPoint() for _ in range(3))
        self.hook_time_embed, self.hook_embed, self.hook_pos_embed = (HookPoint() for _ in range(3))
        self.setup()

    def forward(
        self, states: States, rtgs: Rtgs, timesteps: Timesteps, actions: Actions | None = None
    ) -> Float[Tensor, "batch time action"]:
        """Return the action logits (left, right, forward) read at each state token.

        `states` are minigrid's partial views, `states[..., i, j, channel]` = `obs["image"][i, j, channel]`;
        `timesteps` count the steps of the episode from 0; `actions` are those between the given states. Fewer
        timesteps than the context take the first rows of the positional embedding, in training and in play;
        attention is causal, so shorter episodes in a batch are padded at the end and those logits ignored.

        Raises TypeError or ValueError naming the argument. Invariant: logits = (sum of what the components
        write at the state token) @ W_U + b_U, see `attribution.decompose`.
        """
        resid = self.embed(states, rtgs, timesteps, actions)
        return self.unembed(self.run_blocks(resid))

    def embed(
        self, states: States, rtgs: Rtgs, timesteps: Timesteps, actions: Actions | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream that enters the first block: tokens, time and position."""
        timesteps, actions = check_inputs(self.cfg, states, rtgs, timesteps, actions)
        time = self.hook_time_embed(self.W_E_time[timesteps])
        rtg = self.hook_rtg_embed(rtgs.to(self.W_E_rtg.dtype).unsqueeze(-1) * self.W_E_rtg)
        tokens = [rtg + time, self.hook_state_embed(self.embed_states(states)) + time]
        if actions is not None and actions.shape[1]:
            action = self.hook_action_embed(self.W_E_action[actions])
            # the last timestep's action is what the model predicts: a zero row, cut off below
            tokens.append(nn.functional.pad(action, (0, 0, 0, 1)) + time)
        n_pos = 3 * states.shape[1] - 1
        embed = self.hook_embed(torch.stack(tokens, dim=2).flatten(1, 2)[:, :n_pos])
        return embed + self.hook_pos_embed(self.W_pos[:n_pos].expand_as(embed))

    def embed_states(
        self, states: UInt8[Tensor, "*batch view view channel"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return states @ W_E_state, whose rows are channel-major: row channel·view² + i·view + j.

        The front cell `image[3, 5]` of a 7×7 view is row 26 (object), 75 (colour), 124 (state) of an
        index-encoded model. One-hot channels are OneHotPartialObsWrapper's: 11 objects, 6 colours, 3 states.
        """
        view, m = self.cfg.view_size, self.cfg.d_model
        # permuting 147 rows of weights is cheaper than permuting every observation
        weight = self.W_E_state.view(-1, view, view, m).permute(1, 2, 0, 3).reshape(-1, m)
        return self.encode_states(states).flatten(-3).to(weight.dtype) @ weight

    def encode_states(
        self, states: UInt8[Tensor, "*batch view view channel"]
    ) -> Shaped[Tensor, "*batch view view encoded"]:
        """Return the numbers that a cell enters with: minigrid's indices as they are, or their 20 bits."""
        return one_hot(states) if self.cfg.encoding == "one-hot" else states

    def run_blocks(
        self, resid: Float[Tensor, "batch pos d_model"], start_at_layer: int = 0
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after the last block, given it before block `start_at_layer`."""
        for block in self.blocks[start_at_layer:]:
            resid = block(resid)
        return resid

    def unembed(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch time action"]:
        """Return the logits at the state tokens (positions 1, 4, 7, …)."""
        return resid[:, 1::3] @ self.W_U + self.b_U

    def fast_forward(
        self, states: States, rtgs: Rtgs, timesteps: Timesteps, actions: Actions | None = None
    ) -> Float[Tensor, "batch time action"]:
        """Return `forward`'s logits, up to rounding; faster for one layer of one timestep, where no gradient is wanted.

        That path knows nothing but this class as it stands here, so wherever a model is anything else, by hooks, parts
        or weights of another kind, `forward` itself runs. Raises as `forward`.
        """
        if torch.is_grad_enabled() or states.ndim != 5 or states.shape[1] != 1 or not self.is_plain():
            return self(states, rtgs, timesteps, actions)
        timesteps, _ = check_inputs(self.cfg, states, rtgs, timesteps, actions)
        return self._fused_logits(states[:, 0], rtgs[:, 0], timesteps[:, 0]).unsqueeze(1)

    def is_plain(self) -> bool:
        """Return whether the fast path computes what `forward` does: one layer, and nothing attached or exchanged."""
        dtype, device = self.W_U.dtype, self.W_U.device
        if _has_any_global_hook() or torch.is_autocast_enabled(device.type) or self.cfg.n_layers != 1:
            return False
        return dtype in (torch.float32, torch.float64) and is_plain(self, _fresh(self.cfg), dtype, device)

    def _fused_logits(
        self,
        states: UInt8[Tensor, "batch view view channel"],
        rtgs: Float[Tensor, " batch"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch action"]:
        """Return the logits of one timestep through one layer, by `fused.one_timestep`."""
        attn, mlp, state = self.blocks[0].attn, self.blocks[0].mlp, self.embed_states(states)
        parts: dict[str, Any] = self._parameters | attn._parameters | mlp._parameters
        weights = Weights(*(parts[name] for name in Weights._fields))
        time = nn.functional.embedding(timesteps, self.W_E_time)
        return one_timestep(state, time, rtgs.to(state.dtype), weights)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ActivationCache]:
        """Return the logits and TransformerLens's ActivationCache of the run."""
        logits, cache = super().run_with_cache(*args, **kwargs)
        return logits, ActivationCache(cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def __getattr__(self, name: str) -> Any:
        """Return W_Q, b_Q, …, W_out, b_out stacked over layers: (layer, …), as TransformerLens does."""
        if name in STACKED and len(self.blocks):
            return torch.stack([getattr(getattr(block, STACKED[name]), name) for block in self.blocks])
        return super().__getattr__(name)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of b_O (and b_out) written before block `layer`; ActivationCache asks for it."""
        bias = torch.zeros_like(self.W_pos[0])
        for block in self.blocks[:layer]:
            bias = bias + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return bias + self.blocks[layer].attn.b_O if mlp_input else bias

    def tokens_to_residual_directions(self, tokens: int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """Return the W_U column of each action ("tokens" are actions), for ActivationCache.logit_attrs."""
        return self.W_U.T[tokens]

    @checked
    def permute_heads(self, layer: Integer, order: Integers) -> "DecisionTransformer":
        """Return a copy whose head i is this model's head order[i]: the same function, other names.

        `metadata["head_order"][layer]` keeps, for each head, its index when the model was trained.
        Raises ValueError where the layer does not exist or `order` is no permutation.
        """
        n_heads = self.cfg.n_heads
        if layer not in range(self.cfg.n_layers):
            raise ValueError(f"layer is {layer}; the model has layers 0 to {self.cfg.n_layers - 1}.")
        if sorted(order) != list(range(n_heads)):
            raise ValueError(f"order is {list(order)}; it must be a permutation of 0 to {n_heads - 1}.")
        model = copy.deepcopy(self)
        attn = model.blocks[layer].attn
        with torch.no_grad():
            for weight in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O, attn.b_Q, attn.b_K, attn.b_V):
                weight.copy_(weight[list(order)])
        recorded = model.metadata.setdefault("head_order", {})
        trained = recorded.get(str(layer), list(range(n_heads)))
        recorded[str(layer)] = [trained[head] for head in order]
        return model

    def description(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes to config.json."""
        return {"cfg": asdict(self.cfg), "metadata": self.metadata}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DecisionTransformer":  # type: ignore[override]
        """Return the model that `save_pretrained` wrote to a local folder, in float32 and evaluation mode.

        For a model on the Hugging Face hub, call `huggingface_hub.snapshot_download` first. Raises
        FileNotFoundError for a missing file, ValueError naming the file that is truncated, altered or of
        another kind.
        """
        config, weights = read_folder(folder)
        try:
            model = cls(DTConfig(**config["cfg"]), metadata=config["metadata"])
            model.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder} does not hold a Decision Transformer: {reason}") from error
        return model.eval()

    @classmethod
    def from_post_checkpoint(cls, path: str | Path | None = None) -> "DecisionTransformer":
        """Return the post's own model from `fetch_post_checkpoint()`, or that of any checkpoint of the original.

        Of a `path` any hash and layout will do: `metadata` says which file it is, and where it comes from where that is
        known. Parts that no action logit reads (`predict_rewards`, `predict_states`, masks, the padding row of the
        action embedding) are left out. Raises as `read_post_checkpoint`, and ValueError saying what in the file this
        architecture has not.
        """
        checkpoint, sha256 = read_post_checkpoint(path)
        known = {POST_MODEL_SHA256: POST_MODEL_URL}
        source = known.get(sha256, f"a checkpoint of the original, {Path(path or '').name}")
        try:
            cfg, weights = convert(checkpoint)
            model = cls(cfg, metadata={"source": source, "sha256": sha256})
            model.load_state_dict(weights)
        except ValueError as error:
            raise ValueError(f"{path} {error}.") from error
        except (IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} does not hold a Decision Transformer: {reason}") from error
        check_finite(str(path or source), weights)
        return model.eval()


@lru_cache(maxsize=8)
def _fresh(cfg: DTConfig) -> DecisionTransformer:
    """Return a new model of a shape, which nobody can have changed."""
    return DecisionTransformer(cfg)
