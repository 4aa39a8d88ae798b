"""Artifacts: whole or not there, recorded, checked before use; under kills, lies, races and closed doors."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtbook.artifacts import ArtifactError, ArtifactStore, atomic_write, provenance
from dtbook.artifacts import store as artifact_store

MADE_BY = {"stage": "test", "code": ["dtbook.artifacts.provenance"]}


@pytest.fixture
def store(tmp_path):
    """A file and a folder, as the pipeline leaves them, in a path with a space and letters beyond ASCII."""
    store = ArtifactStore(tmp_path / "dätä folder")
    with store.write("curve.csv", **MADE_BY) as path:
        path.write_text("rtg,return\n0,0\n")
    with store.write("models/reference", parameters={"steps": 8000}, seeds=[0], **MADE_BY) as path:
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(bytes(range(256)))
    return store


def hidden(folder):
    return [path for path in folder.rglob(".*") if path.name != ".manifest.lock"]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# atomic_write


def test_a_write_replaces_a_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new folder" / "table.npz"
    for content in ("first", "second"):
        with atomic_write(target) as draft:
            assert draft.name == "table.npz"
            assert draft.parent.parent == target.parent, "a rename must not cross file systems"
            draft.write_text(content)
    assert target.read_text() == "second"
    assert list(target.parent.iterdir()) == [target]


def test_a_write_replaces_a_folder_as_a_whole(tmp_path):
    for files in (("a", "b"), ("b", "c")):
        with atomic_write(tmp_path / "model") as draft:
            draft.mkdir()
            for name in files:
                (draft / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["b", "c"]
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")

    def fail_halfway():
        with atomic_write(target) as draft:
            draft.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_of_nothing_is_an_error(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"nothing was written for .*table\.csv"),
        atomic_write(tmp_path / "table.csv"),
    ):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_has_the_rights_that_the_umask_leaves(tmp_path, mask):
    """Whoever makes the files of a draft: some make them so that only their owner reads them."""
    former = os.umask(mask)
    try:
        with atomic_write(tmp_path / "model") as draft:
            draft.mkdir()
            os.close(os.open(draft / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(former)
    assert (tmp_path / "model/weights").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    for name in ("old", "new"):
        (tmp_path / "here" / name).symlink_to(Path("../there", name))
    (tmp_path / "there/old").write_text("former")
    for name in ("old", "new"):
        with atomic_write(tmp_path / "here" / name) as draft:
            draft.write_text("latter")
        assert (tmp_path / "here" / name).is_symlink()
        assert (tmp_path / "there" / name).read_text() == "latter"
    store = ArtifactStore(tmp_path / "here")
    with store.write("old", **MADE_BY) as draft:
        draft.write_text("of a store")
    assert (tmp_path / "there/old").read_text() == "of a store"
    assert store.path("old").is_symlink()
    assert hidden(tmp_path) == []


def test_links_that_lead_to_one_another_are_named(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"cannot write .*/a \("), atomic_write(tmp_path / "a"):
        pytest.fail("the error must come before the work")


@pytest.mark.parametrize("name", [".", "..", "../work"])
def test_a_file_does_not_take_the_place_of_a_folder(tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    for target, write, kind in ((name, Path.touch, "folder"), ("mine", Path.mkdir, "file")):
        words = re.escape(f"cannot write {target} (there is a {kind} of that name)")
        with pytest.raises(OSError, match=words), atomic_write(target) as draft:
            write(draft)
    assert [(path.name, path.read_text()) for path in Path.cwd().iterdir()] == [("mine", "mine")]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", [".", "..", "link", "below/.."])
def test_a_folder_that_stays_is_the_same_one_and_keeps_its_files(tmp_path, monkeypatch, name):
    work = tmp_path / "work"
    (work / "below").mkdir(parents=True)
    (work / "link").symlink_to("..")
    monkeypatch.chdir(work)
    folder = Path(name).resolve()
    (folder / "mine").write_text("mine")
    (folder / "weights").write_text("former")
    before = folder.stat().st_ino
    with atomic_write(name, keep=True) as draft:
        draft.mkdir()
        (draft / "weights").write_text("latter")
    assert folder.stat().st_ino == before, "who works in it has no other folder under the feet"
    assert (Path.cwd(), (work / "link").is_symlink()) == (work, True)
    assert [(folder / each).read_text() for each in ("mine", "weights")] == ["mine", "latter"]
    assert hidden(tmp_path) == []


# kill -9

WRITER = """
    import os, signal, sys, time
    from pathlib import Path
    from dtbook.artifacts import ArtifactStore
    store = ArtifactStore(sys.argv[1])
    def write(content):
        with store.write("models/reference", stage="test", code=[]) as draft:
            draft.mkdir()
            for name in ("config.json", "model.safetensors"):
                (draft / name).write_text(content)
                yield
