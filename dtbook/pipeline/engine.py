"""One engine for all that is made: stages, jobs, and graphs of jobs run in local processes or on a Dask cluster.

A *stage* is a row of a table: what it makes, what it needs for that, what it follows from, and the function that does
it. A *job* is a stage at work on something: a replication, the post's weights, a point of a sweep. What a job makes is
whole or not there. A job is run once what it needs is there, and not at all where the store says that what it makes is
there and current: neither by the next call, nor by a scheduler that lost a worker and hands its jobs out anew.
"""

import asyncio
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from dtbook.artifacts.parameters import Count, checked
from dtbook.artifacts.post_weights import POST_MODEL_SHA256
from dtbook.artifacts.processes import Processes, check_scheduler
from dtbook.artifacts.provenance import Code, digest
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.model.subject import Subject
from dtbook.trajectories.ppo import one_thread

ATTEMPTS = 2
"""How often a job is begun whose process dies."""
CONNECT_SECONDS = 10
"""How long a Dask scheduler has to answer."""
FETCHED = {"post/model": POST_MODEL_SHA256}
"""What no store holds, since it is fetched by its hash."""

Writer = Callable[[Path], Any]


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    Names of artifacts may hold `{of}`, what a job is about, and `{seed}`, which stands for each of a job's seeds.
    """

    name: str
    makes: tuple[str, ...]
    function: Callable[["Job"], Sequence[Writer]]
    """Returns what writes each artifact that the stage makes."""
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    """What it takes account of where it is there."""
    recipe: tuple[str, ...] = ()
    """The parts of the recipe that it follows."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it is done with besides; `Recipe.settings` may say otherwise."""
    before: str = "dtbook reproduce"
    """The command that makes what it needs."""
    also: tuple[str, ...] = ()
    """Dotted names of code behind it that the function does not name."""
    stands: Callable[["Job"], bool] | None = None
    """Says whether what is there, made as it would be now, may stand; without it, it does."""

    @property
    def code(self) -> tuple[Code, ...]:
        """Return the code that makes the stage's artifacts: its function, and what that was given."""
        if isinstance(self.function, partial):
            return (self.function.func, *filter(callable, self.function.args), *self.also)
        return (self.function, *self.also)


