"""Directives of the front page: the three ways in, other forms of the book, and what this build was made from."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

PDF = "decision-transformer-book.pdf"
READ, PLAY = "notebooks/01_the_task", "notebooks/13_play"


def executed_folder(app: Sphinx) -> Path:
    """Return the folder of the executed copies."""
    return Path(app.srcdir) / "book" / "_executed"


def pdf_of(app: Sphinx) -> Path:
    """Return where `dtbook build --pdf` leaves the printed book, before the pages are built."""
    return executed_folder(app) / PDF


class FrontPage(SphinxDirective):
    """The common part of the directives here: links to pages that may not be in this build."""

    def address(self, docname: str) -> str | None:
        """Return the link to a page; None if it is not in this build."""
        if docname not in self.env.found_docs:
            return None
        return self.env.app.builder.get_relative_uri(self.env.docname, docname)


class Doors(FrontPage):
    """Three ways into the book: read, play, re-run. Each is a link; the game's is there when its page is."""

    def run(self) -> list[nodes.Node]:
        """Return a list of three."""
        doors = [
            ("Read", READ, "Chapter after chapter, one question each, the answer first."),
            (
                "Play",
                PLAY,
                "Play beside the model, ask it for a reward, and watch its circuit while it plays.",
            ),
            ("Re-run", None, "Every number here is computed by a notebook you can open and change."),
        ]
        made = nodes.bullet_list(classes=["doors"])
        for title, docname, sentence in doors:
            uri = "#re-run-it" if docname is None else self.address(docname)
            if uri is None:
                continue
            link = nodes.reference("", title, internal=True, refuri=uri)
            made += nodes.list_item("", nodes.paragraph("", "", link), nodes.paragraph("", sentence))
        return [made]


class OtherForms(FrontPage):
    """Links to the book as one PDF, if this build has it, and to the notebooks and data of each page."""

    def run(self) -> list[nodes.Node]:
        """Return one paragraph."""
        text = "Each chapter's notebook can be downloaded at the top of its page, the data of each figure below it."
        made = nodes.paragraph("", text)
        if pdf_of(self.env.app).exists():
            depth = self.env.docname.count("/")
            link = nodes.reference("", "PDF", internal=True, refuri="../" * depth + PDF)
            made += [nodes.Text(" The whole book is also one "), link, nodes.Text(".")]
        return [made]


class BuildState(FrontPage):
    """A list of what this build was made from: commit, date, models, and how long they and the notebooks took."""

    def run(self) -> list[nodes.Node]:
        """Return a list of facts; those that are not known are left out."""
        artifacts = manifest(Path(self.env.srcdir) / "data")
        facts = [
            ("version", commit(Path(self.env.srcdir))),
            ("models", models(artifacts)),
            ("data", making_time(artifacts)),
            ("notebooks", compute_time(executed_folder(self.env.app))),
        ]
        self.env.note_reread()
        made = nodes.definition_list(classes=["build-state"])
        for name, fact in facts:
            if fact:
                content = nodes.definition("", nodes.paragraph("", fact))
                made += nodes.definition_list_item("", nodes.term("", name), content)
        return [made]


def commit(root: Path) -> str:
    """Return the commit the pages were built from and its day; nothing outside a checkout."""
    command = ["git", "log", "-1", "--format=commit %h of %cs"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def manifest(data: Path) -> dict[str, Any]:
    """Return the manifest of data/: artifact → what made it."""
    path = data / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def models(artifacts: Mapping[str, Any]) -> str:
    """Return how many models lie in data/ besides the post's own weights, in words."""
    count = sum(name.endswith("/model") for name in artifacts)
    return f"{count} trained from nothing, and the post's own weights" if count else ""


def making_time(artifacts: Mapping[str, Any]) -> str:
    """Return the processor time behind data/, in words; each stage of a replication notes it in all its artifacts."""
    told = [entry for entry in artifacts.values() if "seconds" in entry]
    stages = {(entry["stage"], *entry["seeds"], entry["seconds"]): entry["seconds"] for entry in told}
    return f"made in {in_words(sum(stages.values()))} of processor time, training included" if told else ""


def compute_time(folder: Path) -> str:
    """Return how long the notebooks of the pages took, all of them together, in words."""
    seconds = [float(note.read_text()) for note in sorted(folder.glob("*.seconds"))]
    return f"{len(seconds)} executed in {in_words(sum(seconds))}, one thread" if seconds else ""


def in_words(seconds: float) -> str:
    """Return a duration as a reader says it: `40 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the directives."""
    app.add_directive("doors", Doors)
    app.add_directive("other-forms", OtherForms)
    app.add_directive("build-state", BuildState)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