"""


def writer(store, script):
    program = textwrap.dedent(WRITER) + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", program, store.root], stdout=subprocess.PIPE, text=True)


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill_while_writing_keeps_the_former_artifact(store):
    process = writer(store, "g = write('new'); next(g); print('half', flush=True); time.sleep(600)")
    assert process.stdout.readline() == "half\n"
    live = hidden(store.root)
    assert live, "the draft of a running process is there"
    with store.write("models/reference", **MADE_BY) as draft:
        draft.write_text("a second writer")
    assert set(live) <= set(hidden(store.root)), "a second writer leaves the draft of a running process alone"
    kill(process)

    assert store.verify() == [], "what is left is ignored"
    assert (store.root / "models/reference").read_text() == "a second writer"
    with store.write("models/reference", **MADE_BY) as draft:
        draft.write_text("the next run")
    assert hidden(store.root) == [], "the next write removes what the killed one left"


def test_kill_between_taking_away_and_putting_a_folder_brings_the_former_one_back(store):
    former = (store.root / "models/reference/model.safetensors").read_bytes()
    process = writer(
        store, "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); list(write('new'))"
    )
    assert process.wait() == -signal.SIGKILL
    assert not (store.root / "models/reference").exists()

    assert (store.path("models/reference") / "model.safetensors").read_bytes() == former
    assert store.verify() == []


def test_what_a_kill_left_unmoved_in_a_folder_that_stays_is_moved_by_the_next_write(tmp_path):
    (tmp_path / "mine").write_text("mine")
    program = """
        import os, signal, sys
        from pathlib import Path
        from dtbook.artifacts import atomic_write
        replace = Path.replace
        with atomic_write(sys.argv[1], keep=True) as draft:
            draft.mkdir()
            for name in ("config.json", "model.safetensors"):
                (draft / name).write_text("new")
            if sys.argv[2] == "moving":
                Path.replace = lambda *names: (replace(*names), os.kill(os.getpid(), signal.SIGKILL))
            else:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    moved = []
    for when in ("writing", "moving"):
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path, when])
        assert ended.returncode == -signal.SIGKILL
        moved.append(sorted(path.name for path in tmp_path.iterdir() if path.is_file()))
    assert moved == [["mine"], ["config.json", "mine"]]
    with atomic_write(tmp_path, keep=True) as draft:
        draft.mkdir()
        assert (tmp_path / "model.safetensors").read_text() == "new"
    assert hidden(tmp_path) == []


def test_kill_at_any_moment_leaves_whole_artifacts(store):
    for attempt in range(8):
        process = writer(store, "print('go', flush=True)\nfor i in range(9**9): list(write(str(i)))")
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.004 * attempt)
        kill(process)
        with suppress(ArtifactError):  # killed with the folder in its place, before the manifest said so
            ArtifactStore(store.root).path("models/reference")
        contents = [path.read_bytes() for path in sorted((store.root / "models/reference").iterdir())]
        assert contents[0] == contents[1] or contents == [b"{}", bytes(range(256))], "halves of two writes"
        assert ArtifactStore(store.root).path("curve.csv"), "its neighbour is as it was"


# The manifest


def test_the_manifest_says_what_made_an_artifact(store):
    entry = json.loads(store.manifest.read_text())["models/reference"]
    files = {"config.json": sha256(b"{}"), "model.safetensors": sha256(bytes(range(256)))}
    assert entry["files"] == files
    assert entry["sha256"] == sha256(json.dumps(files, sort_keys=True).encode())
    assert entry["bytes"] == 258
    assert (entry["stage"], entry["parameters"], entry["seeds"]) == ("test", {"steps": 8000}, [0])
    assert entry["python"] == ".".join(map(str, sys.version_info[:3]))
    assert entry["code"] == provenance.code_behind(["dtbook.artifacts.provenance"])["code"]
    curve = json.loads(store.manifest.read_text())["curve.csv"]
    assert curve["sha256"] == sha256((store.root / "curve.csv").read_bytes())
    assert curve["bytes"] == 15
    assert store.verify() == []


def test_the_same_writes_make_the_same_manifest_in_any_order(tmp_path):
    for folder, names in (("one", "ab"), ("two", "ba")):
        for name in names:
            with ArtifactStore(tmp_path / folder).write(name, **MADE_BY) as draft:
                draft.write_text(name)
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


@dataclass(frozen=True)
class Config:
    lr: float = 3e-4
    quotas: tuple[int, int] = (1, 2)


