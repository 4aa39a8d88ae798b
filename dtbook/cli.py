"""The `dtbook` command: run the notebooks, build the book, check what it starts from, measure."""

import itertools
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from filelock import FileLock

from dtbook.artifacts.kernels import choose_portable
from dtbook.artifacts.store import CHECKOUT, ArtifactError, ArtifactStore, atomic_write
from dtbook.pages.notebooks import (
    NotebookError,
    check_parameters,
    declared_parameters,
    find_notebooks,
    inputs_digest,
    is_current,
    run_notebook,
)


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
def run(names: tuple[str, ...], assignments: tuple[str, ...], again: bool) -> None:
    """Execute notebooks in order: those numbered NN, or all of them.

    A copy that is up to date is not made again. With -p the copies go to runs/ and never reach the book. With --again
    they go to runs/again/, and have to be those of the book byte for byte.
    """
    if again and assignments:
        raise click.UsageError("--again compares with the book's copies, which know no -p")
    paths = find_notebooks(CHECKOUT / "notebooks", names)
    if again:
        return _run_again(paths)
    folder = CHECKOUT / "runs" if assignments else CHECKOUT / "book" / "_executed"
    given = dict(_assignment(text) for text in assignments)
    parameters = {path: check_parameters(path, given) for path in paths}
    for position, path in enumerate(paths, start=1):
        line = f"[{position}/{len(paths)}] {path.stem}"
        click.echo(f"{line}: {_run(path, folder / path.name, parameters[path], line)}")
    click.echo(f"Executed notebooks are in {folder}")


def _run(path: Path, target: Path, parameters: dict[str, object], line: str) -> str:
    """Make `target` unless it is current, and return what was done; `line` labels a bar that counts cells.

    Of two runs at once the second waits, and finds the copy of the first.
    """
    inputs = inputs_digest(path, parameters, ArtifactStore())
    if is_current(target, inputs):
        return "up to date"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.stem}.lock")):
        if is_current(target, inputs):
            return "up to date"
        start = time.perf_counter()
        run_notebook(path, target, parameters, inputs, progress=line if sys.stderr.isatty() else "")
    return f"done in {time.perf_counter() - start:.1f} s"


def _run_again(paths: list[Path]) -> None:
    store, copies, different = ArtifactStore(), CHECKOUT / "book" / "_executed", []
    inputs = {path: inputs_digest(path, {}, store) for path in paths}
    if stale := [path.stem for path in paths if not is_current(copies / path.name, inputs[path])]:
        raise click.ClickException(
            f"the book's copies of {', '.join(stale)} are not current: first `dtbook run`"
        )
    for position, path in enumerate(paths, start=1):
        line, target = f"[{position}/{len(paths)}] {path.stem}", CHECKOUT / "runs" / "again" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        run_notebook(path, target, {}, inputs[path], progress=line if sys.stderr.isatty() else "")
        same = target.read_bytes() == (copies / path.name).read_bytes()
        click.echo(f"{line}: {'identical' if same else 'differs'}")
        if not same:
            different.append(path.stem)
    if different:
        raise click.ClickException(
            f"run again, {', '.join(different)} came out otherwise: see {target.parent}"
        )


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
    if not book.is_dir():
        raise NotebookError(f"{CHECKOUT} has no book/: `dtbook build` needs a checkout of the repository")
    lock = book / "_executed" / ".build.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):  # of two builds at once the second waits
        code = _build(book, pdf)
    sys.exit(code)


def _build(book: Path, pdf: bool) -> int:
    """Return what jupyter-book returned."""
    printed = book / "_executed" / "decision-transformer-book.pdf"
    printed.unlink(missing_ok=True)
    if pdf:
        from dtbook.pages.printing import (  # only this needs a browser
            HOW_TO_INSTALL,
            find_chromium,
            print_book,
        )

        if find_chromium() is None:
            click.echo(f"The book is built without its PDF: {HOW_TO_INSTALL}", err=True)
        else:
            print_book(CHECKOUT, printed)
    program = Path(sys.executable).with_name("jupyter-book")
    options = ["--config", "book/_config.yml", "--toc", "book/_toc.yml", "-W", "--keep-going"]
    with (
        suppress(_Unfinished),
        atomic_write(book / "_build") as draft,
    ):  # empty: an old build repeats no warning
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


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where results go.  [default: runs/sweeps/FILE]"
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Local processes.")
@click.option(
    "--scheduler", metavar="ADDRESS", help="A Dask scheduler (tcp://…) in place of local processes."
)
@click.option("--dry-run", is_flag=True, help="List the points and run nothing.")
def sweep(file: Path, folder: Path | None, workers: int, scheduler: str | None, dry_run: bool) -> None:
    """Run a notebook or a stage at every point that FILE (YAML) describes.

    Leaves an artifact for each point, a manifest, and table.parquet with one row a point. The same command goes on
    with a sweep that was interrupted, or whose points failed: what is there is not run again.
    """
    from dtbook import sweep as sweeps  # imports pandas, which the other commands do without

    points = sweeps.read_sweep(file, CHECKOUT / "notebooks")
    folder = (folder or CHECKOUT / "runs" / "sweeps" / file.stem).absolute()
    if dry_run:
        click.echo("\n".join(f"{point.id}  {point}" for point in points))
        return
    count = itertools.count(1)

    def report(point: sweeps.Point, outcome: sweeps.Outcome) -> None:
        done = f"done in {outcome.seconds:.1f} s" if outcome.seconds is not None else "up to date"
        click.echo(f"[{next(count)}/{len(points)}] {point}: {outcome.error or done}")

    try:
        table = sweeps.run_sweep(points, folder, workers, scheduler, report)
    except KeyboardInterrupt:
        click.echo(f"Interrupted. What is done lies in {folder}; the same command goes on with the rest.")
        raise
    click.echo(f"The table is {folder / 'table.parquet'}: {len(table)} rows, {len(table.columns)} columns")
    if failed := table["error"].notna().sum():
        raise click.ClickException(
            f"{failed} of {len(points)} points failed; the same command tries them again"
        )


