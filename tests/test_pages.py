"""The built book in a real browser that can reach no other host: clean, drawn, readable, in both themes."""

import os
import re
import tomllib
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse
from xml.etree import ElementTree

import links
import numpy as np
import pandas as pd
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from browser import draw_all, served, visit
from bs4 import BeautifulSoup
from playwright.sync_api import TimeoutError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
HTML = ROOT / "book" / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
CHAPTERS = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
API = next(chapter for chapter in TOC["parts"][-1]["chapters"] if chapter["file"] == "book/api")
ROOMS = [f"{section['file']}.html" for section in API["sections"]]
PAGES = [f"{name}.html" for name in (TOC["root"], *CHAPTERS)]
NOTEBOOK_PAGES = [page for page in PAGES if page.startswith("notebooks/")]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
UNDER = urlparse(URLS["Book"]).path
SCREENSHOTS = os.environ.get(
    "DTBOOK_SCREENSHOTS"
)  # a folder for a picture of every page, where one wants them
WIDTHS = (360, 768, 1440)
OTHER_PAGES = ["book/api/model.html", "404.html", "genindex.html", "search.html?q=agent"]


@pytest.fixture(scope="session")
def book():
    """The folder of the pages, if they are there and not older than what they are made from."""
    index = HTML / "searchindex.js"  # written last
    if not index.exists():
        pytest.skip("there is no built book at book/_build/html: `make book` builds it")
    sources = [path for path in (ROOT / "book").rglob("*") if path.is_file() and "_build" not in path.parts]
    sources = [path for path in sources if "__pycache__" not in path.parts] + [
        *(ROOT / "notebooks").glob("*.ipynb")
    ]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > index.stat().st_mtime:
        pytest.skip(f"the built book is older than {newest.relative_to(ROOT)}: `make book` builds it anew")
    return HTML


@pytest.fixture(scope="session")
def address(book):
    with served(book, UNDER) as url:
        yield url


def undrawn(page, theme):
    """The descriptions of the figures that hold no drawing of their data in this theme."""
    return page.evaluate(
        """(theme) => [...document.querySelectorAll(".book-figure")].filter((box) => {
          const marks = ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image, .book-attention canvas";
          return box.dataset.drawn !== theme || !box.querySelector(marks);
        }).map((box) => box.ariaLabel)""",
        theme,
    )


def overflow(page):
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.scrollingElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_page_is_clean_drawn_and_accessible(browser, address, page):
    """On a wide screen in the light theme, from a server; a chapter's data are looked at last."""
    with visit(browser, address, page, "light", 1440) as opened:
        draw_all(opened.page)
        assert opened.page.evaluate("shift") < 0.1 or page not in PAGES  # search results come in by and by
        check_page(opened, page, "light", 1440)
        open_all_data(opened.page)
        assert opened.problems() == []
        opened.page.evaluate(KEEP_FIRST_ROWS)
        assert violations(opened.page) == []


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_page_is_clean_drawn_and_accessible_on_a_phone(browser, book, address, page):
    """In the dark theme; the book's pages from their files, those that only a server shows from a server."""
    start = address if page in OTHER_PAGES else book.as_uri() + "/"
    with visit(browser, start, page, "dark", 360) as opened:
        draw_all(opened.page)
        assert opened.page.evaluate("shift") < 0.1 or page not in PAGES
        formulas = opened.page.locator(".math")
        assert opened.page.locator("mjx-container").count() == formulas.count()
        check_page(opened, page, "dark", 360)
        assert violations(opened.page) == []


def check_page(opened, name, theme, width):
    """Nothing went wrong, all is drawn in this theme, and nothing is wider than any of the windows, this one last."""
    page = opened.page
    assert opened.problems() == []
    assert undrawn(page, theme) == []
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert overflow(page) <= 0
    for other in (*(w for w in WIDTHS if w != width), width):
        page.set_viewport_size({"width": other, "height": 900})
        draw_all(page)
        # the theme slides its sidebar in and out
        page.wait_for_function("document.getAnimations().every((a) => a.playState !== 'running')")
        assert overflow(page) <= 0, other
        if SCREENSHOTS:
            picture = re.sub(r"\W+", "_", name.partition(".html")[0])
            page.screenshot(path=Path(SCREENSHOTS) / f"{picture}_{theme}_{other}.png", full_page=True)


