"""What holds for every test: one thread a process, and no skip in continuous integration."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")


def fail_if_skipped_in_ci(report):
    """Turn a skip into a failure where CI=true, so that nothing goes untested there unseen."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, which CI does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_if_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped_in_ci((yield))


def pytest_itemcollected(item):
    if "browser" in item.fixturenames:
        item.add_marker("slow")


@pytest.fixture(scope="session")
def browser():
    """The one browser of this process: Playwright allows a second at once in none."""
    from browser import HOW_TO_INSTALL, find_chromium, launched  # imports Playwright, which few tests need

    program = find_chromium()
    if program is None:
        pytest.skip(HOW_TO_INSTALL)
    with launched(program) as opened:
        yield opened
