"""The links of the built book. As a program: lists those that lead outside; `--check` asks each whether it is there."""

import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

from bs4 import BeautifulSoup

HTML = Path(__file__).parent.parent / "book" / "_build" / "html"


@cache
def parsed(path: Path) -> BeautifulSoup:
    """A page; each is read once."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(path: Path) -> frozenset[str]:
    """What a link may name in a page."""
    return frozenset(element["id"] for element in parsed(path).select("[id]")) | {""}


def links(path: Path) -> list[str]:
    """Where the links of a page lead, as they stand there."""
    return [element["href"] for element in parsed(path).select("a[href]")]


def broken(path: Path, root: Path = HTML, prefix: str = "/") -> list[str]:
    """Links of a page that lead to no page, file or anchor of the book, which is published under `prefix`."""
    found = []
    for link in links(path):
        parts = urlparse(link)
        if parts.scheme or parts.netloc:
            continue
        place = unquote(parts.path)
        target = root / place.removeprefix(prefix) if place.startswith("/") else path.parent / place
        target = path if not place else target
        if not target.exists() or (
            target.suffix == ".html" and unquote(parts.fragment) not in anchors(target)
        ):
            found.append(link)
    return found


def outside(pages: list[Path]) -> dict[str, str]:
    """Each address outside the book that a page links to, with the first page that does."""
    found: dict[str, str] = {}
    for path in pages:
        for link in links(path):
            if urlparse(link).scheme in ("http", "https"):
                found.setdefault(link.partition("#")[0], path.name)
    return found


def answer(address: str) -> str:
    """What the host says of an address: a status, or why there is none."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return str(error)


def main() -> None:
    """Print each outside link; with --check its answer, and exit with 1 if one is gone (404 or 410)."""
    gone = False
    for address, page in sorted(outside(sorted(HTML.rglob("*.html"))).items()):
        said = answer(address) if "--check" in sys.argv else ""
        gone |= said in ("404", "410")
        print(f"{said:5} {address}  ({page})")
    sys.exit(gone)


if __name__ == "__main__":
    main()
