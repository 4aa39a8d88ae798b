"""What was made again held against what data/ ships: the four outcomes, on its own tables and on altered ones."""

import json
import shutil

import click
import numpy as np
import pandas as pd
import pytest

from dtbook.artifacts.comparison import compare
from dtbook.artifacts.store import ArtifactStore, describe
from dtbook.claims.reproduced import (
    FAILED,
    OTHER_PATH,
    ROUNDING,
    SAME,
    claim_ranges,
    judge,
    outside_bars,
    outside_ranges,
    turned_verdicts,
)
from dtbook.cli import _compare
from dtbook.pipeline.deciding import seeds_that_decide
from dtbook.pipeline.replication import BARS, BOOK_SEEDS, FIRST_SEEDS, TUNING, bar_measures

SHIPPED = ArtifactStore()
REPLICATION = [
    "ppo.parquet",
    "collection.parquet",
    "training.parquet",
    "calibration.parquet",
    "claims.parquet",
]


def findings(seed):
    return pd.read_parquet(SHIPPED.path(f"seed_{seed}/claims.parquet"))


def enter(store, name, entry):
    """Let a store say of a file that is there what an entry says, whatever its bytes are."""
    entries = store.entries() | {name: entry | describe(store.root / name)}
    store.manifest.write_text(json.dumps(entries))


def as_if_made(store, names, of=None):
    """Put shipped artifacts into a store; with `of`, those of another replication under the names of seed 10."""
    for name in names:
        source = name.replace("seed_10", of or "seed_10")
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if SHIPPED.path(source).is_dir() else shutil.copyfile
        copy(SHIPPED.path(source), store.root / name)
        enter(store, name, SHIPPED.entries()[source])


def alter(store, name, change):
    """Change a table of a store in its place."""
    change(pd.read_parquet(store.root / name)).to_parquet(store.root / name, index=False)
    enter(store, name, store.entries()[name])


@pytest.fixture
def made(tmp_path):
    return ArtifactStore(tmp_path / "made")


def judged(made, names):
    made = ArtifactStore(made.root)
    return judge(made, SHIPPED, compare(made, SHIPPED, names), BARS, bar_measures)


def test_all_of_data_is_the_same_as_itself():
    report = judged(SHIPPED, list(SHIPPED.entries()))
    groups = [
        *(f"seed_{k}" for k in (TUNING, *BOOK_SEEDS)),
        *(f"recipe_first/seed_{k}" for k in FIRST_SEEDS),
        *(f"recipe_post/seed_{k}" for k in seeds_that_decide(SHIPPED)),
        "recipe_post/controls",
        "controls",
        "post",
        "experiments",
        "long_context",
        "all together",
    ]
    assert sorted(report.table["of"]) == sorted(groups)
    assert (report.table["outcome"] == SAME).all()
    assert report.table["same bytes"].sum() == len(SHIPPED.entries())
    assert report.notes == report.problems == []


def scaled(by):
    return lambda table: table.assign(**{name: table[name] * by for name in table.select_dtypes("float64")})


def test_numbers_that_were_rounded_otherwise(made):
    names = [f"seed_10/{file}" for file in REPLICATION]
    as_if_made(made, names)
    alter(made, "seed_10/calibration.parquet", scaled(1 + 1e-9))
    row = judged(made, names).table.iloc[0]
    assert row[["same bytes", "rounding", "another path", "outcome"]].tolist() == [4, 1, 0, ROUNDING]


@pytest.mark.parametrize("seed", [11, 13, 19])
def test_another_replication_in_a_replications_place_is_another_path(made, seed):
    """What another processor makes of seed 10 is as far from it as another seed is."""
    names = [f"seed_10/{file}" for file in [*REPLICATION, "model", "program.parquet"]]
    as_if_made(made, names, of=f"seed_{seed}")
    report = judged(made, names)
    row = report.table.iloc[0]
    assert row[["another path", "from", "outcome"]].tolist() == [len(names), "ppo", OTHER_PATH]
    assert report.problems == []
    words = {1.0: "passes", 0.0: "fails"}
    own, other = (
        findings(each).set_index("claim")["passed"].map(words).fillna("undecided") for each in (10, seed)
    )
    turned = own.index[own != other]
    assert len(turned) > 0
    assert report.notes == [f"seed_10: {id} {other[id]}, in data/ {own[id]}" for id in turned]


def of_another_path(made):
    names = [f"seed_10/{file}" for file in REPLICATION]
    as_if_made(made, names, of="seed_13")
    return names


def test_a_bar_that_is_missed_is_named_with_its_numbers(made):
    names = of_another_path(made)

    def worse(curves):
        asked = (curves["acting"] == "greedy") & np.isclose(curves["rtg"], 0.9)
        return curves.assign(mean=curves["mean"].mask(asked, 0.5))

    alter(made, "seed_10/calibration.parquet", worse)
    report = judged(made, names)
    assert report.table["outcome"].tolist() == [FAILED]
    assert report.problems == ["seed_10: greedy 0.9 is 0.5, not from 0.93 to 1"]


def test_an_effect_outside_the_replications_is_named_with_its_numbers(made):
    names = of_another_path(made)
    alter(
        made,
        "seed_10/claims.parquet",
        lambda table: table.assign(effect=table["effect"].mask(table["claim"] == "C06", 0.5)),
    )
    effects = [float(findings(seed).set_index("claim")["effect"]["C06"]) for seed in BOOK_SEEDS]
    low, high = min(effects), max(effects)
    more = max(2 * (high - low), 0.05)
    (problem,) = judged(made, names).problems
    assert problem == f"seed_10: the effect of C06 is 0.5, not from {low - more:.4g} to {high + more:.4g}"


