"""Milliseconds an update of training, and pairs a second: ours, the hooked path, plain PyTorch, the arithmetic's limit.

    python benchmarks/training.py [--updates 300] [--seed 0]

One thread, the reference model and batch size, data drawn from `data/`. *Plain PyTorch* is a loop of the original's
shape: every token through embeddings, attention with all queries, autograd and Adam, nothing shared or fused, and no
hook points. The *limit* is what the fused path's matrix products alone take, each measured on this machine. Beside
the wall clock stands processor time, which other work on the machine disturbs less. The last line is what whole
training costs: all updates at the rate of the first row, and the evaluations, one of which is measured.
"""

import argparse
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from dtbook.artifacts import ArtifactStore
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.training import Batch, Sampler, TrainConfig, Updater, evaluate
from dtbook.trajectories import Trajectories
from dtbook.trajectories.ppo import one_thread


class Plain(nn.Module):
    """The architecture as one would write it down, both tokens through every layer."""

    def __init__(self, cfg: DTConfig) -> None:
        super().__init__()
        width = cfg.n_heads * cfg.d_head
        self.heads = cfg.n_heads
        self.state, self.rtg = nn.Linear(147, cfg.d_model, bias=False), nn.Linear(1, cfg.d_model, bias=False)
        self.time, self.pos = nn.Embedding(cfg.max_steps + 1, cfg.d_model), nn.Embedding(3, cfg.d_model)
        self.qkv, self.out = nn.Linear(cfg.d_model, 3 * width), nn.Linear(width, cfg.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.d_model, cfg.d_mlp), nn.ReLU(), nn.Linear(cfg.d_mlp, cfg.d_model)
        )
        self.action = nn.Linear(cfg.d_model, cfg.n_actions)

    def forward(self, batch: Batch) -> torch.Tensor:
        flat = batch.states[:, 0].permute(0, 3, 1, 2).flatten(1).float()
        tokens = torch.stack([self.rtg(batch.rtgs), self.state(flat)], 1)
        x = tokens + self.time(batch.timesteps) + self.pos.weight[:2]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.action(x + self.mlp(x))[:, 1]


def plain(cfg: DTConfig, config: TrainConfig) -> Callable[[Batch], object]:
    model = Plain(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def step(batch: Batch) -> float:
        loss = F.cross_entropy(model(batch), batch.actions[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def ours(cfg: DTConfig, config: TrainConfig, hooked: bool) -> Callable[[Batch], object]:
    model = DecisionTransformer(cfg)
    if hooked:
        model.is_plain = lambda: False  # type: ignore[method-assign]
    update = Updater(model, config)
    return lambda batch: update(batch, config.lr)


def products(cfg: DTConfig, config: TrainConfig) -> Callable[[Batch], object]:
    """The matrix products of one update: forward, towards the inputs and towards the weights."""
    rows, width = config.batch_size, cfg.n_heads * cfg.d_head
    shapes = [(147, cfg.d_model), *[(cfg.d_model, width)] * 3, (width, cfg.d_model), (cfg.d_model, cfg.d_mlp)]
    layers = [(torch.randn(rows, i), torch.randn(i, o), torch.randn(rows, o)) for i, o in shapes]

    def step(_: Batch) -> None:
        for index, (x, weight, grad) in enumerate(layers):
            torch.mm(x, weight)
            torch.mm(x.T, grad)
            if index:  # images need no gradient
                torch.mm(grad, weight.T)

    return step


def measure_one(name: str, step: Callable[[Batch], object], batches: list[Batch]) -> dict[str, float | str]:
    for batch in batches[:30]:
        step(batch)
    wall, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        step(batch)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    pairs = len(batches) * len(batches[0].actions)
    rate = {"pairs/s": pairs / wall, "pairs/processor s": pairs / processor}
    each = {"ms": 1e3 * wall / len(batches), "processor ms": 1e3 * processor / len(batches)}
    return {"run": name} | each | rate


def measure(updates: int, seed: int = 0) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a run, and the processor seconds of drawing a batch and of one evaluation."""
    data = Trajectories.load(ArtifactStore().path("seed_10/trajectories.npz"))
    cfg, config = DTConfig(), TrainConfig()
    sampler = Sampler(data, cfg.n_timesteps, config)
    next(sampler.batches(seed, 0, 1))  # compile the simulator
    start = time.process_time()
    batches = list(sampler.batches(seed, 0, updates))
    other = {"batch": (time.process_time() - start) / updates}
    runs = {
        "ours, an update": ours(cfg, config, hooked=False),
        "ours by the hooked path": ours(cfg, config, hooked=True),
        "plain PyTorch": plain(cfg, config),
        "limit: the products alone": products(cfg, config),
    }
    table = pd.DataFrame([measure_one(name, step, batches) for name, step in runs.items()])
    start = time.process_time()
    evaluate(
        DecisionTransformer.from_pretrained(ArtifactStore().path("seed_10/model")),
        config.evaluation_episodes,
        seed,
        data,
    )
    return table, other | {"evaluation": time.process_time() - start}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300, help="that each row is the mean of")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    with one_thread():
        table, other = measure(options.updates, options.seed)
    print(table.round(2).to_string(index=False))
    config = TrainConfig()
    evaluations = config.steps // config.checkpoint_every * other["evaluation"]
    updates = config.steps * (table["processor ms"][0] / 1e3 + other["batch"])
    print(
        f"training: {config.steps} updates and batches {updates:.1f} s, "
        f"evaluations {evaluations:.1f} s of processor time"
    )


if __name__ == "__main__":
    main()
