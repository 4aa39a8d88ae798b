"""How figures, pictures and numbers are shown in a notebook and in the book: colours, template, renderer.

Colours are named after what they are in the light theme: those of `PALETTE`, and `INK` (text), `GRID` (lines)
and `PAPER` (background, and zero on a diverging scale). When the book's pages draw a figure they put their
theme's own in the place of each of them (_static/figures.js). Those of the palette have a contrast of at
least 3 with the background and can be told apart by colour-blind readers, in both themes;
tests/test_figures.py holds them to it.

Each figure has its alternative text in `layout.meta["alt"]`, and in `layout.meta["narrow"]` what changes on a
phone: its height, and paths into the layout with their values.
"""

import hashlib
import html
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import HTML, Image, display
from jaxtyping import Float, Float32, UInt8
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs_version

INK, GRID, PAPER = "#1f2328", "#d9dee3", "#fefefe"
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#b8609a", "#57606a"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, GREY)
SEQUENTIAL = ((0.0, PAPER), (1.0, BLUE))
DIVERGING = ((0.0, VERMILLION), (0.5, PAPER), (1.0, BLUE))
PLOTLY_MIME = "application/vnd.plotly.v1+json"
GLUE_MIME = "application/papermill.record/"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_SNIPPET = """<div class="book-figure" role="img" aria-label="{alt}"
 style="height:{height}px;--narrow-height:{narrow}px">
<p>This figure is drawn by JavaScript, which is not running here. What it shows: {alt}</p>
<script type="application/json">{json}</script></div>
<script data-outside-the-book>(() => {{
  const box = document.currentScript.previousElementSibling;
  const {{ data, layout, config }} = JSON.parse(box.querySelector("script").textContent);
  const draw = () => {{ box.replaceChildren(); Plotly.newPlot(box, data, layout, config); }};
  if (window.Plotly?.newPlot) return draw();
  const library = document.querySelector("script[data-plotly]") ?? document.createElement("script");
  library.addEventListener("load", draw);
  if (library.isConnected) return;
  library.dataset.plotly = "";
  library.src = "https://cdn.plot.ly/plotly-{version}.min.js";
  document.head.append(library);
}})();</script>"""

CIRCUITSVIS_VERSION = "1.43.3"
"""Of the library that draws attention outside of the book; the book's own copy is the installed package's."""

_ATTENTION = """<div class="book-figure book-attention" role="img" aria-label="{alt}"
 style="height:{height}px;--narrow-height:{narrow}px">
<p>This figure is drawn by JavaScript, which is not running here. What it shows: {alt}</p>
<script type="application/json">{json}</script><div id="{id}" aria-hidden="true"></div></div>
<script data-outside-the-book>(() => {{
  const box = document.currentScript.previousElementSibling;
  const {{ component, props }} = JSON.parse(box.querySelector("script").textContent);
  const library = document.createElement("script");
  library.src = "https://unpkg.com/circuitsvis@{version}/dist/cdn/iife.js";
  library.onload = () => {{
    box.querySelector("p").remove();
    CircuitsVis.render("{id}", CircuitsVis[component], props);
  }};
  document.head.append(library);
}})();</script>"""


