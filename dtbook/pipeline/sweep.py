"""Sweeps: one notebook or stage at many points, in local processes or on a Dask cluster, resumable point by point.

Each point is a job of the engine, and its artifact lies in the sweep's folder. A point that is there, made by the same
code from the same parameters and inputs, is never run again.
"""

import ast
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import nbformat
import pandas as pd
import pyarrow
import yaml

from dtbook.artifacts.parameters import Count, checked
from dtbook.artifacts.provenance import digest
from dtbook.artifacts.store import ArtifactStore
from dtbook.figures.display import GLUE_MIME
from dtbook.pages.notebooks import (
    NotebookError,
    check_parameters,
    code_of,
    find_notebooks,
    inputs_digest,
    is_current,
    python_of,
    read_notebook,
    run_notebook,
)
from dtbook.pipeline.engine import Job, Say, Stage, Writer, run_graph
from dtbook.pipeline.points import POINT_KINDS

SCHEMA = json.loads(Path(__file__).with_name("sweep.schema.json").read_text(encoding="utf-8"))


class SweepError(NotebookError):
    """A sweep that is not well described; the message is one sentence."""


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
        return POINT_KINDS[self.stage].check(self.stage, given)

    def inputs(self, parameters: Mapping[str, Any]) -> Any:
        """Return what stands for all that a point follows from, the code of dtbook aside."""
        if self.notebook:
            return inputs_digest(self.notebook, parameters, ArtifactStore())
        return POINT_KINDS[self.stage].digests(parameters)

    def row(self) -> Stage:
        """Return the row of the table of stages that runs a point."""
        if self.notebook:
            execute = partial(_execute, self.notebook)
            code = tuple(code_of(self.notebook))
            return Stage(self.name, ("points/{of}.ipynb",), execute, also=code, stands=_saw_the_same)
        return POINT_KINDS[self.stage].stage(self.name)


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

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by their last names, without lists, and the `point`: `model.n_layers` is `n_layers`."""
        given = {
            name.rpartition(".")[2]: value
            for name, value in self.parameters.items()
            if not isinstance(value, list)
        }
        return {"point": self.id} | given

    def job(self, folder: Path) -> Job:
        """Return the job that makes the point's artifact in a folder."""
        made_from = {"point": dict(self.parameters), "inputs": self.target.inputs(self.parameters)}
        return Job(
            self.target.row(),
            ArtifactStore(folder),
            self.id,
            seeds=(),
            given=self.parameters,
            parameters=made_from,
            label=str(self),
        )

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.parameters.items()) or "defaults"


def _execute(notebook: Path, job: Job) -> list[Writer]:
    """Execute a notebook; one that fails is kept, as far as it came, in the sweep's folder `failed`."""
    draft, kept = job.resume / f"{job.of}.ipynb", job.store.root / "failed" / f"{job.of}.ipynb"
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_notebook(notebook, draft, job.given, job.parameters["inputs"])
    except NotebookError as error:
        kept.parent.mkdir(exist_ok=True)
        failed = draft.with_suffix(".failed.ipynb")
        failed.replace(kept)
        raise NotebookError(str(error).replace(str(failed), str(kept))) from error
    return [lambda path: shutil.copyfile(draft, path)]


def _saw_the_same(job: Job) -> bool:
    """Return whether an executed copy would be given the same weights of the post's again."""
    return is_current(job.store.path(*job.makes), job.parameters["inputs"])


