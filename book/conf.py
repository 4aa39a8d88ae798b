"""Builds the book with Sphinx alone, from the root: `sphinx-build -c book -b html -W --keep-going . OUT`.

Everything is said in `_config.yml`; this translates it, so that the book does not depend on jupyter-book.
"""

import sys
from pathlib import Path

import yaml

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
settings = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
sys.path += [str(BOOK / path) for path in settings["sphinx"]["local_extensions"].values()]

project = html_title = settings["title"]
author, copyright = settings["author"], settings["copyright"]
exclude_patterns = ["**.ipynb_checkpoints", *settings["exclude_patterns"]]
external_toc_path = "book/_toc.yml"
external_toc_exclude_missing = settings["only_build_toc_files"]
nb_execution_mode = settings["execute"]["execute_notebooks"]
nb_output_stderr = settings["execute"]["stderr_output"]
myst_enable_extensions = settings["parse"]["myst_enable_extensions"]
bibtex_bibfiles = [str(ROOT / path) for path in settings["bibtex_bibfiles"]]
html_theme = "sphinx_book_theme"
html_favicon = str(ROOT / settings["html"]["favicon"])
theme_options = {
    "repository_branch": settings["repository"]["branch"],
    "launch_buttons": settings["launch_buttons"],
    "home_page_in_toc": settings["html"]["home_page_in_navbar"],
}
globals().update(settings["sphinx"]["config"])
html_theme_options = theme_options | settings["sphinx"]["config"]["html_theme_options"]
html_static_path = [str(ROOT / path) for path in settings["sphinx"]["config"]["html_static_path"]]
