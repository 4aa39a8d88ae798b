"""What makes what: the stage and the command behind each artifact of `data/`, and the chapters that start from it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dtbook.artifacts.store import ArtifactStore
from dtbook.pages.notebooks import find_notebooks, read_notebook
from dtbook.pipeline import experiments, measure
from dtbook.pipeline.engine import Stage
from dtbook.pipeline.reproduce import STAGES

ABSENT = "not in data/"


def command_of(stage: Stage) -> str:
    """Return the command that runs a stage."""
    if stage.name == "own model":
        return "dtbook measure SUBJECT"
    if stage in measure.CAUSES:
        return "dtbook causes"
    return "dtbook experiments" if stage in experiments.EXPERIMENT_STAGES else "dtbook reproduce"


def listing(notebooks: Path, store: ArtifactStore | None = None) -> pd.DataFrame:
    """Return one row an artifact of the table of stages.

    Columns: `artifact`, where SUBJECT stands for what `of` names, the subjects that the store has it of; `stage` and
    `command`, which make it; `needs`; and the numbers of the `chapters` that start from it.
    """
    entries, used = (store or ArtifactStore()).entries(), dict(_used(notebooks))
    rows = [
        {
            "artifact": _shown(name),
            "of": _subjects(name, entries),
            "stage": stage.name,
            "command": command_of(stage),
            "needs": ", ".join(map(_shown, stage.needs)),
            "chapters": ", ".join(chapter for chapter, names in used.items() if name in names)
            if _subjects(name, entries) != ABSENT
            else "",
        }
        for stage in STAGES
        for name in stage.makes
    ]
    return pd.DataFrame(rows)


def _shown(name: str) -> str:
    return "controls/shuffled_N" if name == "{of}" else name.format(of="SUBJECT", seed="N")


def _subjects(name: str, entries: Mapping[str, Any]) -> str:
    """Return of which subjects the store has an artifact: "seed_10 … seed_19, post"."""
    if name == "{of}":
        return ", ".join(filter(re.compile(r"(?:recipe_\w+/)?controls/\w+").fullmatch, entries))
    if "{of}" not in name:
        folders = [
            entry.removesuffix(f"/{name}") for entry in entries if re.fullmatch(rf"recipe_\w+/{name}", entry)
        ]
        return ", ".join(folders) if name in entries or folders else ABSENT
    found = [
        re.fullmatch(name.replace("{of}", r"((?:recipe_\w+/)?seed_\d+|post)"), entry) for entry in entries
    ]
    subjects = pd.Series([match[1] for match in found if match], dtype=str)
    recipes = subjects[subjects != "post"].groupby(lambda row: subjects[row].rpartition("seed_")[0])
    ranges = [
        _ranges(str(recipe), sorted(int(each.rpartition("_")[2]) for each in some))
        for recipe, some in recipes
    ]
    return ", ".join([*ranges, *subjects[subjects == "post"]]) or ABSENT


def _ranges(recipe: str, seeds: Sequence[int]) -> str:
    """Return in short which replications these are: "seed_10 … seed_19"."""
    runs = pd.Series(seeds).groupby(pd.Series(seeds) - range(len(seeds))).agg(["first", "last"])
    each = [(f"{recipe}seed_{first}", f"{recipe}seed_{last}") for first, last in runs.to_numpy()]
    return ", ".join(first if first == last else f"{first} … {last}" for first, last in each)


def _used(notebooks: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield the number of each chapter, and the names in the table of stages of what its code reads."""
    names = sorted({name for stage in STAGES for name in stage.makes}, key=lambda name: "{of}" in name)
    for path in find_notebooks(notebooks):
        cells = read_notebook(path).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        found = set()
        for (
            name
        ) in names:  # those with their folder first: they are taken out, so that no other matches there
            if re.search(_pattern(name, code), code):
                found.add(name)
                code = code.replace(name, "")
        yield str(int(path.stem.partition("_")[0])), found


def _pattern(name: str, code: str) -> str:
    """Return what stands in code that reads an artifact: its whole name, or its file of some subject."""
    if name == "{of}":
        return r"controls/|shuffled_"
    if "{of}" not in name:
        return re.escape(name)
    file = name.rpartition("/")[2]
    stem = file.partition(".")[0]
    named = (
        rf'|(?:\(\s*|= |in \((?:"\w+", )*)"{stem}"' if '}.parquet"' in code else ""
    )  # of a loop, or a function's
    model = r"|(?<!dtbook)\.model\b" if file == "model" else ""
    return f'["/]{re.escape(file)}"{named}{model}'
