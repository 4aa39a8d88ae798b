"""Measuring models and keeping what was found: tables over every observation, findings, the scorecard, as artifacts.

Each is keyed by the model's sha256 and the parameters, so it is made anew when either changes, and read otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import pandas as pd

from dtbook.analysis import ablations, behaviour
from dtbook.analysis.head_circuit import measure_circuit
from dtbook.analysis.heads import obstacle_head_scores, order_heads
from dtbook.analysis.weights import embeddings
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.claims.evidence import Evidence
from dtbook.claims.rules import measure
from dtbook.claims.scorecard import scorecard
from dtbook.gridworld.env import all_observations
from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig
from dtbook.model.files import POST_MODEL_SHA256
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline import (
    POST_CALIBRATION,
    Recipe,
    Writer,
    calibrate,
    folder_of,
    name_of,
    run_stage,
    table_writer,
)
from dtbook.protocol import RTGS, TIMESTEPS
from dtbook.replicas import in_processes
from dtbook.rollout import CALIBRATION_RTGS
from dtbook.trajectories.recording import Trajectories

UNTRAINED = {f"untrained_{seed}": seed for seed in range(3)}
"""Control models without training, by the seed of their weights."""
SHUFFLED = tuple(f"controls/shuffled_{seed}" for seed in range(3))
"""Control models trained on shuffled actions, artifacts of the store."""
POST_CLAIMS, CONTROL_CLAIMS = "post/claims.parquet", "controls/claims.parquet"
EXPERIMENT_CLAIMS = "experiments/claims.parquet"
SCORECARD = ("scorecard.parquet", "scorecard.csv")

ANATOMY: dict[str, tuple[Callable[..., pd.DataFrame], dict[str, Any]]] = {
    "distributions": (behaviour.log_odds_distributions, {"rtgs": RTGS, "timesteps": TIMESTEPS}),
    "turns": (behaviour.turns, {"rtgs": RTGS, "timestep": 10}),
    "over_time": (behaviour.over_time, {"rtgs": RTGS, "timesteps": behaviour.EVERY_TIMESTEP}),
    "exceptions": (behaviour.exceptions, {"rtgs": RTGS, "timesteps": behaviour.CERTIFIED}),
    "scans": (
        behaviour.situation_scans,
        {"rtgs": behaviour.SCAN_RTGS, "timesteps": behaviour.SCAN_TIMESTEPS},
    ),
    "neurons": (
        ablations.neurons,
        {"rtgs": RTGS, "timesteps": TIMESTEPS, "how": ablations.NEURON_WAYS, "seed": 0},
    ),
}
"""Tables of chapters 5 and 6 beside the situations: file name → what makes it of a model and its observations, how."""
PLAY = "ablated_play"
PLAY_SETTINGS: dict[str, Any] = {"rtgs": CALIBRATION_RTGS, "episodes": 100, "max_steps": 300, "seed": 0}

CIRCUIT_SETTINGS: dict[str, Any] = {
    "head": 1,
    "rtgs": RTGS,
    "rtg": 0.9,
    "timesteps": TIMESTEPS,
    "timestep": 10,
    "situations": ("obstacle", "wall", "goal"),
}
"""How chapter 8's circuit is measured."""

CODE = (
    "dtbook.claims.evidence",
    "dtbook.claims.rules",
)
STAGES = ("claims", "situations", "anatomy", "scorecard")
"""Stages whose artifacts hold what was measured of models."""


def measure_replication(store: ArtifactStore, seed: int) -> None:
    """Decide the claims for one replication of the store (`claims.parquet`).

    C01 is decided where the store holds PPO's own history.
    """
    history = name_of(seed, "history.npz")
    recipe = Recipe()

    def evidence() -> Evidence:
        model = DecisionTransformer.from_pretrained(store.path(name_of(seed, "model")))
        calibration = pd.read_parquet(store.path(name_of(seed, "calibration.parquet")))
        played = Trajectories.load(store.path(history)) if history in store.entries() else None
        return Evidence(model, _observations(recipe.task), calibration, played)

    sha256 = store.entries()[name_of(seed, "model")]["sha256"]
    _claims(store, name_of(seed, "claims.parquet"), seed, sha256, evidence)


