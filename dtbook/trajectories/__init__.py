"""Who plays and what is kept of it: PPO, recorded episodes, collection by quota, episodes of any task."""

from dtbook.trajectories.episodes import EPISODE_COLUMNS, STEP_COLUMNS, Trajectories
from dtbook.trajectories.recording import RecordEpisodes, play

__all__ = [
    "EPISODE_COLUMNS",
    "STEP_COLUMNS",
    "RecordEpisodes",
    "Trajectories",
    "play",
]
