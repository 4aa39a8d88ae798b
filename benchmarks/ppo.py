"""Environment steps per second of PPO, learning included: ours, the post's settings, and minigrid's own steps.

    python benchmarks/ppo.py [--steps 200000 1000000] [--seeds 0 1 2 3 4]

One thread. Beside the wall clock stands processor time, which other work on the machine disturbs less; the
greedy return of the finished agent (500 episodes) says whether what was learnt fast was the task. All seeds take the
largest number of steps; the other runs have the first seed.
"""

import argparse
import time

import gymnasium
import pandas as pd
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from minigrid.wrappers import ImgObsWrapper

from dtbook.gridworld import DynamicObstaclesVectorEnv
from dtbook.trajectories.ppo import PPOConfig, evaluate_agent, train_ppo

ENV_ID = "MiniGrid-Dynamic-Obstacles-8x8-v0"
MINIGRID_STEPS = 20_480  # 5 updates, enough for a rate


def minigrid(num_envs: int) -> VectorEnv:
    def make() -> gymnasium.Env:
        return ImgObsWrapper(gymnasium.make(ENV_ID, max_steps=300))

    return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def measure_one(name: str, envs: VectorEnv, config: PPOConfig, seed: int) -> dict[str, float | str]:
    wall, processor = time.perf_counter(), time.process_time()
    result = train_ppo(envs, config, seed)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    returns = evaluate_agent(result.agent, DynamicObstaclesVectorEnv(500), 500, greedy=True, seed=seed)[
        "return"
    ]
    steps = int(result.diagnostics["env_steps"].iloc[-1])
    return {
        "run": name,
        "seed": seed,
        "steps": steps,
        "seconds": wall,
        "processor seconds": processor,
        "steps/s": steps / wall,
        "steps/processor s": steps / processor,
        "greedy return": returns.mean(),
    }


def measure(steps: list[int], seeds: list[int]) -> pd.DataFrame:
    """One row a run: `steps` taken, `seconds`, the rates, and the finished agent's `greedy return`."""
    ours = DynamicObstaclesVectorEnv
    train_ppo(ours(64), PPOConfig(total_steps=4096), progress=False)  # compile the simulator
    runs = [
        ("defaults, 64 environments", ours(64), PPOConfig(total_steps=n), seed)
        for n in sorted(steps)
        for seed in (seeds if n == max(steps) else seeds[:1])
    ]
    runs.append(("the post's settings, 30 environments", ours(30), PPOConfig.post(), seeds[0]))
    runs.append(("defaults, minigrid itself", minigrid(64), PPOConfig(total_steps=MINIGRID_STEPS), seeds[0]))
    return pd.DataFrame([measure_one(*run) for run in runs])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[200_000, 1_000_000], help="of each run of ours"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    print(measure(options.steps, options.seeds).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
