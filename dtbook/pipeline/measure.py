"""Measuring subjects and keeping what was found: tables over every observation, findings, the scorecard."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from dtbook.analysis import ablations, behaviour, counterfactuals, faithfulness, frames, neurons, program
from dtbook.analysis.head_circuit import measure_circuit, written_by_heads
from dtbook.analysis.weights import embeddings
from dtbook.artifacts.store import ArtifactStore
from dtbook.claims.evidence import Evidence, check_shape
from dtbook.claims.rules import decide_claims
from dtbook.claims.scorecard import scorecard
from dtbook.gridworld.env import ObservationSet, all_observations
from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig
from dtbook.model.subject import Subject
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline import replication
from dtbook.pipeline.engine import Job, Stage, Writer, table_row, table_writer
from dtbook.pipeline.replication import (
    BOOK_SEEDS,
    CONTROLS,
    POST_RECIPE,
    REFERENCE,
    Recipe,
    calibrate,
    calibration_of,
    controls_of,
    folder_of,
    with_heads_in_order,
)
from dtbook.protocol import HIGH, RTGS, TIMESTEPS
from dtbook.rollout import CALIBRATION_RTGS
from dtbook.trajectories.episodes import Trajectories

UNTRAINED = {f"untrained_{seed}": seed for seed in range(3)}
"""Control models without training, by the seed of their weights."""
POST_CLAIMS, CONTROL_CLAIMS = "post/claims.parquet", "controls/claims.parquet"
BOOK_CLAIMS = tuple(f"seed_{seed}/claims.parquet" for seed in BOOK_SEEDS)
EXPERIMENT_CLAIMS = "experiments/claims.parquet"
SCORECARD = ("scorecard.parquet", "scorecard.csv")
OWN_FOLDER = "own"
"""The folder, in a store of its own, of a reader's model and of what is measured of it."""
ROWS_OF = program.STEPS[4]
"""The step of the program whose rows are kept: RTG band, what is in front, walls, quadrant."""


# ------------------------------------------------------------------------------------------- the stages' functions
@lru_cache(maxsize=1)
def observations_of(task: Task) -> ObservationSet:
    """Return every observation of a task; the last ones are kept, which many stages look at."""
    return all_observations(task.size, task.n_obstacles)


def _over_observations(table: Callable[..., pd.DataFrame], job: Job) -> list[Writer]:
    observations = observations_of(job.recipe.task)
    return [table_writer(table(job.subject().model, observations, progress=job.progress, **job.settings))]


def _over(table: Callable[..., pd.DataFrame]) -> Callable[[Job], list[Writer]]:
    """Return the stage's function that makes a table of a model and of every observation."""
    return partial(_over_observations, table)


def _play(job: Job) -> list[Writer]:
    task = replace(job.recipe.task, max_steps=job.settings["max_steps"])
    model = job.subject().model
    return [table_writer(ablations.ablated_play(model, progress=job.progress, task=task, **job.settings))]


def _embeddings(job: Job) -> list[Writer]:
    return [embeddings(job.subject().model).save]


def _circuit(job: Job) -> list[Writer]:
    observations = observations_of(job.recipe.task)
    return [measure_circuit(job.subject().model, observations, progress=job.progress, **job.settings).save]


def _writes(job: Job) -> list[Writer]:
    return [table_writer(written_by_heads(job.subject().model, **job.settings))]


def _causal(job: Job) -> list[Writer]:
    return [table_writer(counterfactuals.causal_table(job.subject().model, observations_of(job.recipe.task)))]


def _circuits(job: Job) -> list[Writer]:
    model, observations = job.subject().model, observations_of(job.recipe.task)
    tables = [
        faithfulness.circuit_tables(model, observations, case, **job.settings)
        for case in faithfulness.CIRCUIT_CASES
    ]
    return [table_writer(pd.concat(parts, ignore_index=True)) for parts in zip(*tables, strict=True)]


def _program(job: Job) -> list[Writer]:
    summary = program.summarise_model(job.subject().model, observations_of(job.recipe.task))
    steps = program.program_table(summary, task=job.recipe.task, **job.settings)
    return [table_writer(steps), table_writer(program.Program(summary, ROWS_OF).table())]


def _claims(job: Job) -> list[Writer]:
    """Decide the claims for one subject; C01 where there is PPO's own history."""
    calibration, history = job.table("{of}/calibration.parquet"), "{of}/history.npz"
    played = Trajectories.load(job.path(history)) if job.has(history) else None
    model = job.subject().model
    is_ours = job.of == folder_of(job.seed, job.recipe)
    start = start_of_rtg(model.cfg, job.seed) if is_ours else None
    observations = observations_of(job.recipe.task)
    found = decide_claims(Evidence(model, observations, calibration, played, start=start))
    return [table_writer(found)]


def rtg_start_of(subject: Subject) -> Float[Tensor, " d_model"] | None:
    """Return the RTG embedding that a replication's training began with; None for a subject whose name says no seed."""
    name = Path(subject.folder or subject.name).name
    if subject.store is None or not re.fullmatch(r"seed_\d+", name):
        return None
    return start_of_rtg(subject.model.cfg, int(name.removeprefix("seed_")))


