"""Scripts in processes of their own that begin with the package imported: nobody waits for torch again.

They are forks of a server that has imported the package and done nothing else, without the type checks of the test run.
All have the server's seed of hashes; what has to hold under any other is compared with a `subprocess`.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver, get_context

FORKS = get_context("forkserver")
PRELOADED = ["dtbook.cli", "dtbook.pipeline.sweep", "torch._dynamo"]  # the last by the first optimizer


def serve() -> None:
    """Start the server, of which the package's own workers are forks too."""
    FORKS.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


class Fork:
    """A script that runs with these arguments, as `python -c` would, and what `subprocess.Popen` says of a process."""

    def __init__(self, script: str, *arguments: object) -> None:
        self._said = tempfile.NamedTemporaryFile("r", suffix=".txt")  # noqa: SIM115 -- open as long as this is
        given = script, ["-c", *map(str, arguments)], dict(os.environ), self._said.name
        self._process = FORKS.Process(target=_execute, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """Return the exit status, once it has ended."""
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        """End it with SIGKILL, where it has not ended by itself, and wait until it has."""
        self._process.kill()
        self.wait()

    def said(self) -> str:
        """Return what it has written to its standard output and error so far."""
        self._said.seek(0)
        return self._said.read()


def _execute(script: str, argv: Sequence[str], environment: dict[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(said, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = list(argv)
    exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})


def lines_of(script: str, *arguments: object) -> list[str]:
    """Return the lines that a script prints; fail with them where it fails."""
    process = Fork(script, *arguments)
    assert process.wait() == 0, process.said()
    return process.said().splitlines()