def open_all_data(page):
    """Open the table under every drawn figure; it is made then, with a file to download."""
    figures = page.locator("figure:has(.book-figure)")
    for k in range(figures.count()):
        figures.nth(k).locator("details.figure-data > summary").click()
        figures.nth(k).locator("details tbody tr").first.wait_for()
        assert figures.nth(k).locator("a[download]").get_attribute("href").startswith("blob:")


# axe-core looks at each cell of a table, and one row is made as any other.
KEEP_FIRST_ROWS = """for (const row of document.querySelectorAll("details.figure-data tbody tr:nth-child(n + 20)"))
  row.remove();"""


ALL_REACHED = """[...document.querySelectorAll("pre, .cell_output > .output, .pst-scrollable-table-container")].every(
  (box) => (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) === (box.tabIndex === 0))"""


def violations(page):
    """What axe-core finds that keeps people out: its serious and critical violations, with where they are.

    It fetches the style sheets once more, so what the page itself complains of is looked at before. The theme lets the
    keyboard reach what scrolls 300 ms after the last change of window or page.
    """
    with suppress(TimeoutError):  # then axe-core says what cannot be reached
        page.wait_for_function(ALL_REACHED, timeout=20_000)
    found = Axe().run(page).response["violations"]
    return [
        (violation["id"], [node["target"] for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def test_the_data_are_those_of_the_figure(browser, address):
    table = pd.read_parquet(ROOT / "data/seed_10/calibration.parquet").query("acting == 'greedy'")
    with visit(browser, address, "notebooks/04_calibration.html") as opened:
        figure = opened.page.locator("#fig-calibration")
        figure.locator("details.figure-data > summary").click()
        figure.locator("tbody tr").first.wait_for()
        rows = [row.split("\t") for row in figure.locator("tbody").inner_text().splitlines()]
    ours = [
        (float(rtg), float(mean))
        for panel, name, rtg, mean, *_ in rows
        if (panel, name[:4]) == ("greedy", "this")
    ]
    assert np.array(ours) == pytest.approx(table[["rtg", "mean"]].to_numpy(), abs=1e-4)


def test_all_code_opens_at_once_and_with_the_keyboard(browser, address):
    with visit(browser, address, NOTEBOOK_PAGES[0]) as opened:
        page = opened.page
        folded = page.locator("div.cell details.hide")
        assert page.locator("div.cell details.hide[open]").count() == 0
        page.locator("button.show-code").press("Enter")
        assert page.locator("div.cell details.hide[open]").count() == folded.count() > 0
        page.locator("figure details.figure-data > summary").first.press("Enter")
        page.locator("details.figure-data[open] tbody tr").first.wait_for()


def test_definition_shows_when_the_term_is_reached(browser, address):
    with visit(browser, address, NOTEBOOK_PAGES[0]) as opened:
        term = opened.page.locator(".defined").first
        assert not term.locator(".definition").is_visible()
        term.locator("a").focus()
        assert term.locator(".definition").is_visible()


@pytest.mark.parametrize("page", [*PAGES, *ROOMS, "404.html", "genindex.html"])
def test_links_lead_somewhere(book, page):
    assert links.broken(book / page, book, UNDER) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "b.html").write_text("<p id='there'>")
    hrefs = [
        "b.html",
        "b.html#there",
        "#",
        "https://example.org",
        "b.html#gone",
        "c.html",
        "/x/b.html",
        "/y/b.html",
    ]
    (tmp_path / "a.html").write_text("".join(f"<a href='{href}'>" for href in hrefs))
    assert links.broken(tmp_path / "a.html", tmp_path, "/x/") == ["b.html#gone", "c.html", "/y/b.html"]
    assert links.outside([tmp_path / "a.html"]) == {"https://example.org": "a.html"}


@pytest.mark.parametrize("page", [page for page in PAGES if "play" not in page])
def test_page_is_light(book, page):
    soup = BeautifulSoup((book / page).read_text(), "html.parser")
    own = {book / page} | {(book / page).parent / image["src"] for image in soup.article.select("img[src]")}
    assert sum(path.stat().st_size for path in own) < 1.5e6


def test_the_playground_is_light_and_every_model_and_preset_can_be_chosen(browser, book, address):
    with visit(browser, address, "notebooks/13_play.html") as opened:
        page = opened.page
        page.wait_for_selector(".dtp-room svg")
        loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
        weights = [Path(urlparse(url).path).name for url in loaded if "/playground-" in url]
        sizes = [(book / "_static" / name).stat().st_size for name in weights]
        assert sum(sizes) + (book / "notebooks/13_play.html").stat().st_size <= 2e6

        def says(start):
            script = "(start) => document.querySelector('.dtp-message').textContent.startsWith(start)"
            page.wait_for_function(script, arg=start)

        models = page.get_by_label("Model", exact=True)
        names = models.locator("option").all_inner_texts()
        for name in reversed(names):  # the first, which is chosen already, last
            models.select_option(name)
            says(f"This is {name}. ")
            assert models.input_value() == name
        presets = page.locator(".dtp-presets button")
        assert (len(names), presets.count()) > (1, 3)
        for k in range(presets.count()):
            presets.nth(k).click()
            says(f"{presets.nth(k).inner_text()}. ")
        assert opened.problems() == []


def test_every_page_is_on_the_map_and_has_a_picture_to_share(book):
    sitemap = ElementTree.parse(book / "sitemap.xml").getroot()
    base = URLS["Book"]
    places = [place.text for place in sitemap.iterfind("{*}url/{*}loc")]
    assert sorted(places) == sorted(base + page for page in PAGES + ROOMS)
    picture = (book / "_static" / "social.png").read_bytes()
    assert (int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])) == (1200, 630)
    for page in PAGES:
        soup = BeautifulSoup((book / page).read_text(), "html.parser")
        assert soup.select_one("meta[property='og:image']")["content"] == base + "_static/social.png"
        assert soup.select_one("link[rel=canonical]")["href"] == base + page


