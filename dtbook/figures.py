"""Pictures: functions that return plotly figures and compute nothing about the model; one style, one renderer.

Three colours stand for the page: `INK` (text), `GRID` (lines) and `PAPER` (background, and zero on a diverging scale).
The book's pages replace them by their theme's own when they draw (book/_static/figures.js), so every figure is readable
in the light and the dark theme. The colours of `PALETTE` have a contrast of at least 3 with both backgrounds and can be
told apart with any common form of colour blindness (tests/test_figures.py holds them to it); lines differ in dash too.

Each figure carries its alternative text in `layout.meta["alt"]`, and in `layout.meta["narrow"]` what changes on a phone.
"""

import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import Image, display
from jaxtyping import Float, Num, UInt8
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs_version

INK, GRID, PAPER = "#1f2328", "#d9dee3", "#fefefe"
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#b8609a", "#767c85"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SEQUENTIAL = ((0.0, PAPER), (1.0, BLUE))
DIVERGING = ((0.0, VERMILLION), (0.5, PAPER), (1.0, BLUE))
CLASS_COLORS = (VERMILLION, GREY, BLUE)
"""Of the three classes of episodes: return −1, return 0, positive return."""

CHANNELS = ("object", "colour", "state")
AGENT_CELL = (3, 6)
PLOTLY_MIME = "application/vnd.plotly.v1+json"
GLUE_MIME = "application/papermill.record/"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_SNIPPET = """<div class="book-figure" role="img" aria-label="{alt}" style="height:{height}px;--narrow-height:{narrow}px">
<p>This figure is drawn by JavaScript, which is not running here. What it shows: {alt}</p>
<script type="application/json">{json}</script></div>
<script data-outside-the-book>(() => {{
  const box = document.currentScript.previousElementSibling;
  const figure = JSON.parse(box.querySelector("script").textContent);
  const draw = () => {{ box.replaceChildren(); Plotly.newPlot(box, figure.data, figure.layout, figure.config); }};
  if (window.Plotly?.newPlot) return draw();
  const library = document.querySelector("script[data-plotly]") ?? document.createElement("script");
  library.addEventListener("load", draw);
  if (library.isConnected) return;
  library.dataset.plotly = "";
  library.src = "https://cdn.plot.ly/plotly-{version}.min.js";
  document.head.append(library);
}})();</script>"""


def template() -> go.layout.Template:
    """The style of every figure: small, for it travels with each of them."""
    axis = {"gridcolor": GRID, "linecolor": GREY, "zeroline": False, "automargin": True, "ticks": ""}
    bar = {"orientation": "h", "y": -0.08, "yanchor": "top", "thickness": 10, "outlinewidth": 0, "len": 0.6}
    layout = {
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "colorway": PALETTE,
        "coloraxis": {"colorscale": SEQUENTIAL, "colorbar": bar},
        "margin": {"l": 12, "r": 12, "t": 44, "b": 12},
        "xaxis": axis,
        "yaxis": axis,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
        "dragmode": False,  # a finger on the figure scrolls the page
        "hovermode": "closest",
    }
    return go.layout.Template(layout=layout)


class BookRenderer(MimetypeRenderer):
    """Shows a figure in JupyterLab and VS Code (as plotly's own JSON), and in the book and nbconvert (as HTML).

    The HTML holds the figure and its alternative text; book/_static/figures.js draws it from the book's own files,
    and only outside the book does it fall back on the pinned CDN. Raises ValueError for a figure without `alt`.
    """

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """The two representations of a figure given as a dict."""
        layout = fig_dict["layout"]
        meta = layout.get("meta") or {}
        if not meta.get("alt"):
            raise ValueError("layout.meta['alt'] must say in words what the figure shows; this figure has none")
        figure = {**fig_dict, "config": {"displayModeBar": False, "responsive": True}}
        text = pio.to_json(figure, validate=False)
        height = layout.get("height", 380)
        snippet = _SNIPPET.format(
            alt=html.escape(meta["alt"]),
            height=height,
            narrow=(meta.get("narrow") or {}).get("height", height),
            json=text.replace("<", "\\u003c"),  # nothing in it can end the script element
            version=get_plotlyjs_version(),
        )
        return {PLOTLY_MIME: json.loads(text), "text/html": snippet}


