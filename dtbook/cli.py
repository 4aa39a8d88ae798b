"""The `dtbook` command: run the notebooks, build the book, check what it starts from, measure."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from filelock import FileLock

from dtbook.artifacts.kernels import choose_portable
from dtbook.artifacts.post_weights import named_copy
from dtbook.artifacts.processes import check_scheduler
from dtbook.artifacts.store import CHECKOUT, ArtifactError, ArtifactStore, atomic_write
from dtbook.pages.copies import check_book, copies_of, make_copies
from dtbook.pages.notebooks import (
    NotebookError,
    check_parameters,
    declared_parameters,
    find_notebooks,
    is_current,
)

_PATH = click.Path(path_type=Path)


class _OneSentence(click.Group):
    """Errors that are already a sentence for the reader are printed without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ArtifactError, NotebookError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dtbook")
def main() -> None:
    """Run and build the Decision Transformer book, from a checkout of its repository."""


@main.command()
@click.argument("names", nargs=-1, metavar="[NN]...")
@click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE", help="Set a parameter; repeatable.")
@click.option("--again", is_flag=True, help="Execute once more, and compare with the book's copies.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=min(os.cpu_count() or 1, 4),
    help="Notebooks at once, of which each takes up to 1 GB  [default: one a core, at most 4].",
)
def run(names: tuple[str, ...], assignments: tuple[str, ...], again: bool, workers: int) -> None:
    """Execute notebooks in order: those numbered NN, or all of them.

    A copy that is up to date is not made again. With -p the copies go to runs/ and never reach the book. With --again
    they go to runs/again/, and have to be those of the book byte for byte.
    """
    if again and assignments:
        raise click.UsageError("--again compares with the book's copies, which know no -p")
    paths = find_notebooks(CHECKOUT / "notebooks", names)
    named_copy()  # refused at once where there is none
    if again:
        return _run_again(paths, workers)
    folder = CHECKOUT / "runs" if assignments else CHECKOUT / "book" / "_executed"
    given = dict(_assignment(text) for text in assignments)
    parameters = {path: check_parameters(path, given) for path in paths}
    for job, outcome in make_copies(copies_of(parameters, folder), workers):
        click.echo(f"{job.line}: {outcome}")
    click.echo(f"Executed notebooks are in {folder}")


def _run_again(paths: list[Path], workers: int) -> None:
    copies, folder = CHECKOUT / "book" / "_executed", CHECKOUT / "runs" / "again"
    jobs = copies_of({path: {} for path in paths}, folder)
    if stale := [job.path.stem for job in jobs if not is_current(copies / job.path.name, job.inputs)]:
        raise click.ClickException(
            f"the book's copies of {', '.join(stale)} are not current: first `dtbook run`"
        )
    for job in jobs:
        job.target.unlink(missing_ok=True)
    different = []
    for job, _ in make_copies(jobs, workers):
        same = job.target.read_bytes() == (copies / job.path.name).read_bytes()
        click.echo(f"{job.line}: {'identical' if same else 'differs'}")
        if not same:
            different.append(job.path.stem)
    if different:
        raise click.ClickException(f"run again, {', '.join(different)} came out otherwise: see {folder}")


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise click.BadParameter(f"-p takes NAME=VALUE, not {text!r}")
    return name, value


@main.command()
@click.argument("names", nargs=-1, metavar="[NN]...")
def params(names: tuple[str, ...]) -> None:
    """List the parameters that notebooks declare: name, type, default, unit and meaning."""
    for path in find_notebooks(CHECKOUT / "notebooks", names):
        click.echo(path.stem)
        for parameter in declared_parameters(path).values():
            kind = type(parameter.default).__name__
            click.echo(f"  {parameter.name}: {kind} = {parameter.default!r}  {parameter.meaning}".rstrip())


