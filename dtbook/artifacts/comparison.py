"""How alike artifacts are that were made twice: byte for byte, or up to rounding, as on another processor."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from dtbook.artifacts.store import ArtifactStore

ROUNDING_TOLERANCE = 1e-5
"""Of a column's or tensor's largest number: what libraries may differ by that sum in another order."""


def compare(made: ArtifactStore, shipped: ArtifactStore, names: Sequence[str]) -> dict[str, str]:
    """Return a word for each name: "identical" (by sha256), "rounding", "differs", "not made" or "not shipped"."""
    ours, theirs = made.entries(), shipped.entries()
    verdicts = {}
    for name in names:
        if name not in theirs or name not in ours:
            verdicts[name] = "not made" if name in theirs else "not shipped"
        elif ours[name]["sha256"] == theirs[name]["sha256"]:
            verdicts[name] = "identical"
        else:
            distance = largest_difference(made.path(name), shipped.path(name))
            verdicts[name] = "differs" if distance > ROUNDING_TOLERANCE else "rounding"
    return verdicts


def named_inputs(entry: Mapping[str, Any]) -> set[str]:
    """Return the sha256s among the parameters of a manifest's entry: what the artifact was made of."""
    return set(re.findall(r"\b[0-9a-f]{64}\b", str(entry["parameters"])))


def largest_difference(ours: Path, theirs: Path) -> float:
    """Return the largest difference between two artifacts' numbers, each relative to its column's or tensor's largest.

    Infinite where anything else is not the same: names, shapes, texts, whole numbers, which numbers are missing, or
    files that hold neither tables nor tensors nor JSON.
    """
    inside, others = _files(ours), _files(theirs)
    if inside != others:
        return np.inf
    return max(_between(ours / name, theirs / name) for name in inside)


def _files(artifact: Path) -> list[Path]:
    """Return the paths of a folder's files inside it; of a file, the empty path."""
    if artifact.is_file():
        return [Path()]
    return sorted(path.relative_to(artifact) for path in artifact.rglob("*") if path.is_file())


def _between(ours: Path, theirs: Path) -> float:
    if ours.read_bytes() == theirs.read_bytes():
        return 0.0
    columns, others = _columns(ours), _columns(theirs)
    if not columns or list(columns) != list(others):
        return np.inf
    return max(_apart(columns[name], others[name]) for name in columns)


def _columns(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".json":
        return dict(sorted(_leaves("", json.loads(path.read_text(encoding="utf-8")))))
    if path.suffix not in (".parquet", ".csv"):
        return {}
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return {str(name): column.to_numpy() for name, column in table.items()}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what a JSON file holds, the fractions side by side in one mapping or list as one column.

    The hash of weights is left out: they are compared themselves.
    """
    if not isinstance(value, dict | list):
        yield name, np.array([value])
        return
    items = dict(value.items() if isinstance(value, dict) else enumerate(value))
    numbers = {key: item for key, item in items.items() if isinstance(item, float)}
    if numbers:
        yield f"{name}: {', '.join(map(str, numbers))}", np.array([*numbers.values()])
    for key in items.keys() - numbers.keys() - {"weights_sha256"}:
        yield from _leaves(f"{name}/{key}", items[key])


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return np.inf
    if ours.dtype.kind != "f":
        return 0.0 if pd.Series(ours.ravel()).equals(pd.Series(theirs.ravel())) else np.inf
    if (np.isnan(ours) != np.isnan(theirs)).any():
        return np.inf
    a, b = (values[np.isfinite(values)] for values in (ours, theirs))
    if len(a) != len(b):
        return np.inf
    scale = np.abs(b).max(initial=0.0)
    largest = np.abs(a.astype(float) - b).max(initial=0.0)
    return float(largest / scale) if scale else float(largest)
