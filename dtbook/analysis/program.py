"""The model as a program: a table from a few facts about RTG and observation to the probabilities of the actions.

A *step* names the facts that the table may look at; its rows are their combinations, and a row's probabilities are the
mean of the model's over all observations, returns and timesteps that fall into it. No other table on these facts is
nearer to the model in weighted KL divergence. Steps grow: each looks at what the one before did, and at one thing more.

The post says the model learns trigrams, (RTG, f(state)) → action, with f the thing in front and the like. A step is one
choice of f; how much of the model it explains is measured, not assumed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64

from dtbook.analysis.folded import BATCH_SIZE, FoldedWeights
from dtbook.analysis.population import run_at
from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import GOAL, OBSTACLE, WALL
from dtbook.gridworld.rules import ACTIONS, FRONT, Task
from dtbook.gridworld.situations import IN_FRONT, Images, row_batches, weights
from dtbook.model.transformer import DecisionTransformer
from dtbook.protocol import ACTING, RTGS, printed
from dtbook.trajectories.episodes import Trajectories
from dtbook.trajectories.recording import play

FITTED_RTGS = (-1.0, -0.5, 0.0, 0.3, 0.6, 0.9)
"""The returns that tables are fitted on, equally weighted."""
FITTED_TIMESTEPS = (5, 40)
"""The timesteps, equally weighted: no table looks at them."""
BANDS = ("fail", "survive", "succeed")
BAND_EDGES = (-0.25, 0.25)
"""Bands of RTG: up to the first edge, between them, and from the second on."""
LEFT_HAND, RIGHT_HAND = (2, 6), (4, 6)
FRONTS = tuple(IN_FRONT)

FACTS = {"front": 4, "walls": 4, "quadrant": 4, "hands": 4, "goal": 50, "place": 80}
"""What a table may look at in an observation, and how many values each fact can have."""


def facts(images: Images) -> dict[str, np.ndarray]:
    """Return the facts of `FACTS` about each observation, as numbers from 0.

    "front", what is in the front cell (`FRONTS`). "walls", whether a wall is at the left hand (1), the right hand (2).
    "quadrant", in which quarter of the 8×8 room the agent is as it sees it: the wall ahead is more than 3 cells away
    (1), the nearer side wall is the right one (2). "hands", whether an obstacle is at the left hand (1), the right hand
    (2). "goal", where the goal is: not in view (0), or 1 + 7 × its column + its row. "place", the distances to the wall
    ahead and to the nearer side wall, and which side that is.
    """
    objects = images[..., 0]
    front = np.select([objects[:, *FRONT] == IN_FRONT[name] for name in FRONTS], range(len(FRONTS)))
    ahead = 6 - np.where(objects[:, 3, :6] == WALL, np.arange(6), -1).max(1)
    left = 3 - np.where(objects[:, :3, 6] == WALL, np.arange(3), -1).max(1)  # 4 where it is out of view
    right = 1 + np.where(objects[:, 4:, 6] == WALL, np.arange(3), 3).min(1)
    nearer_right = right < left
    goal = (objects == GOAL).reshape(len(images), -1)

    def hands(thing: int) -> np.ndarray:
        return (objects[:, *LEFT_HAND] == thing) + 2 * (objects[:, *RIGHT_HAND] == thing)

    return {
        "front": front,
        "walls": hands(WALL),
        "quadrant": (ahead > 3) + 2 * nearer_right,
        "hands": hands(OBSTACLE),
        "goal": np.where(goal.any(1), 1 + goal.argmax(1), 0),
        "place": ahead + 8 * (np.minimum(left, right) + 5 * nearer_right),
    }


class Step(NamedTuple):
    """One table: the facts that it looks at."""

    name: str
    rtg: str | None
    """"band", "exact" (each return of `FITTED_RTGS`), or None: not at all."""
    facts: tuple[str, ...]


STEPS = (
    Step("nothing", None, ()),
    Step("RTG band", "band", ()),
    Step("+ what is in front", "band", ("front",)),
    Step("+ walls left and right", "band", ("front", "walls")),
    Step("+ quadrant", "band", ("front", "walls", "quadrant")),
    Step("+ obstacles left and right", "band", ("front", "walls", "quadrant", "hands")),
    Step("+ exact RTG", "exact", ("front", "walls", "quadrant", "hands")),
    Step("+ where the goal is", "exact", ("front", "walls", "quadrant", "hands", "goal")),
    Step("+ where the walls are", "exact", ("front", "walls", "quadrant", "hands", "goal", "place")),
)
TRIGRAM = STEPS[2]
"""The smallest table that is a trigram: (RTG band, what is in front) → action."""


def keys(images: Images, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Return the row of each observation in a table on these facts: their numbers, the last one counting fastest."""
    return _numbered(facts(images), names, len(images))


