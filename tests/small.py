"""A recipe that makes everything in seconds: what it makes is whole, and no good."""

from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig
from dtbook.pipeline import Recipe
from dtbook.pipeline.replication import LongContext
from dtbook.training import TrainConfig
from dtbook.trajectories.collection import QuotaConfig
from dtbook.trajectories.ppo import PPOConfig

MODEL = {"d_model": 16, "d_head": 8, "d_mlp": 16, "max_steps": 300}
RECIPE = Recipe(
    task=Task(size=5, n_obstacles=1, max_steps=30),
    ppo=PPOConfig(total_steps=16 * 32 * 12, num_steps=32, minibatches=4),
    envs=16,
    quota=QuotaConfig(steps_per_class=300, round_episodes=64, max_rounds=20),
    model=DTConfig(**MODEL),
    train=TrainConfig(steps=30, batch_size=32, checkpoint_every=5, evaluation_episodes=3),
    snapshots=(0, 4, 30),
    calibration={"rtgs": [-1.0, 0.0, 0.5, 0.9], "episodes": 4, "max_steps": 30},
    long_context=LongContext(
        DTConfig(**MODEL, n_timesteps=3), TrainConfig(steps=4, batch_size=8, evaluation_episodes=0)
    ),
)
