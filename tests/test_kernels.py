"""Portable kernels: the same bytes whatever kernels were asked for before, and a manifest that tells them apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtbook.artifacts.kernels import choose_portable, kernels
from dtbook.artifacts.store import ArtifactStore

pytestmark = pytest.mark.slow  # processes of its own

SETTINGS = {
    "the processor's own": {},
    "what older processors have": {
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
VARIABLES = {name for setting in SETTINGS.values() for name in setting}


def first_updates(setting):
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, Path(__file__).with_name("first_updates.py")]
    done = subprocess.run(command, env=inherited | setting, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_they_take_one_path_whatever_the_processor_would_choose():
    found = [first_updates(setting) for setting in SETTINGS.values()]
    assert found[0] == found[1]
    assert found[0]["made"] == {"kernels": "portable"}


@pytest.fixture
def native(monkeypatch):
    for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY"):
        monkeypatch.setenv(name, "default")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def written(store, name):
    with store.write(name, stage="test", code=["dtbook.artifacts.kernels"]) as path:
        path.write_text("what was made")
    return store.entries()[name]


def is_current(store, name):
    return store.is_current(name, stage="test", code=["dtbook.artifacts.kernels"])


@pytest.mark.usefixtures("native")
def test_the_manifest_tells_them_apart(tmp_path):
    store = ArtifactStore(tmp_path)
    assert kernels() == {}
    entry = written(store, "native")
    assert is_current(store, "native")
    choose_portable()
    assert not is_current(store, "native")
    assert written(store, "portable") == entry | {"kernels": "portable"}
    assert is_current(store, "portable")
    os.environ["ATEN_CPU_CAPABILITY"] = "default"  # other kernels than the portable ones
    assert not is_current(store, "portable")
    assert is_current(store, "native")