def use_book_style() -> None:
    """Make the book's template and renderer plotly's defaults in this notebook (in Colab: Colab's own renderer)."""
    pio.templates["book"] = template()
    pio.templates.default = "book"
    pio.renderers["book"] = BookRenderer()
    pio.renderers.default = "colab" if "google.colab" in sys.modules else "book"


def glue(**values: Any) -> None:
    """Record values under their names for the prose (`` {glue:text}`name:.2f` ``); shows nothing.

    MyST-NB's own `glue` would need the whole of Sphinx in the notebook, and records NumPy scalars as text that the
    prose cannot format.
    """
    for name, value in values.items():
        text = repr(value.item() if hasattr(value, "item") else value)
        metadata = {"scrapbook": {"name": name, "mime_prefix": GLUE_MIME}}
        display({f"{GLUE_MIME}text/plain": text}, metadata=metadata, raw=True)


def picture(*panels: UInt8[np.ndarray, "_ _ 3"], gap: int = 24) -> Image:
    """RGB arrays side by side as one PNG, bottoms aligned, with `gap` transparent pixels between them."""
    import pygame  # comes with minigrid; slow to import

    height = max(panel.shape[0] for panel in panels)
    columns = []
    for panel in panels:
        opaque = np.insert(panel, 3, 255, axis=2)
        columns += [np.pad(opaque, ((height - len(panel), 0), (0, 0), (0, 0))), np.zeros((height, gap, 4), np.uint8)]
    rgba = np.hstack(columns[:-1])
    file = io.BytesIO()
    pygame.image.save(pygame.image.frombytes(rgba.tobytes(), rgba.shape[1::-1], "RGBA"), file, "picture.png")
    return Image(file.getvalue(), format="png")


def new_figure(*, alt: str, height: int = 380, **layout: Any) -> go.Figure:
    """An empty figure in the book's style; `alt` says in words what it will show. Raises ValueError if it says nothing."""
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, not be empty")
    return go.Figure(layout={"template": template(), "height": height, "meta": {"alt": alt}, **layout})