def test_parameters_may_be_a_dataclass_and_must_be_plain(tmp_path):
    store = ArtifactStore(tmp_path / "data")
    with store.write("a", parameters=Config(), **MADE_BY) as draft:
        draft.write_text("a")
    assert store.entries()["a"]["parameters"] == {"lr": 3e-4, "quotas": [1, 2]}
    for wrong in ({"x": float("nan")}, {"x": object()}):
        with (
            pytest.raises(TypeError, match=r"parameters must hold plain JSON values, not \{'x'"),
            store.write("b", parameters=wrong, **MADE_BY),
        ):
            pytest.fail("the error must come before the work")


@pytest.mark.parametrize("name", ["../outside", "/outside", "", "models/../../outside"])
def test_names_stay_inside(tmp_path, name):
    with (
        pytest.raises(ArtifactError, match="name must be a relative path inside"),
        ArtifactStore(tmp_path / "data").write(name, **MADE_BY),
    ):
        pytest.fail("the error must come before the work")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_current_until_code_parameters_seeds_or_bytes_change(store, monkeypatch):
    made_by = {
        "stage": "test",
        "code": ["dtbook.artifacts.provenance"],
        "parameters": {"steps": 8000},
        "seeds": [0],
    }
    assert store.is_current("models/reference", **made_by)
    for change in ({"stage": "other"}, {"code": []}, {"parameters": {"steps": 1}}, {"seeds": [1]}):
        assert not store.is_current("models/reference", **made_by | change)
    assert not store.is_current("models/other", **made_by)
    with monkeypatch.context() as patch:
        patch.setattr("dtbook.artifacts.provenance.platform.python_version", lambda: "3.0")
        assert not store.is_current("models/reference", **made_by)
    truncate(store.root / "models/reference/config.json")
    assert not store.is_current("models/reference", **made_by)


# Damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, Path.unlink])
@pytest.mark.parametrize(("name", "file"), [("curve.csv", ""), ("models/reference", "model.safetensors")])
def test_a_damaged_artifact_is_named(store, damage, name, file):
    damage(store.root / name / file)
    with pytest.raises(ArtifactError, match=name) as error:
        ArtifactStore(store.root).path(name)
    assert "\n" not in str(error.value)
    assert [name in problem for problem in store.verify()] == [True]


def test_a_file_too_many_is_named(store):
    (store.root / "models/reference/optimizer.bin").write_text("")
    (store.root / "notes.txt").write_text("")
    (store.root / ".cache").write_text("hidden files are nobody's artifacts")
    problems = store.verify()
    assert len(problems) == 2
    assert "models/reference is not what" in problems[0]
    assert "notes.txt is not in" in problems[1]


def test_an_unknown_artifact_is_answered_with_the_known_ones(store):
    with pytest.raises(
        ArtifactError, match=r"names no artifact 'model': it has curve\.csv, models/reference"
    ):
        store.path("model")


def swap(entries):
    keys = entries["curve.csv"].keys() & {"sha256", "bytes"}
    entries["curve.csv"] |= {key: entries["models/reference"][key] for key in keys}
    return entries


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (swap, r"curve\.csv is not what .* says: sha256 is"),
        (lambda entries: entries | {"curve.csv": entries["curve.csv"] | {"bytes": 1}}, "bytes is 15, not 1"),
        (lambda entries: entries | {"curve.csv": {"bytes": 15}}, r"'curve\.csv' has no sha256"),
        (lambda entries: entries | {"curve.csv": None}, r"'curve\.csv' has no size"),
        (lambda entries: entries | {"../x": entries["curve.csv"]}, "'../x' is not a path inside"),
        (lambda entries: entries | {"gone": entries["curve.csv"]}, "gone is missing, though"),
        (lambda entries: entries["models/reference"]["files"].popitem() and entries, "do not add up"),
        (lambda entries: entries["models/reference"].update(files=[1]) or entries, "do not add up"),
        (lambda entries: list(entries), "must map the names"),
    ],
)
def test_a_manifest_that_lies_is_found_out(store, lie, sentence):
    store.manifest.write_text(json.dumps(lie(json.loads(store.manifest.read_text()))))
    problems = store.verify()
    assert len(problems) == 1
    assert re.search(sentence, problems[0])


def test_a_truncated_manifest_is_named(store):
    truncate(store.manifest)
    truncate(store.manifest)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: it is not JSON"):
        store.path("curve.csv")


# Closed doors and company


