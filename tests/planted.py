"""Models built by hand, whose circuit is known because it was put there."""

import torch

from dtbook.model import DecisionTransformer, DTConfig

FRONT_OBJECT, FRONT_COLOUR = 26, 75  # rows of W_E_state for the cell in front: 3·7 + 5, and 49 more
SEEN, TOLD, FORWARD, NEAR, OBSTACLE, GOAL, AT_RTG = range(7)  # directions of the planted models' stream


def scattered(cfg):
    """A model of float64 whose every parameter is drawn at random, biases too, so that nothing in it is zero."""
    model, generator = DecisionTransformer(cfg).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model.eval()


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


def eager(model, strength=4.0):
    """The model with a bias towards forward, so that what holds it back shows."""
    model.b_U[2] = strength
    return model


def see_apart(model):
    """The model with a direction that is 1 for an obstacle in front and 0 for the goal, and one the other way round."""
    for direction, (of_object, of_colour) in {OBSTACLE: (-0.1, 0.8), GOAL: (0.2, -0.6)}.items():
        model.W_E_state[FRONT_OBJECT, direction] = of_object  # obstacle 6, goal 8
        model.W_E_state[FRONT_COLOUR, direction] = of_colour  # obstacle 2, goal 1
    return model


def plant_reader(model, head, reads, strength):
    """A head that attends evenly and writes −strength times what a direction holds, on FORWARD."""
    attn = model.blocks[0].attn
    attn.W_V[head, reads, 0], attn.W_O[head, 0, FORWARD] = 2, -strength
    return model


def plant_look(model, head, strength):
    """A head that looks at the RTG token when an object of 4 or more is in front, and then writes −strength on FORWARD.

    What it finds is always the same: its pattern carries all of it.
    """
    attn = model.blocks[0].attn
    model.W_pos[0, AT_RTG] = 1
    attn.W_Q[head, SEEN, 0], attn.b_Q[head, 0], attn.W_K[head, AT_RTG, 0] = 4, -14, 1
    attn.W_V[head, AT_RTG, 0], attn.W_O[head, 0, FORWARD] = 1, -strength
    return model


def plant_gate(model, head, strength, when_blocked):
    """A head that looks at the RTG token when the way is blocked, or only when it is not, and copies it.

    It writes strength times the return asked for on FORWARD.
    """
    attn, sign = model.blocks[0].attn, 1 if when_blocked else -1
    model.W_E_rtg[AT_RTG], model.W_pos[0, AT_RTG] = 1, 1
    attn.W_Q[head, SEEN, 0], attn.b_Q[head, 0], attn.W_K[head, AT_RTG, 0] = 4 * sign, -14 * sign, 1
    attn.W_V[head, AT_RTG, 0], attn.W_O[head, 0, FORWARD] = 1, strength
    return model


def plant_conjunction(model, head, alone, both):
    """A neuron that frees the way only where neither the state embedding nor the head says that an object is there.

    Emptying the cell for the head alone gives 5 × alone logits; for the head and the MLP, as much and both.
    """
    plant_head(model, head, 1.0, to=TOLD)
    model.blocks[0].attn.W_O[head, 0, FORWARD] = -alone
    mlp = model.blocks[0].mlp
    mlp.W_in[SEEN, 0], mlp.W_in[TOLD, 0], mlp.b_in[0] = -1, 1, 3
    mlp.W_out[0, FORWARD] = both
    return model


def turning(model, rightwards):
    """The model with a bias of logits towards right."""
    model.b_U[1] = rightwards
    return model
