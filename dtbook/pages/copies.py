"""The executed copies of notebooks: those that are not current are made, several at once."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from dtbook.artifacts.post_weights import weights_at_hand
from dtbook.artifacts.processes import in_order
from dtbook.artifacts.store import ArtifactStore
from dtbook.pages.notebooks import (
    NotebookError,
    declared_parameters,
    inputs_digest,
    is_current,
    read_notebook,
    run_notebook,
)


@dataclass(frozen=True)
class Copy:
    """An executed copy to make: of which notebook, its line on the screen, what its outputs follow from."""

    line: str
    path: Path
    target: Path
    parameters: dict[str, object]
    inputs: str

    def is_done(self) -> bool:
        """Return whether it is there and current."""
        return is_current(self.target, self.inputs)


def copies_of(parameters: dict[Path, dict[str, object]], folder: Path) -> list[Copy]:
    """Return the copies of notebooks with these parameters that are to lie in a folder."""
    store = ArtifactStore()
    return [
        Copy(
            f"[{position}/{len(parameters)}] {path.stem}",
            path,
            folder / path.name,
            given,
            inputs_digest(path, given, store),
        )
        for position, (path, given) in enumerate(parameters.items(), start=1)
    ]


def make_copies(jobs: list[Copy], workers: int) -> Iterator[tuple[Copy, str]]:
    """Make the copies that are not current, and yield what was done for each job, in their order.

    On a terminal a bar counts the cells of the notebook that is executed, or of several at once the notebooks.
    """
    todo = [job for job in jobs if not job.is_done()]
    several, terminal = min(workers, len(todo)) > 1, sys.stderr.isatty()
    if several:
        weights_at_hand()  # the one attempt to fetch them: processes that are started now remember how it failed
    outcomes = in_order(_make, [(job, terminal and not several) for job in todo], workers)
    with tqdm(total=len(jobs), desc="notebooks", leave=False, disable=not (terminal and several)) as bar:
        for job in jobs:
            outcome = next(outcomes) if job in todo else "up to date"
            with bar.external_write_mode():
                yield job, outcome
            bar.update()


def _make(job: Copy, bar: bool) -> str:
    """Make one copy and return how long it took; of two runs at once the second waits, and finds it made."""
    job.target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.target.with_name(f".{job.target.stem}.lock")):
        if job.is_done():
            return "up to date"
        start = time.perf_counter()
        run_notebook(job.path, job.target, job.parameters, job.inputs, progress=job.line if bar else "")
    return f"done in {time.perf_counter() - start:.1f} s"


def check_book(checkout: Path) -> None:
    """Raise NotebookError where there is no book, or one of its notebooks or executed copies cannot be read."""
    if not (checkout / "book").is_dir():
        raise NotebookError(f"{checkout} has no book/: `dtbook build` needs a checkout of the repository")
    for path in sorted((checkout / "notebooks").glob("*.ipynb")):
        declared_parameters(path)
        if (copy := checkout / "book" / "_executed" / path.name).exists():
            read_notebook(copy)
