"""TransformerLens's own small transformer with the weights of a Decision Transformer."""

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge


def bridge_of(model):
    """TransformerLens's own small transformer, holding this model's weights."""
    cfg = model.cfg
    shape = {
        name: getattr(cfg, name) for name in ("d_model", "d_head", "n_heads", "d_mlp", "n_layers", "n_ctx")
    }
    bridge = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            **shape,
            d_vocab=cfg.n_actions,
            act_fn="relu",
            normalization_type=None,
            architecture="TransformerLensNative",
        )
    )
    weights = {"head.weight": model.W_U.T}
    for index, block in enumerate(model.blocks):
        attn, mlp, layer = block.attn, block.mlp, f"layers.{index}"
        for name in "QKV":
            by_head = getattr(attn, f"W_{name}").transpose(1, 2)
            weights[f"{layer}.attn.{name.lower()}.weight"] = by_head.reshape(-1, cfg.d_model)
            weights[f"{layer}.attn.{name.lower()}.bias"] = getattr(attn, f"b_{name}").flatten()
        weights[f"{layer}.attn.o.weight"] = attn.W_O.reshape(-1, cfg.d_model).T
        weights[f"{layer}.attn.o.bias"] = attn.b_O
        weights[f"{layer}.mlp.fc_in.weight"], weights[f"{layer}.mlp.fc_in.bias"] = mlp.W_in.T, mlp.b_in
        weights[f"{layer}.mlp.fc_out.weight"], weights[f"{layer}.mlp.fc_out.bias"] = mlp.W_out.T, mlp.b_out
    bridge = bridge.to(model.W_U.dtype)
    own = {
        name.replace("_original_component.", ""): p for name, p in bridge.original_model.named_parameters()
    }
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    return bridge.eval()