@main.command()
@click.option(
    "--pdf", is_flag=True, help="Print the whole book too, if there is a Chromium; the pages link to it."
)
def build(pdf: bool) -> None:
    """Build the book from the executed notebooks, clean and without a warning, into book/_build/html/.

    The former book stays until the new one is whole; after warnings the new one is there to be looked at.
    """
    book = CHECKOUT / "book"
    check_book(CHECKOUT)
    (book / "_executed").mkdir(exist_ok=True)
    with FileLock(book / "_executed" / ".build.lock"):  # of two builds at once the second waits
        sys.exit(_build(book, pdf))


def _build(book: Path, pdf: bool) -> int:
    """Return what jupyter-book returned."""
    printed = book / "_executed" / "decision-transformer-book.pdf"
    printed.unlink(missing_ok=True)
    if pdf:
        from dtbook.pages.printing import HOW_TO_INSTALL, find_chromium, print_book  # asks for a browser

        if find_chromium() is None:
            click.echo(f"The book is built without its PDF: {HOW_TO_INSTALL}", err=True)
        else:
            print_book(CHECKOUT, printed)
    program = Path(sys.executable).with_name("jupyter-book")
    options = ["--config", "book/_config.yml", "--toc", "book/_toc.yml", "-W", "--keep-going"]
    # an empty folder: an old build repeats no warning
    with suppress(_Unfinished), atomic_write(book / "_build") as draft:
        command = [str(program), "build", ".", *options, "--path-output", str(draft.parent)]
        code = subprocess.run(command, cwd=CHECKOUT).returncode
        if not (draft / "html" / "searchindex.js").exists():  # what Sphinx writes last
            raise _Unfinished
    return code


class _Unfinished(Exception):
    """A build that broke off; the former book is kept."""


@main.command()
def verify() -> None:
    """Check every artifact in data/ against its manifest."""
    store = ArtifactStore()
    if problems := store.verify():
        raise ArtifactError("\n".join(problems))
    sizes = [entry["bytes"] for entry in store.entries().values()]
    click.echo(f"{store.root}: {len(sizes)} artifacts, {sum(sizes) / 1e6:.1f} MB, all as the manifest says")


def _parse_seeds(context: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    from dtbook.pipeline.replication import parse_seeds  # imports torch and TransformerLens

    try:
        return None if text is None else parse_seeds(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_seeds = click.option(
    "--seeds", default="10-19", show_default=True, callback=_parse_seeds, help="As 0,3,5-7."
)
_workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    help="Processes  [default: one a core].",
)
_scheduler = click.option(
    "--scheduler",
    metavar="ADDRESS",
    callback=lambda context, option, address: check_scheduler(address),
    help="A Dask scheduler (tcp://…) in place of local processes.",
)


@contextmanager
def _goes_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted. What is done lies in {folder}; the same command goes on with the rest.")
        raise


def _run_jobs(jobs: Any, workers: int, folder: Path) -> None:
    from dtbook.pipeline.engine import failures, run_graph

    with _goes_on(folder):
        failed = failures(run_graph(jobs, workers, say=click.echo))
    if failed:
        raise click.ClickException(f"{', '.join(failed)} failed; the same command tries again")


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--folder", type=_PATH, help="Where results go.  [default: runs/sweeps/FILE]")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Local processes.")
@_scheduler
@click.option("--dry-run", is_flag=True, help="List the points and run nothing.")
def sweep(file: Path, folder: Path | None, workers: int, scheduler: str | None, dry_run: bool) -> None:
    """Run a notebook or a stage at every point that FILE (YAML) describes.

    Leaves an artifact for each point, a manifest, and table.parquet with one row a point. The same command goes on
    with a sweep that was interrupted, or whose points failed: what is there is not run again.
    """
    from dtbook.pipeline.sweep import read_sweep, run_sweep  # imports torch and TransformerLens

    points = read_sweep(file, CHECKOUT / "notebooks")
    folder = (folder or CHECKOUT / "runs" / "sweeps" / file.stem).absolute()
    if dry_run:
        click.echo("\n".join(f"{point.id}  {point}" for point in points))
        return
    with _goes_on(folder):
        table = run_sweep(points, folder, workers, scheduler, click.echo)
    click.echo(f"The table is {folder / 'table.parquet'}: {len(table)} rows, {len(table.columns)} columns")
    if failed := table["error"].notna().sum():
        raise click.ClickException(f"{failed} of {len(points)} points failed; the same command tries again")


