"""Checkpoints of the original: their weights under our names, or what they have that this architecture lacks.

The post's layout has `state_encoder` and `predict_actions` in a bare state dict; the later ones have `state_embedding`
and `action_predictor`, in a state dict that lies beside JSON texts of its configurations.

Source: https://github.com/jbloomAus/DecisionTransformerInterpretability (`src/decision_transformer/model.py`, later
`src/models/trajectory_transformer.py`, `src/config.py` and `store_transformer_model`).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import pad

from dtbook.model.config import ONE_HOT_SIZES, DTConfig

LATER = {"state_embedding": "state_encoder", "action_predictor": "predict_actions"}
"""Parts that were renamed."""
OUTSIDE_BLOCKS = {
    "W_E_rtg": "reward_embedding.0.weight",
    "W_E_state": "state_encoder.weight",
    "W_E_action": "action_embedding.0.weight",
    "W_E_time": "time_embedding.weight",
    "W_pos": "transformer.pos_embed.W_pos",
    "W_U": "predict_actions.weight",
    "b_U": "predict_actions.bias",
}
BLOCK = {f"attn.{kind}_{part}" for kind in "Wb" for part in "QKVO"}
BLOCK |= {f"mlp.{kind}_{part}" for kind in "Wb" for part in ("in", "out")}
UNUSED = re.compile(
    r"(predict_(rewards|states)|(reward|state)_predictor)\..*|transformer\.blocks\.\d+\.attn\.(mask|IGNORE)"
)
"""What no action logit reads."""
LAYER_NORM, GATE, LINEAR_TIME = r"\bln(\d|_final)\.", "W_gate", r"time_embedding\.bias"
OTHERS = {
    LAYER_NORM: "LayerNorm",
    GATE: "a gated MLP",
    r"(?i)lstm|rnn|gru": "an LSTM",
    r"\.conv": "a convolution of the view",
    r"state_encoder\.(embedding|linear)\.": "a bag of words for the view",
    LINEAR_TIME: "a linear time embedding",
}
"""What weights of these names belong to."""


def convert(checkpoint: Any) -> tuple[DTConfig, dict[str, Tensor]]:
    """Return the shape and the weights of a checkpoint. Raises ValueError, without its name, where it differs."""
    state, model, environment = _unwrap(checkpoint)
    names = _names(state)
    if differences := list(dict.fromkeys(_differences(state, model, environment))):
        raise ValueError(f"has what this architecture has not: {', '.join(differences)}")
    if missing := [name for name in names.values() if name not in state]:
        raise ValueError(f"is no Decision Transformer of the original: it has no {missing[0]}")
    if unknown := [name for name in state if name not in names.values() and not UNUSED.fullmatch(name)]:
        raise ValueError(f"has weights that this architecture has not: {', '.join(unknown)}")
    weights = {ours: state[theirs] for ours, theirs in names.items()}
    weights["W_E_rtg"] = weights["W_E_rtg"][:, 0]
    weights |= {name: weights[name].T for name in ("W_E_state", "W_U")}
    weights["W_E_action"] = weights["W_E_action"][:-1]  # without the row of its padding
    # the third position is an action's, which is never given, and the later layouts have none
    weights["W_pos"] = pad(weights["W_pos"], (0, 0, 0, 3 - len(weights["W_pos"])))
    return _shape(weights), weights


def _unwrap(checkpoint: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return the state dict, in the post's names, and what is said of the model and of the environment."""
    wrapped = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = wrapped.get("model_state_dict", wrapped)
    if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError("is no checkpoint of the original: it holds no state dict")
    parts = {name: str(name).partition(".") for name in state}
    renamed = {
        LATER.get(first, first) + dot + rest: state[name] for name, (first, dot, rest) in parts.items()
    }
    return renamed, _said(wrapped, "model_config"), _said(wrapped, "environment_config")


def _said(wrapped: Mapping[Any, Any], name: str) -> dict[str, Any]:
    try:
        said = wrapped.get(name, {})
        return dict(json.loads(said) if isinstance(said, str) else said)
    except (TypeError, ValueError):
        raise ValueError(f"is no checkpoint of the original: its {name} is not a JSON object") from None


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the original's name of each weight of ours."""
    found = (re.match(r"transformer\.blocks\.(\d+)\.", name) for name in state)
    layers = {match[1] for match in found if match} or {"0"}
    in_blocks = {f"blocks.{k}.{part}": f"transformer.blocks.{k}.{part}" for k in layers for part in BLOCK}
    return OUTSIDE_BLOCKS | in_blocks


def _differences(
    state: Mapping[str, Tensor], model: Mapping[str, Any], environment: Mapping[str, Any]
) -> Iterator[str]:
    """Yield in words what this architecture has not."""
    for pattern, words in OTHERS.items():
        if any(re.search(pattern, name) for name in state):
            yield words
    if model.get("layer_norm") in (True, "LN", "LNPre", "RMS", "RMSPre"):
        yield OTHERS[LAYER_NORM]
    if model.get("gated_mlp"):
        yield OTHERS[GATE]
    if (activation := model.get("activation_fn") or "relu") != "relu":
        yield f"the activation {activation}"
    if (time := state.get("time_embedding.weight")) is not None and time.shape[-1] == 1:
        yield OTHERS[LINEAR_TIME]
    positions = state.get("transformer.pos_embed.W_pos", (0, 1))
    if len(positions) not in (2, 3):
        yield f"a context of {len(positions)} tokens, padded where an episode begins (one timestep has 2)"
    if environment.get("fully_observed") or environment.get("img_obs"):
        yield "a picture or the whole grid in the place of the agent's view"


def _shape(weights: Mapping[str, Tensor]) -> DTConfig:
    n_inputs, d_model = weights["W_E_state"].shape
    channels: dict[Literal["index", "one-hot"], int]
    channels = {"index": len(ONE_HOT_SIZES), "one-hot": sum(ONE_HOT_SIZES)}
    views = {encoding: math.isqrt(n_inputs // each) for encoding, each in channels.items()}
    fitting = [encoding for encoding, view in views.items() if channels[encoding] * view**2 == n_inputs]
    if not fitting:
        raise ValueError(f"reads {n_inputs} numbers of a view; square ones have 3 or 20 a cell")
    layers = [weights[name] for name in weights if name.endswith("attn.W_Q")]
    (n_heads, _, d_head), d_mlp = layers[0].shape, weights["blocks.0.mlp.b_in"].shape[0]
    return DTConfig(
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        n_layers=len(layers),
        max_steps=len(weights["W_E_time"]) - 1,
        encoding=fitting[0],
        n_actions=len(weights["b_U"]),
        view_size=views[fitting[0]],
    )
