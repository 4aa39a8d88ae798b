"""The built book in a real browser that can reach no other host: clean, drawn, readable, in both themes."""

import re
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml
from browser import HOW_TO_INSTALL, draw_all, find_chromium, launched, served, visit
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
HTML = ROOT / "book" / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
CHAPTERS = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
PAGES = [f"{name}.html" for name in (TOC["root"], *CHAPTERS)]
NOTEBOOK_PAGES = [page for page in PAGES if page.startswith("notebooks/")]
OTHER_PAGES = ["404.html", "genindex.html", "search.html?q=agent"]


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
def browser(book):
    program = find_chromium()
    if program is None:
        pytest.skip(HOW_TO_INSTALL)
    with launched(program) as opened:
        yield opened


@pytest.fixture(scope="session")
def address(book):
    with served(book) as url:
        yield url


def undrawn(page, theme):
    """The descriptions of the figures that hold no drawing of their data in this theme."""
    return page.evaluate(
        """(theme) => [...document.querySelectorAll(".book-figure")].filter((box) => {
          const marks = ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image";
          return box.dataset.drawn !== theme || !box.querySelector(marks);
        }).map((box) => box.ariaLabel)""",
        theme,
    )


def overflow(page):
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.scrollingElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 360)])
def test_page_is_clean_and_drawn(browser, address, page, theme, width):
    with visit(browser, address, page, theme, width) as opened:
        draw_all(opened.page)
        assert opened.problems() == []
        assert undrawn(opened.page, theme) == []
        assert overflow(opened.page) <= 0
        assert opened.page.evaluate("shift") < 0.1 or page not in PAGES  # search results come in by and by
        assert opened.page.evaluate("document.documentElement.dataset.theme") == theme


@pytest.mark.parametrize("page", PAGES)
def test_page_opens_from_a_file(browser, book, page):
    with visit(browser, book.as_uri() + "/", page) as opened:
        draw_all(opened.page)
        assert opened.problems() == []
        assert undrawn(opened.page, "light") == []
        formulas = opened.page.locator(".math")
        assert opened.page.locator("mjx-container").count() == formulas.count()


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
    repository = urlparse(CONFIG["repository"]["url"]).path
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
