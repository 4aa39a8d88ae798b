"""The task's own pictures: episodes by return and length, and values on the cells of the agent's view."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Num

from dtbook.figures.display import BLUE, DIVERGING, GREY, GRID, SEQUENTIAL, VERMILLION, drawn
from dtbook.figures.panels import axes, fade, new_figure, panel_figure

CLASS_COLORS = (VERMILLION, GREY, BLUE)
"""Of the three classes of episodes, by the sign of their return."""
CLASS_TITLES = ("return −1", "return 0", "positive return")
CHANNELS = ("object", "colour", "state")
AGENT_CELL = (3, 6)


def return_by_length(
    returns: Num[np.ndarray, " episodes"],
    lengths: Num[np.ndarray, " episodes"],
    *,
    alt: str,
    height: int = 460,
) -> go.Figure:
    """Return a figure of return against length, an episode a point, with histograms (the post's Fig. 4).

    Colours tell the signs of the returns. Episodes of equal return and length make one disc; its area grows with
    their number. Raises ValueError for numbers that are not finite.
    """
    for name, values in {"returns": returns, "lengths": lengths}.items():
        drawn(name, values)
    fig = new_figure(
        alt=alt,
        height=height,
        barmode="stack",
        bargap=0,
        legend={"itemsizing": "constant", "traceorder": "normal"},
        xaxis={"domain": [0, 0.8], "title": "length (steps)", "rangemode": "tozero"},
        yaxis={"domain": [0, 0.78], "title": "return", "range": [-1.15, 1.15]},
        xaxis2={"domain": [0.83, 1], "title": "episodes", "nticks": 2, "tickangle": 0},
        yaxis2={"domain": [0.83, 1], "title": "episodes", "nticks": 3},
    )
    for sign, name, color in zip((-1, 0, 1), CLASS_TITLES, CLASS_COLORS, strict=True):
        members = np.sign(returns) == sign
        _add_discs(fig, returns[members], lengths[members], name, color)
        style = {"marker": {"color": color, "line_width": 0}, "showlegend": False, "name": name}
        steps, below = _histogram(lengths[members], np.linspace(0, max(lengths.max(initial=1), 1), 41))
        fig.add_bar(x=steps, y=below, xaxis="x", yaxis="y2", **style)
        heights, beside = _histogram(returns[members], np.linspace(-1.025, 1.025, 42))
        fig.add_bar(y=heights, x=beside, orientation="h", xaxis="x2", yaxis="y", **style)
    return fig


def _histogram(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles of the bins, and how many values fall into each."""
    return ((edges[1:] + edges[:-1]) / 2).astype(np.float32), np.histogram(values, edges)[0]


def _add_discs(fig: go.Figure, returns: np.ndarray, lengths: np.ndarray, name: str, color: str) -> None:
    points, counts = np.unique(np.stack([lengths, returns]), axis=1, return_counts=True)
    x, y = points.astype(np.float32)
    marker = {"color": fade(color, 0.55), "size": 4 + 20 * np.sqrt(counts / len(returns)), "line_width": 0}
    hover = "length %{x}, return %{y:.2f}: %{customdata} episodes<extra></extra>"
    fig.add_scatter(
        x=x, y=y, mode="markers", name=name, marker=marker, customdata=counts, hovertemplate=hover
    )


def view_maps(
    values: Num[np.ndarray, "panels 7 7"],
    titles: Sequence[str] = CHANNELS,
    *,
    alt: str,
    unit: str = "",
    signed: bool = True,
    labels: bool = False,
    height: int = 340,
) -> go.Figure:
    """Return a figure of values of the view's 7×7 cells, one panel each, drawn where the agent (▲) sees them.

    `values[panel, i, j]` belongs to `image[i, j]`; the agent sits at (3, 6) and looks up. All panels share
    one scale: `signed` values a diverging one centred on 0, others a sequential one from 0. `labels` prints
    the values in the cells, for maps of a few whole numbers. Raises ValueError for numbers that are not finite, and for
    titles that are not one a panel.
    """
    if len(titles) != len(values):
        raise ValueError(f"titles must name the {len(values)} panels of values, not {len(titles)}")
    limit = float(np.abs(values).max()) or 1.0
    limit *= 2 if labels else 1  # pale enough to read a number on it
    scale = {
        "colorscale": DIVERGING if signed else SEQUENTIAL,
        "cmin": -limit if signed else 0,
        "cmax": limit,
    }
    bar = {"title": {"text": unit, "side": "bottom", "font": {"size": 13}}, "outlinewidth": 0}
    fig = panel_figure(
        titles,
        alt=alt,
        height=height,
        coloraxis={**scale, "cmax": limit, "colorbar": bar, "showscale": not labels},
        plot_bgcolor=GRID,  # shows as the lines between the cells
        gaps=(0.1, 0.15),
        margin={"t": 24, "b": 12 if labels else 76},
    )
    for k, panel in enumerate(values, start=1):
        _add_map(fig, k, drawn("values", panel).T, labels)
    hidden = {"showgrid": False, "showticklabels": False, "showline": False, "constrain": "domain"}
    return fig.update_xaxes(hidden).update_yaxes(hidden)


def _add_map(fig: go.Figure, panel: int, cells: np.ndarray, labels: bool) -> None:
    """Draw `cells[row, column]` in a panel, and the agent over them."""
    (column, row), (x, y) = AGENT_CELL, axes(panel)
    text = np.vectorize("{:g}".format)(cells) if labels else None
    if text is not None:
        text[row, column] = ""
    hover = "column %{x}, row %{y}: %{z:.3g}<extra></extra>"
    style = {"coloraxis": "coloraxis", "xgap": 1, "ygap": 1, "hovertemplate": hover}
    fig.add_heatmap(z=cells, text=text, texttemplate="%{text}" if labels else None, xaxis=x, yaxis=y, **style)
    fig.add_annotation(text="▲", x=column, y=row, xref=x, yref=y, showarrow=False)
    fig.layout[y.replace("y", "yaxis")].update(scaleanchor=x, autorange="reversed")