def measure_post(store: ArtifactStore) -> None:
    """Decide the claims for the post's own weights.

    They are fetched, or found where DTBOOK_POST_MODEL says, only where something is to be measured.
    """

    def evidence() -> Evidence:
        calibration = pd.read_parquet(store.path(POST_CALIBRATION))
        return Evidence(DecisionTransformer.from_post_checkpoint(), _observations(Task()), calibration)

    _claims(store, POST_CLAIMS, 0, POST_MODEL_SHA256, evidence)


def measure_anatomy(store: ArtifactStore, folder: str, progress: bool = True) -> None:
    """Make the tables of chapters 5 and 6 for the model in a folder of the store, or for the post's ("post")."""
    sha256, model = _model_in(store, folder)
    observations = cache(lambda: _observations(Task()))

    def keep(name: str, settings: dict[str, Any], make: Callable[[], pd.DataFrame]) -> None:
        parameters = {"model": sha256, "task": asdict(Task())} | settings
        names = [f"{folder}/{name}.parquet"]
        run_stage(
            store,
            0,
            "anatomy",
            ("dtbook.analysis.behaviour", "dtbook.analysis.ablations"),
            parameters,
            names,
            lambda: [table_writer(make())],
        )

    def run_it(table: Callable[..., pd.DataFrame], settings: dict[str, Any]) -> pd.DataFrame:
        return table(model(), observations(), progress=progress, **settings)

    for name, (table, settings) in ANATOMY.items():
        keep(name, settings, partial(run_it, table, settings))
    keep(PLAY, PLAY_SETTINGS, lambda: ablations.ablated_play(model(), progress=progress, **PLAY_SETTINGS))


def measure_situations(store: ArtifactStore, folder: str, progress: bool = True) -> None:
    """Make the table behind chapter 6 (`ablations.situation_table`) of a model, named as in `measure_anatomy`."""
    sha256, model = _model_in(store, folder)
    settings: dict[str, Any] = {
        "rtgs": RTGS,
        "timesteps": TIMESTEPS,
        "how": ablations.HOW,
        "preference": "F-R",
        "seed": 0,
    }
    parameters = {"model": sha256, "task": asdict(Task())} | settings

    def make() -> list[Writer]:
        table = ablations.situation_table(model(), _observations(Task()), progress=progress, **settings)
        return [table_writer(table)]

    run_stage(
        store,
        0,
        "situations",
        ("dtbook.analysis.ablations",),
        parameters,
        [f"{folder}/situations.parquet"],
        make,
    )


def measure_circuit_of(store: ArtifactStore, folder: str, progress: bool = True) -> None:
    """Make what chapters 7 and 8 show of a model, named as in `measure_anatomy`: embeddings, and head 1's circuit."""
    sha256, model = _model_in(store, folder)
    parameters = {"model": sha256, "task": asdict(Task())} | CIRCUIT_SETTINGS

    def circuit() -> list[Writer]:
        return [measure_circuit(model(), _observations(Task()), progress=progress, **CIRCUIT_SETTINGS).save]

    def embedded() -> list[Writer]:
        return [embeddings(model()).save]

    name = f"{folder}/embeddings.safetensors"
    run_stage(store, 0, "anatomy", ("dtbook.analysis.weights",), {"model": sha256}, [name], embedded)
    run_stage(
        store, 0, "anatomy", ("dtbook.analysis.head_circuit",), parameters, [f"{folder}/circuit"], circuit
    )


def _model_in(store: ArtifactStore, folder: str) -> tuple[str, Callable[[], DecisionTransformer]]:
    """The sha256 of the model in a folder of the store, or of the post's ("post"), and what loads it once."""
    if folder == "post":
        return POST_MODEL_SHA256, cache(DecisionTransformer.from_post_checkpoint)
    sha256 = store.entries()[f"{folder}/model"]["sha256"]
    return sha256, cache(lambda: DecisionTransformer.from_pretrained(store.path(f"{folder}/model")))


