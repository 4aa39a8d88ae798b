"""Steps per second of the task, observations included: minigrid, alone and in gymnasium's vector, EnvPool, ours.

Each plays uniformly random actions through its Gymnasium face, on one thread, and starts episodes
anew as they end. The simulators take turns, several rounds each, and a figure is the median over
rounds. Steps are divided by processor time, all threads together, so that other work on the machine
counts little.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import pandas as pd
from minigrid.wrappers import ImgObsWrapper

from dtbook.gridworld import DynamicObstaclesVectorEnv, Task

ENV_ID = "MiniGrid-Dynamic-Obstacles-8x8-v0"
ROUNDS = 5


def actions(num_envs: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (256, num_envs))


def step_minigrid(max_steps: int) -> Iterator[int]:
    env = ImgObsWrapper(gymnasium.make(ENV_ID, max_steps=max_steps))
    env.reset(seed=0)
    while True:
        for action in actions(1)[:, 0].tolist():
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
            yield 1


def step_gymnasium(num_envs: int, max_steps: int) -> Iterator[int]:
    def make() -> gymnasium.Env:
        return ImgObsWrapper(gymnasium.make(ENV_ID, max_steps=max_steps))

    envs = gymnasium.vector.SyncVectorEnv([make] * num_envs)
    envs.reset(seed=0)
    while True:
        for action in actions(num_envs):
            envs.step(action)
            yield num_envs


def step_envpool(num_envs: int, max_steps: int) -> Iterator[int]:
    import envpool

    options = {"num_envs": num_envs, "num_threads": 1, "max_episode_steps": max_steps, "seed": 0}
    envs = envpool.make(ENV_ID, env_type="gymnasium", **options)
    envs.reset()
    while True:
        for action in actions(num_envs).astype(np.int32):
            envs.step(action)
            yield num_envs


def step_ours(num_envs: int, max_steps: int) -> Iterator[int]:
    task = Task.from_env_id(ENV_ID, max_steps)
    envs = DynamicObstaclesVectorEnv(num_envs, task.size, task.n_obstacles, task.max_steps, task.random_start)
    envs.reset(seed=0)
    while True:
        for action in actions(num_envs):
            envs.step(action)
            yield num_envs


def has_envpool() -> bool:
    try:
        import envpool  # noqa: F401
    except ImportError as error:
        print(f"EnvPool is left out ({error}); pip install 'dtbook[bench]' brings it, on Linux only.")
        return False
    return True


def contestants(max_steps: int) -> dict[tuple[str, int], Iterator[int]]:
    """Steppers by (simulator, environments in a batch); each `next` steps a batch and gives its size."""
    makers: list[tuple[str, tuple[int, ...], Callable[[int], Iterator[int]]]] = [
        ("minigrid", (1,), lambda _: step_minigrid(max_steps)),
        ("gymnasium's SyncVectorEnv", (64,), lambda n: step_gymnasium(n, max_steps)),
        ("EnvPool", (64, 256, 1024), lambda n: step_envpool(n, max_steps)),
        ("dtbook", (64, 256, 1024, 4096), lambda n: step_ours(n, max_steps)),
    ]
    if not has_envpool():
        makers.pop(2)
    return {(name, n): make(n) for name, sizes, make in makers for n in sizes}


def speed(stepper: Iterator[int], seconds: float) -> float:
    """Steps per second of processor time."""
    steps, end, start = 0, time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end:
        steps += next(stepper)
    return steps / (time.process_time() - start)


def simulator_speeds(seconds: float = 2.0, max_steps: int = 300) -> pd.DataFrame:
    """Steps per second of each simulator at each batch size, and how many times its peers' best that is."""
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, not {seconds}.")
    steppers = contestants(max_steps)
    for stepper in steppers.values():
        speed(stepper, 0.05)  # compiles and warms up
    rows = [
        (name, num_envs, speed(stepper, seconds / ROUNDS))
        for _ in range(ROUNDS)
        for (name, num_envs), stepper in steppers.items()
    ]
    columns = ["simulator", "environments", "steps per second"]
    table = pd.DataFrame(rows, columns=columns).groupby(columns[:2], sort=False).median().reset_index()
    best = table.groupby("simulator")[columns[2]].max()
    for peer in best.index.drop("dtbook"):
        table[f"× {peer}"] = table[columns[2]] / best[peer]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of measurement for each row (default: 2)")
    print(simulator_speeds(parser.parse_args().seconds).to_string(index=False, float_format="{:,.1f}".format))


if __name__ == "__main__":
    main()
