"""Episodes a second of a calibration curve: all episodes in lockstep, against stepping minigrid itself.

    python benchmarks/calibration.py [--episodes 500] [--minigrid-episodes 5]

The same model (the reference one of `data/`) plays both, one thread; the ratio is of episodes a second.
"""

import argparse
import time

import gymnasium
import numpy as np
import pandas as pd
import torch
from minigrid.wrappers import ImgObsWrapper

from dtbook.artifacts import ArtifactStore
from dtbook.model import DecisionTransformer
from dtbook.rollout import CALIBRATION_RTGS, calibration_curve, rollout_in


def measure(episodes: int, minigrid_episodes: int) -> pd.DataFrame:
    """One row an engine: `episodes`, `seconds`, `episodes/s` and the ratio to minigrid's."""
    model = DecisionTransformer.from_pretrained(ArtifactStore().path("seed_10/model"))
    calibration_curve(model, [0.9], episodes=10)  # compile the simulator

    start = time.perf_counter()
    calibration_curve(model, CALIBRATION_RTGS, episodes=episodes)
    rows = [("lockstep", episodes * len(CALIBRATION_RTGS), time.perf_counter() - start)]

    def make() -> gymnasium.Env:
        return ImgObsWrapper(gymnasium.make("MiniGrid-Dynamic-Obstacles-8x8-v0", max_steps=300))

    for lanes in (1, 64):
        envs = gymnasium.vector.SyncVectorEnv(
            [make] * lanes, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
        )
        asked = np.repeat(CALIBRATION_RTGS, minigrid_episodes)
        start = time.perf_counter()
        rollout_in(envs, model, asked)
        rows.append((f"minigrid, {lanes} at a time", len(asked), time.perf_counter() - start))
    table = pd.DataFrame(rows, columns=["engine", "episodes", "seconds"])
    table["episodes/s"] = table["episodes"] / table["seconds"]
    table["ratio to one minigrid"] = table["episodes/s"] / table["episodes/s"][1]
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=500, help="for each of the 21 RTGs, in lockstep")
    parser.add_argument(
        "--minigrid-episodes", type=int, default=5, help="for each of the 21 RTGs, in minigrid"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(measure(options.episodes, options.minigrid_episodes).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
