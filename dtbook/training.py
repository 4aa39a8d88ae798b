"""Offline training of the Decision Transformer: sampling, optimiser, checkpoints, evaluation along the way.

Every batch is drawn from a generator seeded with (seed, step), so a run that was killed resumes from its last
whole checkpoint to the same final bytes as one that was not.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from dtbook.artifacts.parameters import (
    Checked,
    Count,
    Flag,
    Integers,
    NotNegative,
    Positive,
    Share,
    Whole,
    checked,
    not_finite,
    refuse,
    require,
)
from dtbook.artifacts.store import atomic_write
from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig, check_one_hot
from dtbook.model.gradients import Gradients
from dtbook.model.transformer import DecisionTransformer
from dtbook.rollout import check_task, rollout
from dtbook.trajectories.anytask import ImageEpisodes
from dtbook.trajectories.episodes import CLASS_NAMES, Trajectories

Row = dict[str, float | int]
Recorded = Trajectories | ImageEpisodes
"""What can be trained on: episodes of the book's own task, or of any."""
LOOKED_UP_AT_ONCE = 64
"""Steps whose batches are taken from the data together."""


@dataclass(frozen=True)
class TrainConfig(Checked):
    """The settings of a training run; the defaults, those of the book's first edition, are good in minutes.

    `post()` has the post's, `book()` those of the models that chapters 2 to 9 tell of.

    Raises ValueError naming the field, its value and what is allowed.
    """

    steps: Count = 9_000
    """Optimiser steps."""
    batch_size: Count = 384
    """Windows (for a context of one timestep: state–action pairs) a step."""
    lr: Positive = 8e-4
    """Highest learning rate, reached after the warm-up."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: half a cosine down to zero, or the highest rate to the end."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """`adam` adds the weight decay to the gradient (coupled L2), as the post did; `adamw` decouples it."""
    weight_decay: NotNegative = 1e-5
    """Coefficient of the weight decay."""
    last_step_share: Share = 0.2
    """Share of the batch replaced by the last step of its episode: the post's over-sampling hack."""
    balance_classes: Flag = True
    """Draw episodes of return −1, 0 and + equally; otherwise every step of the data is equally likely."""
    checkpoint_every: Count = 1_000
    """Steps between checkpoints (and evaluations)."""
    evaluation_episodes: Whole = 100
    """Episodes for each RTG at an evaluation, greedy and sampled; 0 for none."""

    @classmethod
    def post(cls) -> "TrainConfig":
        """Return the original's settings: 5,000 passes of about 14 batches, the rate constant.

        Source: `scripts/reproduce_initial_decision_transformer.sh` and `src/decision_transformer/train.py` in
        github.com/jbloomAus/DecisionTransformerInterpretability.
        """
        small = cls(
            steps=70_000, batch_size=128, lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=1e-3
        )
        return replace(small, last_step_share=0.1, balance_classes=False, checkpoint_every=10_000)

    @classmethod
    def book(cls) -> "TrainConfig":
        """Return the settings of the book's models: the first edition's, its weight decay ten times larger."""
        return replace(cls(), weight_decay=1e-4)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then half a cosine down to zero, or nothing else."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
        return (
            rate if self.schedule == "constant" else rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        )


class Batch(NamedTuple):
    """Windows of consecutive timesteps, padded on the right where an episode begins (`real` marks the rest)."""

    states: UInt8[torch.Tensor, "batch time view view 3"]
    rtgs: Float32[torch.Tensor, "batch time"]
    timesteps: Int64[torch.Tensor, "batch time"]
    actions: Int64[torch.Tensor, "batch time"]
    real: Bool[torch.Tensor, "batch time"]


