"""Draws _static/social.png, which other sites show with a link to the book; run it when circuit.svg changes."""

import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(BOOK.parent / "tests"))
from browser import find_chromium, launched  # noqa: E402

PAGE = """<html><body style="margin:0;width:1200px;height:630px;background:#fff;color:#1f2328;display:flex;
  align-items:center;gap:40px;padding:0 60px;box-sizing:border-box;font-family:system-ui,sans-serif">
  <div style="flex:1"><div style="font-size:58px;font-weight:650;line-height:1.1;letter-spacing:-.02em">
  The Decision Transformer book</div><p style="font-size:27px;line-height:1.4;color:#57606a">A small transformer that
  plays as well as it is asked to, taken apart on everything it can see.</p></div>
  <div style="width:600px">{svg}</div></body></html>"""


def main() -> None:
    """Draw it, 1200 by 630 pixels, as the Open Graph protocol's readers expect."""
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium found")
    svg = (BOOK / "_static" / "circuit.svg").read_text(encoding="utf-8")
    svg = svg.replace("svg:root", ".dt-diagram").replace(
        'width="480" height="292"', 'width="600" height="365"'
    )
    with launched(program) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 630}, color_scheme="light")
        page.set_content(PAGE.format(svg=svg))
        page.screenshot(path=BOOK / "_static" / "social.png")


if __name__ == "__main__":
    main()