@main.command()
@click.option("--seeds", default="0-9", show_default=True, help="Replications to make, like 0-9 or 0,3,5-7.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    help="Processes [default: one a core].",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where it goes.  [default: runs/reproduce, or runs/portable]",
)
@click.option("--publish", is_flag=True, help="Put what was made into data/, for the next commit.")
@click.option(
    "--everything",
    is_flag=True,
    help="Also what chapters 9, 11, 12 and 15 start from.",
)
@click.option("--portable", is_flag=True, help="Slower, but the same bytes on every x86-64 processor.")
def reproduce(
    seeds: str, workers: int, folder: Path | None, publish: bool, everything: bool, portable: bool
) -> None:
    """Make the artifacts of data/ again from nothing, and compare: PPO, trajectories, model, calibration, claims.

    Seed 0 is the reference: with it come the controls and the post's weights. An interrupted call goes on where it
    stopped. Bytes are the same on the same kind of processor with the same libraries. Another one rounds otherwise and
    so takes another path: then a replication must meet the bars of behaviour, and each claim's effect must lie in the
    range over the replications of data/.
    """
    if portable:
        choose_portable()  # before anything computes
    from dtbook import measures, replicas, reproduction  # import torch and TransformerLens

    try:
        chosen = replicas.parse_seeds(seeds)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--seeds") from error
    folder = folder or CHECKOUT / "runs" / ("portable" if portable else "reproduce")
    made, shipped = ArtifactStore(folder.absolute()), ArtifactStore()
    made.root.mkdir(parents=True, exist_ok=True)
    # of two at once the second waits, and finds what the first made
    with FileLock(made.root / ".reproduce.lock"):
        names = reproduction.reproduce(made, shipped, chosen, workers, everything, click.echo, _say_stage)
    card = shipped.entries().get(measures.SCORECARD[0], {"parameters": {"seeds": chosen}})
    if not publish and card["parameters"]["seeds"] != chosen:
        click.echo("The tables of data/ over all replications are over other seeds: they are not compared")
        names = [name for name in names if name not in (*measures.SCORECARD, replicas.TABLE)]
    _compare(made, shipped, names, publish)


@main.command()
@click.option("--seeds", default="0-9", show_default=True, help="Replications of data/, like 0-9 or 0,3,5-7.")
@click.option("--workers", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes.")
def causes(seeds: str, workers: int) -> None:
    """Make the tables of causal effects, circuits and programs in data/, of its models and the post's.

    Tables that are there, of the same model and code, are not made again.
    """
    from dtbook import causal_tables, replicas

    try:
        chosen = replicas.parse_seeds(seeds)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--seeds") from error
    store = ArtifactStore()
    for name in causal_tables.make_all(store, chosen, workers):
        click.echo(store.root / name)


def _say_stage(seed: int, stage: str, seconds: float) -> None:
    click.echo(
        f"seed {seed}: {stage} done in {seconds:.0f} s" if seconds > 1 else f"seed {seed}: {stage} is there"
    )


def _compare(made: ArtifactStore, shipped: ArtifactStore, names: list[str], publish: bool) -> None:
    """Say how alike two stores are; raise ClickException for what is not reproduced, unless it is published."""
    from dtbook import replicas
    from dtbook.artifacts.comparison import compare
    from dtbook.claims.reproduced import judge

    verdicts = compare(made, shipped, names)
    report = judge(made, shipped, verdicts, replicas.BARS, replicas.measures)
    click.echo(report.table.to_string(index=False))
    if report.notes:
        click.echo("Claims decided otherwise than in data/:\n  " + "\n  ".join(report.notes))
    if publish:
        for name in (name for name, verdict in verdicts.items() if verdict != "not made"):
            shipped.take(name, made)
    elif report.problems:
        raise click.ClickException("not reproduced:\n  " + "\n  ".join(report.problems))


@main.command()
@click.option(
    "--sweeps", type=click.Path(path_type=Path), default=CHECKOUT / "runs" / "sweeps", show_default=True
)
@click.option(
    "--made", type=click.Path(path_type=Path), default=CHECKOUT / "runs" / "reproduce", show_default=True
)
def experiments(sweeps: Path, made: Path) -> None:
    """Measure what the sweeps in sweeps/ and the replications' snapshots have left, put the tables into data/.

    First `dtbook sweep sweeps/NAME.yml` for each of them and `dtbook reproduce`. What is current is not done again.
    """
    from dtbook import experiments as rooms  # imports torch and TransformerLens

    parts = rooms.run_all(ArtifactStore(), ArtifactStore(made.absolute()), CHECKOUT, sweeps.absolute())
    for name, outcome in parts:
        click.echo(f"{name}: {outcome}")


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
    """What a table of figures needs beside it: the command, the processor, the libraries, the day, the load."""
    models: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    versions = " ".join(f"{library} {version(library)}" for library in ("torch", "numpy", "numba"))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return (
        f"dtbook bench {name}\n{processor}, {os.cpu_count()} cores, {load:.1f} processes a core when it ended\n"
        f"Python {platform.python_version()} {versions}, {date.today().isoformat()}"
    )