def test_what_is_made_of_the_same_has_to_be_the_same(made):
    """A table of the same model is no other path: something else must be wrong."""
    names = ["post/situations.parquet", "post/claims.parquet"]
    as_if_made(made, names)
    alter(made, names[0], scaled(1.001))
    report = judged(made, names)
    assert report.problems == ["post: post/situations.parquet: not the same, though made of the same"]
    assert report.table["outcome"].tolist() == [FAILED]


def test_a_table_over_replications_that_are_the_same_has_to_be_the_same(made):
    names = ["seed_10/calibration.parquet", "replicas.parquet"]
    as_if_made(made, names)
    alter(made, names[1], scaled(1.001))
    problem = "all together: replicas.parquet: not the same, though made of the same"
    assert judged(made, names).problems == [problem]


def test_a_table_of_the_same_weights_is_held_to_its_findings_where_paths_part(made):
    names = [*of_another_path(made), "post/situations.parquet", "post/claims.parquet"]
    as_if_made(made, names[-2:])
    alter(made, names[-2], scaled(1.001))
    report = judged(made, names)
    assert report.problems == []
    assert report.table[["of", "from", "outcome"]].to_numpy().tolist() == [
        ["seed_10", "ppo", OTHER_PATH],
        ["post", "situations", OTHER_PATH],
    ]
    alter(made, names[-1], lambda table: table.assign(effect=table["effect"] + 0.06))
    assert all(line.startswith("post: the effect of ") for line in judged(made, names).problems)
    assert len(judged(made, names).problems) == len(findings(10)) - 1, "all but C01, which no play decides"


def test_what_was_not_made_is_named(made):
    names = ["seed_10/ppo.parquet", "seed_10/model"]
    as_if_made(made, names[:1])
    assert judged(made, names).problems == ["seed_10: seed_10/model: not made"]


def test_of_controls_only_what_they_do_counts(made):
    names = ["controls/shuffled_0", "controls/claims.parquet"]
    as_if_made(made, names[1:])
    as_if_made(made, names[:1])
    entry = made.entries()["controls/claims.parquet"]
    for claim, problems in (("C21b", 0), ("C02", 1)):
        as_if_made(made, names[1:])
        alter(
            made,
            names[1],
            lambda table, c=claim: table.assign(effect=table["effect"].mask(table["claim"] == c, 5.0)),
        )
        enter(made, names[1], entry | {"parameters": {"models": {"controls/shuffled_0": "0" * 64}}})
        assert len(judged(made, names).problems) == 6 * problems, claim


def test_ranges_are_wide_enough_for_a_replication_and_not_for_anything():
    """Each of the ten that are shipped, against the other nine."""
    outside = {}
    for seed in BOOK_SEEDS:
        others = pd.concat(findings(other) for other in BOOK_SEEDS if other != seed)
        outside[seed] = [line.split()[3] for line in outside_ranges(findings(seed), others)]
    assert {seed: claims for seed, claims in outside.items() if claims} == {15: ["C12"], 18: ["C24"]}
    post = pd.read_parquet(SHIPPED.path("post/claims.parquet"))
    assert outside_ranges(post, pd.concat(map(findings, BOOK_SEEDS))), "the post's model is none of ours"


def test_a_range_is_widened_by_twice_its_width_or_a_little():
    known = pd.DataFrame({"claim": ["a", "a", "b", "b", "c"], "effect": [1.0, 2.0, 0.3, 0.3, np.nan]})
    assert claim_ranges(known).loc["a"].tolist() == [-1, 4]
    assert claim_ranges(known).loc["b"].tolist() == pytest.approx([0.25, 0.35])
    found = pd.DataFrame({"claim": ["a", "b", "c"], "effect": [4.0, 0.36, np.nan]})
    assert outside_ranges(found, known) == ["the effect of b is 0.36, not from 0.25 to 0.35"]
    undecided = found.assign(effect=[np.nan, 0.3, 1.0])  # decided where nothing was, and the other way round
    assert [line.split()[3] for line in outside_ranges(undecided, known)] == ["a", "c"]


def test_bars_hold_their_ends():
    bars = {"one": (0.0, 1.0), "two": (-1.0, -0.5)}
    assert outside_bars({"one": 1.0, "two": -0.5}, bars) == []
    assert outside_bars({"one": np.nan, "two": 0.0}, bars) == [
        "one is nan, not from 0 to 1",
        "two is 0, not from -1 to -0.5",
    ]


def test_verdicts_of_a_scorecard_are_compared_too():
    card = pd.read_parquet(SHIPPED.path("scorecard.parquet"))
    first = card["verdict"].iloc[0]
    other = card.assign(verdict=["undecided", *card["verdict"].iloc[1:]])
    assert turned_verdicts(other, card) == [f"C01 undecided, in data/ {first}"]


def test_the_command_ends_well_on_another_path_and_not_otherwise(made, capsys):
    names = of_another_path(made)
    _compare(ArtifactStore(made.root), SHIPPED, names, publish=False, bars=True)
    said = capsys.readouterr().out
    assert OTHER_PATH in said
    assert "C09 fails, in data/ passes" in said
    assert "seed_10/ppo.parquet" not in said, "a table, no list of names"
    alter(made, "seed_10/claims.parquet", lambda table: table.assign(effect=1e9))
    with pytest.raises(
        click.ClickException, match="not reproduced:\n  seed_10: the effect of C01 is 1e\\+09, not from"
    ):
        _compare(ArtifactStore(made.root), SHIPPED, names, publish=False, bars=True)
