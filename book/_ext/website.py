"""What the site has besides its text: its address, the printed book, templates, names for the menu's buttons."""

import shutil
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

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


def take_pdf(app: Sphinx, exception: Exception | None) -> None:
    """Put the printed book beside the pages."""
    if not exception and app.builder.name == "html" and pdf_of(app).exists():
        shutil.copy(pdf_of(app), app.outdir)


def add_templates(app: Sphinx, config: Config) -> None:
    """Lay this book's templates over the theme's."""
    config.templates_path = [*config.templates_path, str(Path(__file__).parent / "templates")]


def name_toggles(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Tell screen readers what the menu's buttons open: the theme draws them as an arrow alone."""
    menu: Any = context.get("generate_toctree_html")

    def named(**options: Any) -> Any:
        tree = menu(**options)
        for button in tree.select("li > details > summary"):
            button["aria-label"] = f"Pages below {button.find_parent('li').a.text}"
        return tree

    if menu:
        context["generate_toctree_html"] = named


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect all of it."""
    app.connect("config-inited", publish_at)
    app.connect("config-inited", add_templates)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme
    app.connect("build-finished", take_pdf)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
