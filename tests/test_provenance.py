"""What stands behind an artifact: the meaning of the code, wherever it is written and however it is described."""

import functools

import pytest

from dtbook.artifacts import provenance
from dtbook.artifacts.provenance import code_behind, dotted_name

TRAIN = """
import numpy as np
from dtbook.grid import stride, STONE

def train(n: int) -> float:
    return np.mean([stride(i) for i in range(n)])
"""
GRID = """
STONE = 2

def stride(x):
    return x + STONE

def unrelated():
    return 1
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)

    def write(**sources):
        for name, source in ({"__init__": ""} | sources).items():
            path = tmp_path / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        return code_behind(["dtbook.train.train"])["code"]

    return write


def test_behind_a_definition_is_all_that_it_refers_to_and_no_more(package):
    before = package(train=TRAIN, grid=GRID)
    assert code_behind(["dtbook.train.train"])["libraries"].keys() == {"numpy"}
    assert package(grid=GRID.replace("return 1", "return 2")) == before
    assert package(grid=GRID.replace("STONE = 2", "STONE = 3")) != before


@pytest.mark.parametrize(
    "same",
    [
        GRID.replace("def stride(x):", 'def stride(x: int) -> int:\n    """Go on."""'),
        GRID.replace("    return x + STONE", "    # onwards\n    return (x\n            + STONE)"),
        GRID.replace("STONE = 2", 'STONE = 2\n"""Cells of stone."""'),
    ],
)
def test_docstrings_comments_layout_and_annotations_do_not_count(package, same):
    assert package(train=TRAIN, grid=GRID) == package(grid=same)


def test_it_does_not_count_where_a_definition_stands_or_by_what_name_its_module_is_known(package):
    before = package(train=TRAIN, grid=GRID)
    package(room__in____init__="from dtbook.room.cells import STONE, stride", room__in__cells=GRID)
    assert package(train=TRAIN.replace("dtbook.grid", "dtbook.room.cells")) == before
    assert package(train=TRAIN.replace("dtbook.grid", "dtbook.room")) == before, "by the room's own name"
    through_module = TRAIN.replace("from dtbook.grid import stride, STONE", "from dtbook import grid")
    assert package(train=through_module.replace("stride(i)", "grid.stride(i)")) == before


def test_what_a_module_does_when_it_is_imported_counts(package):
    before = package(train=TRAIN, grid=GRID)
    loud = package(grid=GRID + "\nprint(STONE)\n")
    assert loud != before
    registry = "ALL = []\ndef rule(name):\n    return ALL.append\n"
    package(registry=registry, grid=GRID)
    registered = 'from dtbook.registry import rule\n@rule("C01")\ndef holds():\n    return {}\n'
    one = package(grid=GRID + registered.format(1))
    assert package(grid=GRID + registered.format(2)) != one


def test_the_class_of_an_argument_is_behind_a_function_but_what_runs_its_stage_is_not(package):
    config = "class Config:\n    def rate(self):\n        return {}\n"
    train = "from dtbook.config import Config\ndef train(config: Config):\n    return config.rate()\n"
    one = package(train=train, config=config.format(1))
    assert package(config=config.format(2)) != one
    job = "class Job:\n    def rate(self):\n        return {}\n"
    stage = "from dtbook.pipeline.engine import Job\ndef train(job: Job):\n    return job.rate()\n"
    package(pipeline__in____init__="", pipeline__in__engine=job.format(1))
    one = package(train=stage)
    assert package(pipeline__in__engine=job.format(2)) == one


def test_functions_and_partial_functions_have_a_name():
    assert dotted_name(provenance.digest) == "dtbook.artifacts.provenance.digest"
    assert dotted_name(functools.partial(provenance.digest, 1)) == "dtbook.artifacts.provenance.digest"


def test_scripts_of_a_room_are_its_code(package, tmp_path):
    package(train=TRAIN, grid=GRID, page__in____init__="def show():\n    return 1")
    before = code_behind(["dtbook.page.show"])["code"]
    (tmp_path / "page/engine.js").write_text("1")
    assert code_behind(["dtbook.page.show"])["code"] != before


def test_a_definition_that_is_not_there_is_named(package):
    package(train=TRAIN, grid=GRID)
    for name in ("dtbook.train.trian", "dtbook.training"):
        with pytest.raises(
            ValueError, match=f"code must name definitions or modules of dtbook, not '{name}'"
        ):
            code_behind([name])