def in_a_child(task):
    """Run `task` in a forked process without a superuser's rights and return the exception it raises."""

    def run(pipe):
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            task()
        except Exception as error:
            pipe.send((type(error).__name__, str(error)))
        else:
            pipe.send(("nothing", ""))

    receiver, sender = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run, args=(sender,))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def test_a_read_only_folder_is_read_and_its_file_named_when_written(store):
    def write():
        with read_only.write("curve.csv", **MADE_BY):
            pytest.fail("the error must come before the work")

    with tempfile.TemporaryDirectory() as folder:  # the folders of `tmp_path` let nobody else in
        shutil.copytree(store.root, folder, dirs_exist_ok=True)
        Path(folder).chmod(0o555)
        read_only = ArtifactStore(folder)
        assert in_a_child(lambda: read_only.path("curve.csv")) == ("nothing", "")
        sentence = f"[Errno 13] cannot write {folder}/curve.csv (Permission denied)"
        assert in_a_child(write) == ("PermissionError", sentence)
        assert hidden(Path(folder)) == []
        assert read_only.verify() == []
        Path(folder).chmod(0o755)


def test_two_writers_at_once_lose_nothing(tmp_path):
    script = """
        for i in range(15):
            for name in (f"{sys.argv[2]}-{i}", "shared"):
                with store.write(name, stage="test", code=[]) as draft:
                    draft.mkdir()
                    (draft / "content").write_text(sys.argv[2])
    """
    program = textwrap.dedent(WRITER) + textwrap.dedent(script)
    writers = [subprocess.Popen([sys.executable, "-c", program, tmp_path, name]) for name in "ab"]
    assert [process.wait() for process in writers] == [0, 0]
    store = ArtifactStore(tmp_path)
    assert sorted(store.entries()) == sorted([f"{name}-{i}" for name in "ab" for i in range(15)] + ["shared"])
    assert store.verify() == []
    assert hidden(tmp_path) == []


# Fetching


@pytest.fixture
def cache(store, tmp_path):
    return ArtifactStore(tmp_path / "cache", url=store.root.as_uri(), manifest=store.manifest)


def test_what_is_missing_is_fetched_by_hash(store, cache):
    folder = cache.path("models/reference")
    assert folder == cache.root / "models/reference"
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256))
    plain_path = ArtifactStore(cache.root / "two", url=str(store.root), manifest=store.manifest)
    assert plain_path.path("curve.csv").read_text() == "rtg,return\n0,0\n"


def test_an_altered_copy_in_the_cache_is_fetched_again(cache):
    flip_one_bit(cache.path("curve.csv"))
    again = ArtifactStore(cache.root, cache.url, cache.manifest)
    assert again.path("curve.csv").read_text() == "rtg,return\n0,0\n"


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, Path.unlink])
def test_an_altered_source_is_refused(store, cache, damage):
    damage(store.root / "curve.csv")
    with pytest.raises(ArtifactError, match=r"curve\.csv cannot be fetched from file:.*DTBOOK_DATA_URL"):
        cache.path("curve.csv")
    assert not (cache.root / "curve.csv").exists()


def test_no_network_is_said_in_a_sentence(store, tmp_path):
    nobody = "http://127.0.0.1:9/data"  # the discard port: nothing listens there
    cache = ArtifactStore(tmp_path / "cache", nobody, store.manifest)
    with pytest.raises(ArtifactError, match=r"curve\.csv cannot be fetched from http://127.*DTBOOK_DATA_URL"):
        cache.path("curve.csv")


def test_a_cache_is_not_written_to(cache):
    with pytest.raises(ArtifactError, match="is a cache"), cache.write("x", **MADE_BY):
        pytest.fail("the error must come before the work")


def test_the_installed_package_fetches_what_its_manifest_names(store, tmp_path):
    """Without the repository around it: only the package and the manifest that its wheel carries."""
    site = tmp_path / "site"
    shutil.copytree(provenance.PACKAGE, site / "dtbook", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "dtbook/data").mkdir()
    shutil.copy(store.manifest, site / "dtbook/data")
    script = "from dtbook.artifacts import ArtifactStore as S; print(S().path('curve.csv').read_text())"
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/cache")}
    environment = os.environ | home | {"PYTHONPATH": str(site), "DTBOOK_DATA_URL": str(store.root)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "rtg,return\n0,0\n\n", result.stderr
    assert list((tmp_path / "home").rglob("curve.csv"))


def test_a_package_installed_from_git_fetches_from_that_very_commit(monkeypatch):
    record = {"url": "https://example.org/a/book.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}

    def address(record):
        distribution = SimpleNamespace(read_text=lambda name: record and json.dumps(record))
        monkeypatch.setattr("importlib.metadata.distribution", lambda name: distribution)
        return artifact_store._installed_from()

    assert address(record) == "https://example.org/a/book/raw/c0ffee/data"
    assert address({"url": "file:///a/book", "dir_info": {}}) == "file:///a/book/data"
    assert address(None) is None
