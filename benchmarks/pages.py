"""Weight and speed of the built pages: own bytes, largest contentful paint, layout shift; the CPU slowed 4 times."""

import sys
from pathlib import Path

from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browser import HOW_TO_INSTALL, find_chromium, launched, served  # noqa: E402

HTML = ROOT / "book" / "_build" / "html"
SLOWDOWN, RUNS = 4, 3
WATCH = """window.seen = { paint: 0, shift: 0 };
new PerformanceObserver((list) => { for (const e of list.getEntries()) window.seen.paint = e.startTime; })
  .observe({ type: "largest-contentful-paint", buffered: true });
new PerformanceObserver((list) => { for (const e of list.getEntries()) window.seen.shift += e.value; })
  .observe({ type: "layout-shift", buffered: true });"""


def weight(path):
    """Bytes of a page and the pictures that are its own."""
    images = BeautifulSoup(path.read_text(), "html.parser").article.select("img[src]:not([src^='data:'])")
    return sum(file.stat().st_size for file in {path, *(path.parent / image["src"] for image in images)})


def measured(browser, address):
    """Seconds until the largest paint, and the layout shift of the first three seconds."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(300_000)
    page = context.new_page()
    page.add_init_script(WATCH)
    context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": SLOWDOWN})
    page.goto(address, wait_until="load")
    page.wait_for_timeout(3000)
    seen = page.evaluate("seen")
    context.close()
    return seen["paint"] / 1000, seen["shift"]


def main():
    program = find_chromium()
    if program is None or not HTML.exists():
        sys.exit(HOW_TO_INSTALL if program is None else "there is no built book: `make book` builds it")
    pages = [*sorted(HTML.glob("notebooks/*.html")), *sorted(HTML.glob("book/*.html"))]
    print(f"{'page':32} {'kB':>6} {'LCP, s (median, worst)':>24} {'shift':>6}")
    with launched(program) as browser, served(HTML) as address:
        for path in pages:
            runs = [measured(browser, address + path.relative_to(HTML).as_posix()) for _ in range(RUNS)]
            paints = sorted(paint for paint, _ in runs)
            lcp = f"{paints[RUNS // 2]:.2f}, {paints[-1]:.2f}"
            print(
                f"{path.stem:32} {weight(path) / 1000:6.0f} {lcp:>24} {max(shift for _, shift in runs):6.3f}"
            )


if __name__ == "__main__":
    main()
