"""Sweeps: one notebook or stage at many points, in local processes or on a Dask cluster, resumable point by point.

Each point is an artifact of the sweep's folder, written whole by whoever ran it. A point that is there, made by
the same code from the same parameters and inputs, is never run again: neither by the next call, nor by a
scheduler that lost a worker and hands the worker's finished points out anew.
"""

import ast
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jsonschema
import nbformat
import pandas as pd
import yaml
from filelock import FileLock

from dtbook.artifacts.provenance import PACKAGE, digest
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.figures.display import GLUE_MIME
from dtbook.pages.notebooks import (
    KERNEL_ENVIRONMENT,
    NotebookError,
    check_parameters,
    code_of,
    find_notebooks,
    inputs_digest,
    run_notebook,
)

SCHEMA = json.loads((PACKAGE / "sweep.schema.json").read_text(encoding="utf-8"))
PATIENCE = 2  # times that a point may bring its own process down
CONNECT_SECONDS = 10  # that a scheduler has to answer


class SweepError(NotebookError):
    """A sweep that is not well described, or that did not end well; the message is one sentence."""


@dataclass(frozen=True)
class Target:
    """What a sweep runs: a notebook (by its path) or a stage (by its name)."""

    notebook: Path | None = None
    stage: str = ""

    @property
    def name(self) -> str:
        """How the sweep's tables and manifest call it."""
        return self.notebook.stem if self.notebook else self.stage

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters in the types that are declared; raise ValueError for one that is wrong."""
        if self.notebook:
            return check_parameters(self.notebook, given)
        return _stage(self.stage).check(given)

    def inputs(self, parameters: Mapping[str, Any]) -> Any:
        """Return what stands for all that a point follows from, the rooms of dtbook aside."""
        if self.notebook:
            return inputs_digest(self.notebook, parameters, ArtifactStore())
        return _stage(self.stage).digests(parameters)

    def code(self) -> Sequence[str]:
        """Return the dotted names of the code of dtbook behind it."""
        return code_of(self.notebook) if self.notebook else _stage(self.stage).code


@dataclass(frozen=True)
class Point:
    """One point of a sweep, and where its artifact lies in the sweep's folder."""

    target: Target
    parameters: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Twelve digits that follow from target and parameters: the same in every sweep that has this point."""
        return digest([self.target.name, dict(self.parameters)])[:12]

    @property
    def artifact(self) -> str:
        """The artifact's name: an executed notebook, or the folder of a stage."""
        return f"points/{self.id}{'.ipynb' if self.target.notebook else ''}"

    def made_by(self) -> dict[str, Any]:
        """Return what the sweep's manifest says of the artifact, and what tells whether it is current."""
        made_from = {"point": dict(self.parameters), "inputs": self.target.inputs(self.parameters)}
        return {"stage": self.target.name, "code": self.target.code(), "parameters": made_from}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.parameters.items()) or "defaults"


@dataclass(frozen=True)
class Outcome:
    """What became of a point: the seconds it took, None if it was there already; the error, None if all is well."""

    point: str
    seconds: float | None = None
    error: str | None = None


def _stage(name: str) -> Any:
    from dtbook.stages import (
        STAGES,
    )  # imports torch and TransformerLens, which notebooks bring for themselves

    return STAGES[name]


# ---------------------------------------------------------------------------------------- what is to be run
def read_sweep(path: Path, notebooks: Path) -> list[Point]:
    """Return the points that the file describes, each checked; raise SweepError in one sentence if one is wrong."""
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return points_of(described, notebooks, str(path))


def points_of(described: Any, notebooks: Path, source: str = "the sweep") -> list[Point]:
    """Return the points of a sweep as `sweep.schema.json` has it, in order, each once."""
    _check_schema(described, source)
    if "notebook" in described:
        target = Target(find_notebooks(notebooks, [str(described["notebook"])])[0])
    else:
        target = Target(stage=described["stage"])
    points: dict[str, Point] = {}
    for given in _combinations(described, source):
        try:
            point = Point(target, target.check(given))
        except ValueError as error:
            raise SweepError(f"{source}: {error}") from error
        points.setdefault(point.id, point)
    return list(points.values())


