"""The commands under faults: full disks, kills, company, closed doors, no network. Nothing lost, one clear sentence.

What single artifacts do under faults stands in test_artifacts.py, the pipeline under kills in test_pipeline.py,
sweeps under dying workers in test_sweep.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from subprocess import PIPE, STDOUT

import psutil
import pytest
from forked import Fork
from test_cli import PARAMETERS, copies, dtbook, executed, printed, write_notebook

from dtbook import cli
from dtbook.artifacts import ArtifactStore, provenance

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]

COMMAND = """
import sys
from pathlib import Path
from dtbook import cli
from dtbook.artifacts import store
store.CHECKOUT = cli.CHECKOUT = Path(sys.argv[1])
cli.main(sys.argv[2:])
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one notebook, in a path with spaces and letters beyond ASCII."""
    folder = tmp_path / "mein Büch 本"
    (folder / "book").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    write_notebook(folder / "notebooks/01_task.ipynb", "print(episodes)", parameters=PARAMETERS)
    monkeypatch.setattr(cli, "CHECKOUT", folder)
    monkeypatch.setattr("dtbook.artifacts.store.CHECKOUT", folder)
    return folder


def start(checkout, *arguments):
    """The command on that checkout, in a process of its own."""
    return Fork(COMMAND, checkout, *arguments)


def kill_all(process):
    """Send SIGKILL to a process and to all that it has started."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.wait()


# A full disk


def on_a_tiny_disk(folder, script):
    """Run a script in a folder that is a disk of 1 MB, where one can be mounted; else with files of 300 kB at most."""
    folder.mkdir()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    mount = f'mount -t tmpfs -o size=1m tmpfs \'{folder}\' && exec "$0" "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounts = not subprocess.run([*unshare, mount, "true"], capture_output=True).returncode
    command = [sys.executable, "-c", ("" if mounts else limit) + textwrap.dedent(script), str(folder)]
    if mounts:
        command = [*unshare, mount, *command]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_full_disk_loses_nothing_and_is_named(tmp_path):
    said = on_a_tiny_disk(
        tmp_path / "tiny disk",
        """
        import sys
        from pathlib import Path
        import numpy as np, pandas as pd
        from dtbook.artifacts import ArtifactStore
        from dtbook.gridworld import Task
        from dtbook.model import DecisionTransformer, DTConfig
        from dtbook.trajectories import play

        store, rng = ArtifactStore(sys.argv[1]), np.random.default_rng(0)
        data = play(Task(), lambda images, *_: rng.integers(0, 3, len(images)), 100_000, rng)
        def model(path):
            DecisionTransformer(DTConfig(d_model=512, n_heads=8)).save_pretrained(path)
        def table(path):
            pd.DataFrame(rng.random((200_000, 3))).to_parquet(path)
        def text(path):
            path.write_text("1" * 3_000_000)
        for name, write in {"model": model, "table": table, "episodes": data.save, "text": text}.items():
            with store.write(name, stage="test", code=[]) as path:
                path.write_text("the former one")
            try:
                with store.write(name, stage="test", code=[]) as path:
                    write(path)
            except OSError as error:
                print(error)
            assert store.path(name).read_text() == "the former one"
        assert store.verify() == []
        print(sorted(path.name for path in store.root.iterdir()))
        """,
    ).splitlines()
    folder = tmp_path / "tiny disk"
    assert said[:4] == [
        f"[Errno 28] cannot write {folder / name} (no space left on the disk)"
        for name in ("model", "table", "episodes", "text")
    ]
    assert said[4] == str([".manifest.lock", "episodes", "manifest.json", "model", "table", "text"]), (
        "no drafts"
    )


