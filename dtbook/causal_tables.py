"""The tables of chapters 9 and 15 as artifacts: causal effects, circuits, and the model as a program.

Each is keyed by the model's sha256 and the parameters, so it is made anew when either changes, and read otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from dtbook.analysis import counterfactuals, faithfulness, program
from dtbook.artifacts.store import ArtifactStore
from dtbook.gridworld.env import all_observations
from dtbook.gridworld.rules import Task
from dtbook.model.files import POST_MODEL_SHA256
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline import Writer, folder_of, run_stage, table_writer
from dtbook.protocol import TIMESTEP
from dtbook.trajectories.ppo import one_thread

FILES = {
    "causal": ("causal.parquet",),
    "circuits": ("units.parquet", "circuits.parquet"),
    "program": ("program.parquet", "program_rows.parquet"),
}
"""Stage → the files it leaves in a model's folder."""
CODE = {
    "causal": "dtbook.analysis.counterfactuals",
    "circuits": "dtbook.analysis.faithfulness",
    "program": "dtbook.analysis.program",
}
ROWS_OF = program.STEPS[4]
"""The step of the program whose rows are kept: RTG band, what is in front, walls, quadrant."""
EPISODES = 200
"""Played by each step of the program, for each return and way of acting."""


def make_tables(
    store: ArtifactStore, folder: str, sha256: str, load: Callable[[], DecisionTransformer], seed: int = 0
) -> None:
    """Make the tables of one model in its folder of the store, those that are not there; `load` gives the model."""
    task = Task()

    def run(
        stage: str, settings: dict[str, object], make: Callable[[DecisionTransformer], list[pd.DataFrame]]
    ) -> None:
        def write() -> list[Writer]:
            return [table_writer(table) for table in make(load())]

        parameters = {"model": sha256, "task": asdict(task), "seed": seed} | settings
        names = [f"{folder}/{file}" for file in FILES[stage]]
        run_stage(store, seed, stage, (CODE[stage],), parameters, names, write)

    run(
        "causal",
        {"cases": counterfactuals.CASES, "timestep": TIMESTEP},
        lambda model: [counterfactuals.causal_table(model, all_observations())],
    )
    run(
        "circuits",
        {"cases": faithfulness.CIRCUIT_CASES, "timestep": TIMESTEP, "keep": faithfulness.KEEP},
        lambda model: _circuits(model, seed),
    )
    run(
        "program",
        {"rtgs": program.FITTED_RTGS, "timesteps": program.FITTED_TIMESTEPS, "episodes": EPISODES},
        lambda model: _program(model, task, seed),
    )


def _circuits(model: DecisionTransformer, seed: int) -> list[pd.DataFrame]:
    observations = all_observations()
    tables = [
        faithfulness.circuit_tables(model, observations, case, seed) for case in faithfulness.CIRCUIT_CASES
    ]
    return [pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True)]


def _program(model: DecisionTransformer, task: Task, seed: int) -> list[pd.DataFrame]:
    summary = program.summarise_model(model, all_observations())
    steps = program.program_table(summary, EPISODES, task, seed)
    return [steps, program.Program(summary, ROWS_OF).table()]


def make_all(store: ArtifactStore, seeds: Sequence[int], workers: int = 1) -> list[str]:
    """Make the tables of these replications and of the post's weights; return the artifacts' names."""
    folders = [*map(folder_of, seeds), "post"]
    with get_context("spawn").Pool(min(workers, len(folders))) as pool:
        made = pool.imap_unordered(partial(_one, store.root), folders)
        for _ in tqdm(made, total=len(folders), desc="causal tables"):
            pass
    return [f"{folder}/{file}" for folder in folders for files in FILES.values() for file in files]


def _one(root: Path, folder: str) -> None:
    store = ArtifactStore(root)
    with one_thread():
        if folder == "post":
            make_tables(store, folder, POST_MODEL_SHA256, DecisionTransformer.from_post_checkpoint)
            return
        name = f"{folder}/model"
        sha256 = store.entries()[name]["sha256"]
        make_tables(store, folder, sha256, lambda: DecisionTransformer.from_pretrained(store.path(name)))
