"""Whether what was made again says what was found first, where its numbers are others: another path, the same findings.

Another processor rounds the first update of PPO otherwise, and then all that follows is another path: other play,
other weights. Such a replication is as good as one of another seed, and is held to what those have in common: the bars
of behaviour, and each claim's effect in the range over the replications.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dtbook.artifacts.comparison import named_inputs
from dtbook.artifacts.store import ArtifactStore
from dtbook.claims.rules import CLAIMS

Bars = Mapping[str, tuple[float, float]]
SAME, ROUNDING, OTHER_PATH, FAILED = (
    "the same bytes",
    "the same up to rounding",
    "another path, the same findings",
    "not reproduced",
)
TOGETHER = "all together"
"""The group of what is over all replications."""
WIDER = 2.0
"""By how many times its width a range is wider on either side than what was seen.

Of eleven replications, each is outside the range over the ten others in two claims of eleven. In a range so much wider,
nine of the ten that `data/` ships have every claim, each held against the other nine.
"""
LEAST = 0.05
"""The least that a range is wider on either side, in the effect's unit: claims that all replications agree on."""


@dataclass(frozen=True)
class Report:
    """What a comparison came to."""

    table: pd.DataFrame
    """One row a group of artifacts: how many are of which kind, the stage at which its path parts, the outcome."""
    notes: list[str]
    """Verdicts on claims that are not those of `data/`, a sentence each."""
    problems: list[str]
    """What is not reproduced, a sentence each; empty if all is."""


# ------------------------------------------------------------------------------------------- one model's findings
def outside_bars(measured: Mapping[str, float], bars: Bars) -> list[str]:
    """Name each measure that is not between its bars, with the numbers."""
    return [
        f"{name} is {measured[name]:.4g}, not from {low:g} to {high:g}"
        for name, (low, high) in bars.items()
        if not low <= measured[name] <= high
    ]


def claim_ranges(known: pd.DataFrame) -> pd.DataFrame:
    """Return `low` and `high` of each claim's effect over findings that are known, widened by `WIDER` and `LEAST`."""
    effects = known.groupby("claim")["effect"]
    low, high = effects.min(), effects.max()
    more = (WIDER * (high - low)).clip(lower=LEAST)
    return pd.DataFrame({"low": low - more, "high": high + more})


def outside_ranges(findings: pd.DataFrame, known: pd.DataFrame) -> list[str]:
    """Name each claim whose effect is outside its range over what is known, with the numbers.

    That an effect is missing is no news where it is missing in what is known too.
    """
    rows = findings.join(claim_ranges(known), on="claim")
    undecided = rows["effect"].isna() & rows["claim"].isin(known["claim"][known["effect"].isna()])
    outside = rows[~(rows["effect"].between(rows["low"], rows["high"]) | undecided)]
    return [
        f"the effect of {row.claim} is {row.effect:.4g}, not from {row.low:.4g} to {row.high:.4g}"
        for row in outside.itertuples()
    ]


def turned_verdicts(findings: pd.DataFrame, shipped: pd.DataFrame) -> list[str]:
    """Name each claim that is decided otherwise than in the shipped findings of the same models, or scorecard."""
    keys = [name for name in ("model", "claim") if name in shipped]
    decided = "verdict" if "verdict" in shipped else "passed"
    both = findings.merge(shipped, on=keys, suffixes=("", " shipped"))
    words = both[[decided, f"{decided} shipped"]].replace({1.0: "passes", 0.0: "fails"}).fillna("undecided")
    return [
        f"{' '.join(names)} {ours}, in data/ {theirs}"
        for names, (ours, theirs) in zip(both[keys].to_numpy(), words.to_numpy(), strict=True)
        if ours != theirs
    ]