def template() -> go.layout.Template:
    """Return the style of every figure: small, for it travels with each of them."""
    axis = {
        "gridcolor": GRID,
        "linecolor": GREY,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "title": {"font": {"size": 13}},
        "fixedrange": True,  # with no dragmode: a finger on the figure scrolls the page
    }
    bar = {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "len": 0.6, "thickness": 10}
    legend = {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"}
    layout = {
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "colorway": PALETTE,
        "coloraxis": {"colorscale": SEQUENTIAL, "colorbar": bar},
        "margin": {"l": 12, "r": 12, "t": 44, "b": 12},
        "xaxis": axis,
        "yaxis": axis,
        "legend": legend,
        "dragmode": False,
        "hovermode": "closest",
    }
    return go.layout.Template(layout=layout)


class BookRenderer(MimetypeRenderer):
    """Shows a figure in JupyterLab and VS Code (as plotly's JSON) and in the book and nbconvert (as HTML).

    The HTML holds the figure and its alternative text. In the book, book/_static/figures.js draws it with the
    book's own copy of plotly.js; elsewhere a script that the book leaves out does, with the pinned CDN's.
    Raises ValueError for a figure without alternative text.
    """

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the two representations of a figure given as a dict."""
        layout = fig_dict["layout"]
        meta = layout.get("meta") or {}
        if not meta.get("alt"):
            raise ValueError("layout.meta['alt'] must say in words what the figure shows, but it is missing")
        figure = {**fig_dict, "config": {"displayModeBar": False, "responsive": True}}
        text = pio.to_json(figure, validate=False)
        height = layout.get("height", 380)
        snippet = _SNIPPET.format(
            alt=html.escape(meta["alt"]),
            height=height,
            narrow=(meta.get("narrow") or {}).get("height", height),
            json=text,  # plotly escapes every "<", so nothing in it can end the script element
            version=get_plotlyjs_version(),
        )
        return {PLOTLY_MIME: json.loads(text), "text/html": snippet}


def use_book_style() -> None:
    """Make the book's template and renderer plotly's defaults in this notebook; Colab keeps its renderer."""
    pio.templates["book"] = template()
    pio.templates.default = "book"
    pio.renderers["book"] = BookRenderer()
    pio.renderers.default = "colab" if "google.colab" in sys.modules else "book"


def glue(**values: Any) -> None:
    """Record values under their names for the prose (`` {glue:text}`name:.2f` ``); shows nothing.

    MyST-NB's own `glue` would bring the whole of Sphinx into the notebook, and records NumPy scalars as a
    text that the prose cannot format.
    """
    for name, value in values.items():
        text = repr(value.item() if hasattr(value, "item") else value)
        metadata = {"scrapbook": {"name": name, "mime_prefix": GLUE_MIME}}
        display({f"{GLUE_MIME}text/plain": text}, metadata=metadata, raw=True)


def drawn(name: str, values: np.ndarray | pd.Series, gaps: bool = False) -> Float32[np.ndarray, "..."]:
    """Return numbers as figures hold them, in float32; with `gaps`, NaN is a place where nothing is drawn.

    Raises ValueError naming `values` where another is not finite, which would take its scale from the figure, or where
    there is nothing but gaps.
    """
    with np.errstate(over="ignore"):
        numbers = np.asarray(values, np.float32)
    wrong = np.isinf(numbers) if gaps and not np.isnan(numbers).all() else ~np.isfinite(numbers)
    if wrong.any():
        allowed = "finite, or NaN for some that are missing" if gaps else "finite"
        raise ValueError(f"{name} holds {numbers[wrong][0]}; every number of a figure must be {allowed}.")
    return numbers


def attention_heads(
    patterns: Float[np.ndarray, "head query key"],
    tokens: Sequence[str],
    names: Sequence[str],
    *,
    alt: str,
    largest: float | None = None,
    height: int = 740,
    narrow: int = 480,
) -> HTML:
    """Return the attention of each head, drawn by CircuitsVis: choose a head, point at a cell to read its value.

    The scale begins at 0 and ends at `largest`, or else at the largest value. CircuitsVis's own output would look for a
    network when it is shown, and bring 1.3 MB of script along each time; this is its data alone, which
    book/_static/figures.js gives to the book's one copy. `height` and `narrow` are in pixels, on a screen and on a
    phone. Raises ValueError for an empty `alt`, where the names do not fit the patterns, and as `drawn`.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, not be empty")
    if patterns.shape != (len(names), len(tokens), len(tokens)):
        raise ValueError(
            f"patterns has shape {patterns.shape}; {len(names)} names and {len(tokens)} tokens ask for "
            f"{(len(names), len(tokens), len(tokens))}"
        )
    drawn("patterns", patterns)
    largest = float(patterns.max() if largest is None else drawn("largest", np.array(largest)))
    props = {
        "attention": np.round(patterns.astype(float), 4).tolist(),
        "tokens": list(tokens),
        "attentionHeadNames": list(names),
        "minValue": 0,
        "maxValue": round(largest, 4),
        "positiveColor": BLUE,
        "maskUpperTri": True,
    }
    text = json.dumps({"component": "AttentionHeads", "props": props}).replace("<", "\\u003c")
    name = "attention-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    places = {"alt": html.escape(alt), "height": height, "narrow": narrow, "json": text, "id": name}
    return HTML(_ATTENTION.format(version=CIRCUITSVIS_VERSION, **places))


def picture(*panels: UInt8[np.ndarray, "_ _ 3"], gap: int = 24) -> Image:
    """Return RGB arrays side by side as one PNG, bottoms aligned, `gap` transparent pixels between them."""
    import pygame  # comes with minigrid; slow to import

    height = max(panel.shape[0] for panel in panels)
    columns = []
    for panel in panels:
        above = height - len(panel)
        opaque = np.pad(np.insert(panel, 3, 255, axis=2), ((above, 0), (0, 0), (0, 0)))
        columns += [opaque, np.zeros((height, gap, 4), np.uint8)]
    rgba, file = np.hstack(columns[:-1]), io.BytesIO()
    pygame.image.save(pygame.image.frombytes(rgba.tobytes(), rgba.shape[1::-1], "RGBA"), file, "picture.png")
    return Image(file.getvalue(), format="png")
