"""The loss of one timestep through one layer, and its gradients by hand, in arrays that are made once.

The formulas are those of `fused`. PyTorch multiplies the matrices; what happens to each number between the products is
done in one compiled pass. Autograd would cost as much again, for the many small tensors that it makes and adds up. No
kernel changes the order of a sum, so that processors with wider registers take no other path.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, no_type_check

import numpy as np
import torch
from torch import Tensor

from dtbook.gridworld.kernels import compiled

if TYPE_CHECKING:
    from dtbook.model.transformer import DecisionTransformer

WITHOUT_GRADIENT = ("W_E_action", "b_K")
"""The weights without a gradient: no action is read, and b_K adds the same to the scores of both tokens."""


class Gradients:
    """Writes the gradients of a plain one-layer model of one timestep into those of its weights."""

    def __init__(self, model: "DecisionTransformer", batch_size: int) -> None:
        """Make room for so many states; of the model, see `DecisionTransformer.is_plain`, on the CPU."""
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        named: dict[str, Any] = model._parameters | attn._parameters | mlp._parameters
        weights = {name: weight for name, weight in named.items() if name not in WITHOUT_GRADIENT}
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        self._encode = model.encode_states
        self._w = SimpleNamespace(**{name: weight.data for name, weight in weights.items()})
        self._g = SimpleNamespace(**{name: weight.grad for name, weight in weights.items()})
        self._x = self._activations(batch_size)
        self._w_np, self._g_np, self._x_np = map(_arrays, (self._w, self._g, self._x))

    def _activations(self, batch: int) -> SimpleNamespace:
        """Return room for the activations, and, under names that begin with `d_`, for their gradients."""
        (heads, d_model, d_head), (d_mlp, n_actions) = (
            self._w.W_Q.shape,
            (len(self._w.b_in), len(self._w.b_U)),
        )
        by_head, stream, neurons = (heads, batch, d_head), (batch, d_model), (batch, d_mlp)
        shapes: dict[str, tuple[int, ...]] = {
            "flat_states": (batch, len(self._w.W_E_state)),
            "scores": (heads, batch),
        }
        shapes |= {"to_rtg": (heads, batch), "W_read": (n_actions, d_mlp), "d_W_read": (n_actions, d_mlp)}
        shapes |= {"W_U": (n_actions, d_model), "d_W_U": (n_actions, d_model), "d_scores": (heads, batch)}
        shapes |= dict.fromkeys(("q", "dk", "z", "d_q", "d_dk", "d_z"), by_head)
        shapes |= dict.fromkeys(("mixed", "d_mixed"), (heads, *stream))
        shapes |= dict.fromkeys(("state", "stream", "delta", "mid"), stream)
        shapes |= dict.fromkeys(("d_state", "d_stream", "d_delta", "d_mid"), stream)
        shapes |= dict.fromkeys(("post", "d_pre"), neurons)
        shapes |= dict.fromkeys(("log_p", "p", "d_logits"), (batch, n_actions))
        return SimpleNamespace(**{name: self._w.W_U.new_zeros(shape) for name, shape in shapes.items()})

    @torch.no_grad()
    def __call__(
        self, states: Tensor, rtgs: Tensor, timesteps: Tensor, actions: Tensor
    ) -> tuple[float, float]:
        """Write the gradients of the mean cross-entropy; return it (nats), and the share of actions that are likeliest.

        Shapes: states (batch, view, view, channel), the others (batch,). Nothing is checked.
        """
        given = rtgs.to(self._w.W_U.dtype).numpy(), timesteps.numpy()
        self._embed(states, *given)
        self._attend()
        result = self._read(actions.numpy())
        self._read_backward()
        self._attend_backward()
        self._embed_backward(*given)
        return result

    def _embed(self, states: Tensor, rtgs: np.ndarray, timesteps: np.ndarray) -> None:
        w, x, n = self._w_np, self._x, self._x_np
        states = self._encode(states).movedim(-1, 1)
        x.flat_states.view(states.shape).copy_(states)
        torch.mm(x.flat_states, self._w.W_E_state, out=x.state)
        _embed(n.state, rtgs, timesteps, w.W_E_rtg, w.W_E_time, w.W_pos, n.stream, n.delta)

    def _attend(self) -> None:
        w, x, n = self._w, self._x, self._x_np
        torch.bmm(x.stream.expand(x.mixed.shape), w.W_Q, out=x.q)
        torch.bmm(x.delta.expand(x.mixed.shape), w.W_K, out=x.dk)
        _score(n.q, self._w_np.b_Q, n.dk, n.scores)
        torch.sigmoid(x.scores, out=x.to_rtg)
        _mix(n.stream, n.delta, n.to_rtg, self._w_np.b_O, n.mixed, n.mid)
        torch.baddbmm(w.b_V.unsqueeze(1), x.mixed, w.W_V, out=x.z)
        for z, W_O in zip(x.z, w.W_O, strict=True):
            x.mid.addmm_(z, W_O)

    def _read(self, actions: np.ndarray) -> tuple[float, float]:
        w, x, n = self._w, self._x, self._x_np
        torch.addmm(w.b_in, x.mid, w.W_in, out=x.post).relu_()
        x.W_U.copy_(w.W_U.T)  # products with 3 long rows are four times as fast as with 3 short columns
        torch.mm(x.W_U, w.W_out.T, out=x.W_read)
        bias = torch.addmv(w.b_U, x.W_U, w.b_out)
        torch.log_softmax(torch.addmm(bias, x.mid, x.W_U.T).addmm_(x.post, x.W_read.T), 1, out=x.log_p)
        torch.exp(x.log_p, out=x.p)
        return _cross_entropy(n.log_p, n.p, actions, n.d_logits)

    def _read_backward(self) -> None:
        w, x, n, g = self._w, self._x, self._x_np, self._g
        _read_backward(n.d_logits, n.W_read, n.W_U, n.post, n.d_pre, n.d_mid, self._g_np.b_in, self._g_np.b_U)
        rows = x.d_logits.T.contiguous()
        torch.mm(rows, x.post, out=x.d_W_read)
        torch.mm(rows, x.mid, out=x.d_W_U).addmm_(x.d_W_read, w.W_out).addr_(g.b_U, w.b_out)
        g.W_U.copy_(x.d_W_U.T)
        torch.mm(x.d_W_read.T, x.W_U, out=g.W_out)
        torch.mv(w.W_U, g.b_U, out=g.b_out)
        torch.mm(x.mid.T, x.d_pre, out=g.W_in)
        x.d_mid.addmm_(x.d_pre, w.W_in.T)

    def _attend_backward(self) -> None:
        w, x, n, g = self._w, self._x, self._x_np, self._g
        d_mid = x.d_mid.expand(x.mixed.shape)
        torch.bmm(d_mid, w.W_O.mT, out=x.d_z)
        torch.bmm(x.z.mT, d_mid, out=g.W_O)
        torch.bmm(x.d_z, w.W_V.mT, out=x.d_mixed)
        torch.bmm(x.mixed.mT, x.d_z, out=g.W_V)
        _score_backward(n.d_mixed, n.delta, n.to_rtg, n.d_scores, n.q, n.dk, n.d_q, n.d_dk, self._g_np.b_Q)
        _mix_backward(
            n.d_mixed, n.to_rtg, n.d_mid, n.d_z, n.d_stream, n.d_delta, self._g_np.b_V, self._g_np.b_O
        )
        torch.bmm(x.stream.expand(x.mixed.shape).mT, x.d_q, out=g.W_Q)
        torch.bmm(x.delta.expand(x.mixed.shape).mT, x.d_dk, out=g.W_K)
        for d_q, d_dk, W_Q, W_K in zip(x.d_q, x.d_dk, w.W_Q, w.W_K, strict=True):
            x.d_stream.addmm_(d_q, W_Q.T)
            x.d_delta.addmm_(d_dk, W_K.T)

    def _embed_backward(self, rtgs: np.ndarray, timesteps: np.ndarray) -> None:
        x, n, g = self._x, self._x_np, self._g_np
        _embed_backward(n.d_stream, n.d_delta, rtgs, timesteps, g.W_E_rtg, g.W_E_time, g.W_pos, n.d_state)
        torch.mm(x.flat_states.T, x.d_state, out=self._g.W_E_state)


def _arrays(tensors: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: tensor.numpy() for name, tensor in vars(tensors).items()})


@compiled
@no_type_check
def _embed(state, rtgs, timesteps, W_E_rtg, W_E_time, W_pos, stream, delta):
    """Write the state token's stream, and δ."""
    for b in range(len(state)):
        rtg, t = rtgs[b], timesteps[b]
        for j in range(state.shape[1]):
            s = state[b, j]
            stream[b, j] = s + W_E_time[t, j] + W_pos[1, j]
            delta[b, j] = rtg * W_E_rtg[j] + W_pos[0, j] - W_pos[1, j] - s