def test_a_run_on_a_full_disk_is_one_sentence_and_the_next_one_carries_on(tmp_path):
    said = on_a_tiny_disk(
        tmp_path / "tiny disk",
        f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from click.testing import CliRunner
        from dtbook import cli
        from dtbook.artifacts import store
        from test_cli import write_notebook
        store.CHECKOUT = cli.CHECKOUT = folder = Path(sys.argv[1])
        (folder / "pyproject.toml").touch()
        path, cell = folder / "notebooks/01_big.ipynb", "print(*range(n), sep=chr(10))"
        write_notebook(path, cell, parameters="n = 200_000  # lines")
        result = CliRunner().invoke(cli.main, ["run"])
        print(result.exit_code, result.output)
        print(list((folder / "book/_executed").glob("*.ipynb")))
        write_notebook(path, cell, parameters="n = 3  # lines")
        print(CliRunner().invoke(cli.main, ["run"]).exit_code)
        """,
    ).splitlines()
    copy = tmp_path / "tiny disk/book/_executed/01_big.ipynb"
    assert said[0] == f"1 Error: [Errno 28] cannot write {copy} (no space left on the disk)"
    assert said[-2:] == ["[]", "0"]


# kill -9


def test_a_run_that_was_killed_leaves_no_half_copy_and_the_next_one_carries_on(checkout, tmp_path):
    write_notebook(checkout / "notebooks/02_slow.ipynb", "import time; print('here', flush=True)", f"""
import pathlib
while not pathlib.Path({str(tmp_path / "go")!r}).exists():
    pathlib.Path({str(tmp_path / "began")!r}).touch()
    time.sleep(0.05)""")  # fmt: skip
    process = start(checkout, "run", "--workers", "1")
    while not (tmp_path / "began").exists():
        assert process.poll() is None, process.said()
        time.sleep(0.05)
    kill_all(process)
    assert copies(checkout) == ["01_task.ipynb"]
    (tmp_path / "go").touch()
    output = dtbook("run").output
    assert [line.partition(": ")[2][:4] for line in output.splitlines()[:2]] == ["up t", "done"]
    assert printed(executed(checkout, "02_slow")) == ["here\n"]
    assert copies(checkout) == ["01_task.ipynb", "02_slow.ipynb"]
    assert list((checkout / "book/_executed").glob(".*.tmp")) == [], (
        "the next run removes what the killed one left"
    )


def test_a_build_that_was_killed_leaves_the_former_book_and_the_next_one_carries_on(checkout):
    (checkout / "book/_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (checkout / "book/_config.yml").write_text(
        "title: A book\nonly_build_toc_files: true\nexclude_patterns: ['.*']\n"
    )
    (checkout / "book/intro.md").write_text("# A book\n\nThe first edition.\n")
    assert dtbook("build").exit_code == 0
    page = checkout / "book/_build/html/book/intro.html"
    former = {path: path.stat().st_mtime_ns for path in (checkout / "book/_build").rglob("*")}
    (checkout / "book/intro.md").write_text("# A book\n\nThe second edition.\n")
    killed_with_pages = 0
    for depth in ("*", "html", "html/book/intro.html"):
        process = start(checkout, "build")
        while not any(path for path in (checkout / "book").glob(f"._build.*.tmp/_build/{depth}")):
            assert process.poll() is None, process.said()
            time.sleep(0.01)
        killed_with_pages += bool(process.poll() is None)
        kill_all(process)
        assert {path: path.stat().st_mtime_ns for path in (checkout / "book/_build").rglob("*")} == former
        assert "The first edition." in page.read_text()
    assert killed_with_pages == 3
    assert dtbook("build").exit_code == 0
    assert "The second edition." in page.read_text()
    assert [path.name for path in (checkout / "book").glob(".*")] == []


def test_a_build_that_breaks_off_keeps_the_former_book(checkout):
    (checkout / "book/_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (checkout / "book/_config.yml").write_text("title: A book\nonly_build_toc_files: true\n")
    (checkout / "book/intro.md").write_text("# A book\n\nThe first edition.\n")
    assert dtbook("build").exit_code == 0
    (checkout / "book/_toc.yml").write_text("format: jb-book\nroot: book/nowhere\n")
    assert dtbook("build").exit_code != 0
    assert "The first edition." in (checkout / "book/_build/html/book/intro.html").read_text()


# Company


def test_two_runs_at_once_execute_each_notebook_once(checkout, tmp_path):
    log = tmp_path / "log"
    cell = f"import time; time.sleep(1)\nwith open({str(log)!r}, 'a') as file: file.write('x')"
    write_notebook(checkout / "notebooks/01_task.ipynb", cell)
    write_notebook(checkout / "notebooks/02_next.ipynb", cell)
    runs = [start(checkout, "run") for _ in range(2)]
    assert [process.wait() for process in runs] == [0, 0]
    assert log.read_text() == "xx"
    assert dtbook("run").output.count("up to date") == 2


def test_of_two_builds_at_once_the_second_waits(checkout):
    (checkout / "book/_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (checkout / "book/_config.yml").write_text(
        "title: A book\nonly_build_toc_files: true\nexclude_patterns: ['.*']\n"
    )
    (checkout / "book/intro.md").write_text("# A book\n")
    builds = [start(checkout, "build") for _ in range(2)]
    drafts = 0
    while any(process.poll() is None for process in builds):
        drafts = max(drafts, len(list((checkout / "book").glob("._build.*.tmp"))))
        time.sleep(0.01)
    assert [process.wait() for process in builds] == [0, 0]
    assert drafts == 1
    assert (checkout / "book/_build/html/book/intro.html").exists()
    assert [path.name for path in (checkout / "book").glob(".*")] == []


# Closed doors


def without_rights():
    """What a command begins with where the tests run as root, so that closed doors are closed to it too."""
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []


@pytest.fixture
def close():
    """Closes a folder and all below to writing and, so that it can be removed, opens them again at the end."""
    closed = []

    def shut(path):
        closed.append(path)
        for below in [path, *path.rglob("*")]:
            below.chmod(0o555 if below.is_dir() else 0o444)

    yield shut
    for path in closed:
        for below in [path, *path.rglob("*")]:
            below.chmod(0o755)


def test_notebooks_run_where_data_and_package_are_read_only(checkout, tmp_path, close):
    """Nothing but the folder of the executed copies and the home can be written to."""
    with ArtifactStore().write("curve.csv", stage="test", code=[]) as draft:
        draft.write_text("0,0\n")
    site = tmp_path / "site"
    shutil.copytree(provenance.PACKAGE, site / "dtbook", ignore=shutil.ignore_patterns("__pycache__"))
    cell = """from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import DynamicObstaclesVectorEnv
import dtbook, pathlib
envs = DynamicObstaclesVectorEnv(2)
envs.reset(seed=0)
print(envs.step([0, 0])[1].tolist(), pathlib.Path(dtbook.__file__).parent.parent)"""
    write_notebook(checkout / "notebooks/01_task.ipynb", cell, parameters=PARAMETERS)
    home, copies = tmp_path / "home", checkout / "book/_executed"
    for folder in (home, copies):
        folder.mkdir()
    for folder in (checkout, site):
        close(folder)
    copies.chmod(0o755)
    names = ("HOME", "XDG_CACHE_HOME", "JUPYTER_RUNTIME_DIR")
    environment = os.environ | {"PYTHONPATH": str(site)} | dict.fromkeys(names, str(home))

    def run(*arguments):
        command = [*without_rights(), sys.executable, "-c", COMMAND, checkout, "run", *arguments]
        done = subprocess.run(command, env=environment, cwd=home, text=True, stdout=PIPE, stderr=STDOUT)
        return done.stdout, done.returncode

    output, code = run()
    assert code == 0, output
    assert f"[0.0, 0.0] {site}\n" in printed(executed(checkout))
    copies.chmod(0o555)
    assert run()[0].startswith("[1/1] 01_task: up to date"), "a copy that is current needs no writing"
    output, code = run("-p", "episodes=4")
    assert code == 1
    assert output == f"Error: [Errno 13] Permission denied: '{checkout / 'runs'}'\n"


def test_two_artifacts_that_changed_places_are_both_named(checkout):
    for name in "ab":
        with ArtifactStore().write(name, stage="test", code=[]) as draft:
            draft.write_text(name)
    a, b = (checkout / "data" / name for name in "ab")
    a.rename(checkout / "c")
    b.rename(a)
    (checkout / "c").rename(b)
    output = dtbook("verify").output
    assert f"{a} is not what" in output
    assert f"{b} is not what" in output
    write_notebook(checkout / "notebooks/01_task.ipynb", "from dtbook.artifacts import ArtifactStore", f"""
from pathlib import Path
ArtifactStore(Path({str(checkout / "data")!r})).path("a")""")  # fmt: skip
    error = dtbook("run").output.splitlines()[-1]
    assert error.startswith("Error: 01_task failed in cell [2], `")
    assert f"ArtifactError: {a} is not what" in error
