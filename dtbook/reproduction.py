"""All of `data/` from nothing, in the order in which one thing needs the other."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from dtbook import causal_tables, experiments, measures, pipeline, replicas
from dtbook.analysis import long_context
from dtbook.artifacts.store import CHECKOUT, ArtifactError, ArtifactStore
from dtbook.sweep import Outcome, Point, read_sweep, run_sweep

Say = Callable[[str], object]


def reproduce(
    made: ArtifactStore,
    shipped: ArtifactStore,
    seeds: Sequence[int],
    workers: int,
    everything: bool,
    say: Say,
    report: pipeline.Report,
) -> list[str]:
    """Make what `data/` holds of these replications in another store; return the names of what is to be compared.

    Seed 0 is the reference: with it come the controls, the nine-timestep model and the post's weights. With
    `everything` also the sweeps and traces of chapters 11 and 12 and the causal tables of chapters 9 and 15; without
    it what the sweeps said of claims is taken from `shipped`. What is there and current is not made again. `say` hears
    of what is done; `report`, of the stages of replications, in their processes. Raises ArtifactError naming
    replications or points that failed.
    """
    if failed := replicas.replicate_all(made, seeds, workers, report):
        sentence = f"seeds {', '.join(map(str, failed))} failed; the same command goes on where they stopped"
        raise ArtifactError(sentence)
    names = [name for seed in seeds for name in pipeline.shipped_names(seed)]
    if 0 in seeds:
        jobs: list[Callable[[], object]] = [
            partial(pipeline.train_control, made, control, progress=False)
            for control in range(len(pipeline.CONTROLS))
        ]
        jobs += [partial(long_context.make, made, progress=False), partial(pipeline.calibrate_post, made)]
        replicas.in_processes(jobs, workers, "controls, long context, the post's weights")
        names.append(long_context.NAME)
    if len(seeds) > 1:
        names.append(replicas.TABLE)
        say(replicas.write_summary(made, seeds).round(3).to_string(index=False))
    if everything:
        _experiments(made, seeds, workers, say)
    elif measures.EXPERIMENT_CLAIMS in shipped.entries():
        made.take(measures.EXPERIMENT_CLAIMS, shipped)
    names += measures.measure_all(made, seeds, workers)
    if everything:
        causal_tables.make_all(made, seeds, workers)
        names += [name for name in shipped.entries() if name not in names and _is_of(name, seeds)]
    return names


def _is_of(name: str, seeds: Sequence[int]) -> bool:
    match = re.match(r"seed_(\d+)/", name)
    return match is None or int(match[1]) in seeds


def _experiments(made: ArtifactStore, seeds: Sequence[int], workers: int, say: Say) -> None:
    folder = made.root / "sweeps"
    for name in experiments.SWEEPS:
        points = read_sweep(CHECKOUT / "sweeps" / f"{name}.yml", CHECKOUT / "notebooks")
        done: list[str] = []

        def report(point: Point, outcome: Outcome, name: str = name, done: list[str] = done) -> None:
            done.append(point.id)
            say(f"sweep {name}, {len(done)} points done{f': {outcome.error}' if outcome.error else ''}")

        if run_sweep(points, folder / name, workers, report=report)["error"].notna().any():
            raise ArtifactError(f"points of sweep {name} failed; the same command tries them again")
    traces: list[Callable[[], object]] = [
        partial(experiments.measure_dynamics, made, seed, made, progress=False) for seed in seeds
    ]
    replicas.in_processes(traces, workers, "training, traced")
    for part, outcome in experiments.run_all(made, made, CHECKOUT, folder):
        if outcome != "done":
            raise ArtifactError(f"{part}: {outcome}")
