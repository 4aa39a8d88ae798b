"""`reproduce` from nothing to its end, small: what it makes, that a second call makes nothing, what it takes over."""

from dataclasses import replace

import pandas as pd
import pytest
import small

from dtbook.artifacts.comparison import compare
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.pipeline import Recipe, replication
from dtbook.pipeline.experiments import SWEEPS, read
from dtbook.pipeline.measure import CONTROL_CLAIMS, EXPERIMENT_CLAIMS, POST_CLAIMS, SCORECARD
from dtbook.pipeline.recipes import RECIPE_STAGES
from dtbook.pipeline.reproduce import STAGES, plan, reproduce_data

OF_RECIPES = {name for stage in RECIPE_STAGES for name in stage.makes}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]  # trainings

RECIPE = replace(
    small.RECIPE,
    settings={
        "over_time": {"timesteps": (0, 5)},
        "exceptions": {"timesteps": (5,)},
        "scans": {"rtgs": (0.0, 0.9), "timesteps": (5,)},
        "neurons": {"rtgs": (0.9,), "timesteps": (5,)},
        "ablated_play": {"rtgs": (0.9,), "episodes": 2, "max_steps": 30},
    },
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with two small replications and all that is measured of them, what was said, and what is compared."""
    store, said = ArtifactStore(tmp_path_factory.mktemp("made")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTBOOK_POST_MODEL", str(store.root / "nowhere"))
        names = reproduce_data(store, ArtifactStore(), [10, 11], workers=2, recipe=RECIPE, say=said.append)
    return store, said, names


def test_all_is_made_and_named_for_the_comparison(made):
    store, said, names = made
    assert store.verify() == []
    assert len(said) == int(said[0].partition("/")[2].partition("]")[0])
    assert all(": done in " in line for line in said)
    shipped = [name for name in ArtifactStore().entries() if name.startswith(("seed_10/", "seed_11/"))]
    of_everything = ("causal", "circuits", "units", "program")
    expected = {name for name in shipped if not name.rpartition("/")[2].startswith(of_everything)}
    expected |= {
        *replication.CONTROLS,
        replication.LONG_CONTEXT,
        replication.TABLE,
        CONTROL_CLAIMS,
    }
    assert set(names) == expected
    assert set(compare(store, store, names).values()) == {"identical"}


def test_the_recipe_reaches_every_stage(made):
    store, _, names = made
    entries = store.entries()
    for name in names:
        parameters = entries[name]["parameters"]
        assert parameters.get("task", {"size": 5})["size"] == 5, name
        assert parameters.get("train", {"steps": 30})["steps"] in (30, 4), name
        assert parameters.get("calibration", {"episodes": 4})["episodes"] == 4, name
    controls = pd.read_parquet(store.path(CONTROL_CLAIMS))
    assert controls["model"].nunique() == 6
    table = pd.read_parquet(store.path(replication.TABLE))
    assert table["seed"].tolist() == [10, 11]


def test_what_cannot_be_made_is_taken(made):
    store, _, _ = made
    shipped = ArtifactStore()
    for name in (POST_CLAIMS, EXPERIMENT_CLAIMS):
        assert store.entries()[name] == shipped.entries()[name]


def test_a_second_call_makes_nothing(made, monkeypatch):
    store, first, names = made
    monkeypatch.setenv("DTBOOK_POST_MODEL", str(store.root / "nowhere"))
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*") if path.is_file()}
    said = []
    again = reproduce_data(store, ArtifactStore(), [10, 11], workers=2, recipe=RECIPE, say=said.append)
    assert again == names
    assert [line.rpartition(": ")[2] for line in said] == ["up to date"] * len(first)
    assert before == {path: path.stat().st_mtime_ns for path in store.root.rglob("*") if path.is_file()}


def test_what_failed_is_named(tmp_path):
    (tmp_path / "seed_11").write_text("in the way of a folder")
    with pytest.raises(
        ArtifactError, match=r"seed_11 ppo, seed_11 collection, .* failed; the same command goes on"
    ):
        reproduce_data(ArtifactStore(tmp_path), ArtifactStore(), [11], recipe=RECIPE)


def by_the_books_recipe(names):
    return {name for name in names if not name.startswith("recipe_")} - {*SCORECARD, *OF_RECIPES}


def test_the_plan_of_everything_makes_each_file_of_data_once(tmp_path):
    store = ArtifactStore(tmp_path)
    jobs, shipped = plan(store, replication.BOOK_SEEDS, Recipe(), everything=True), ArtifactStore()
    made = [name for job in jobs if job.store is store for name in job.makes]
    assert len(made) == len(set(made))
    assert by_the_books_recipe(shipped.entries()) == {name for name in made if replication.is_shipped(name)}
    points = [job for job in jobs if job.store is not store]
    assert len(points) == sum(len(read(name)) for name in SWEEPS)
    assert {job.stage.name for job in jobs} == {stage.name for stage in STAGES} - {
        "own model",
        *("histories", "scorecard"),  # by the post's recipe
        *(stage.name for stage in RECIPE_STAGES),  # `dtbook experiments`
    }


def test_of_the_first_edition_only_claims_are_kept(tmp_path):
    jobs = plan(ArtifactStore(tmp_path), [3], Recipe.first())
    made = [name for job in jobs for name in job.makes]
    assert all(name.startswith("recipe_first/seed_3/") for name in made)
    assert [name for name in made if replication.is_shipped(name)] == ["recipe_first/seed_3/claims.parquet"]