class Sampler:
    """Draws training windows: a return class, an episode of it by its length, a uniform step of that episode.

    Classes are drawn equally where `balance_classes` says so. A `last_step_share` of the windows end at the
    last step of the episode instead. Raises ValueError where a class that should be drawn has no episode.
    """

    def __init__(self, data: Recorded, context: int, config: TrainConfig) -> None:
        self.data, self.context, self.config = data, context, config
        lengths, classes = data.lengths, data.classes
        self.last_row = np.repeat(data.episode_starts + lengths - 1, lengths)
        self.episode_returns = np.repeat(data.returns, lengths)
        self.start_row = np.repeat(data.episode_starts, lengths)
        step_classes = np.repeat(classes, lengths)
        groups = [np.flatnonzero(step_classes == c) for c in range(len(CLASS_NAMES))]
        missing = [name for name, rows in zip(CLASS_NAMES, groups, strict=True) if not len(rows)]
        if missing and config.balance_classes:
            raise ValueError(
                f"balance_classes needs episodes of every return, but none have return {missing[0]}"
            )
        groups = groups if config.balance_classes else [np.arange(len(step_classes))]
        self.sizes = np.array([len(rows) for rows in groups])
        self.ordered, self.first_of = np.concatenate(groups), np.cumsum(self.sizes) - self.sizes

    def rows(self, rng: np.random.Generator) -> Int64[np.ndarray, " batch"]:
        """Draw the step rows at which the windows of one batch end."""
        size, sizes = self.config.batch_size, self.sizes
        group, uniform = rng.integers(len(sizes), size=size), rng.random(size)
        within = (uniform * sizes[group]).astype(np.int64)
        rows = self.ordered[self.first_of[group] + np.minimum(within, sizes[group] - 1)]
        return np.where(rng.random(size) < self.config.last_step_share, self.last_row[rows], rows)

    def batch(self, rng: np.random.Generator) -> Batch:
        """Draw one batch of windows."""
        return self.windows(self.rows(rng))

    def windows(self, end: Int64[np.ndarray, " batch"]) -> Batch:
        """Return the windows that end at some step rows."""
        first = np.maximum(end - self.context + 1, self.start_row[end])
        rows = first[:, None] + np.arange(self.context)
        real = rows <= end[:, None]
        rows = np.minimum(rows, end[:, None])
        images = self.data.observations(rows.ravel())
        return Batch(
            torch.from_numpy(images.reshape(*rows.shape, *images.shape[1:])),
            torch.from_numpy(self.episode_returns[rows]),
            torch.from_numpy(rows - self.start_row[rows]),
            torch.from_numpy(self.data.actions[rows].astype(np.int64)),
            torch.from_numpy(real),
        )

    def batches(self, seed: int, begin: int, end: int) -> Iterator[Batch]:
        """Yield the batches of steps `begin` … `end` − 1, each drawn by a generator seeded with (seed, step).

        What is drawn is looked up for many steps together, which is faster.
        """
        for first in range(begin, end, LOOKED_UP_AT_ONCE):
            steps = range(first, min(first + LOOKED_UP_AT_ONCE, end))
            drawn = [self.rows(np.random.default_rng([seed, step])) for step in steps]
            columns = (column.split(self.config.batch_size) for column in self.windows(np.concatenate(drawn)))
            yield from map(Batch._make, zip(*columns, strict=True))


class TrainResult(NamedTuple):
    """The trained model, the loss at every step, and the evaluations along the way."""

    model: DecisionTransformer
    curve: pd.DataFrame
    """One row a step: `step`, `loss` (cross-entropy, nats), `accuracy`, `lr`."""
    evaluations: pd.DataFrame
    """One row an evaluation: `step` and, for instance, `greedy 0.9`, the mean return at RTG 0.9."""
    snapshots: dict[int, dict[str, torch.Tensor]]
    """Steps taken → the weights after them, for the steps in `snapshots`."""