LANES = 16
"""Partial sums of a scalar product: the compiler puts them into whatever registers there are."""


@compiled
@no_type_check
def _score(q, b_Q, dk, scores):
    """Add the bias to the queries, and write their products with the difference of the keys, scaled."""
    heads, n, d_head = q.shape
    scale, lanes, whole = q.dtype.type(d_head**-0.5), np.zeros(LANES, q.dtype), d_head - d_head % LANES
    for h in range(heads):
        for b in range(n):
            lanes[:] = 0
            for j in range(d_head):
                q[h, b, j] += b_Q[h, j]
            for j in range(0, whole, LANES):
                for lane in range(LANES):
                    lanes[lane] += q[h, b, j + lane] * dk[h, b, j + lane]
            for j in range(whole, d_head):
                lanes[0] += q[h, b, j] * dk[h, b, j]
            total = lanes[0]
            for lane in range(1, LANES):
                total += lanes[lane]
            scores[h, b] = total * scale


@compiled
@no_type_check
def _mix(stream, delta, to_rtg, b_O, mixed, mid):
    """Write s + a_h δ, and the part of m that attention does not change."""
    for b in range(len(stream)):
        for j in range(stream.shape[1]):
            mid[b, j] = stream[b, j] + b_O[j]
        for h in range(len(mixed)):
            a = to_rtg[h, b]
            for j in range(stream.shape[1]):
                mixed[h, b, j] = stream[b, j] + a * delta[b, j]


