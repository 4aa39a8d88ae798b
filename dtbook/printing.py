"""The whole book as one PDF: all pages as one, its figures drawn, printed by Chromium with an outline."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HOW_TO_INSTALL = (
    "no Chromium found: install one with `playwright install chromium` or your system's package manager "
    "(`apt install chromium`), or let the environment variable DTBOOK_CHROMIUM name one"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox",  # as in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",  # and no service of the browser's own, which would call other hosts
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
FOOTER = (
    '<div style="font: 8px system-ui; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
)
DRAW_ALL = """async () => {
  for (const box of document.querySelectorAll(".book-figure")) {
    box.scrollIntoView();
    while (!box.dataset.drawn) await new Promise((done) => setTimeout(done, 50));
  }
  await window.MathJax?.startup?.promise;
}"""


def find_chromium() -> str | None:
    """The browser that DTBOOK_CHROMIUM names, the system's, or Playwright's own; None if there is none."""
    from playwright.sync_api import sync_playwright

    if given := os.environ.get("DTBOOK_CHROMIUM"):
        if shutil.which(given) is None:
            raise FileNotFoundError(f"DTBOOK_CHROMIUM must name a browser's program, not {given!r}")
        return given
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def print_book(root: Path, target: Path) -> None:
    """Build all pages of the book under `root` as one and print it to `target`; executed notebooks must be there.

    Raises FileNotFoundError where there is no Chromium, CalledProcessError where the pages do not build.
    """
    from playwright.sync_api import sync_playwright

    program = find_chromium()
    if program is None:
        raise FileNotFoundError(HOW_TO_INSTALL)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        pages = Path(scratch) / "pages"
        command = [sys.executable, "-m", "sphinx", "-q", "-c", "book", "-b", "singlehtml"]
        subprocess.run([*command, "-d", f"{scratch}/doctrees", ".", str(pages)], cwd=root, check=True)
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS])
        page = browser.new_page(color_scheme="light", viewport={"width": 900, "height": 1200})
        page.set_default_timeout(600_000)
        page.add_init_script("localStorage.mode = localStorage.theme = 'light'")
        page.goto((pages / "book" / "intro.html").as_uri())
        page.evaluate(DRAW_ALL)
        target.parent.mkdir(parents=True, exist_ok=True)
        margin: Any = {"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
        shown: dict[str, Any] = {
            "display_header_footer": True,
            "header_template": "<span></span>",
            "footer_template": FOOTER,
        }
        page.pdf(path=target, format="A4", margin=margin, outline=True, tagged=True, **shown)
        browser.close()