def table_row(
    name: str,
    function: Callable[["Job"], Sequence[Writer]],
    makes: str,
    needs: str = "",
    uses: str = "",
    recipe: str = "task",
    before: str = "dtbook reproduce",
    **settings: Any,
) -> Stage:
    """Return a row of the table of stages, in which names stand in a text with spaces between them."""
    made, needed, used, followed = (tuple(names.split()) for names in (makes, needs, uses, recipe))
    return Stage(name, made, function, needed, used, followed, settings, before)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the seconds it took, None if it was not run; the error, None if all is well."""

    seconds: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        return self.error or ("up to date" if self.seconds is None else f"done in {self.seconds:.1f} s")


@dataclass(frozen=True, eq=False)
class Job:
    """A stage at work: whom it is about, with which seeds, by which recipe, and where the results go."""

    stage: Stage
    store: ArtifactStore
    of: str = ""
    recipe: Any = None
    seeds: tuple[int, ...] = (0,)
    source: ArtifactStore | None = None
    """Where what it needs lies, if not in `store`."""
    given: Any = None
    """What the stage's function gets besides."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What stands for `given` in the manifest."""
    label: str = ""
    progress: bool = False

    def __str__(self) -> str:
        return self.label or f"{self.of} {self.stage.name}".strip()

    @property
    def seed(self) -> int:
        """Return the job's only seed."""
        return self.seeds[0]

    @property
    def origin(self) -> ArtifactStore:
        """Return the store that holds what the job needs."""
        return self.source or self.store

    def names(self, patterns: Sequence[str]) -> list[str]:
        """Return the artifacts that names of the stage stand for."""
        return [
            pattern.format(of=self.of, seed=seed)
            for pattern in patterns
            for seed in (self.seeds if "{seed}" in pattern else (None,))
        ]

    @property
    def makes(self) -> list[str]:
        """Return the artifacts that it makes."""
        return self.names(self.stage.makes)

    @property
    def resume(self) -> Path:
        """Return the folder that holds what a killed run goes on from; it is gone when the job is done."""
        return self.store.root / ".running" / digest([self.makes, self.made_by()["parameters"]])[:24]

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the stage is done with: the row's settings, where the recipe does not say otherwise."""
        return {**self.stage.settings, **getattr(self.recipe, "settings", {}).get(self.stage.name, {})}

    def path(self, pattern: str) -> Path:
        """Return the path of something that the job needs."""
        return self.origin.path(*self.names([pattern]))

    def table(self, pattern: str) -> pd.DataFrame:
        """Return a table that the job needs."""
        return pd.read_parquet(self.path(pattern))

    def has(self, pattern: str) -> bool:
        """Return whether something that the job uses is there."""
        return set(self.names([pattern])) <= self.origin.entries().keys()

    def subject(self) -> Subject:
        """Return the model that the job is about."""
        return Subject.find(self.of, self.origin)

    def sources(self) -> dict[str, str]:
        """Return the artifacts that the job starts from, and their sha256; raise ArtifactError where one is missing."""
        entries = self.origin.entries()
        needs = self.names(self.stage.needs)
        if missing := [name for name in needs if name not in entries and name not in FETCHED]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            sentence = f"{self.origin.root} has no {missing[0]}{more}: `{self.stage.before}` makes it"
            raise ArtifactError(sentence)
        wanted = [*needs, *(name for name in self.names(self.stage.uses) if name in entries)]
        return {name: FETCHED.get(name) or entries[name]["sha256"] for name in wanted}

    def made_by(self) -> dict[str, Any]:
        """Return what the manifest says of the artifacts, and what tells whether they are current."""
        parts = asdict(self.recipe) if self.stage.recipe else {}
        parameters = {part: parts[part] for part in self.stage.recipe} | self.settings | dict(self.parameters)
        if sources := self.sources():
            parameters["from"] = sources
        return {
            "stage": self.stage.name,
            "code": self.stage.code,
            "parameters": parameters,
            "seeds": self.seeds,
        }

    def is_current(self) -> bool:
        """Return whether all that the job makes is there, made as it would be now."""
        made_by, stands = self.made_by(), self.stage.stands
        return all(self.store.is_current(name, **made_by) for name in self.makes) and (
            not stands or stands(self)
        )

    def ensure(self) -> float | None:
        """Make what the job makes unless it is there and current; return the seconds it took, None if it was there.

        The lock keeps a second process away that was given the same job, and ends with its owner, however that dies.
        """
        start, locks = time.perf_counter(), self.store.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / digest(self.makes)[:24]):
            if self.is_current():
                return None
            self._make()
        return time.perf_counter() - start

    def writers(self) -> Sequence[Writer]:
        """Do what the stage does, and return what writes each artifact."""
        with one_thread():
            return self.stage.function(self)

    def _make(self) -> None:
        made_by, resume, start = self.made_by(), self.resume, sum(os.times()[:4])
        writers = self.writers()
        seconds = sum(os.times()[:4]) - start  # those of a notebook's kernel too
        for name, write in zip(self.makes, writers, strict=True):
            with self.store.write(name, **made_by, seconds=seconds) as path:
                write(path)
        shutil.rmtree(resume, ignore_errors=True)


def table_writer(table: pd.DataFrame) -> Writer:
    """Return what writes a table as a Parquet file."""
    return lambda path: table.to_parquet(path, index=False)


def run_job(job: Job) -> Outcome:
    """Make what the job makes; whatever goes wrong is in the outcome."""
    trace = job.store.root / "failed" / f"{digest(job.makes)[:12]}.txt"
    try:
        outcome = Outcome(job.ensure())
        trace.unlink(missing_ok=True)
    except (ValueError, OSError) as error:  # already a sentence
        return Outcome(error=str(error))
    except Exception as error:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(error=f"{type(error).__name__}: {error}; {trace} has the traceback")
    return outcome