@checked
def train(
    data: Recorded,
    model_config: DTConfig,
    config: TrainConfig,
    seed: Whole,
    folder: str | Path | None = None,
    progress: bool = True,
    snapshots: Integers = (),
) -> TrainResult:
    """Train a Decision Transformer on `data`; `snapshots` are the steps after which to keep the weights.

    With a `folder`, each checkpoint is kept there as `step_NNNNNN/` (a model folder, and the optimiser beside
    it), and a run that finds checkpoints of the same settings goes on from the last. Raises ValueError where
    the folder belongs to other settings, or, before the first step, where data, model and evaluation do not fit
    each other; and, naming the step, where training diverges.
    """
    check_fit(data, model_config, config)
    sampler = Sampler(data, model_config.n_timesteps, config)
    model = DecisionTransformer(model_config, seed=seed)
    update = Updater(model, config)
    run = _Run(folder, {"model": asdict(model_config), "train": asdict(config), "seed": seed})
    run.settings["snapshots"] = list(snapshots)
    curve, evaluations, begin = run.resume(model, update.optimizer)
    if begin == 0 and 0 in snapshots:
        run.keep(0, model)
    torch.set_flush_denormal(True)  # the unused state channel decays to denormals, which cost a factor of two
    try:
        with tqdm(total=config.steps, initial=begin, desc="training", disable=not progress) as bar:
            for step, batch in enumerate(sampler.batches(seed, begin, config.steps), begin):
                lr = config.learning_rate(step)
                loss, accuracy = update(batch, lr)
                curve.append({"step": step + 1, "loss": loss, "accuracy": accuracy, "lr": lr})
                if not math.isfinite(loss):
                    _refuse_divergence(step + 1, config, "the loss")
                bar.update()
                at_end = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
                if (at_end or step + 1 in snapshots) and (wrong := not_finite(model.state_dict())):
                    _refuse_divergence(step + 1, config, wrong)
                if step + 1 in snapshots:
                    run.keep(step + 1, model)
                if at_end:
                    measured = evaluate(model, config.evaluation_episodes, seed, data)
                    evaluations.append({"step": step + 1, **measured})
                    bar.set_postfix({k: f"{v:.2f}" for k, v in measured.items() if k.startswith("greedy")})
                    run.save(step + 1, model, update.optimizer, curve, evaluations)
    finally:
        torch.set_flush_denormal(False)
    model.zero_grad()
    return TrainResult(model.eval(), pd.DataFrame(curve), pd.DataFrame(evaluations), run.snapshots)


@checked
def evaluate(model: DecisionTransformer, episodes: Whole, seed: Whole, data: Recorded) -> Row:
    """Return mean returns, greedy and sampled, at RTGs −1, 0 and 0.9 in the task the data come from."""
    if not episodes:
        return {}
    task = _task_of(data, episodes)
    rtgs = np.repeat([-1.0, 0.0, 0.9], episodes)
    result: Row = {}
    for how in ("greedy", "sampled"):
        returns = rollout(model, rtgs, how == "greedy", seed=seed, task=task).returns
        means = returns.reshape(3, episodes).mean(1)
        result |= {f"{how} {rtg:g}": float(mean) for rtg, mean in zip((-1, 0, 0.9), means, strict=True)}
    return result


def check_fit(data: Recorded, model_config: DTConfig, config: TrainConfig) -> None:
    """Raise ValueError where data, the model to be trained on them and its evaluation do not fit each other."""
    longest = int(data.lengths.max(initial=0))
    if not 1 <= longest <= model_config.max_steps:
        raise ValueError(
            f"data must hold episodes of 1 to {model_config.max_steps} steps (max_steps), the longest has {longest}"
        )
    most, view = model_config.n_actions - 1, data.observations(np.arange(1)).shape[1]
    largest = data.actions.max()
    require(largest <= most, "data's largest action", largest, f"at most n_actions − 1 = {most}")
    require(
        view == model_config.view_size, "DTConfig.view_size", model_config.view_size, f"that of data, {view}"
    )
    if isinstance(data, ImageEpisodes) and model_config.encoding == "one-hot":
        check_one_hot(torch.from_numpy(data.images))
    if config.evaluation_episodes:
        check_task(_task_of(data, config.evaluation_episodes), model_config)


def _task_of(data: Recorded, episodes: int) -> Task:
    """Return the task that a model is evaluated in; raise ValueError where the data are of another than the book's."""
    if isinstance(data, Trajectories):
        return data.task
    refuse(
        "evaluation_episodes", episodes, "0 for ImageEpisodes, whose task is not the book's (use rollout_in)"
    )