def _check_schema(described: Any, source: str) -> None:
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(described))
    if error is None:
        return
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.absolute_path)[1:]
    if error.validator == "additionalProperties":
        unknown = sorted(set(error.instance) - set(error.schema["properties"]))
        sentence = f"there is no key {unknown[0]!r}: there are {', '.join(SCHEMA['properties'])}"
    elif error.validator in ("oneOf", "required"):
        sentence = "exactly one of the keys notebook and stage must be given"
    elif error.validator in ("minItems", "minLength"):
        sentence = f"{where} must not be empty"
    elif error.validator in ("anyOf", "type"):
        kinds = error.schema.get("type", error.schema.get("description"))
        kinds = {"object": "a mapping of names to values", "array": "a list"}.get(str(kinds), kinds)
        sentence = f"{where or 'the whole'} must be {_phrase(kinds)}, not {error.instance!r}"
    elif error.validator == "enum":
        sentence = f"{where} must be one of {', '.join(error.validator_value)}, not {error.instance!r}"
    else:
        sentence = f"{where}: {error.message}"
    raise SweepError(f"{source}: {sentence}")


def _phrase(kinds: Any) -> str:
    if isinstance(kinds, list):
        return " or ".join(kinds)
    return str(kinds[0].lower() + kinds[1:]).removesuffix(".")


def _combinations(described: Mapping[str, Any], source: str) -> Iterator[dict[str, Any]]:
    grid, listed = described.get("grid", {}), described.get("points", [{}])
    if twice := sorted(set(grid) & set().union(*listed)):
        raise SweepError(f"{source}: {twice[0]!r} must stand in grid or in points, not in both")
    for point in listed:
        for values in itertools.product(*grid.values()):
            yield described.get("parameters", {}) | point | dict(zip(grid, values, strict=True))


# ---------------------------------------------------------------------------------------- running one point
def run_point(folder: Path, point: Point) -> Outcome:
    """Make the point's artifact unless it is there and current; whatever goes wrong is in the outcome.

    The lock keeps a second worker away that was given the same point, and ends with its owner, however that dies.
    """
    store, start = ArtifactStore(folder), time.perf_counter()
    (folder / ".locks").mkdir(parents=True, exist_ok=True)
    try:
        (folder / ".locks" / point.id).touch()
        with FileLock(folder / ".locks" / point.id):
            made_by = point.made_by()
            if store.is_current(point.artifact, **made_by):
                return Outcome(point.id)
            if point.target.notebook:
                _run_notebook(store, point, made_by)
            else:
                _run_stage(store, point, made_by)
    except (ValueError, OSError) as error:  # already a sentence
        return Outcome(point.id, error=str(error))
    except Exception as error:
        trace = folder / "failed" / f"{point.id}.txt"
        with suppress(OSError):
            trace.parent.mkdir(exist_ok=True)
            trace.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(point.id, error=f"{type(error).__name__}: {error}; {trace} has the traceback")
    return Outcome(point.id, time.perf_counter() - start)


def _run_notebook(store: ArtifactStore, point: Point, made_by: Mapping[str, Any]) -> None:
    assert point.target.notebook
    draft = store.root / ".running" / f"{point.id}.ipynb"
    inputs = made_by["parameters"]["inputs"]
    try:
        run_notebook(point.target.notebook, draft, point.parameters, inputs)
    except NotebookError as error:
        kept = store.root / "failed" / draft.name
        kept.parent.mkdir(exist_ok=True)
        failed = draft.with_suffix(".failed.ipynb")
        failed.replace(kept)
        raise NotebookError(str(error).replace(str(failed), str(kept))) from error
    with store.write(point.artifact, **made_by) as path:
        shutil.copyfile(draft, path)
    for file in (draft, draft.with_suffix(".seconds")):
        file.unlink(missing_ok=True)