def panel_figure(
    titles: Sequence[str], *, alt: str, height: int = 340, columns: int = 3, gap: float = 0.08, **layout: Any
) -> go.Figure:
    """An empty figure with a titled panel for each title, in rows of `columns`; on a phone one under the other.

    Panel k has the axes `x{k}` and `y{k}`, counted from 1; `height` is that of one row in pixels.
    """
    n, columns = len(titles), min(columns, len(titles))
    rows = -(-n // columns)
    changes: dict[str, Any] = {"height": height * n}
    for k, title in enumerate(titles):
        key = "" if k == 0 else str(k + 1)
        row, column = divmod(k, columns)
        layout[f"xaxis{key}"] = {"domain": _slot(column, columns, gap), "anchor": f"y{key}"}
        layout[f"yaxis{key}"] = {"domain": _slot(rows - 1 - row, rows, 0.24), "anchor": f"x{key}"}
        changes |= {f"xaxis{key}.domain": [0, 1], f"yaxis{key}.domain": _slot(n - 1 - k, n, 0.24)}
    fig = new_figure(alt=alt, height=height * rows, **layout)
    for k, title in enumerate(titles, start=1):
        place = {"xref": f"x{k} domain" if k > 1 else "x domain", "yref": f"y{k} domain" if k > 1 else "y domain"}
        fig.add_annotation(text=title, x=0, y=1, xanchor="left", yanchor="bottom", showarrow=False, **place)
    fig.layout.meta = {**fig.layout.meta, "narrow": changes}
    return fig


def _slot(index: int, count: int, gap: float) -> list[float]:
    """The part of 0…1 that slot `index` of `count` takes, with gaps that are a share `gap` of a slot between them."""
    width = 1 / (count + gap * (count - 1))
    start = index * width * (1 + gap)
    return [round(start, 4), round(min(start + width, 1.0), 4)]


def _fade(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def lines(
    panels: Mapping[str, Mapping[str, pd.Series | pd.DataFrame]],
    *,
    x_title: str,
    y_title: str,
    alt: str,
    height: int = 360,
    markers: bool = False,
) -> go.Figure:
    """Lines, with a band where there is one: panels[title][name] is what is drawn over its index.

    A Series is a line; a DataFrame has a column `mean` for the line and `low`, `high` for the band. One name has one
    colour and dash in all panels. `y_title` labels the first panel of the row.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    fig = panel_figure(list(panels), alt=alt, height=height)
    for k, panel in enumerate(panels.values(), start=1):
        for name, values in panel.items():
            style = names.index(name) % len(PALETTE)
            first = name not in {trace.name for trace in fig.data}
            _add_line(fig, k, name, values, PALETTE[style], DASHES[style], first, markers)
    fig.update_layout(showlegend=len(names) > 1)
    fig.update_xaxes(title_text=x_title)
    fig.layout.yaxis.title.text = y_title
    return fig


def _add_line(
    fig: go.Figure,
    k: int,
    name: str,
    values: pd.Series | pd.DataFrame,
    color: str,
    dash: str,
    first: bool,
    markers: bool,
) -> None:
    x = values.index.to_numpy()
    shared = {"legendgroup": name, "xaxis": f"x{k}", "yaxis": f"y{k}"}
    if isinstance(values, pd.DataFrame):
        around = np.concatenate([values["low"], values["high"][::-1]]).astype(np.float32)
        band = {"fill": "toself", "fillcolor": _fade(color, 0.16), "line": {"width": 0}, "hoverinfo": "skip"}
        fig.add_scatter(x=np.concatenate([x, x[::-1]]), y=around, mode="lines", showlegend=False, **band, **shared)
        values = values["mean"]
    fig.add_scatter(
        x=x,
        y=values.to_numpy(np.float32),
        name=name,
        mode="lines+markers" if markers else "lines",
        line={"color": color, "dash": dash, "width": 2},
        marker={"size": 5},
        showlegend=first,
        **shared,
    )


def calibration(panels: Mapping[str, Mapping[str, pd.DataFrame]], *, alt: str, height: int = 420) -> go.Figure:
    """Return achieved against return asked for (the post's Fig. 5), with the line of perfect calibration.

    panels[title][model name] is a curve as `rollout.calibration_curve` returns it: columns `rtg`, `mean`, `low`, `high`.
    """
    drawn = {
        title: {name: curve.set_index("rtg")[["mean", "low", "high"]] for name, curve in curves.items()}
        for title, curves in panels.items()
    }
    fig = lines(drawn, x_title="return asked for (RTG)", y_title="return achieved", alt=alt, height=height, markers=True)
    for k in range(1, len(panels) + 1):
        ends = np.array([-1.0, 1.0], dtype=np.float32)
        line = {"color": GREY, "dash": "dot", "width": 1.5}
        axes = {"xaxis": f"x{k}", "yaxis": f"y{k}"}
        fig.add_scatter(x=ends, y=ends, mode="lines", name="perfect", line=line, showlegend=k == 1, **axes)
    fig.update_yaxes(range=[-1.08, 1.08])
    fig.update_xaxes(range=[-1.08, 1.08])
    fig.update_layout(showlegend=True)
    return fig


def learning_curves(
    runs: Mapping[str, pd.DataFrame], panels: Mapping[str, str], *, x: str, x_title: str, alt: str, height: int = 300
) -> go.Figure:
    """One panel for each column of the runs' tables: `panels` maps a column to the panel's title (with its unit)."""
    drawn = {title: {name: run.set_index(x)[column] for name, run in runs.items()} for column, title in panels.items()}
    return lines(drawn, x_title=x_title, y_title="", alt=alt, height=height)


def return_by_length(
    returns: Num[np.ndarray, " episodes"], lengths: Num[np.ndarray, " episodes"], *, alt: str, height: int = 460
) -> go.Figure:
    """Return against length of each episode, with their histograms (the post's Fig. 4), coloured by the return's sign.

    Episodes of equal return and length make one disc, whose area is their number.
    """
    fig = new_figure(
        alt=alt,
        height=height,
        barmode="stack",
        bargap=0,
        xaxis={"domain": [0, 0.8], "title": "length (steps)", "rangemode": "tozero"},
        yaxis={"domain": [0, 0.78], "title": "return", "range": [-1.15, 1.15]},
        xaxis2={"domain": [0.83, 1], "title": "episodes", "nticks": 3},
        yaxis2={"domain": [0.83, 1], "anchor": "x", "title": "episodes", "nticks": 3},
    )
    steps, heights = np.linspace(0, max(lengths.max(), 1), 41), np.linspace(-1.025, 1.025, 42)
    for sign, name, color in zip((-1, 0, 1), ("return −1", "return 0", "positive"), CLASS_COLORS, strict=True):
        chosen = np.sign(returns) == sign
        _add_discs(fig, returns[chosen], lengths[chosen], name, color)
        below, beside = np.histogram(lengths[chosen], steps)[0], np.histogram(returns[chosen], heights)[0]
        shared = {"marker": {"color": color, "line": {"width": 0}}, "showlegend": False, "name": name}
        fig.add_bar(x=(steps[1:] + steps[:-1]) / 2, y=below, xaxis="x", yaxis="y2", **shared)
        fig.add_bar(y=(heights[1:] + heights[:-1]) / 2, x=beside, orientation="h", xaxis="x2", yaxis="y", **shared)
    return fig


def _add_discs(fig: go.Figure, returns: np.ndarray, lengths: np.ndarray, name: str, color: str) -> None:
    points, counts = np.unique(np.stack([lengths, returns]), axis=1, return_counts=True)
    marker = {"color": _fade(color, 0.55), "size": 4 + np.sqrt(counts), "line": {"width": 0}}
    hover = "length %{x}, return %{y:.2f}: %{customdata} episodes<extra></extra>"
    x, y = points.astype(np.float32)
    fig.add_scatter(x=x, y=y, mode="markers", name=name, marker=marker, customdata=counts, hovertemplate=hover)


def view_maps(
    values: Num[np.ndarray, "panels 7 7"] | Float[np.ndarray, "panels 7 7"],
    titles: Sequence[str] = CHANNELS,
    *,
    alt: str,
    unit: str = "",
    signed: bool = True,
    labels: bool = False,
    height: int = 300,
) -> go.Figure:
    """Values of the 7×7 cells of the view, `values[panel, i, j]` as in `image[i, j]`, drawn where the agent sees them.

    The agent (▲) sits at (3, 6) and looks up. All panels share one scale: `signed` ones a diverging scale centred on 0,
    others a sequential one from 0. `labels` prints the values in the cells, for maps of a few whole numbers.
    """
    limit = float(np.abs(values).max()) or 1.0
    scale = {"colorscale": DIVERGING if signed else SEQUENTIAL, "cmin": -limit if signed else 0, "cmax": limit}
    if labels:  # pale enough to read the number on it
        scale |= {"cmin": scale["cmin"] * 2, "cmax": limit * 2, "showscale": False}
    fig = panel_figure(titles, alt=alt, height=height, coloraxis={**scale, "colorbar": {"title": {"text": unit, "side": "bottom"}}})
    for k, panel in enumerate(values, start=1):
        axes = {"xaxis": f"x{k}", "yaxis": f"y{k}", "coloraxis": "coloraxis", "xgap": 2, "ygap": 2}
        text = {"texttemplate": "%{z}"} if labels else {}
        hover = "column %{x}, row %{y}: %{z:.3g}<extra></extra>"
        fig.add_heatmap(z=np.asarray(panel, np.float32).T, hovertemplate=hover, **text, **axes)
        place = {"xref": f"x{k}" if k > 1 else "x", "yref": f"y{k}" if k > 1 else "y"}
        fig.add_annotation(text="▲", x=AGENT_CELL[0], y=AGENT_CELL[1], showarrow=False, **place)
        key = "" if k == 1 else str(k)
        square = {"scaleanchor": f"x{key}", "autorange": "reversed"}
        fig.update_layout({f"yaxis{key}": square})
    fig.update_xaxes(showgrid=False, showticklabels=False, showline=False, constrain="domain")
    fig.update_yaxes(showgrid=False, showticklabels=False, showline=False, constrain="domain")
    return fig


def grouped_bars(
    table: pd.DataFrame, *, x_title: str = "", y_title: str, alt: str, height: int = 360, colors: Sequence[str] = PALETTE
) -> go.Figure:
    """One group of bars for each row of `table`, one colour for each of its columns."""
    fig = new_figure(alt=alt, height=height, barmode="group", bargap=0.25, bargroupgap=0.08)
    for column, color in zip(table.columns, colors, strict=False):
        x = [str(label) for label in table.index]
        fig.add_bar(x=x, y=table[column].to_numpy(np.float32), name=str(column), marker={"color": color})
    fig.update_layout(showlegend=len(table.columns) > 1, xaxis_title=x_title, yaxis_title=y_title)
    return fig
