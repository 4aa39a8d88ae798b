"""The directive `scorecard`: each claim of the post in its own words, with the mark of its verdict."""

from pathlib import Path
from typing import ClassVar

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

MARKS = {
    "replicated": "yes",
    "mixed": "half",
    "not replicated": "no",
    "uninformative": "none",
    "undecided": "none",
}
ALWAYS = ("replicated", "mixed", "not replicated")
"""Verdicts that are counted in words even where no claim has them."""
FOUND_HERE = "Found here"
"""The group of claims that are not the post's, and not counted among its."""
NOT_YET = "This build has no scorecard: the replications that it counts are not part of it."


class Scorecard(SphinxDirective):
    """The claims of the post and what became of them, from data/scorecard.parquet if the build has it."""

    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        """Return the counts and the claims by group, or the sentence that there are none.

        The columns are those of `dtbook.claims.scorecard.scorecard`; `section` is where in the book a claim is decided,
        `notebooks/06_x.html#anchor`.
        """
        path = Path(self.env.srcdir) / "data" / "scorecard.parquet"
        self.env.note_dependency(str(path))
        if not path.exists():
            return [nodes.paragraph("", NOT_YET)]
        table = pd.read_parquet(path)
        claims = table[table["of"] == ""]
        groups = [self.group(str(name), some) for name, some in claims.groupby("group", sort=False)]
        of_post = claims["verdict"][claims["group"] != FOUND_HERE]
        return [self.counts(of_post), *(node for group in groups for node in group)]

    def counts(self, verdicts: pd.Series) -> nodes.Node:
        """Return how many of the post's claims have which verdict, in words."""
        counts, line = verdicts.value_counts(), nodes.paragraph(classes=["scorecard-counts"])
        for verdict in [name for name in MARKS if name in counts or name in ALWAYS]:
            line += nodes.inline("", "", nodes.strong("", str(counts.get(verdict, 0))), nodes.Text(" "))
            line[-1] += marked(verdict, verdict)
            line += nodes.Text(" ")
        return line

    def group(self, name: str, claims: pd.DataFrame) -> list[nodes.Node]:
        """Return the group's name, and its claims in their own words: each leads to where it is decided."""
        listed = nodes.bullet_list(classes=["scorecard-marks"])
        for row in claims.itertuples():
            how_many = f", {row.passed:.0f} of {row.n:.0f}" if row.n else ""
            link = self.link(
                row.section, marked(row.verdict, row.statement), f"{row.claim}: {row.verdict}{how_many}"
            )
            listed += nodes.list_item("", nodes.paragraph("", "", link))
        return [nodes.paragraph("", "", nodes.strong("", name), classes=["scorecard-group"]), listed]

    def link(self, section: str | None, text: nodes.inline, title: str) -> nodes.Node:
        """Return a text that leads to where the claim is decided, with its verdict for those who point at it."""
        page, _, anchor = (section or "").partition("#")
        docname = Path(page).with_suffix("").as_posix()
        if not section or docname not in self.env.found_docs:
            return text
        builder = self.env.app.builder
        uri = builder.get_relative_uri(self.env.docname, docname)
        uri += f"#{anchor}" if anchor and builder.name == "html" else ""
        return nodes.reference("", "", text, internal=True, refuri=uri, reftitle=title)


def marked(verdict: str, text: str) -> nodes.inline:
    """Return a text behind the book's mark for a verdict; who does not see the mark hears the verdict."""
    mark = nodes.inline("", "", classes=["verdict", f"verdict-{MARKS[verdict]}"])
    if text != verdict:
        mark += nodes.inline("", f"{verdict}: ", classes=["visually-hidden"])
    mark += nodes.Text(text)
    return mark


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the directive."""
    app.add_directive("scorecard", Scorecard)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