def start_of_rtg(cfg: DTConfig, seed: int) -> Float[Tensor, " d_model"]:
    """Return the RTG embedding that the training of a model of this shape began with."""
    return DecisionTransformer(cfg, seed).W_E_rtg.detach()


def _control_claims(job: Job) -> list[Writer]:
    """Decide the claims for models that learnt nothing: untrained ones, and those trained on shuffled actions."""
    recipe, tables = job.recipe, []
    models = [
        (name, seed, DecisionTransformer(recipe.model, seed).eval()) for name, seed in UNTRAINED.items()
    ]
    models += [
        (name, seed, Subject.find(name, job.origin).model) for seed, name in enumerate(job.stage.needs)
    ]
    for name, seed, model in models:
        ordered, _ = with_heads_in_order(model, recipe.task)
        curves = calibrate(ordered, calibration_of(recipe), seed)
        start, observations = start_of_rtg(recipe.model, seed), observations_of(recipe.task)
        found = decide_claims(Evidence(ordered, observations, curves, start=start))
        tables.append(found.assign(model=Path(name).name))
    return [table_writer(pd.concat(tables, ignore_index=True))]


def _scorecard(job: Job) -> list[Writer]:
    experiments = job.table(EXPERIMENT_CLAIMS) if job.has(EXPERIMENT_CLAIMS) else None
    has_book = all(map(job.has, BOOK_CLAIMS))
    robustness = findings(job.origin, BOOK_SEEDS) if has_book else None
    ours, controls = (
        findings(job.origin, job.seeds, POST_RECIPE),
        job.table(f"{POST_RECIPE}/{CONTROL_CLAIMS}"),
    )
    card = scorecard(ours, job.table(POST_CLAIMS), controls, experiments, robustness)
    return [table_writer(card), lambda path: card.to_csv(path, index=False)]