@compiled
@no_type_check
def _cross_entropy(log_p, p, actions, d_logits):
    """Write the gradient of the mean cross-entropy; return it, and the share of actions that are the likeliest."""
    n, n_actions = p.shape
    loss, right, one = 0.0, 0, p.dtype.type(1)
    for b in range(n):
        best, target = 0, actions[b]
        for a in range(n_actions):
            if log_p[b, a] > log_p[b, best]:
                best = a
            d_logits[b, a] = p[b, a] / n
        d_logits[b, target] = (p[b, target] - one) / n
        loss -= log_p[b, target]
        right += best == target
    return loss / n, right / n


@compiled
@no_type_check
def _read_backward(d_logits, W_read, W_U, post, d_pre, d_mid, d_b_in, d_b_U):
    """Write the gradients of the neurons, of what of m is read directly, and of two biases."""
    n, n_actions = d_logits.shape
    zero = post.dtype.type(0)
    d_b_in[:], d_b_U[:], d_pre[:], d_mid[:] = 0, 0, 0, 0
    for b in range(n):
        for a in range(n_actions):
            g = d_logits[b, a]
            d_b_U[a] += g
            for j in range(post.shape[1]):
                d_pre[b, j] += g * W_read[a, j]
            for j in range(d_mid.shape[1]):
                d_mid[b, j] += g * W_U[a, j]
        for j in range(post.shape[1]):
            g = d_pre[b, j] if post[b, j] > zero else zero
            d_pre[b, j] = g
            d_b_in[j] += g


@compiled
@no_type_check
def _score_backward(d_mixed, delta, to_rtg, d_scores, q, dk, d_q, d_dk, d_b_Q):
    """Write the gradients of the scores (scale and sigmoid taken in), of queries and keys, and of b_Q."""
    heads, n, d_head = q.shape
    d_model, one = delta.shape[1], q.dtype.type(1)
    scale, lanes, whole = q.dtype.type(d_head**-0.5), np.zeros(LANES, q.dtype), d_model - d_model % LANES
    d_b_Q[:] = 0
    for h in range(heads):
        for b in range(n):
            lanes[:] = 0
            for j in range(0, whole, LANES):
                for lane in range(LANES):
                    lanes[lane] += d_mixed[h, b, j + lane] * delta[b, j + lane]
            for j in range(whole, d_model):
                lanes[0] += d_mixed[h, b, j] * delta[b, j]
            total = lanes[0]
            for lane in range(1, LANES):
                total += lanes[lane]
            g = total * to_rtg[h, b] * (one - to_rtg[h, b]) * scale
            d_scores[h, b] = g
            for j in range(d_head):
                d_q[h, b, j] = g * dk[h, b, j]
                d_dk[h, b, j] = g * q[h, b, j]
                d_b_Q[h, j] += g * dk[h, b, j]


@compiled
@no_type_check
def _mix_backward(d_mixed, to_rtg, d_mid, d_z, d_stream, d_delta, d_b_V, d_b_O):
    """Write the gradients of stream and δ but for what comes by queries and keys, and of two biases."""
    heads, n, d_head = d_z.shape
    d_b_V[:], d_b_O[:], d_delta[:] = 0, 0, 0
    for b in range(n):
        for j in range(d_mid.shape[1]):
            d_b_O[j] += d_mid[b, j]
            d_stream[b, j] = d_mid[b, j]
        for h in range(heads):
            a = to_rtg[h, b]
            for j in range(d_mid.shape[1]):
                d_stream[b, j] += d_mixed[h, b, j]
                d_delta[b, j] += a * d_mixed[h, b, j]
            for j in range(d_head):
                d_b_V[h, j] += d_z[h, b, j]


@compiled
@no_type_check
def _embed_backward(d_stream, d_delta, rtgs, timesteps, d_W_E_rtg, d_W_E_time, d_W_pos, d_state):
    """Write the gradients of the embeddings; that of an observation is its stream's less δ's."""
    d_W_E_rtg[:], d_W_E_time[:], d_W_pos[:] = 0, 0, 0
    for b in range(len(d_stream)):
        rtg, t = rtgs[b], timesteps[b]
        for j in range(d_stream.shape[1]):
            s, d = d_stream[b, j], d_delta[b, j]
            d_state[b, j] = s - d
            d_W_E_rtg[j] += rtg * d
            d_W_E_time[t, j] += s
            d_W_pos[0, j] += d
            d_W_pos[1, j] += s - d
