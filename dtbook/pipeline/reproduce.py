"""All of `data/` from nothing: one graph of jobs, in the order in which one thing needs the other."""

import re
from collections.abc import Iterable, Sequence, Set

from dtbook.artifacts.parameters import Count, checked
from dtbook.artifacts.store import ArtifactStore
from dtbook.model.files import read_post_checkpoint
from dtbook.pipeline import deciding, experiments, measure, replication
from dtbook.pipeline.engine import Job, Say
from dtbook.pipeline.replication import (
    BOOK_SEEDS,
    FIRST_RECIPE,
    FIRST_SEEDS,
    POST_RECIPE,
    REFERENCE,
    TUNING,
    Recipe,
    is_shipped,
)

STAGES = (
    *replication.REPLICATION_STAGES,
    deciding.HISTORIES_STAGE,
    *measure.MEASURE_STAGES,
    *experiments.EXPERIMENT_STAGES,
)
"""The table of stages: what makes each file of `data/`."""


RECIPES = {"book": Recipe, "post": Recipe.post, "first": Recipe.first}
"""Recipes by name: the book's own, of which chapters 2 to 9 tell, the post's, and that of the book's first edition."""


def plan(
    made: ArtifactStore, seeds: Sequence[int], recipe: Recipe, everything: bool = False, post: bool = True
) -> list[Job]:
    """Return the jobs that make what `data/` holds of these replications, in another store.

    By the post's recipe these are the replications, their claims and the controls; by the first edition's no controls.
    With the reference of the book's own come the controls, the model of nine timesteps and, if there are any, the
    post's weights. With `everything` also the sweeps of chapters 11 and 12, with the episodes that they learn from,
    and the causes of chapters 9 and 15.
    """
    if recipe.folder == POST_RECIPE:
        return deciding.replications_of(made, seeds, recipe)
    if recipe.folder == FIRST_RECIPE:
        return deciding.jobs(made, seeds, recipe)
    jobs = [job for seed in seeds for job in replication.replication(made, seed, recipe)]
    if REFERENCE in seeds:
        jobs += replication.around(made, recipe)
    if len(seeds) > 1:
        jobs.append(Job(replication.REPLICATION_ROWS["replicas"], made, seeds=tuple(seeds)))
    if everything:
        if TUNING not in seeds:
            jobs += replication.replication(made, TUNING, recipe)[:2]  # PPO and collection
        folder = made.root / "sweeps"
        jobs += [point.job(folder / name) for name in experiments.SWEEPS for point in experiments.read(name)]
        jobs += experiments.graph(made, folder, recipe, post)
    return jobs + measure.measured(made, seeds, recipe, post, everything)


@checked
def reproduce_data(
    made: ArtifactStore,
    shipped: ArtifactStore,
    seeds: Sequence[int] | None = None,
    workers: Count = 1,
    scheduler: str | None = None,
    everything: bool = False,
    recipe: Recipe | None = None,
    say: Say = lambda line: None,
) -> list[str]:
    """Run the plan, where what is there and current is not made again; return the names of what is to be compared.

    Without `seeds` those that decide by the recipe. Of the post's these are the first whose histories hold every class
    of returns, ten, or thirty with `everything`. What is needed and not made, such as what was measured of the post's
    weights where they cannot be had, is taken from `shipped`. `say` hears of each job as it ends, in a line. Raises
    ArtifactError naming those that failed.
    """
    recipe = recipe or Recipe()
    if seeds is None:
        seeds = _seeds_of(made, recipe, everything, workers, scheduler, say)
    post = not recipe.folder and REFERENCE in seeds and has_post()
    if not recipe.folder and REFERENCE in seeds:
        known = [name for name in shipped.entries() if name.startswith("post/")]
        _take([*([] if post else known), *([] if everything else [measure.EXPERIMENT_CLAIMS])], made, shipped)
    jobs = plan(made, seeds, recipe, everything, post)
    deciding.run_jobs(jobs, workers, scheduler, say)
    if recipe.folder:
        over_all = _over_all(made, shipped, {name for job in jobs for name in job.makes})
        deciding.run_jobs(over_all, workers, scheduler, say)
        jobs += over_all
    names = [name for job in jobs if job.store is made for name in job.makes if is_shipped(name)]
    if recipe.folder == POST_RECIPE and deciding.HISTORIES in made.entries():
        chosen = deciding.seeds_that_decide(made)
        names = [name for name in (deciding.HISTORIES, *names) if deciding.is_kept(name, chosen)]
    if everything and not recipe.folder:
        entries = [name for name in shipped.entries() if name not in names and _is_of(name, seeds)]
        names += [name for name in entries if post or not name.startswith("post/")]
    return names


def _seeds_of(
    made: ArtifactStore, recipe: Recipe, everything: bool, workers: int, scheduler: str | None, say: Say
) -> list[int]:
    if recipe.folder != POST_RECIPE:
        return list(FIRST_SEEDS if recipe.folder == FIRST_RECIPE else BOOK_SEEDS)
    wanted = deciding.ALL if everything else deciding.DECIDING
    tried = deciding.histories(made, recipe, wanted, workers, scheduler, say)
    return tried["seed"][tried["decides"]].tolist()


def _take(names: Iterable[str], made: ArtifactStore, shipped: ArtifactStore) -> None:
    entries = shipped.entries()
    for name in names:
        if entries.get(name) not in (None, made.entries().get(name)):
            made.take(name, shipped)


def _over_all(made: ArtifactStore, shipped: ArtifactStore, ours: Set[str]) -> list[Job]:
    """Return the jobs of what is over all replications: the scorecard, where all that it needs is there.

    What is not made here, as `ours` is, is taken as `shipped` has it now.
    """
    _take({deciding.HISTORIES} - made.entries().keys(), made, shipped)
    if deciding.HISTORIES not in made.entries():
        return []
    card = deciding.scorecard_job(made)
    _take({*card.names(card.stage.needs), *card.names(card.stage.uses)} - ours, made, shipped)
    return [card] if set(card.names(card.stage.needs)) <= made.entries().keys() else []


def over_other_seeds(names: Iterable[str], made: ArtifactStore, shipped: ArtifactStore) -> set[str]:
    """Return those of the tables over all replications that two stores have over different ones."""
    ours, theirs = made.entries(), shipped.entries()
    both = {*measure.SCORECARD, replication.TABLE} & {*names} & ours.keys() & theirs.keys()
    return {name for name in both if ours[name]["seeds"] != theirs[name]["seeds"]}


def has_post() -> bool:
    """Return whether the post's weights can be had."""
    try:
        read_post_checkpoint()
    except (OSError, ValueError):
        return False
    return True


def _is_of(name: str, seeds: Sequence[int]) -> bool:
    match = re.match(r"seed_(\d+)/", name)
    return match is None or int(match[1]) in seeds