@main.command()
@click.option("--recipe", type=click.Choice(["book", "post", "first"]), default="book", show_default=True)
@click.option("--seeds", callback=_parse_seeds, help="As 10-19 or 0,3,5-7.  [default: those that decide]")
@_workers
@_scheduler
@click.option("--folder", type=_PATH, help="Where it goes.  [default: runs/reproduce, or runs/portable]")
@click.option("--publish", is_flag=True, help="Put what was made into data/, for the next commit.")
@click.option("--everything", is_flag=True, help="Also what chapters 9, 11, 12 and 15 start from.")
@click.option("--portable", is_flag=True, help="Slower, but the same bytes on every x86-64 processor.")
def reproduce(
    recipe: str,
    seeds: list[int] | None,
    workers: int,
    scheduler: str | None,
    folder: Path | None,
    publish: bool,
    everything: bool,
    portable: bool,
) -> None:
    """Make the artifacts of data/ again from nothing, and compare: PPO, trajectories, model, calibration, claims.

    Of the book's own recipe seed 10 is the reference: with it come the controls and the post's weights. By the post's
    recipe ten replications decide; --everything makes thirty. An interrupted call goes on where it stopped. Bytes are
    the same on the same kind of processor with the same libraries. Another one rounds otherwise and so takes another
    path: then a replication must meet the bars of behaviour, and each claim's effect must lie in the range of data/.
    """
    if portable:
        choose_portable()  # before anything computes
    from dtbook.pipeline import reproduce  # imports torch and TransformerLens

    folder = folder or CHECKOUT / "runs" / ("portable" if portable else "reproduce")
    made, shipped = ArtifactStore(folder.absolute()), ArtifactStore()
    with _goes_on(made.root):
        how = reproduce.RECIPES[recipe]()
        names = reproduce.reproduce_data(
            made, shipped, seeds, workers, scheduler, everything, how, click.echo
        )
    if not publish and (others := reproduce.over_other_seeds(names, made, shipped)):
        click.echo("The tables of data/ over all replications are over other seeds: they are not compared")
        names = [name for name in names if name not in others]
    _compare(made, shipped, names, publish, bars=recipe == "book")


@main.command()
@_seeds
@_workers
def causes(seeds: list[int], workers: int) -> None:
    """Make the tables of causal effects, circuits and programs in data/, of its models and the post's.

    Tables that are there, of the same model and code, are not made again.
    """
    from dtbook.pipeline import measure
    from dtbook.pipeline.replication import Recipe

    store = ArtifactStore()
    _run_jobs(measure.causal_jobs(store, seeds, Recipe()), workers, store.root)


@main.command()
@click.argument("subject")
@click.option("--out", type=_PATH, help="Where the tables go.  [default: runs/measure/SUBJECT]")
@click.option("--only", multiple=True, metavar="STAGE", help="Only what this stage makes; repeatable.")
@_workers
def measure(subject: str, out: Path | None, only: tuple[str, ...], workers: int) -> None:
    """Make every table of chapters 4 to 9 and 15 for SUBJECT: a folder that `save_pretrained` wrote, or "seed_14".

    A checkpoint of the original may take its place, where the architecture is the post's.
    What is there already, of the same model, is not made again, so an interrupted call goes on where it stopped.
    """
    from dtbook.model import Subject
    from dtbook.pipeline import measure as rooms

    out = (out or CHECKOUT / "runs" / "measure" / Path(subject).resolve().name).absolute()
    try:
        jobs = rooms.tables_of(Subject.find(subject), ArtifactStore(out), only=only)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    _run_jobs(jobs, workers, out)
    out /= rooms.OWN_FOLDER
    click.echo(f"The tables are in {out}; chapters take them by `dtbook run NN -p subject={out}`")


