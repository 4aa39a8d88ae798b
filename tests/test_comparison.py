"""Two artifacts held against each other: the same bytes, the same up to rounding, or not the same."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from dtbook.artifacts import ArtifactStore
from dtbook.artifacts.comparison import compare, largest_difference

TABLE = pd.DataFrame({"name": ["a", "b", "c"], "share": [0.25, -4.0, np.nan], "count": [1, 2, 3]})


def stored(store, name, table):
    with store.write(name, stage="test", code=["dtbook.analysis.stats"]) as path:
        table.to_parquet(path)


def test_artifacts_are_identical_rounded_different_or_not_shipped(tmp_path):
    made, shipped = ArtifactStore(tmp_path / "made"), ArtifactStore(tmp_path / "shipped")
    for name, other in (
        ("same", TABLE),
        ("rounded", TABLE.assign(share=TABLE["share"] * (1 + 1e-12))),
        ("other", TABLE.assign(share=TABLE["share"] + [4.1e-5, 0, 0])),
    ):
        stored(made, f"{name}.parquet", TABLE)
        stored(shipped, f"{name}.parquet", other)
    stored(made, "new.parquet", TABLE)
    stored(shipped, "old.parquet", TABLE)
    names = [f"{name}.parquet" for name in ("same", "rounded", "other", "new", "old")]
    verdicts = ["identical", "rounding", "differs", "not shipped", "not made"]
    assert compare(made, shipped, names) == dict(zip(names, verdicts, strict=True))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (TABLE.assign(share=[0.25, -4.0, 0.0]), np.inf),  # a number where there was none
        (TABLE.assign(name=["a", "b", "d"]), np.inf),
        (TABLE.assign(count=[1, 2, 4]), np.inf),  # a count is no rounding
        (TABLE.rename(columns={"share": "part"}), np.inf),
        (TABLE.iloc[:2], np.inf),
        (TABLE.assign(share=[0.26, -4.0, np.nan]), 0.01 / 4),  # of the column's largest
    ],
)
def test_only_numbers_may_be_rounded(tmp_path, other, expected):
    TABLE.to_parquet(tmp_path / "ours.parquet")
    other.to_parquet(tmp_path / "theirs.parquet")
    assert largest_difference(tmp_path / "ours.parquet", tmp_path / "theirs.parquet") == pytest.approx(
        expected
    )


def test_folders_tensors_and_arrays(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"W": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros(2, np.float32)}
    for name, more in (("one", 0.0), ("two", 1e-3)):
        (tmp_path / name).mkdir()
        save_file(weights | {"b": weights["b"] + np.float32(more)}, tmp_path / name / "model.safetensors")
        np.savez(tmp_path / name / "data.npz", returns=np.arange(3.0))
        (tmp_path / name / "README.md").write_text("The same.")
    one, two = tmp_path / "one", tmp_path / "two"
    assert largest_difference(one, one) == 0
    assert largest_difference(one, two) == pytest.approx(1.0)  # all of what is there
    (two / "README.md").write_text("Something else.")
    assert largest_difference(one, two) == np.inf
    (one / "README.md").unlink()
    assert largest_difference(one, two) == np.inf


def test_numbers_in_json_may_be_rounded_and_texts_may_not(tmp_path):
    """As in a model's config.json, whose scores are measured and whose weights are compared themselves."""
    ours = {
        "score": {"L0H0": 0.5, "L0H1": None},
        "order": [1, 0],
        "means": [2.0, 2.1e-5],
        "name": "a",
        "weights_sha256": "0",
    }
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    for change, expected in (
        ({"score": {"L0H0": 0.5000001, "L0H1": None}, "weights_sha256": "1"}, 2e-7),
        ({"means": [2.0, 2e-5]}, 5e-7),  # of the largest beside it
        ({"order": [0, 1]}, np.inf),
        ({"name": "b"}, np.inf),
        ({"score": {"L0H0": 0.5}}, np.inf),
    ):
        (tmp_path / "theirs.json").write_text(json.dumps(ours | change))
        distance = largest_difference(tmp_path / "ours.json", tmp_path / "theirs.json")
        assert distance == pytest.approx(expected)
