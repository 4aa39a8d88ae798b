"""The pages of the built book in a real browser: Chromium driven by Playwright, without other hosts."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Response, Route, sync_playwright

from dtbook.pages.printing import FLAGS, HOW_TO_INSTALL, find_chromium

__all__ = ["HOW_TO_INSTALL", "draw_all", "find_chromium", "launched", "served", "visit"]


@contextmanager
def launched(program: str) -> Iterator[Browser]:
    """A browser without a window, closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS])
        yield browser
        browser.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, under: str, **kwargs: Any) -> None:
        self.under = under
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.removeprefix(self.under))

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path, under: str = "/") -> Iterator[str]:
    """The address under which a folder is served to this machine, until the end; its path is `under`."""
    handler = functools.partial(_Quiet, directory=str(folder), under=under)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{under}"
        server.shutdown()


@dataclass
class Visit:
    """A page that was opened, with all that went wrong while it was: empty lists if nothing did."""

    page: Page
    console: list[str] = field(default_factory=list)
    """Errors and warnings on the console, and uncaught exceptions."""
    failed: list[str] = field(default_factory=list)
    """Requests without an answer or with one that says error."""
    outside: list[str] = field(default_factory=list)
    """Requests to anything but the book, which were blocked."""

    def problems(self) -> list[str]:
        """All of it."""
        return self.console + self.failed + self.outside


WATCH_SHIFTS = """window.shift = 0;
new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shift += entry.value; })
  .observe({ type: "layout-shift", buffered: true });"""


@contextmanager
def visit(
    browser: Browser, address: str, page: str, theme: str = "light", width: int = 1280, scripts: bool = True
) -> Iterator[Visit]:
    """Open a page of the book, all of which begin with `address`, in a theme; wait until it is quiet."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, java_script_enabled=scripts
    )
    context.set_default_timeout(300_000)  # a page that hangs fails; one on a busy machine does not
    context.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
    context.add_init_script(WATCH_SHIFTS)
    opened = Visit(context.new_page())
    context.route("**/*", functools.partial(_guard, opened, address))
    _listen(opened)
    opened.page.goto(address + page, wait_until="networkidle")
    yield opened
    context.close()


def _guard(opened: Visit, address: str, route: Route) -> None:
    if route.request.url.startswith((address, "data:", "blob:")):
        route.continue_()
    else:
        opened.outside.append(route.request.url)
        route.abort()


def _listen(opened: Visit) -> None:
    """Write down what the page complains of."""

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            opened.console.append(f"{message.type}: {message.text}")

    def response(answer: Response) -> None:
        if answer.status >= 400:
            opened.failed.append(f"{answer.url}: {answer.status}")

    opened.page.on("console", console)
    opened.page.on("response", response)
    opened.page.on("pageerror", lambda error: opened.console.append(f"exception: {error}"))
    opened.page.on("requestfailed", lambda asked: opened.failed.append(f"{asked.url}: {asked.failure}"))


def draw_all(page: Page) -> None:
    """Scroll to each figure in turn, as a reader does, and wait until it has been drawn."""
    for k in range(page.locator(".book-figure").count()):
        page.evaluate(
            "(k) => document.querySelectorAll('.book-figure')[k].scrollIntoView({ block: 'center' })", k
        )
        page.wait_for_function("(k) => document.querySelectorAll('.book-figure')[k].dataset.drawn", arg=k)
    page.evaluate("scrollTo(0, 0)")
