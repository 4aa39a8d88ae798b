"""The book as one PDF: printed from a little page, and the one that the built book links to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from browser import HOW_TO_INSTALL, find_chromium
from bs4 import BeautifulSoup

from dtbook.pages.notebooks import find_notebooks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
HTML = ROOT / "book" / "_build" / "html"
TITLE = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())["title"]
PRINT = """import sys
from pathlib import Path
from dtbook.pages.printing import print_page
print_page(*map(Path, sys.argv[1:]))"""
WHOLE = """<html lang="en"><head><link rel="stylesheet" href="style.css"></head><body>
<div id="jb-print-docs-body"><h1>A book</h1>
<div id="jb-print-toc"><a href="#document-notebooks/01_one">One</a></div></div>
<article class="bd-article"><dl class="build-state"><dd>commit abc</dd></dl>
<span id="document-notebooks/01_one"></span><section id="one"><h2>One question</h2>
<p><a href="02_two.html">chapter</a> <a href="book/intro.html#term">term</a>
<a href="_sources/a.ipynb">file</a></p></section>
<span id="document-notebooks/02_two"></span><section id="two"><h2>Two questions</h2><p id="term">word</p>
<p><a href="book/api/02_two.html">room</a></p></section>
<span id="document-book/api/02_two"></span><section id="room"><h2>A room</h2></section>
</article></body></html>"""


def print_in_a_process(whole, target):
    """Print, in a process of its own: Playwright allows no second browser beside that of the other tests."""
    if find_chromium() is None:
        pytest.skip(HOW_TO_INSTALL)
    command = [sys.executable, "-c", PRINT, whole, target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def outline(pdf):
    """The titles of the outline of a PDF, in order: literal strings, or UTF-16 in hexadecimal digits."""
    found = re.findall(rb"/Title (?:\(((?:\\.|[^\\)])*)\)|<(\w+)>)", pdf)
    return [
        re.sub(r"\\(.)", r"\1", plain.decode()) if plain else bytes.fromhex(coded.decode()).decode("utf-16")
        for plain, coded in found
    ]


def pages(pdf):
    """How many pages a PDF has."""
    return len(re.findall(rb"/Type /Page\b", pdf))


def test_a_page_is_printed_with_its_chapters_apart_and_its_links_inside(tmp_path):
    (tmp_path / "whole.html").write_text(WHOLE)
    (tmp_path / "style.css").write_text("")
    done = print_in_a_process(tmp_path / "whole.html", tmp_path / "book.pdf")
    assert done.returncode == 0, done.stderr
    pdf = (tmp_path / "book.pdf").read_bytes()
    assert (
        pages(pdf) == 6
    )  # title, contents, front page, two chapters, a page with a chapter's name in another folder
    assert [title for title in outline(pdf) if "question" in title] == ["One question", "Two questions"]
    assert set(re.findall(rb"/Subtype /Link(?:(?!endobj)[\s\S])*?/Dest /(\S+)", pdf)) == {
        b"one",
        b"two",
        b"term",
        b"room",
    }
    assert b"_sources" not in pdf


def test_a_page_that_lacks_its_style_is_not_printed(tmp_path):
    (tmp_path / "whole.html").write_text(WHOLE)
    done = print_in_a_process(tmp_path / "whole.html", tmp_path / "book.pdf")
    assert "FileNotFoundError: the page to print lacks file://" in done.stderr
    assert "style.css" in done.stderr
    assert not (tmp_path / "book.pdf").exists()


def test_the_front_page_leads_to_the_whole_book_as_pdf():
    if not (HTML / "searchindex.js").exists():
        pytest.skip("there is no built book at book/_build/html: `make book` builds it")
    link = BeautifulSoup((HTML / "book" / "intro.html").read_text(), "html.parser").find("a", string="PDF")
    if link is None:
        pytest.skip(
            "the book was built without its PDF: `dtbook build --pdf` prints it, where there is Chromium"
        )
    pdf = (HTML / "book" / link["href"]).resolve().read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) < 25e6
    assert pages(pdf) > 100
    titles = outline(pdf)
    assert titles[0] == TITLE
    assert [
        title for title in titles if re.match(r"([\d.]+ )\1", title)
    ] == []  # letters that are on two pages
    for notebook in find_notebooks(ROOT / "notebooks", ()):
        page = BeautifulSoup((HTML / "notebooks" / f"{notebook.stem}.html").read_text(), "html.parser")
        assert any(title.endswith(page.h1.text.rstrip("#")) for title in titles)