def _refuse_divergence(step: int, config: TrainConfig, what: str) -> NoReturn:
    raise ValueError(
        f"training has diverged at step {step} of {config.steps}: {what} is no longer finite; lr is {config.lr:g}, "
        "and a lower one may do."
    )


class Updater:
    """Takes optimiser steps on a model: by `gradients` where one layer sees one timestep, else by autograd."""

    def __init__(self, model: DecisionTransformer, config: TrainConfig) -> None:
        """Make Adam or AdamW over all weights."""
        self.model = model
        fused = model.cfg.n_timesteps == 1 and model.is_plain() and model.W_U.device.type == "cpu"
        self.gradients = Gradients(model, config.batch_size) if fused else None
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        self.optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def __call__(self, batch: Batch, lr: float) -> tuple[float, float]:
        """Take one step and return loss and accuracy of the batch before it."""
        self.optimizer.param_groups[0]["lr"] = lr
        result = self._differentiate(batch)
        self.optimizer.step()
        return result

    def _differentiate(self, batch: Batch) -> tuple[float, float]:
        if self.gradients:
            return self.gradients(*(column[:, 0] for column in batch[:4]))
        logits = self.model(batch.states, batch.rtgs, batch.timesteps, batch.actions[:, :-1])
        logits, target = logits[batch.real], batch.actions[batch.real]
        loss = F.cross_entropy(logits, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.item(), (logits.detach().argmax(-1) == target).float().mean().item()


class _Run:
    """The folder of one training run: checkpoints from which it can go on, each whole or absent."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder) if folder else None, settings
        self.snapshots: dict[int, dict[str, torch.Tensor]] = {}

    def checkpoints(self) -> Iterator[Path]:
        if self.folder:
            yield from sorted(self.folder.glob("step_*[0-9]"), reverse=True)

    def resume(
        self, model: DecisionTransformer, optimizer: torch.optim.Optimizer
    ) -> tuple[list[Row], list[Row], int]:
        """Load the last whole checkpoint, if there is one, into model and optimiser."""
        for folder in self.checkpoints():
            state = json.loads((folder / "training.json").read_text())
            if state["settings"] != self.settings:
                raise ValueError(
                    f"{folder} belongs to a run of other settings; give another folder or remove it"
                )
            try:
                saved = load_file(folder / "optimizer.safetensors")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{folder / 'optimizer.safetensors'} is not whole ({error}); remove {folder}"
                ) from None
            model.load_state_dict(DecisionTransformer.from_pretrained(folder).state_dict())
            _load_moments(optimizer, saved)
            begin = state["curve"][-1]["step"]
            steps = [step for step in self.settings["snapshots"] if step <= begin]
            self.snapshots = {step: load_file(self._snapshot(step)) for step in steps}
            return state["curve"], state["evaluations"], begin
        return [], [], 0

    def _snapshot(self, step: int) -> Path:
        assert self.folder
        return self.folder / f"weights_{step:06d}.safetensors"

    def keep(self, step: int, model: DecisionTransformer) -> None:
        """Keep the weights as they are now."""
        self.snapshots[step] = {name: value.clone() for name, value in model.state_dict().items()}
        if self.folder:
            with atomic_write(self._snapshot(step)) as temporary:
                save_file(self.snapshots[step], temporary)

    def save(
        self,
        step: int,
        model: DecisionTransformer,
        optimizer: torch.optim.Optimizer,
        curve: list[Row],
        evaluations: list[Row],
    ) -> None:
        """Write a checkpoint folder, whole or not at all."""
        if self.folder is None:
            return
        with atomic_write(self.folder / f"step_{step:06d}") as temporary:
            model.save_pretrained(temporary)
            save_file(_moments(optimizer), temporary / "optimizer.safetensors")
            state = {"settings": self.settings, "curve": curve, "evaluations": evaluations}
            (temporary / "training.json").write_text(json.dumps(state))


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def _load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in saved.items():
        index, name = key.split(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