def findings(store: ArtifactStore, seeds: Sequence[int], recipe: str = "") -> pd.DataFrame:
    """Return the findings of replications in a recipe's folder: `model`, `seed`, `claim`, `effect`, `passed`."""
    models = {"/".join(filter(None, [recipe, f"seed_{seed}"])): seed for seed in seeds}
    tables = [
        pd.read_parquet(store.path(f"{model}/claims.parquet")).assign(model=model, seed=seed)
        for model, seed in models.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _own_model(job: Job) -> list[Writer]:
    """Take a reader's model over, its heads in order."""
    model = Subject.find(job.given).model
    return [with_heads_in_order(model, job.recipe.task)[0].save_pretrained]


# ------------------------------------------------------------------------------------------- the table, and its graphs
def _of(name: str, function: Callable[[Job], Sequence[Writer]], makes: str = "", **others: Any) -> Stage:
    """Return a row of what is measured of a subject; without `makes` it is a table of the row's name."""
    makes = " ".join(f"{{of}}/{file}" for file in (makes or f"{name}.parquet").split())
    return table_row(name, function, makes, **{"needs": "{of}/model"} | others)


_EVERYWHERE: dict[str, Any] = {"rtgs": RTGS, "timesteps": TIMESTEPS}
BEHAVIOUR = (
    _of("distributions", _over(behaviour.log_odds_distributions), **_EVERYWHERE),
    _of("turns", _over(behaviour.turns), rtgs=RTGS, timestep=10),
    _of("along_walls", _over(behaviour.along_walls), **_EVERYWHERE),
    _of("over_time", _over(behaviour.over_time), rtgs=RTGS, timesteps=behaviour.EVERY_TIMESTEP),
    _of("exceptions", _over(behaviour.exceptions), rtgs=RTGS, timesteps=behaviour.CERTIFIED),
    _of(
        "scans",
        _over(behaviour.situation_scans),
        rtgs=behaviour.SCAN_RTGS,
        timesteps=behaviour.SCAN_TIMESTEPS,
    ),
    _of(
        "neurons",
        _over(neurons.neuron_table),
        **_EVERYWHERE,
        how=neurons.NEURON_WAYS,
        seed=0,
    ),
    _of("frames", _over(frames.median_frames), timestep=10, preference="F-R"),
    _of("means", _over(frames.kept_by_means), rtg=HIGH, timestep=10, seed=0),
    _of("directions", _over(frames.along_preference), rtg=HIGH, timestep=10, preference="F-R", seed=0),
    _of("ablated_play", _play, rtgs=CALIBRATION_RTGS, episodes=100, max_steps=300, seed=0),
    _of(
        "situations",
        _over(ablations.situation_table),
        **_EVERYWHERE,
        how=ablations.HOW,
        preference="F-R",
        seed=0,
    ),
    _of("embeddings", _embeddings, "embeddings.safetensors", recipe=""),
    _of(
        "circuit",
        _circuit,
        "circuit",
        head=1,
        rtgs=RTGS,
        rtg=HIGH,
        timesteps=TIMESTEPS,
        timestep=10,
        situations=("obstacle", "wall", "goal"),
    ),
    _of("writes", _writes, rtg=HIGH, timesteps=TIMESTEPS, recipe=""),
)
"""What chapters 5 to 8 show of a subject."""
CAUSES = (
    _of("causal", _causal),
    _of("circuits", _circuits, "units.parquet circuits.parquet", seed=0),
    _of("program", _program, "program.parquet program_rows.parquet", episodes=200, seed=0),
)
"""What chapters 9 and 15 show of a subject."""
CLAIMS_STAGE = _of("claims", _claims, needs="{of}/model {of}/calibration.parquet", uses="{of}/history.npz")
MEASURE_STAGES = (
    *BEHAVIOUR,
    *CAUSES,
    CLAIMS_STAGE,
    table_row(
        "control claims", _control_claims, CONTROL_CLAIMS, " ".join(CONTROLS), recipe="task model calibration"
    ),
    table_row(
        "scorecard",
        _scorecard,
        " ".join(SCORECARD),
        f"{POST_RECIPE}/seed_{{seed}}/claims.parquet {POST_CLAIMS} {POST_RECIPE}/{CONTROL_CLAIMS}",
        " ".join([EXPERIMENT_CLAIMS, *BOOK_CLAIMS]),
        recipe="",
    ),
    table_row("own model", _own_model, f"{OWN_FOLDER}/model"),
)
MEASURE_ROWS = {stage.name: stage for stage in MEASURE_STAGES}


def of_subject(
    store: ArtifactStore, of: str, recipe: Recipe, stages: Sequence[Stage], seeds: tuple[int, ...] = (0,)
) -> list[Job]:
    """Return jobs that measure a subject of a store, or the post's weights ("post")."""
    return [Job(stage, store, of, recipe, seeds) for stage in stages]


def measured(
    store: ArtifactStore, seeds: Sequence[int], recipe: Recipe, post: bool, everything: bool
) -> list[Job]:
    """Return the jobs that measure these replications, the longest ones first.

    With the reference come the controls, and what chapters 5 to 8 show of it and, where there are any, of the
    post's weights.
    """
    jobs, looked_at = [], [folder_of(REFERENCE), *(["post"] if post else [])]
    if REFERENCE in seeds:
        jobs = [control_claims(store, recipe)]
        jobs += [Job(stage, store, of, recipe) for stage in BEHAVIOUR for of in looked_at]
    if everything:
        jobs += causal_jobs(store, seeds, recipe, post)
    if post and REFERENCE in seeds:
        calibration = replication.REPLICATION_ROWS["calibration"]
        jobs += of_subject(store, "post", recipe, (calibration, CLAIMS_STAGE))
    for seed in seeds:
        jobs += of_subject(store, folder_of(seed), recipe, (CLAIMS_STAGE,), (seed,))
    return jobs


def control_claims(store: ArtifactStore, recipe: Recipe) -> Job:
    """Return the job that decides the claims for a recipe's controls."""
    names = controls_of(recipe)
    made = "/".join(filter(None, [recipe.folder, CONTROL_CLAIMS]))
    stage = replace(MEASURE_ROWS["control claims"], makes=(made,), needs=tuple(names))
    return Job(stage, store, recipe=recipe, label=f"{recipe.folder} control claims".strip())


def causal_jobs(store: ArtifactStore, seeds: Sequence[int], recipe: Recipe, post: bool = True) -> list[Job]:
    """Return the jobs of chapters 9 and 15: for these replications, and for the post's weights."""
    subjects = [*map(folder_of, seeds), *(["post"] if post else [])]
    return [job for of in subjects for job in of_subject(store, of, recipe, CAUSES)]


def tables_of(
    subject: Subject, store: ArtifactStore, recipe: Recipe | None = None, only: Sequence[str] = ()
) -> list[Job]:
    """Return the jobs that make every table, or only those of some stages, of a subject in a store of the reader's.

    Raises FileNotFoundError or ValueError, one sentence, for a folder that holds no model, a damaged one, or one of
    another shape; ValueError for an unknown stage.
    """
    recipe = recipe or Recipe()
    rows = (replication.REPLICATION_ROWS["calibration"], CLAIMS_STAGE, *BEHAVIOUR, *CAUSES)
    check_shape(subject.model)
    last = recipe.calibration["max_steps"]
    if subject.model.cfg.max_steps < last:
        raise ValueError(
            f"model has max_steps {subject.model.cfg.max_steps}; the tables need at least {last}."
        )
    names = [stage.name for stage in rows]
    if unknown := set(only) - set(names):
        raise ValueError(f"there is no stage {min(unknown)!r}: there are {', '.join(names)}")
    chosen = {*(only or names), *(["calibration"] if "claims" in only else [])}
    own = Job(
        MEASURE_ROWS["own model"],
        store,
        OWN_FOLDER,
        recipe,
        given=subject.name,
        parameters={"model": subject.sha256},
    )
    return [own, *of_subject(store, OWN_FOLDER, recipe, [stage for stage in rows if stage.name in chosen])]