# ------------------------------------------------------------------------------------------- a graph of jobs
Say = Callable[[str], object]


@checked
def run_graph(
    jobs: Sequence[Job],
    workers: Count = 1,
    scheduler: str | None = None,
    say: Say = lambda line: None,
) -> dict[Job, Outcome]:
    """Run each job when what it needs is made, the first ones first; return their outcomes.

    They run in `workers` local processes, or on the Dask cluster of a `scheduler`. A job that fails leaves out those
    that need what it was to make; the others go on. `say` hears of each job as it ends, in a line. Raises ArtifactError
    for a scheduler that is none.
    """
    left, running, outcomes = list(jobs), dict[Future[Outcome], Job](), dict[Job, Outcome]()
    deaths, graph = Counter[Job](), _Graph(jobs)

    def end(job: Job, outcome: Outcome) -> None:
        outcomes[job] = outcome
        say(f"[{len(outcomes)}/{len(jobs)}] {job}: {outcome}")

    with _executor(scheduler) as pool:
        while left or running:
            while len(running) < (len(jobs) if scheduler else workers):
                job = graph.first_ready(left, running.values())
                if job is None:
                    break
                left.remove(job)
                if outcome := _settled(job):
                    end(job, outcome)
                else:
                    running[pool.submit(run_job, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    end(job, future.result())
                except BrokenProcessPool:
                    deaths[job] += 1
                    if deaths[job] < ATTEMPTS:
                        left.insert(0, job)
                    else:
                        end(job, Outcome(error=f"its process died {ATTEMPTS} times (out of memory?)"))
                except Exception as error:  # Dask gave the job up: several of its workers died
                    end(job, Outcome(error=f"{type(error).__name__}: {error}"))
    return outcomes


def failures(outcomes: Mapping[Job, Outcome]) -> list[str]:
    """Return the names of the jobs that failed."""
    return [str(job) for job, outcome in outcomes.items() if outcome.error]


class _Graph:
    """Which job waits for which: for those that make what it needs or uses."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.makes = {job: {(job.store.root, name) for name in job.makes} for job in jobs}
        self.wants = {
            job: {(job.origin.root, name) for name in job.names((*job.stage.needs, *job.stage.uses))}
            for job in jobs
        }

    def first_ready(self, left: Sequence[Job], running: Sequence[Job] | Any) -> Job | None:
        """Return the first job that waits for none of those that are left or running."""
        open_ends = set[Any]().union(*(self.makes[job] for job in (*left, *running)))
        return next((job for job in left if not self.wants[job] & open_ends), None)


def _settled(job: Job) -> Outcome | None:
    """Return the outcome of a job that need not, or cannot, be run."""
    try:
        return Outcome() if job.is_current() else None
    except (ValueError, OSError) as error:
        return Outcome(error=str(error))


# ------------------------------------------------------------------------------------------- who runs them
@contextmanager
def _executor(scheduler: str | None) -> Iterator[Executor]:
    """Yield local processes, or Dask's own executor over the workers of a cluster."""
    if scheduler is None:
        with Processes() as processes:
            yield processes
        return
    check_scheduler(scheduler)
    try:
        from distributed import Client
        from distributed.comm import connect
    except ImportError as error:
        sentence = "a --scheduler needs dask.distributed: python -m pip install 'dtbook[sweep]'"
        raise ArtifactError(sentence) from error

    async def greet() -> None:  # a client itself waits for ever where something else answers
        await (await asyncio.wait_for(connect(scheduler, timeout=CONNECT_SECONDS), CONNECT_SECONDS)).close()

    try:
        with ThreadPoolExecutor(1) as thread:  # Jupyter's has a loop that runs
            thread.submit(asyncio.run, greet()).result()
    except Exception as error:
        raise ArtifactError(
            f"--scheduler must be that of a Dask cluster, but at {scheduler} none answers"
        ) from error
    with Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False) as client:
        yield client.get_executor(pure=False)
