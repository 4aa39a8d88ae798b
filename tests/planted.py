"""Models built by hand, whose circuit is known because it was put there."""

from dtbook.model import DecisionTransformer, DTConfig

FRONT_OBJECT = 26  # the row of W_E_state for the object in front: 3·7 + 5
SEEN, TOLD, FORWARD, NEAR = range(4)  # directions of the planted models' stream


def blank(n_heads=2, n_layers=1, max_steps=20):
    """A model that writes nothing but the object in front, along SEEN, and reads forward from FORWARD."""
    cfg = DTConfig(d_model=8, n_heads=n_heads, d_head=4, d_mlp=4, n_layers=n_layers, max_steps=max_steps)
    model = DecisionTransformer(cfg).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.W_E_state[FRONT_OBJECT, SEEN] = 1
    model.W_U[FORWARD, 2] = 1
    return model.eval()


def plant_head(model, head, strength, to=FORWARD, layer=0):
    """A head that attends evenly and writes −strength times the object in front, twice the half it reads."""
    attn = model.blocks[layer].attn
    attn.W_V[head, SEEN, 0], attn.W_O[head, 0, to] = 2, -strength
    return model


def plant_mlp(model, reads, strength, layer=0):
    """Neuron 0 reads a direction and writes −strength times its sign-corrected value on FORWARD."""
    mlp = model.blocks[layer].mlp
    mlp.W_in[reads, 0] = 1 if reads == SEEN else -1  # what heads write on TOLD is negative
    mlp.W_out[0, FORWARD] = -strength
    return model
