"""All of `data/` from nothing: one graph of jobs, in the order in which one thing needs the other."""

import re
from collections.abc import Sequence

from dtbook.artifacts.parameters import Count, checked
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.model.files import read_post_checkpoint
from dtbook.pipeline import experiments, measure, replication
from dtbook.pipeline.engine import Job, Say, failures, run_graph
from dtbook.pipeline.replication import Recipe, is_shipped

STAGES = (*replication.REPLICATION_STAGES, *measure.MEASURE_STAGES, *experiments.EXPERIMENT_STAGES)
"""The table of stages: what makes each file of `data/`."""


def plan(
    made: ArtifactStore, seeds: Sequence[int], recipe: Recipe, everything: bool = False, post: bool = True
) -> list[Job]:
    """Return the jobs that make what `data/` holds of these replications, in another store.

    Seed 0 is the reference: with it come the controls, the model of nine timesteps and, if there are any, the post's
    weights. With `everything` also the sweeps and traces of chapters 11 and 12 and the causes of chapters 9 and 15.
    """
    jobs = [job for seed in seeds for job in replication.replication(made, seed, recipe)]
    if 0 in seeds:
        jobs += replication.around(made, recipe)
    if len(seeds) > 1:
        jobs.append(Job(replication.REPLICATION_ROWS["replicas"], made, seeds=tuple(seeds)))
    if everything:
        folder = made.root / "sweeps"
        jobs += [point.job(folder / name) for name in experiments.SWEEPS for point in experiments.read(name)]
        jobs += experiments.graph(made, made, seeds, folder, recipe, post)
    return jobs + measure.measured(made, seeds, recipe, post, everything)


@checked
def reproduce_data(
    made: ArtifactStore,
    shipped: ArtifactStore,
    seeds: Sequence[int],
    workers: Count = 1,
    scheduler: str | None = None,
    everything: bool = False,
    recipe: Recipe | None = None,
    say: Say = lambda line: None,
) -> list[str]:
    """Run the plan, where what is there and current is not made again; return the names of what is to be compared.

    Without `everything`, what the sweeps said of claims is taken from `shipped`; so is what was measured of the post's
    weights where they cannot be had. `say` hears of each job as it ends, in a line. Raises ArtifactError naming those
    that failed.
    """
    post = 0 in seeds and has_post()
    entries = shipped.entries()
    taken = [] if post else [name for name in entries if name.startswith("post/")]
    taken += [] if everything else [measure.EXPERIMENT_CLAIMS]
    for name in taken:
        if 0 in seeds and entries.get(name) not in (None, made.entries().get(name)):
            made.take(name, shipped)
    jobs = plan(made, seeds, recipe or Recipe(), everything, post)
    if failed := failures(run_graph(jobs, workers, scheduler, say)):
        raise ArtifactError(f"{', '.join(failed)} failed; the same command goes on where they stopped")
    names = [name for job in jobs if job.store is made for name in job.makes if is_shipped(name)]
    if everything:
        names += [name for name in entries if name not in names and _is_of(name, seeds)]
    return [name for name in names if name not in taken]


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