def test_api_has_a_page_for_every_room_with_all_its_modules(book):
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    rooms = [room for layer in reversed(layers) for room in re.findall(r"\w+", layer)]
    assert [f"book/api/{room}.html" for room in rooms] == ROOMS
    listed = BeautifulSoup((book / "book/api.html").read_text(), "html.parser").select("article li > p > a")
    assert [link["href"] for link in listed] == [f"api/{room}.html" for room in rooms]
    for room, page in zip(rooms, ROOMS, strict=True):
        soup = BeautifulSoup((book / page).read_text(), "html.parser")
        modules = [
            f"dtbook.{room}.{path.stem}" for path in sorted((ROOT / "dtbook" / room).glob("[a-z]*.py"))
        ]
        assert [title.text.rstrip("#") for title in soup.select("article h2")] == modules


def test_api_says_what_a_name_takes_and_where_it_can_be_imported(book):
    rollout = BeautifulSoup((book / "book/api/rollout.html").read_text(), "html.parser")
    assert "model: " in rollout.find(id="dtbook.rollout.rollout").text
    model = BeautifulSoup((book / "book/api/model.html").read_text(), "html.parser")
    links = {link.text: link["href"] for link in model.select("article section > p > a")}
    assert links["DecisionTransformer"] == "#dtbook.model.transformer.DecisionTransformer"
    assert len(model.select("dl.py.function")) > 20


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_is_described_and_every_figure_numbered(book, page):
    article = BeautifulSoup((book / page).read_text(), "html.parser").article
    for picture in article.select("img, .book-figure, .dt-diagram"):
        assert len(picture.get("alt") or picture.get("aria-label") or "") >= 20, picture
    for figure in article.select("figure"):
        assert figure.select(".caption-number"), figure


@pytest.mark.parametrize("page", NOTEBOOK_PAGES)
def test_numbers_stand_in_the_prose(book, page):
    article = BeautifulSoup((book / page).read_text(), "html.parser").article
    assert article.select(".pasted-text")
    for code in article.select("div.cell_input"):
        code.decompose()
    assert not re.search(r"\{(glue|numref|term|cite)|\bnan\b", article.get_text())


