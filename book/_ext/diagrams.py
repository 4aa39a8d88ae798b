"""The book's own SVG diagrams, drawn in the page itself, and the one that says which component a section is about."""

import html
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

STATIC = Path(__file__).resolve().parent.parent / "_static"
ARCHITECTURE = STATIC / "architecture.svg"
LOGGER = logging.getLogger(__name__)


class Pictures(SphinxTransform):
    """Holds every image to having alternative text, and draws the book's own SVG diagrams in the page itself.

    An `<img>` cannot see the page's theme; a diagram in the page takes its colours from it, by book.css.
    """

    default_priority = 210

    def apply(self, **kwargs: Any) -> None:
        """Check and replace the images of a document."""
        for image in list(self.document.findall(nodes.image)):
            alt = image.get("alt", "").strip()
            if not alt:
                LOGGER.warning("the image %s has no alternative text", image["uri"], location=image)
            path = STATIC / Path(image["uri"]).name
            if path.suffix == ".svg" and path.exists():
                self.env.note_dependency(str(path))
                image.replace_self(nodes.raw("", diagram(path, alt), format="html"))


def diagram(path: Path, alt: str, lit: tuple[str, ...] = (), prefix: str = "") -> str:
    """Return the SVG as part of a page: one image to a screen reader, its ids prefixed, the groups `lit` picked out."""
    svg = path.read_text(encoding="utf-8")
    for name in lit:
        svg = svg.replace(f'<g id="{name}"', f'<g class="lit" id="{name}"')
    if lit:
        svg = svg.replace('class="dt-diagram"', 'class="dt-diagram highlighting"', 1)
    prefix = prefix or path.stem
    svg = svg.replace(' id="', f' id="{prefix}-').replace("url(#", f"url(#{prefix}-")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def components() -> list[str]:
    """Return the names of the parts of the architecture diagram that can be picked out."""
    return re.findall(r'<g id="([\w-]+)"', ARCHITECTURE.read_text(encoding="utf-8"))


class Architecture(SphinxDirective):
    """The model in small, in the margin, with the components that a section is about picked out.

    ````
    ```{architecture} head-1
    Head 1, which reads both tokens.
    ```
    ````
    The names are the ids of _static/architecture.svg: rtg-token, state-token, time-embedding, head-0, head-1, mlp,
    unembedding, logits, residual-state, residual-rtg. The content, if any, is the note below the diagram.
    """

    required_arguments = 1
    optional_arguments = 20
    option_spec: ClassVar = {"alt": directives.unchanged}
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return a margin note with the diagram in it."""
        known = components()
        if unknown := [name for name in self.arguments if name not in known]:
            message = (
                f"architecture must name components of the diagram ({', '.join(known)}), not {unknown[0]}"
            )
            return [self.state.document.reporter.warning(message, line=self.lineno)]
        self.env.note_dependency(str(ARCHITECTURE))
        names = " and ".join(name.replace("-", " ") for name in self.arguments)
        alt = self.options.get("alt", f"The model in small: {names} picked out among its components.")
        prefix = f"architecture-{self.env.new_serialno('architecture') + 1}"
        note = nodes.sidebar("", classes=["margin", "locator"])
        note += nodes.raw("", diagram(ARCHITECTURE, alt, tuple(self.arguments), prefix), format="html")
        self.state.nested_parse(self.content, self.content_offset, note)
        return [note]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the transform and the directive."""
    app.add_transform(Pictures)
    app.add_directive("architecture", Architecture)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