def _numbered(known: Mapping[str, np.ndarray], names: Sequence[str], n: int) -> Int64[np.ndarray, " n"]:
    key = np.zeros(n, np.int64)
    for name in names:
        key = key * FACTS[name] + known[name]
    return key


def split_keys(key: Int64[np.ndarray, " n"], names: Sequence[str]) -> dict[str, Int64[np.ndarray, " n"]]:
    """Return the facts by name that `keys` made into one number."""
    columns = {}
    for name in reversed(names):
        key, columns[name] = np.divmod(key, FACTS[name])
    return {name: columns[name] for name in names}


def bands(rtgs: Float[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return the band of each RTG."""
    return np.searchsorted(BAND_EDGES, rtgs, side="right")


def _rtg_rows(step: Step, rtgs: np.ndarray) -> np.ndarray:
    """Return the part of a row that RTG decides; an RTG that is none of the exact ones takes the nearest."""
    if step.rtg is None:
        return np.zeros(len(rtgs), np.int64)
    return bands(rtgs) if step.rtg == "band" else np.abs(rtgs[:, None] - FITTED_RTGS).argmin(1)


class Summary(NamedTuple):
    """A model's behaviour summed over all observations of each combination of facts: what every step is fitted from."""

    rows: Int64[np.ndarray, " row"]
    """The combinations of all facts that occur, as `keys` numbers them."""
    chances: Float[np.ndarray, "rtg row action"]
    """Summed probabilities, weighted; all of it sums to 1."""
    likeliest: Float[np.ndarray, "rtg row action"]
    """Weight of the observations whose likeliest action this is."""
    negative_entropy: float
    """Weighted mean of Σ p log p (nats)."""


@torch.inference_mode()
def summarise_model(
    model: DecisionTransformer, observations: ObservationSet, progress: bool = False
) -> Summary:
    """Return a one-layer model's behaviour by combination of facts.

    It is summed over all observations, `FITTED_RTGS` and `FITTED_TIMESTEPS`. Raises ValueError for a model that has
    other actions than left, right and forward.
    """
    if model.cfg.n_actions != len(ACTIONS):
        raise ValueError(
            f"model has {model.cfg.n_actions} actions; a program is about {', '.join(ACTIONS)} alone."
        )
    images, names = observations.images, tuple(FACTS)
    known = np.concatenate([keys(images[batch], names) for batch in row_batches(len(images), BATCH_SIZE)])
    rows, row_of = np.unique(known, return_inverse=True)
    share = weights(observations) / (len(FITTED_RTGS) * len(FITTED_TIMESTEPS))
    folded, n_actions = FoldedWeights(model), len(ACTIONS)
    sums, entropy = np.zeros((2, len(FITTED_RTGS), len(rows), n_actions)), 0.0
    embedded = folded.embed(observations)
    for batch, some in embedded.batches(progress="program" if progress else None):
        cells, weight = row_of[batch, None] * n_actions + np.arange(n_actions), share[batch, None]
        for k, rtg in enumerate(FITTED_RTGS):
            for timestep in FITTED_TIMESTEPS:
                p = run_at(some, rtg, timestep).logits().T.double().softmax(0).T.numpy()
                first = p == p.max(1, keepdims=True)
                for total, value in zip(sums[:, k], (p, first / first.sum(1, keepdims=True)), strict=True):
                    flat = np.bincount(cells.ravel(), (weight * value).ravel(), total.size)
                    total += flat.reshape(total.shape)
                entropy += float((weight * p * np.log(np.maximum(p, 1e-300))).sum())
    return Summary(rows, sums[0], sums[1], entropy)


class Program:
    """A table fitted to a model: (RTG, facts) → probabilities of left, right and forward."""

    def __init__(self, summary: Summary, step: Step) -> None:
        """Fit a step: each row's probabilities are the weighted mean of the model's.

        A row that no observation falls into has the probabilities of the table that looks at nothing.
        """
        self.step = step
        key = _numbered(split_keys(summary.rows, tuple(FACTS)), step.facts, len(summary.rows))
        self.count = int(np.prod([FACTS[name] for name in step.facts], dtype=np.int64))
        self.rtg_rows = _rtg_rows(step, np.array(FITTED_RTGS))
        groups = self.rtg_rows.max() + 1
        self.sums, self.likeliest = np.zeros((2, groups * self.count, len(ACTIONS)))
        for k, group in enumerate(self.rtg_rows):
            np.add.at(self.sums, group * self.count + key, summary.chances[k])
            np.add.at(self.likeliest, group * self.count + key, summary.likeliest[k])
        weight = self.sums.sum(1, keepdims=True)
        self.weight, everywhere = weight[:, 0], self.sums.sum(0) / weight.sum()
        self.probabilities = np.where(weight > 0, self.sums / np.where(weight > 0, weight, 1), everywhere)
        self.negative_entropy = summary.negative_entropy

    def __call__(self, images: Images, rtgs: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n action"]:
        """Return the probabilities of the actions."""
        rows = _rtg_rows(self.step, rtgs) * self.count + keys(images, self.step.facts)
        return self.probabilities[rows]

    @property
    def kl(self) -> float:
        """The weighted KL divergence of the model from the table (nats): 0 for a table that is the model."""
        return self.negative_entropy - float(
            (self.sums * np.log(np.maximum(self.probabilities, 1e-300))).sum()
        )

    @property
    def agreement(self) -> float:
        """The weight of the observations for which the table's likeliest action is the model's."""
        best = self.probabilities.argmax(1)
        return float(self.likeliest[np.arange(len(best)), best].sum())

    @property
    def n_rows(self) -> int:
        """The number of rows that some observation falls into."""
        return int((self.weight > 0).sum())

    def table(self) -> pd.DataFrame:
        """Return the rows that occur: RTG, the facts by number, `left`, `right`, `forward` and `weight`."""
        at = np.flatnonzero(self.weight > 0)
        group, key = np.divmod(at, self.count)
        labels = {None: ["any"], "band": list(BANDS), "exact": [f"{rtg:g}" for rtg in FITTED_RTGS]}[
            self.step.rtg
        ]
        frame = pd.DataFrame({"rtg": np.array(labels)[group]} | split_keys(key, self.step.facts))
        for name, column in zip(ACTIONS, self.probabilities[at].T, strict=True):
            frame[name] = column
        return frame.assign(weight=self.weight[at])

    def play(self, rtgs: Float[np.ndarray, " episodes"], greedy: bool, task: Task, seed: int) -> Trajectories:
        """Play one episode for each RTG with the table alone, in lockstep."""
        rng = np.random.default_rng(seed)

        def policy(images: Images, episodes: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
            chances = self(images, rtgs[episodes])
            if greedy:
                return chances.argmax(1)
            return (chances.cumsum(1)[:, :-1] < rng.random((len(chances), 1))).sum(1)

        return play(task, policy, len(rtgs), rng)


@checked
def program_table(
    summary: Summary, episodes: Count, task: Task, seed: Whole, rtgs: Sequence[float] = RTGS
) -> pd.DataFrame:
    """Return how much of the model each step explains; one row a step.

    Columns: `step`, `rows`; `kl` (nats) and `explained`, 1 − kl ÷ that of the table that looks at nothing; `agreement`,
    how often the likeliest actions agree; and the mean returns in play, "sampled −1", "greedy 0.9" and so on, from as
    many episodes each.
    """
    records = []
    for step in STEPS:
        program = Program(summary, step)
        record = {"step": step.name, "rows": program.n_rows, "kl": program.kl, "agreement": program.agreement}
        for acting in ACTING:
            each = np.repeat(np.array(rtgs), episodes)
            returns = program.play(each, acting == "greedy", task, seed).returns.reshape(len(rtgs), episodes)
            names = [f"{acting} {printed(rtg)}" for rtg in rtgs]
            record |= dict(zip(names, returns.mean(1).tolist(), strict=True))
        records.append(record)
    frame = pd.DataFrame(records)
    frame.insert(3, "explained", 1 - frame["kl"] / frame["kl"].iloc[0])
    return frame