@main.command()
def stages() -> None:
    """Say what makes each file of data/, which command that is, and which chapters use it."""
    from dtbook.pipeline.listing import listing

    click.echo(listing(CHECKOUT / "notebooks").to_string(index=False))


def _compare(
    made: ArtifactStore, shipped: ArtifactStore, names: list[str], publish: bool, bars: bool
) -> None:
    """Say how alike two stores are; raise ClickException for what is not reproduced, unless it is published."""
    from dtbook.artifacts.comparison import compare
    from dtbook.claims.reproduced import judge
    from dtbook.pipeline.replication import BARS, bar_measures

    verdicts = compare(made, shipped, names)
    report = judge(made, shipped, verdicts, BARS if bars else {}, bar_measures)
    click.echo(report.table.to_string(index=False))
    if report.notes:
        click.echo("Claims decided otherwise than in data/:\n  " + "\n  ".join(report.notes))
    if publish:
        for name in (name for name, verdict in verdicts.items() if verdict != "not made"):
            shipped.take(name, made)
    elif report.problems:
        raise click.ClickException("not reproduced:\n  " + "\n  ".join(report.problems))


@main.command()
@click.option("--sweeps", type=_PATH, default=CHECKOUT / "runs" / "sweeps", show_default=True)
@click.option("--made", type=_PATH, default=CHECKOUT / "runs" / "reproduce", show_default=True)
@_workers
def experiments(sweeps: Path, made: Path, workers: int) -> None:
    """Measure what the sweeps in sweeps/ and the replications' snapshots have left, put the tables into data/.

    First `dtbook sweep sweeps/NAME.yml` for each of them and `dtbook reproduce`. What is current is not done again.
    """
    from dtbook.pipeline import experiments as rooms

    store, source, folder = ArtifactStore(), ArtifactStore(made.absolute()), sweeps.absolute()
    jobs = rooms.graph_of_chapters(store, source, folder)
    _run_jobs(jobs, workers, store.root)


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--write", is_flag=True, help="Put the tables into the book, whose chapter Speed shows them.")
def bench(names: tuple[str, ...], write: bool) -> None:
    """Run the benchmarks of that NAME, or all of them; each prints a table."""
    scripts = {script.stem: script for script in sorted((CHECKOUT / "benchmarks").glob("[a-z]*.py"))}
    if unknown := sorted(set(names) - set(scripts)):
        raise click.BadParameter(f"there is no benchmark {unknown[0]!r}: {', '.join(scripts) or 'none'}")
    failed = []
    for name in names or scripts:
        click.echo(f"{name}:")
        pipe = subprocess.PIPE if write else None
        done = subprocess.run([sys.executable, scripts[name]], cwd=CHECKOUT, stdout=pipe, text=True)
        if write:
            click.echo(done.stdout, nl=False)
        if done.returncode:
            failed.append(name)
        elif write:
            with atomic_write(CHECKOUT / "book" / "speed" / f"{name}.txt") as draft:
                draft.write_text(f"{_conditions(name)}\n\n{done.stdout}", encoding="utf-8")
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


def _conditions(name: str) -> str:
    """Return what a table of figures needs beside it: the command, the processor, the libraries, the day, the load."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    versions = " ".join(f"{library} {version(library)}" for library in ("torch", "numpy", "numba"))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return (
        f"dtbook bench {name}\n{processor}, {os.cpu_count()} cores, {load:.1f} processes a core when it ended\n"
        f"Python {platform.python_version()} {versions}, {date.today().isoformat()}"
    )
