"""The directive `scorecard`: the table of the post's claims, or with `:small:` only the mark of each."""

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

MARKS = {"replicated": "yes", "mixed": "half", "not replicated": "no", "undecided": "none"}
COLUMNS = {
    "claim": "claim",
    "statement": "the post says",
    "post": "its number",
    "posts_weights": "its weights, measured again",
    "replications": "replications that pass",
    "effect": "mean effect [95 %]",
    "controls": "controls that pass",
    "verdict": "verdict",
}
NOT_YET = "This build has no scorecard: the replications that it counts are not part of it."


def read_scorecard(path: Path) -> pd.DataFrame:
    """Return the scorecard, one row a claim, with the columns of the page ready to be printed.

    Its own columns are those of `dtbook.claims.scorecard.scorecard`; `section` is where in the book a claim is decided,
    `notebooks/06_x.html#anchor`.
    """
    table = pd.read_parquet(path)
    table["replications"] = [f"{p:.0f} of {n:.0f}" for p, n in zip(table["passed"], table["n"], strict=True)]
    table["effect"] = [
        "" if pd.isna(effect) else f"{effect:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
        for effect, low, high in zip(table["effect"], table["low"], table["high"], strict=True)
    ]
    control = zip(table["controls_passed"], table["controls_n"], strict=True)
    table["controls"] = [f"{p} of {n}" if n else "" for p, n in control]
    for column in ("post", "posts_weights"):
        table[column] = [printed(value) for value in table[column]]
    return table


def printed(value: Any) -> str:
    """Return a cell of the table as text: what is missing as nothing, numbers with two digits and a true minus."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.2f}".replace("-", "−")
    return "" if value is None else str(value)


def verdict_node(verdict: str) -> nodes.inline:
    """Return the word of a verdict with the book's mark for it."""
    return nodes.inline("", verdict, classes=["verdict", f"verdict-{MARKS.get(verdict, 'half')}"])


class Scorecard(SphinxDirective):
    """The claims of the post and what became of them, from data/scorecard.parquet if the build has it."""

    option_spec: ClassVar = {"small": directives.flag}

    def run(self) -> list[nodes.Node]:
        """Return the table, the marks alone, or the sentence that there are none."""
        path = Path(self.env.srcdir) / "data" / "scorecard.parquet"
        self.env.note_dependency(str(path))
        if not path.exists():
            return [nodes.paragraph("", NOT_YET)]
        table = read_scorecard(path)
        return self.marks(table) if "small" in self.options else self.table(table)

    def marks(self, table: pd.DataFrame) -> list[nodes.Node]:
        """Return a count in words, then a mark for each claim that links to where it is decided."""
        counts = table["verdict"].value_counts()
        line = nodes.paragraph(classes=["scorecard-counts"])
        for verdict in [name for name in MARKS if name in counts or name != "undecided"]:
            line += nodes.inline("", "", nodes.strong("", str(counts.get(verdict, 0))), nodes.Text(" "))
            line[-1] += verdict_node(verdict)
            line += nodes.Text(" ")
        claims = nodes.bullet_list(classes=["scorecard-marks"])
        for row in table.itertuples():
            label = f"{row.claim}, {row.verdict}: {row.statement}"
            link = self.link(
                row.section, row.claim, ["verdict", f"verdict-{MARKS.get(row.verdict, 'half')}"], label
            )
            claims += nodes.list_item("", nodes.paragraph("", "", link))
        return [line, claims]

    def table(self, table: pd.DataFrame) -> list[nodes.Node]:
        """Return the table of all claims."""
        group = nodes.tgroup(cols=len(COLUMNS))
        group += [nodes.colspec(colwidth=1) for _ in COLUMNS]
        head, body = nodes.thead(), nodes.tbody()
        head += nodes.row("", *[nodes.entry("", nodes.paragraph("", title)) for title in COLUMNS.values()])
        for row in table.to_dict("records"):
            entries = []
            for column in COLUMNS:
                content: nodes.Node = nodes.Text(str(row[column]))
                if column == "claim":
                    content = self.link(row["section"], row["claim"], [], row["statement"])
                if column == "verdict":
                    content = verdict_node(row["verdict"])
                entries.append(nodes.entry("", nodes.paragraph("", "", content)))
            body += nodes.row("", *entries)
        group += [head, body]
        return [nodes.table("", group, classes=["scorecard"])]

    def link(self, section: str | None, text: str, classes: list[str], title: str) -> nodes.Node:
        """Return a link to where the claim is decided, with its statement for those who point at it."""
        if not section:
            return nodes.inline("", text, classes=classes)
        page, _, anchor = section.partition("#")
        inner = nodes.inline("", text, classes=classes)
        docname = Path(page).with_suffix("").as_posix()
        if docname not in self.env.found_docs:
            return inner
        builder = self.env.app.builder
        uri = builder.get_relative_uri(self.env.docname, docname)
        uri += f"#{anchor}" if anchor and builder.name == "html" else ""
        return nodes.reference("", "", inner, internal=True, refuri=uri, reftitle=title)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the directive."""
    app.add_directive("scorecard", Scorecard)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