# ---------------------------------------------------------------------------------------- what is to be run
class _OnceOnly(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error, as the standard has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            keys.append(self.construct_object(key, deep=True))
            if keys[-1] in keys[:-1]:
                problem = f"the key {keys[-1]!r} stands twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_sweep(path: Path, notebooks: Path) -> list[Point]:
    """Return the points that the file describes, each checked; raise SweepError in one sentence if one is wrong."""
    try:
        described = yaml.load(path.read_text(encoding="utf-8"), _OnceOnly)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return points_of(described, notebooks, str(path))


def points_of(described: Any, notebooks: Path, source: str = "the sweep") -> list[Point]:
    """Return the points of a sweep as `sweep.schema.json` has it, in order, each once."""
    _check_schema(described, source)
    if "notebook" in described:
        (path,) = find_notebooks(notebooks, [str(described["notebook"])])
        _check_names(_names_glued(python_of(path)), f"{source}: {path.stem} glues")
        target = Target(path)
    else:
        target = Target(stage=described["stage"])
    points: dict[str, Point] = {}
    for given in _combinations(described, source):
        try:
            point = Point(target, target.check(given))
        except ValueError as error:
            raise SweepError(f"{source}: {error}") from error
        points.setdefault(point.id, point)
    table = pd.DataFrame([dict(point.parameters) for point in points.values()], dtype=object)
    _check_names(table, f"{source}: a parameter is called")
    for name, column in table.items():
        if not _fits(column):
            allowed = "values of one kind, and whole numbers of at most 64 bits"
            raise SweepError(f"{source}: {name} must have {allowed}, not {_misfits(column.dropna())}")
    return list(points.values())


def _check_names(names: Iterable[Any], what: str) -> None:
    if reserved := sorted({"point", "error"} & set(names)):
        raise SweepError(
            f"{what} {reserved[0]!r}, which is a column of the sweep's table: choose another name"
        )


def _names_glued(code: str) -> Iterator[str | None]:
    """Yield the names under which a notebook's code glues, as far as they stand there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "glue":
            yield from (keyword.arg for keyword in node.keywords)


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


# ---------------------------------------------------------------------------------------- running them all
@checked
def run_sweep(
    points: Sequence[Point],
    folder: Path,
    workers: Count = 1,
    scheduler: str | None = None,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Run the points that are not there yet, in `workers` local processes or on a Dask cluster; return the table.

    `say` hears of every point as it ends, in a line, and of what `tabulate` changes. The table is written to
    `table.parquet`, also where points failed.
    """
    outcomes = run_graph([point.job(folder) for point in points], workers, scheduler, say)
    table = tabulate(points, folder, {job.of: end.error for job, end in outcomes.items() if end.error}, say)
    store = ArtifactStore(folder)
    entries = store.entries()
    seconds = {point.id: entries[point.artifact]["seconds"] for point in points if point.artifact in entries}
    times = pd.DataFrame({"point": list(seconds), "seconds": list(seconds.values())})
    parameters = {"target": points[0].target.name, "points": [point.id for point in points]}
    for name, frame in (("table.parquet", table), ("seconds.parquet", times)):
        with store.write(name, stage="sweep", code=[tabulate], parameters=parameters) as path:
            frame.to_parquet(path, index=False)
    return table


# ---------------------------------------------------------------------------------------- the sweep's table
def tabulate(
    points: Sequence[Point], folder: Path, errors: Mapping[str, str], say: Say = lambda line: None
) -> pd.DataFrame:
    """Return one row a point, in the sweep's order: id, parameters, the figures it gave, its error if it failed.

    A notebook's figures are the numbers, texts and truth values that it glued; those of a stage are its row. One that
    differs from another column of its name is called "glued NAME". A column of several kinds of values, or of whole
    numbers beyond 64 bits, becomes text. `say` hears of both.
    """
    store = ArtifactStore(folder)
    rows, said = [], set[str]()
    for point in points:
        if point.id in errors:
            figures: dict[str, Any] = {}
        elif point.target.notebook:
            figures = glued(read_notebook(store.path(point.artifact)))
        else:
            figures = json.loads((store.path(point.artifact) / "row.json").read_text(encoding="utf-8"))
        known = {"point": point.id, **point.parameters, "error": errors.get(point.id)}
        renamed = {
            name: f"glued {name}" for name in figures if name in known and figures[name] != known[name]
        }
        rows.append({renamed.get(name, name): value for name, value in figures.items()} | known)
        said |= {f"{name!r} is a column already: what was glued is {new!r}" for name, new in renamed.items()}
    first = ["point", *{name: None for point in points for name in point.parameters}]
    table = pd.DataFrame(rows).convert_dtypes()  # whole numbers stay whole where a point gave none
    for name in [name for name in table.columns if not _fits(table[name])]:
        table[name] = table[name].map(str, na_action="ignore").astype("string")
        said.add(f"{name!r} is text in the table: its values are of several kinds, or beyond 64 bits")
    for line in sorted(said):
        say(line)
    return table[[*first, *(name for name in table.columns if name not in first)]]


def _fits(column: pd.Series) -> bool:
    """Return whether a Parquet file can hold a column."""
    try:
        pyarrow.array(column, from_pandas=True)
    except (pyarrow.ArrowException, OverflowError):
        return False
    return True


def _misfits(column: pd.Series) -> str:
    """Return what keeps a column out of a file: the value, or one of each kind."""
    alone = [value for value in column if not _fits(pd.Series([value], dtype=object))]
    return " and ".join(map(repr, alone[:1] or {type(value): value for value in column}.values()))


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
        value = ast.literal_eval(text)  # half a character, which no file can hold, is written out
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
    with suppress(ValueError):
        return float(text)  # nan and inf
    return None