def measure_controls(store: ArtifactStore) -> None:
    """Decide the claims for models that learnt nothing: untrained ones, and those trained on shuffled actions."""
    recipe = Recipe()

    def findings(name: str, model: DecisionTransformer, seed: int) -> pd.DataFrame:
        observations = _observations(recipe.task)
        ordered = order_heads(model, obstacle_head_scores(model, observations))
        curves = calibrate(ordered, recipe.calibration, seed)
        return measure(Evidence(ordered, observations, curves)).assign(model=name)

    def make() -> list[Writer]:
        tables = [
            findings(name, DecisionTransformer(DTConfig(), seed).eval(), seed)
            for name, seed in UNTRAINED.items()
        ]
        for seed, name in enumerate(SHUFFLED):
            model = DecisionTransformer.from_pretrained(store.path(name))
            tables.append(findings(name.rpartition("/")[2], model, seed))
        return [table_writer(pd.concat(tables, ignore_index=True))]

    entries = store.entries()
    if absent := [name for name in SHUFFLED if name not in entries]:
        raise ArtifactError(
            f"{store.root} has no {absent[0]}: the controls are measured when it has been trained"
        )
    hashes = {name: entries[name]["sha256"] for name in SHUFFLED}
    parameters = {"untrained": UNTRAINED, "models": hashes, "calibration": dict(recipe.calibration)}
    run_stage(store, 0, "claims", (*CODE, "dtbook.rollout"), parameters, [CONTROL_CLAIMS], make)


def make_scorecard(store: ArtifactStore, seeds: Sequence[int]) -> None:
    """Put the findings of these replications, the post's weights, controls and experiments together, and decide."""
    entries = store.entries()
    names = [name_of(seed, "claims.parquet") for seed in seeds]
    sources = [*names, POST_CLAIMS, CONTROL_CLAIMS]
    sources += [EXPERIMENT_CLAIMS] if EXPERIMENT_CLAIMS in entries else []

    def read(name: str) -> pd.DataFrame:
        return pd.read_parquet(store.path(name))

    def make() -> list[Writer]:
        experiments = read(EXPERIMENT_CLAIMS) if EXPERIMENT_CLAIMS in sources else None
        card = scorecard(findings(store, seeds), read(POST_CLAIMS), read(CONTROL_CLAIMS), experiments)
        return [table_writer(card), lambda path: card.to_csv(path, index=False)]

    hashes = {name: entries[name]["sha256"] for name in sources}
    run_stage(
        store,
        0,
        "scorecard",
        ("dtbook.claims.scorecard",),
        {"seeds": list(seeds), "from": hashes},
        SCORECARD,
        make,
    )


def measure_all(store: ArtifactStore, seeds: Sequence[int], workers: int = 1) -> list[str]:
    """Measure these replications, in `workers` processes; return the names of the artifacts that hold what was found.

    With the reference, seed 0, come the post's weights, the controls, what chapters 5 to 8 show of both models, and the
    scorecard over all of `seeds`. The longest jobs begin first.
    """
    jobs: list[Callable[[], object]] = [partial(measure_replication, store, seed) for seed in seeds]
    if 0 in seeds:
        inside = (measure_anatomy, measure_situations, measure_circuit_of)
        jobs = [
            partial(measure_controls, store),
            *(partial(do, store, of, progress=False) for do in inside for of in (folder_of(0), "post")),
            partial(measure_post, store),
            *jobs,
        ]
    in_processes(jobs, workers, "measures")
    if 0 in seeds:
        make_scorecard(store, seeds)
    return [name for name, entry in store.entries().items() if entry["stage"] in STAGES]


def findings(store: ArtifactStore, seeds: Sequence[int]) -> pd.DataFrame:
    """Return what each replication says to each claim: `model`, `seed`, `claim`, `effect`, `passed`."""
    tables = [
        pd.read_parquet(store.path(name_of(seed, "claims.parquet"))).assign(model=f"seed_{seed}", seed=seed)
        for seed in seeds
    ]
    return pd.concat(tables, ignore_index=True)


def _observations(task: Task) -> Any:
    return all_observations(task.size, task.n_obstacles)


def _claims(
    store: ArtifactStore, name: str, seed: int, sha256: str, evidence: Callable[[], Evidence]
) -> None:
    parameters = {"model": sha256, "rtgs": RTGS, "timesteps": TIMESTEPS}
    run_stage(store, seed, "claims", CODE, parameters, [name], lambda: [table_writer(measure(evidence()))])
