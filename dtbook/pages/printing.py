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
MARGIN: Any = {"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
SHOWN: dict[str, Any] = {
    "display_header_footer": True,
    "header_template": "<span></span>",
    "footer_template": FOOTER,
}
STYLE = """
#jb-print-docs-body { text-align: center; }
#jb-print-docs-body h1 { margin-top: 15vh; }
#jb-print-docs-body nav { text-align: start; }
#jb-print-toc { break-before: page; }
#jb-print-toc :is(li, p) { line-height: 1.35; margin: 0; padding: 0; }
#jb-print-toc p.caption { margin-top: 0.6rem; }
article.bd-article, [id^="document-"] + section { break-before: page; }
[id^="document-"] + section > h2 { font-size: 2rem; margin-top: 0; }
.bd-article dl.py { font-size: 0.78rem; line-height: 1.4; }
"""
ARRANGE = """() => {
  const chapters = {};
  for (const place of document.querySelectorAll("[id^='document-']")) {
    const name = place.id.replace("document-", "");
    chapters[name] = place.nextElementSibling;
    chapters[name.split("/").pop()] ??= place.nextElementSibling; // some paths say no more; the API comes last
  }
  for (const chapter of Object.values(chapters))
    for (const part of chapter.querySelectorAll("section[id]"))
      if (part !== document.getElementById(part.id)) part.removeAttribute("id"); // "results": each chapter has one
  for (const entry of document.querySelectorAll("div.citation[id]")) {
    for (const link of document.querySelectorAll(`a[href$="#${entry.id}"][title]`)) link.href = "#entry-" + entry.id;
    entry.id = "entry-" + entry.id;
  }
  for (const link of document.querySelectorAll("a[href]")) {
    const [path, anchor] = link.getAttribute("href").split("#");
    if (/^[a-z]+:/.test(path)) continue;
    const name = (anchor?.startsWith("document-") ? anchor.replace("document-", "") : path).replace(".html", "");
    const place = chapters[name] ?? chapters[name.split("/").pop()];
    if (place && (!anchor || anchor.startsWith("document-"))) link.setAttribute("href", "#" + place.id);
    else if (anchor && document.getElementById(anchor)) link.setAttribute("href", "#" + anchor);
    else link.removeAttribute("href"); // a file to download, which lies beside the pages and not in here
  }
  const state = document.querySelector(".build-state dd");
  document.querySelector("#jb-print-docs-body h1")?.after(state?.cloneNode(true) ?? "");
}"""
"""Makes all links lead to a place in the same page, and puts what was built on the title page."""
DRAW_ALL = """async () => {
  for (const box of document.querySelectorAll(".book-figure")) {
    box.scrollIntoView();
    while (!box.dataset.drawn) await new Promise((done) => setTimeout(done, 50));
  }
  await window.MathJax?.startup?.promise;
}"""


def find_chromium() -> str | None:
    """Return the browser that DTBOOK_CHROMIUM names, the system's, or Playwright's own; None if there is none."""
    from playwright.sync_api import sync_playwright

    if given := os.environ.get("DTBOOK_CHROMIUM"):
        if shutil.which(given) is None:
            raise FileNotFoundError(f"DTBOOK_CHROMIUM must name a browser's program, not {given!r}")
        return given
    if program := next(filter(None, map(shutil.which, NAMES)), None):
        return program
    with sync_playwright() as playwright:
        bundled = playwright.chromium.executable_path
    return bundled if Path(bundled).exists() else None


def print_book(root: Path, target: Path) -> None:
    """Build all pages of the book under `root` as one and print it to `target`; executed notebooks must be there.

    Raises FileNotFoundError where there is no Chromium, CalledProcessError where the pages do not build.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch) / "pages"
        command = [sys.executable, "-m", "sphinx", "-q", "-c", "book", "-b", "singlehtml"]
        subprocess.run([*command, "-d", f"{scratch}/doctrees", ".", str(pages)], cwd=root, check=True)
        book = pages / "whole.html"
        (pages / "book" / "intro.html").rename(book)  # Sphinx writes its links as if it lay there
        print_page(book, target)


def print_page(source: Path, target: Path) -> None:
    """Print the page of HTML `source`, its figures drawn and its links leading within it, to the PDF `target`.

    Raises FileNotFoundError where there is no Chromium, or where a style, script or picture of the page is missing.
    """
    from playwright.sync_api import sync_playwright

    program = find_chromium()
    if program is None:
        raise FileNotFoundError(HOW_TO_INSTALL)
    missing: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS])
        page = browser.new_page(color_scheme="light", viewport={"width": 900, "height": 1200})
        page.set_default_timeout(600_000)
        page.on("requestfailed", lambda request: missing.append(request.url))
        page.add_init_script("localStorage.mode = localStorage.theme = 'light'")
        page.goto(source.as_uri())
        missing = [url for url in missing if not url.endswith("/searchindex.js")]  # nothing searches on paper
        if missing:
            raise FileNotFoundError(f"the page to print lacks {missing[0]} and {len(missing) - 1} more")
        page.evaluate(DRAW_ALL)
        page.add_style_tag(content=STYLE)
        page.evaluate(ARRANGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        page.pdf(path=target, format="A4", margin=MARGIN, outline=True, tagged=True, **SHOWN)
        browser.close()
