"""The pass over every observation as this book did it before: matrix products of batches, as a peer of the sums.

The weights are folded as in `dtbook.analysis.folded`; a batch of observations meets them in two products, of what all
of it has in common and of the inputs in which it differs; then attention and MLP are evaluated.
"""

from functools import partial
from typing import no_type_check

import numpy as np
import torch

from dtbook.analysis.folded import FoldedWeights
from dtbook.gridworld import ObservationSet
from dtbook.gridworld.kernels import compiled
from dtbook.gridworld.situations import row_batches
from dtbook.model import DecisionTransformer

BATCH_SIZE = 2048


class Products:
    """A model's folded weights as matrices."""

    def __init__(self, model: DecisionTransformer) -> None:
        self.f = f = FoldedWeights(model)
        self.n_parts, self.n_heads = len(f.through), len(f.head_names)
        self.read = f.cast(f.from_image.unflatten(1, (self.n_parts, -1)).transpose(0, 1)).contiguous()
        qk = f.query_and_key.unflatten(1, (2 * self.n_heads, -1))
        self.qk = f.cast(qk.transpose(0, 1)).contiguous()
        self.W = f.W_mlp.T.contiguous().numpy()

    def logits(self, images: np.ndarray, rtg: float, timestep: int) -> torch.Tensor:
        """(n, action) of a batch."""
        f, x = self.f, torch.from_numpy(images).flatten(1).to(self.f.dtype)
        differ = (x != x[:1]).any(0).nonzero()[:, 0]
        x, same = x[:, differ], x[:1].index_fill(1, differ, 0)
        read, qk = (
            torch.baddbmm(same @ weight, x.expand(len(weight), -1, -1), weight[:, differ])
            for weight in (self.read, self.qk)
        )
        (q, k), token = qk.tensor_split(2), f.rtg_token(rtg)
        query, key = (f.cast(each).unsqueeze(2) for each in (f.query_of_time(timestep), f.key(token)))
        scores = (q @ key - k @ query + query.transpose(1, 2) @ key).squeeze(2) - (q * k).sum(-1)
        pattern = torch.sigmoid(scores / f.model.cfg.d_head**0.5)
        rtg_result, time_result = (token @ f.through)[1:], (f.time[timestep] @ f.through)[1:] + f.b_V
        total = read[0] + f.cast(f.time[timestep] @ f.through[0] + f.b_in) + f.b_O
        for head in range(self.n_heads):
            total += torch.lerp(read[1 + head], f.cast(rtg_result[head]), pattern[head][:, None])
            total += f.cast(time_result[head])
        out = np.empty((len(images), 3), np.float32)
        relu_matmul(total.numpy(), self.W, out)
        return f.direct_logits(total) + torch.from_numpy(out) + f.b_mlp + f.b_U


@partial(compiled, fastmath=True)
@no_type_check
def relu_matmul(pre, weight, out):
    """Write relu(pre) @ weightᵀ of three actions, in one go over `pre`."""
    for i in range(len(pre)):
        left = right = forward = pre[i, 0] * 0
        for j in range(weight.shape[1]):
            active = max(pre[i, j], 0)
            left += active * weight[0, j]
            right += active * weight[1, j]
            forward += active * weight[2, j]
        out[i, 0], out[i, 1], out[i, 2] = left, right, forward


@torch.inference_mode()
def logits(model: DecisionTransformer, observations: ObservationSet, rtg: float, timestep: int) -> np.ndarray:
    """(n, action) of every observation."""
    products, out = Products(model), np.empty((len(observations), 3), np.float32)
    for rows in row_batches(len(out), BATCH_SIZE):
        out[rows] = products.logits(observations.images[rows], rtg, timestep).numpy()
    return out