def _run_stage(store: ArtifactStore, point: Point, made_by: Mapping[str, Any]) -> None:
    stage = _stage(point.target.stage)
    resume = store.root / ".running" / digest([point.id, made_by])[:24]
    with store.write(point.artifact, **made_by) as path:
        path.mkdir()
        row = stage.run({**stage.defaults, **point.parameters}, path, resume)
        (path / "row.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(resume, ignore_errors=True)


# ---------------------------------------------------------------------------------------- running them all
def run_sweep(
    points: Sequence[Point],
    folder: Path,
    workers: int = 1,
    scheduler: str | None = None,
    report: Callable[[Point, Outcome], None] = lambda point, outcome: None,
) -> pd.DataFrame:
    """Run the points that are not there yet, in `workers` local processes or on a Dask cluster; return the table.

    `report` hears of every point as it ends. The table is written to `table.parquet`, also where points failed.
    """
    by_id, errors, seconds = {point.id: point for point in points}, {}, _former_seconds(folder)
    for outcome in _outcomes(points, folder, workers, scheduler):
        if outcome.error is not None:
            errors[outcome.point] = outcome.error
        if outcome.seconds is not None:
            seconds[outcome.point] = outcome.seconds
        report(by_id[outcome.point], outcome)
    table = tabulate(points, folder, errors)
    store, target = ArtifactStore(folder), points[0].target.name
    times = pd.DataFrame({"point": list(seconds), "seconds": list(seconds.values())})
    for name, frame in (("table.parquet", table), ("seconds.parquet", times)):
        parameters = {"target": target, "points": list(by_id)}
        with store.write(name, stage="sweep", code=["dtbook.sweep"], parameters=parameters) as path:
            frame.to_parquet(path, index=False)
    return table


def _former_seconds(folder: Path) -> dict[str, float]:
    with suppress(ArtifactError):
        table = pd.read_parquet(ArtifactStore(folder).path("seconds.parquet"))
        return dict(zip(table["point"], table["seconds"], strict=True))
    return {}


def _outcomes(
    points: Sequence[Point], folder: Path, workers: int, scheduler: str | None
) -> Iterator[Outcome]:
    """Yield each point's outcome. After a death that took the local processes down, what they ran runs alone."""
    left = {point.id: point for point in points}
    while left:
        start = time.time()
        for outcome in _round(left, folder, workers, scheduler):
            del left[outcome.point]
            yield outcome
        for id in [id for id in left if _started(folder, id) >= start]:
            yield _alone(left.pop(id), folder)


def _round(
    points: Mapping[str, Point], folder: Path, workers: int, scheduler: str | None
) -> Iterator[Outcome]:
    """Yield the outcomes of these points, up to the death of a local process, which ends them all."""
    with _pool(workers, scheduler) as pool:
        futures = {pool.submit(run_point, folder, point): id for id, point in points.items()}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                continue
            except Exception as error:  # Dask gave the point up: several of its workers died
                yield Outcome(futures[future], error=f"{type(error).__name__}: {error}")


def _alone(point: Point, folder: Path) -> Outcome:
    """Run a point in a process of its own, so that a death can be laid at its door."""
    for _ in range(PATIENCE):
        for outcome in _round({point.id: point}, folder, 1, None):
            return outcome
    return Outcome(point.id, error=f"its process died {PATIENCE} times (out of memory?)")


def _started(folder: Path, id: str) -> float:
    with suppress(FileNotFoundError):
        return (folder / ".locks" / id).stat().st_mtime
    return 0.0


@contextmanager
def _pool(workers: int, scheduler: str | None) -> Iterator[Executor]:
    """Yield an executor: local processes of one thread each, or Dask's own over the cluster's workers."""
    if scheduler is None:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, KERNEL_ENVIRONMENT[name])
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        try:
            yield pool
        finally:
            pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)
        return
    try:
        from distributed import Client
    except ImportError as error:
        sentence = "a --scheduler needs dask.distributed: python -m pip install 'dtbook[sweep]'"
        raise SweepError(sentence) from error
    with Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False) as client:
        yield client.get_executor(pure=False)


# ---------------------------------------------------------------------------------------- the sweep's table
def tabulate(points: Sequence[Point], folder: Path, errors: Mapping[str, str]) -> pd.DataFrame:
    """Return one row a point, in the sweep's order: id, parameters, the figures it gave, its error if it failed.

    A notebook's figures are the numbers, texts and truth values that it glued; those of a stage are its row.
    """
    store = ArtifactStore(folder)
    rows = []
    for point in points:
        if point.id in errors:
            figures: dict[str, Any] = {}
        elif point.target.notebook:
            figures = glued(nbformat.read(store.path(point.artifact), as_version=4))
        else:
            figures = json.loads((store.path(point.artifact) / "row.json").read_text(encoding="utf-8"))
        rows.append({"point": point.id, **figures, **point.parameters, "error": errors.get(point.id)})
    first = ["point", *{name: None for point in points for name in point.parameters}]
    table = pd.DataFrame(rows).convert_dtypes()  # whole numbers stay whole where a point gave none
    return table[[*first, *(name for name in table.columns if name not in first)]]


def glued(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Return the plain values that an executed notebook recorded for its prose, name → value."""
    values = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            text = output.get("data", {}).get(f"{GLUE_MIME}text/plain")
            if name and text is not None:
                values[name] = _plain(text)
    return {name: value for name, value in values.items() if isinstance(value, int | float | str | bool)}


def _plain(text: str) -> Any:
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    with suppress(ValueError):
        return float(text)  # nan and inf
    return None
