"""How cost grows: with seeds, the size of the grid, the context and the width; each exponent fitted.

    python benchmarks/scaling.py [--updates 20] [--rounds 3]

Cost is processor time, one thread, the least of several rounds. An exponent is the slope of log cost over log size:
1 says that twice as much costs twice as much. Small sizes pay for overheads that do not grow, so the slope is
taken over all sizes and over the last two.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from training import ours

from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.population import run_at
from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import DynamicObstaclesVectorEnv, all_observations
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.training import Sampler, TrainConfig
from dtbook.trajectories import Trajectories
from dtbook.trajectories.ppo import PPOConfig, one_thread, train_ppo

Work = Callable[[], object]


def seeds(number: int) -> Work:
    """PPO from as many seeds, one after another."""

    def work() -> None:
        for seed in range(number):
            train_ppo(DynamicObstaclesVectorEnv(64), PPOConfig(total_steps=12_288), seed, progress=False)

    return work


def grid(size: int) -> Work:
    """100 random steps of 256 environments with two obstacles each, observations included."""
    envs = DynamicObstaclesVectorEnv(256, size, n_obstacles=2)
    actions = np.random.default_rng(0).integers(0, 3, (100, 256))
    envs.reset(seed=0)
    return lambda: [envs.step(row) for row in actions]


def updates(data: Trajectories, number: int, **shape: int) -> Work:
    """Updates of training."""
    cfg, config = DTConfig(**shape), TrainConfig(batch_size=128)
    sampler, step = Sampler(data, cfg.n_timesteps, config), ours(cfg, config, hooked=False)
    batches = [sampler.batch(np.random.default_rng(i)) for i in range(number)]
    return lambda: [step(batch) for batch in batches]


def one_pass(size: int = 8, n_obstacles: int = 4, **shape: int) -> Work:
    """A pass over 20,000 observations, from where the listing is half through."""
    observations = all_observations(size, n_obstacles)
    rows = (len(observations) // 2 + np.arange(20_000)) % len(observations)
    embedded = FoldedWeights(DecisionTransformer(DTConfig(**shape))).embed(observations)[np.sort(rows)]
    return lambda: run_at(embedded, 0.9, 10).logits()


def works(number: int) -> Iterator[tuple[str, int, Work]]:
    data = Trajectories.load(ArtifactStore().path("seed_10/trajectories.npz"))
    for n in (1, 2, 4):
        yield "seeds (PPO, 12,288 steps each)", n, seeds(n)
    for size in (5, 6, 8, 16):
        yield "grid, cells a side (a step of the simulator)", size, grid(size)
    for context in (1, 3, 9, 27):
        yield "context, timesteps (an update)", context, updates(data, number, n_timesteps=context)
    for width in (32, 64, 128, 256, 512):
        shape = {"d_model": width, "d_head": width // 2, "d_mlp": 2 * width}
        yield "width of the stream (an update)", width, updates(data, number, **shape)
    for size in (6, 8, 12, 16):
        yield "grid, cells a side (a pass)", size, one_pass(size, 2)
    for n_obstacles in (1, 2, 3, 4):
        yield "obstacles (a pass)", n_obstacles, one_pass(8, n_obstacles)
    for n_heads in (1, 2, 4, 8):
        yield "heads (a pass)", n_heads, one_pass(n_heads=n_heads)
    for d_mlp in (64, 128, 256, 512, 1024):
        yield "neurons (a pass)", d_mlp, one_pass(d_mlp=d_mlp)


def least(work: Work, rounds: int) -> float:
    """Processor seconds of the fastest of several rounds, after one that warms up."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def slope(sizes: pd.Series, cost: pd.Series) -> float:
    return float(np.polyfit(np.log(sizes), np.log(cost), 1)[0])


def measure(number: int, rounds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cost of everything at every size, and the exponents."""
    rows = [(what, size, 1e3 * least(work, rounds)) for what, size, work in works(number)]
    table = pd.DataFrame(rows, columns=["cost grows with", "size", "processor ms"])
    groups = table.groupby("cost grows with", sort=False)
    exponents = {
        what: {
            "exponent": slope(part["size"], part["processor ms"]),
            "of the last two": slope(part["size"][-2:], part["processor ms"][-2:]),
        }
        for what, part in groups
    }
    return table, pd.DataFrame(exponents).T.rename_axis("cost grows with").reset_index()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=20, help="of training, in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    with one_thread():
        table, exponents = measure(options.updates, options.rounds)
    for frame in (table, exponents):
        print(frame.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