# ------------------------------------------------------------------------------------------------ all of it
def judge(
    made: ArtifactStore,
    shipped: ArtifactStore,
    verdicts: Mapping[str, str],
    bars: Bars,
    measures: Callable[[pd.DataFrame], Mapping[str, float]],
) -> Report:
    """Return what `comparison.compare` found, by group: a replication, the controls, the post's weights, the rest.

    Paths part where an artifact that is made from nothing is not the same. Where none is, the processor rounds alike,
    and what names the same inputs by their hashes has to be the same too. Elsewhere a table of the same weights may
    have an episode or an observation fall on the other side, and is held to its group's findings. `measures` of a
    replication's calibration curves are held against `bars`.
    """
    alike = _of_the_same(made, shipped, [name for name, found in verdicts.items() if found == "differs"])
    rows, notes, problems = [], [], []
    for group, members in pd.Series(verdicts).groupby(_group_of, sort=False):
        differ = list(members.index[members == "differs"])
        wrong = [f"{name}: not made" for name in members.index[members == "not made"]]
        wrong += [f"{name}: not the same, though made of the same" for name in differ if name in alike]
        if differ:
            wrong += _outside(made, shipped, str(group), bars, measures)
            notes += [f"{group}: {line}" for line in _turned(made, shipped, str(group))]
        parts_at = made.entries()[differ[0]]["stage"] if differ else ""
        rows.append({"of": group, **_counts(members), "from": parts_at, "outcome": _outcome(members, wrong)})
        problems += [f"{group}: {line}" for line in wrong]
    return Report(pd.DataFrame(rows), notes, problems)


def _of_the_same(made: ArtifactStore, shipped: ArtifactStore, differ: list[str]) -> list[str]:
    """Those of the artifacts that differ which are made of the same inputs; none, if one is made from nothing."""
    inputs = [{name: named_inputs(store.entries()[name]) for name in differ} for store in (made, shipped)]
    if any(_group_of(name) != TOGETHER and not inputs[0][name] for name in differ):
        return []
    return [name for name in differ if inputs[0][name] == inputs[1][name]]


def _group_of(name: str) -> str:
    *folders, _ = name.split("/")
    recipe = folders[:1] if name.startswith("recipe_") else []
    return "/".join(folders[: len(recipe) + 1]) if folders != recipe else TOGETHER


def _counts(members: pd.Series) -> dict[str, int]:
    kinds = {"same bytes": "identical", "rounding": "rounding", "another path": "differs"}
    return {column: int((members == kind).sum()) for column, kind in kinds.items()}


def _outcome(members: pd.Series, wrong: list[str]) -> str:
    if wrong:
        return FAILED
    for kind, outcome in (("differs", OTHER_PATH), ("rounding", ROUNDING), ("identical", SAME)):
        if (members == kind).any():
            return outcome
    return "not in data/"


def _outside(
    made: ArtifactStore, shipped: ArtifactStore, group: str, bars: Bars, measures: Callable[..., Any]
) -> list[str]:
    """What a group found that is outside the bars, or the ranges over what is known of its kind.

    Controls learnt nothing, so what goes on inside them is chance: of them only what they do has a range.
    """
    found = f"{group}/claims.parquet"
    if found not in shipped.entries():
        return []
    recipe, _, seed = group.rpartition("seed_")
    if not seed.isdigit():
        findings = _read(made, found)
        done = findings["claim"].map(lambda id: CLAIMS[id].group == "Data and behaviour")
        return outside_ranges(findings[done | (not group.endswith("controls"))], _read(shipped, found))
    curves = _read(made, f"{group}/calibration.parquet")
    known = [name for name in shipped.entries() if re.fullmatch(rf"{recipe}seed_\d+/claims\.parquet", name)]
    ranges = outside_ranges(_read(made, found), pd.concat(_read(shipped, name) for name in known))
    return outside_bars(measures(curves), bars) + ranges


def _turned(made: ArtifactStore, shipped: ArtifactStore, group: str) -> list[str]:
    found = "scorecard.parquet" if group == TOGETHER else f"{group}/claims.parquet"
    both = all(found in store.entries() for store in (made, shipped))
    return turned_verdicts(_read(made, found), _read(shipped, found)) if both else []


def _read(store: ArtifactStore, name: str) -> pd.DataFrame:
    return pd.read_parquet(store.path(name))
