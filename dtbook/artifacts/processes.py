"""Local processes, of one thread each, that end with the one that started them, and what to call a cluster's."""

import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context
from typing import Any, TypeVar

from tqdm import tqdm

from dtbook.artifacts.store import ArtifactError

T = TypeVar("T")
_CONTEXT: Any = get_context("forkserver" if sys.platform == "linux" else "spawn")


class Processes(Executor):
    """Local processes of one thread each. Each is a pool of its own, so that one that dies takes no other's job along.

    There are as many as jobs were ever running at once. They end with this process, however it ends. On Linux they are
    forks of one process that has imported what the first job needs, so that its imports are waited for once; an edited
    module is imported anew by the next program. Elsewhere each imports for itself.
    """

    def __init__(self) -> None:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        self._last: dict[ProcessPoolExecutor, Future[Any]] = {}
        self._alive, self._held = _CONTEXT.Pipe(duplex=False)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in an idle process, or in a new one."""
        while True:
            pool = next((pool for pool, last in self._last.items() if last.done()), None)
            pool = pool or self._start(function)
            try:
                self._last[pool] = pool.submit(function, *args, **kwargs)
                return self._last[pool]
            except BrokenProcessPool:
                self._last.pop(pool, None)

    def _start(self, function: Callable[..., Any]) -> ProcessPoolExecutor:
        if sys.platform == "linux":
            _CONTEXT.set_forkserver_preload(["__main__", function.__module__])
        return ProcessPoolExecutor(1, _CONTEXT, _begin, (self._alive, dict(os.environ)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes; what is still running is broken off."""
        if not all(last.done() for last in self._last.values()):
            self._held.close()
        for pool in self._last:
            pool.shutdown(wait, cancel_futures=cancel_futures)
        self._held.close()
        self._alive.close()


def _begin(alive: connection.Connection, environment: dict[str, str]) -> None:
    """Begin a process with an environment, which ends when nobody holds the other end of `alive`.

    No other process draws on its progress bars; tqdm's own lock would be a semaphore that a killed process leaves.
    """
    os.environ.clear()
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: connection.Connection) -> None:
    connection.wait([alive])
    os._exit(1)


def in_order(task: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """Yield what `task(*job)` returns for each job, in their order, with `workers` processes at work on them.

    One worker is this process. Of errors the first in the jobs' order is raised. After any of them no job is begun;
    those that were are brought to their end.
    """
    if min(workers, len(jobs)) < 2:
        yield from itertools.starmap(task, jobs)
        return
    begun: list[Future[T]] = []
    told = 0
    with Processes() as processes:
        while told < len(jobs):
            running = [future for future in begun if not future.done()]
            if len(running) < workers and len(begun) < len(jobs) and not _any_failed(begun):
                begun.append(processes.submit(task, *jobs[len(begun)]))
            elif not begun[told].done():
                wait(running, return_when=FIRST_COMPLETED)
            else:
                if begun[told].exception():
                    wait(running)
                yield begun[told].result()
                told += 1


def _any_failed(futures: Sequence[Future[T]]) -> bool:
    return any(future.done() and future.exception() for future in futures)


_ADDRESS = re.compile(r"(?:(?:tcp|tls|ucx|wss?)://)?(?:\[[\da-fA-F:.%]+\]|[^\s/:]+):(\d{1,5})|inproc://\S+")


def check_scheduler(address: str | None) -> str | None:
    """Return the address of a Dask scheduler, if there is one; raise ArtifactError where it cannot be that of any."""
    match = None if address is None else _ADDRESS.fullmatch(address)
    if address is not None and not (match and 0 < int(match[1] or 1) < 2**16):
        raise ArtifactError(f"--scheduler must be an address like tcp://host:8786, not {address!r}")
    return address
