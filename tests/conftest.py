"""What holds for every test: one thread a process, no download of the post's weights, no skip in CI."""

import os
from functools import cache

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")


@cache
def has_post_weights():
    """Whether a copy is named or was fetched before; imported here, as jaxtyping has to be first."""
    from dtbook.artifacts.post_weights import COPY, REFUSED, find_post_checkpoint, named_copy

    if named_copy():
        os.environ[COPY] = str(named_copy())  # kernels and commands run in other folders
    if there := find_post_checkpoint() is not None:
        return there
    os.environ[REFUSED] = "The post's weights are not at hand, and tests download nothing."
    return there


def pytest_sessionstart(session):
    try:
        has_post_weights()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from error


def lacks_post_weights(item):
    return item.get_closest_marker("post_weights") is not None and not has_post_weights()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if lacks_post_weights(item):
        pytest.skip("needs the post's weights: DTBOOK_POST_MODEL may name a copy")


def fail_if_skipped_in_ci(report):
    """Turn a skip into a failure where CI=true, so that nothing goes untested there unseen."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, which CI does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return report if lacks_post_weights(item) else fail_if_skipped_in_ci(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped_in_ci((yield))


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Without the type checks of the test run, so that what the package itself does with a value is reached."""
    import jaxtyping  # not before its hook

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_itemcollected(item):
    if "browser" in item.fixturenames:
        item.add_marker("slow")


FIRST = (
    "test_reproduce",
    "test_pipeline",
)  # their fixtures take longest, and a file that is begun stays together
LAST = (
    "test_pages",
    "test_playground",
    "test_playground_widget",
)  # hundreds of short tests, with which two processes end together


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (item.path.stem in LAST) - (item.path.stem in FIRST))


@pytest.fixture(scope="session")
def browser():
    """The one browser of this process: Playwright allows a second at once in none."""
    from browser import HOW_TO_INSTALL, find_chromium, launched  # imports Playwright, which few tests need

    program = find_chromium()
    if program is None:
        pytest.skip(HOW_TO_INSTALL)
    with launched(program) as opened:
        yield opened


@pytest.fixture(scope="session")
def forks():
    """Processes that start are forks of one that has imported the package; each test process has its own."""
    from forked import serve

    serve()