@pytest.mark.parametrize("page", NOTEBOOK_PAGES)
def test_buttons_open_the_source_notebook(book, page):
    links = [a["href"] for a in BeautifulSoup((book / page).read_text(), "html.parser").select("a[href]")]
    notebook, branch = page.replace(".html", ".ipynb"), CONFIG["repository"]["branch"]
    repository = urlparse(URLS["Repository"]).path
    assert (ROOT / notebook).exists()
    assert f"https://colab.research.google.com/github{repository}/blob/{branch}/{notebook}" in links
    assert f"https://mybinder.org/v2/gh{repository}/{branch}?urlpath=lab/tree/{notebook}" in links


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_other_host_to_load_from(book, page):
    soup = BeautifulSoup((book / page).read_text(), "html.parser")
    loaded = [e.get("src") or e.get("href") for e in soup.select("[src], link[href]:not([rel=canonical])")]
    assert [url for url in loaded if urlparse(url).netloc] == []
    assert [e for e in soup.select("script:not([src])") if "https://" in e.text] == []


def test_theme_button_redraws_every_figure(browser, address):
    with visit(browser, address, NOTEBOOK_PAGES[0], "light") as opened:
        page = opened.page
        draw_all(page)
        ink = "getComputedStyle(document.querySelector('.book-figure .xtick text, .book-figure .annotation text')).fill"
        light = page.evaluate(ink)
        for _ in range(3):  # the button goes round: light, as the system has it, dark
            if page.evaluate("document.documentElement.dataset.theme") == "light":
                page.locator(".theme-switch-button").first.click()
        page.wait_for_function(
            "[...document.querySelectorAll('.book-figure')].every((box) => box.dataset.drawn === 'dark')"
        )
        assert undrawn(page, "dark") == []
        assert light == "rgb(31, 35, 40)"
        assert page.evaluate(ink) == "rgb(206, 214, 221)"
        assert opened.problems() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_first_visit_has_the_systems_theme_before_any_file_of_script_runs(browser, address, theme):
    context = browser.new_context(color_scheme=theme)
    context.route("**/*.js*", lambda route: route.abort())
    page = context.new_page()
    page.goto(address + NOTEBOOK_PAGES[0])
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    context.close()


@pytest.mark.parametrize("page", PAGES)
def test_no_file_of_script_holds_up_the_text(book, page):
    scripts = BeautifulSoup((book / page).read_text(), "html.parser").select("head script[src]")
    waits = [script["src"].partition("?")[0] for script in scripts if not script.has_attr("defer")]
    assert [Path(src).name for src in waits] == ["documentation_options.js"]


def test_panels_stand_one_under_the_other_on_a_phone(browser, address):
    page = "notebooks/01_the_task.html"
    tops = {}
    for width in (1440, 360):
        with visit(browser, address, page, width=width) as opened:
            draw_all(opened.page)
            maps = opened.page.locator("#fig-channels .heatmaplayer image")
            boxes = maps.evaluate_all("all => all.map((e) => e.getBoundingClientRect().top)")
            tops[width] = len({round(top) for top in boxes})
    assert tops == {1440: 1, 360: 3}


def test_without_javascript_a_figure_says_what_it_shows(browser, address):
    with visit(browser, address, "notebooks/01_the_task.html", scripts=False) as opened:
        sentences = opened.page.locator(".book-figure > p")
        assert sentences.count() > 0
        for k in range(sentences.count()):
            assert sentences.nth(k).is_visible()
            assert "What it shows: " in sentences.nth(k).inner_text()


def test_search_works_from_the_book_alone(browser, book):
    with visit(browser, book.as_uri() + "/", "search.html?q=truncation") as opened:
        opened.page.wait_for_selector("#search-results li")
        assert "Glossary" in opened.page.locator("#search-results").inner_text()
        assert opened.outside == []


def test_listener_sees_what_goes_wrong(browser, tmp_path):
    """The guard of all tests above: a page with an error, a missing file and a call to another host."""
    (tmp_path / "bad.html").write_text(
        "<html data-theme='light'><script>console.error('oops'); window.shift = 0</script>"
        "<img src='gone.png'><img src='https://example.org/x.png'></html>"
    )
    with served(tmp_path) as url, visit(browser, url, "bad.html") as opened:
        assert "error: oops" in opened.console
        assert [line for line in opened.failed if "gone.png: 404" in line]
        assert opened.outside == ["https://example.org/x.png"]
