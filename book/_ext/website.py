"""What the site has besides its text: its address, a map for search engines, the printed book, templates."""

import shutil
import tomllib
from pathlib import Path
from urllib.parse import urlparse
from xml.sax.saxutils import escape

from front import pdf_of
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.typing import ExtensionMetadata


def publish_at(app: Sphinx, config: Config) -> None:
    """Take where sources and pages are published from pyproject.toml: for buttons, map, shared links and 404 page."""
    project = tomllib.loads((Path(app.srcdir) / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = project["urls"]["Book"]
    config.html_theme_options = {
        **config.html_theme_options,
        "repository_url": project["urls"]["Repository"],
    }
    config.html_baseurl = config.ogp_site_url = pages
    config.notfound_urls_prefix = urlparse(pages).path


def write_sitemap(app: Sphinx, exception: Exception | None) -> None:
    """List every page under the address where the book is published."""
    if exception or app.builder.name != "html":
        return
    base = app.config.html_baseurl.rstrip("/")
    addresses = [f"{base}/{app.builder.get_target_uri(name)}" for name in sorted(app.env.found_docs)]
    lines = [f"  <url><loc>{escape(address)}</loc></url>" for address in addresses]
    head = (
        '<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
    )
    (Path(app.outdir) / "sitemap.xml").write_text("\n".join([head, *lines, "</urlset>\n"]), encoding="utf-8")


def take_pdf(app: Sphinx, exception: Exception | None) -> None:
    """Put the printed book beside the pages."""
    if not exception and app.builder.name == "html" and pdf_of(app).exists():
        shutil.copy(pdf_of(app), app.outdir)


def add_templates(app: Sphinx, config: Config) -> None:
    """Lay this book's templates over the theme's."""
    config.templates_path = [*config.templates_path, str(Path(__file__).parent / "templates")]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect all of it."""
    app.connect("config-inited", publish_at)
    app.connect("config-inited", add_templates)
    app.connect("build-finished", write_sitemap)
    app.connect("build-finished", take_pdf)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
