"""Print the hash of what the first updates of PPO and of a transformer give, in a process that this one starts."""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from dtbook.artifacts.kernels import choose_portable, kernels


def first_updates():
    """Return the sha256 of diagnostics, play and weights, and which kernels the process says that it has."""
    import numpy as np

    from dtbook.gridworld import DynamicObstaclesVectorEnv
    from dtbook.model import DecisionTransformer, DTConfig
    from dtbook.training import Sampler, TrainConfig, Updater
    from dtbook.trajectories.ppo import PPOConfig, one_thread, train_ppo
    from dtbook.trajectories.recording import RecordEpisodes

    with one_thread():
        envs = RecordEpisodes(DynamicObstaclesVectorEnv(64))
        diagnostics = train_ppo(envs, PPOConfig(total_steps=3 * 64 * 128), 0, progress=False).diagnostics
        data, config = envs.trajectories(), TrainConfig(steps=20, balance_classes=False)
        model = DecisionTransformer(DTConfig(), seed=0)
        update = Updater(model, config)
        for step, batch in enumerate(Sampler(data, 1, config).batches(0, 0, config.steps)):
            update(batch, config.learning_rate(step))
    numbers = [diagnostics.select_dtypes("number").to_numpy(dtype=np.float64), data.actions]
    numbers += [parameter.detach().numpy() for parameter in model.parameters()]
    parts = [np.ascontiguousarray(each).tobytes() for each in numbers]
    return {"sha256": hashlib.sha256(b"".join(parts)).hexdigest(), "made": kernels()}


if __name__ == "__main__":
    choose_portable()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        print(json.dumps(pool.submit(first_updates).result()))
