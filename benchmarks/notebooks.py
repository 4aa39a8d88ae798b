"""Seconds that each chapter takes to execute, alone: from the start of its kernel to its last cell.

    python benchmarks/notebooks.py [NN ...]

As it stands, which is what the book shows, and with the small parameters that it gives under `nbmake`.
"""

import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from dtbook.pages.notebooks import find_notebooks, run_notebook, small_parameters

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def seconds(path: Path, parameters: dict[str, object]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_notebook(path, Path(folder, path.name), parameters, "measured")
        return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    rows = {
        path.stem: {"as it stands": seconds(path, {}), "small": seconds(path, small_parameters(path))}
        for path in find_notebooks(NOTEBOOKS, sys.argv[1:])
    }
    table = pd.DataFrame(rows).T
    table.loc["all"] = table.sum()
    print(table.round(1).to_string())


if __name__ == "__main__":
    main()
