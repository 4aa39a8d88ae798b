"""Pictures: functions that return plotly figures in the book's style and compute nothing about the model."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Num

from dtbook.figures.display import (
    BLUE,
    DIVERGING,
    GREY,
    GRID,
    INK,
    PALETTE,
    SEQUENTIAL,
    VERMILLION,
    template,
)

DASHES = ("solid", "dash", "dot", "dashdot")  # with five colours, twenty lines that differ
CLASS_COLORS = (VERMILLION, GREY, BLUE)
"""Of the three classes of episodes, by the sign of their return."""
CLASS_TITLES = ("return −1", "return 0", "positive return")
CHANNELS = ("object", "colour", "state")
AGENT_CELL = (3, 6)


def new_figure(
    *, alt: str, height: int = 380, narrow: Mapping[str, Any] | None = None, **layout: Any
) -> go.Figure:
    """Return an empty figure in the book's style; `alt` says in words what it will show.

    `height` is in pixels; `narrow` is what changes on a phone. Raises ValueError for an empty `alt`.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, not be empty")
    meta = {"alt": alt, "narrow": dict(narrow or {})}
    return go.Figure(layout={"template": template(), "height": height, "meta": meta}).update_layout(**layout)


def panel_figure(
    titles: Sequence[str],
    *,
    alt: str,
    height: int = 340,
    columns: int = 3,
    gaps: tuple[float, float] = (0.22, 0.4),
    **layout: Any,
) -> go.Figure:
    """Return an empty figure with a panel for each title, in rows of `columns`, one under the other on a phone.

    Panel k has the axes x{k} and y{k}, counted from 1; `height` is that of one row, in pixels, and `gaps` are
    the shares of a panel's width and height that lie between two of them. Raises ValueError for no title.
    """
    if not titles:
        raise ValueError("titles must name at least one panel, not be empty")
    n, columns = len(titles), min(columns, len(titles))
    rows = -(-n // columns)
    narrow: dict[str, Any] = {"height": height * n}
    for k in range(n):
        row, column = divmod(k, columns)
        x, y = axes(k + 1)
        layout[x.replace("x", "xaxis")] = {"domain": _slot(column, columns, gaps[0]), "anchor": y}
        layout[y.replace("y", "yaxis")] = {"domain": _slot(rows - 1 - row, rows, gaps[1]), "anchor": x}
        narrow[x.replace("x", "xaxis") + ".domain"] = [0, 1]
        narrow[y.replace("y", "yaxis") + ".domain"] = _slot(n - 1 - k, n, gaps[1])
    fig = new_figure(alt=alt, height=height * rows, narrow=narrow, **layout)
    corner = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    for k, title in enumerate(titles, start=1):
        x, y = axes(k)
        fig.add_annotation(text=title, xref=f"{x} domain", yref=f"{y} domain", **corner)
    return fig


def axes(panel: int) -> tuple[str, str]:
    """Return plotly's names of the axes of a panel, counted from 1: x and y, x2 and y2 …"""
    suffix = "" if panel == 1 else str(panel)
    return f"x{suffix}", f"y{suffix}"


def _slot(index: int, count: int, gap: float) -> list[float]:
    """Return the part of 0…1 that slot `index` of `count` takes; gaps between them are a share `gap` of a slot."""
    width = 1 / (count + gap * (count - 1))
    start = index * width * (1 + gap)
    return [round(start, 4), round(min(start + width, 1.0), 4)]


def _fade(color: str, opacity: float) -> str:
    return f"{color}{round(255 * opacity):02x}"  # still begins with the colour that a page replaces


def _make_room(fig: go.Figure, entries: int) -> go.Figure:
    """Make room for a legend above the panels of a figure on a phone, in rows of two entries."""
    fig.layout.meta["narrow"]["margin.t"] = 24 + 24 * -(-entries // 2)
    return fig.update_layout(showlegend=True)


def lines(
    panels: Mapping[str, Mapping[str, pd.Series | pd.DataFrame]],
    *,
    x_title: str,
    y_title: str,
    alt: str,
    height: int = 360,
    markers: bool = False,
) -> go.Figure:
    """Return a figure of lines, with a band where there is one: panels[title][name] is drawn over its index.

    A Series is a line; a DataFrame has a column `mean` for the line and `low`, `high` for the band. One name
    has one colour and dash in all panels. `y_title` labels the first panel.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    fig = panel_figure(list(panels), alt=alt, height=height, showlegend=False)
    for k, panel in enumerate(panels.values(), start=1):
        for name, values in panel.items():
            _add_line(fig, k, values, name, names.index(name), markers)
    fig.update_xaxes(title_text=x_title)
    fig.update_layout(yaxis_title=y_title)
    return _make_room(fig, len(names)) if len(names) > 1 else fig


def _add_line(
    fig: go.Figure, panel: int, values: pd.Series | pd.DataFrame, name: str, style: int, markers: bool
) -> None:
    color, dash = PALETTE[style % len(PALETTE)], DASHES[style % len(DASHES)]
    place = dict(zip(("xaxis", "yaxis"), axes(panel), strict=True)) | {"legendgroup": name}
    x = values.index.to_numpy()
    if isinstance(values, pd.DataFrame):
        outline = np.concatenate([values["low"], values["high"][::-1]]).astype(np.float32)
        band = {"fill": "toself", "fillcolor": _fade(color, 0.16), "line_width": 0, "hoverinfo": "skip"}
        around = np.concatenate([x, x[::-1]])
        fig.add_scatter(x=around, y=outline, mode="lines", showlegend=False, **band, **place)
        values = values["mean"]
    fig.add_scatter(
        x=x,
        y=values.to_numpy(np.float32),
        name=name,
        mode="lines+markers" if markers else "lines",
        line={"color": color, "dash": dash, "width": 2},
        marker_size=5,
        showlegend=name not in {trace.name for trace in fig.data},
        **place,
    )


def calibration(
    panels: Mapping[str, Mapping[str, pd.DataFrame]], *, alt: str, height: int = 420
) -> go.Figure:
    """Return a figure of the return achieved against the RTG (the post's Fig. 5), with the line of perfect calibration.

    panels[title][name] is a curve of `rollout.calibration_curve`: columns `rtg`, `mean`, `low`, `high`.
    """
    drawn = {
        title: {name: curve.set_index("rtg")[["mean", "low", "high"]] for name, curve in curves.items()}
        for title, curves in panels.items()
    }
    titles = {"x_title": "return asked for (RTG)", "y_title": "return achieved"}
    fig = lines(drawn, **titles, alt=alt, height=height, markers=True)
    ends, style = np.array([-1, 1], np.float32), {"color": GREY, "dash": "dot", "width": 1.5}
    for k in range(1, len(panels) + 1):
        x, y = axes(k)
        perfect = {"name": "perfect", "legendgroup": "perfect", "showlegend": k == 1, "hoverinfo": "skip"}
        fig.add_scatter(x=ends, y=ends, mode="lines", line=style, xaxis=x, yaxis=y, **perfect)
    fig.update_xaxes(range=[-1.08, 1.08])
    fig.update_yaxes(range=[-1.08, 1.08])
    return _make_room(fig, 1 + len({name for curves in panels.values() for name in curves}))


def learning_curves(
    runs: Mapping[str, pd.DataFrame],
    panels: Mapping[str, str],
    *,
    x: str,
    x_title: str,
    alt: str,
    height: int = 300,
) -> go.Figure:
    """Return a figure with a panel for each column in `panels` (column → title and unit) and a line for each run."""
    drawn = {
        title: {name: run.set_index(x)[column] for name, run in runs.items()}
        for column, title in panels.items()
    }
    return lines(drawn, x_title=x_title, y_title="", alt=alt, height=height)


def return_by_length(
    returns: Num[np.ndarray, " episodes"],
    lengths: Num[np.ndarray, " episodes"],
    *,
    alt: str,
    height: int = 460,
) -> go.Figure:
    """Return a figure of return against length, an episode a point, with histograms (the post's Fig. 4).

    Colours tell the signs of the returns. Episodes of equal return and length make one disc; its area grows with
    their number.
    """
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
        chosen = np.sign(returns) == sign
        _add_discs(fig, returns[chosen], lengths[chosen], name, color)
        style = {"marker": {"color": color, "line_width": 0}, "showlegend": False, "name": name}
        steps, below = _histogram(lengths[chosen], np.linspace(0, max(lengths.max(initial=1), 1), 41))
        fig.add_bar(x=steps, y=below, xaxis="x", yaxis="y2", **style)
        heights, beside = _histogram(returns[chosen], np.linspace(-1.025, 1.025, 42))
        fig.add_bar(y=heights, x=beside, orientation="h", xaxis="x2", yaxis="y", **style)
    return fig


def _histogram(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles of the bins, and how many values fall into each."""
    return ((edges[1:] + edges[:-1]) / 2).astype(np.float32), np.histogram(values, edges)[0]


def _add_discs(fig: go.Figure, returns: np.ndarray, lengths: np.ndarray, name: str, color: str) -> None:
    points, counts = np.unique(np.stack([lengths, returns]), axis=1, return_counts=True)
    x, y = points.astype(np.float32)
    marker = {"color": _fade(color, 0.55), "size": 4 + 20 * np.sqrt(counts / len(returns)), "line_width": 0}
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
    the values in the cells, for maps of a few whole numbers.
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
        _add_map(fig, k, np.asarray(panel, np.float32).T, labels)
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


def grouped_bars(
    table: pd.DataFrame,
    *,
    y_title: str,
    alt: str,
    x_title: str = "",
    height: int = 360,
    colors: Sequence[str] = PALETTE,
) -> go.Figure:
    """Return a figure with a group of bars for each row of `table` and a colour for each of its columns."""
    fig = new_figure(alt=alt, height=height, barmode="group", bargap=0.25, bargroupgap=0.08)
    x = [str(label) for label in table.index]
    for column, color in zip(table.columns, itertools.cycle(colors), strict=False):
        fig.add_bar(x=x, y=table[column].to_numpy(np.float32), name=str(column), marker_color=color)
    legend = len(table.columns) > 1
    return fig.update_layout(
        showlegend=legend, xaxis_title=x_title, xaxis_type="category", yaxis_title=y_title
    )


def forest(
    card: pd.DataFrame,
    points: pd.DataFrame,
    *,
    x_title: str,
    alt: str,
    x_range: tuple[float, float] | None = None,
    row_height: int = 34,
) -> go.Figure:
    """Return a figure of effects with their intervals over replications, one row a claim, first row on top.

    `card` has a row a claim: `label`, the mean `effect` with `low` and `high`, `posts_weights` (the effect on the
    post's own weights) and `none` (the effect that speaks against the claim); `points` the replications' own effects:
    `label`, `effect`.
    """
    fig = new_figure(alt=alt, height=96 + row_height * len(card), narrow={"margin.t": 72})
    y = list(card["label"])
    spread: dict[str, Any] = {"symmetric": False, "thickness": 2, "width": 0}
    spread |= {"array": (card["high"] - card["effect"]).to_numpy(np.float32)}
    spread |= {"arrayminus": (card["effect"] - card["low"]).to_numpy(np.float32)}
    marks: list[tuple[str, pd.DataFrame, str, dict[str, Any], dict[str, Any]]] = [
        ("speaks against", card, "none", {"symbol": "line-ns-open", "size": 18, "color": INK}, {}),
        ("one replication", points, "effect", {"symbol": "circle-open", "size": 7, "color": GREY}, {}),
        (
            "mean, 95 % interval",
            card,
            "effect",
            {"size": 9, "color": BLUE},
            {"error_x": spread | {"color": BLUE}},
        ),
        (
            "the post's weights",
            card,
            "posts_weights",
            {"symbol": "diamond", "size": 9, "color": VERMILLION},
            {},
        ),
    ]
    for name, table, column, marker, more in marks:
        hover = "%{y}: %{x:.3g}<extra>" + name + "</extra>"
        values = table[column].to_numpy(np.float32)
        style = {"mode": "markers", "name": name, "marker": marker, "hovertemplate": hover, **more}
        fig.add_scatter(x=values, y=list(table["label"]), **style)
    fig.update_yaxes(categoryorder="array", categoryarray=y[::-1], showgrid=True, range=[-0.6, len(y) - 0.4])
    return fig.update_xaxes(title_text=x_title, range=list(x_range) if x_range else None)


def before_after(
    cases: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], *, unit: str, alt: str, height: int = 300
) -> go.Figure:
    """Return a figure of contributions before and after an intervention, and the probabilities (the post's Figs. 8–10).

    cases[title] = (contributions, probabilities), each with a column for either run ("before", "after"); the rows
    are components, and actions. One row of two panels a case.
    """
    titles = [name for case in cases for name in (case, "probability")]
    fig = panel_figure(titles, alt=alt, height=height, columns=2, gaps=(0.14, 0.45), barmode="group")
    for k, table in enumerate((table for tables in cases.values() for table in tables), start=1):
        x, y = axes(k)
        for column, color in zip(table.columns, (GREY, VERMILLION), strict=True):
            style = {
                "name": str(column),
                "legendgroup": str(column),
                "marker_color": color,
                "showlegend": k == 1,
            }
            values = table[column].to_numpy(np.float32)
            fig.add_bar(x=[str(label) for label in table.index], y=values, xaxis=x, yaxis=y, **style)
        scale = {"title_text": unit} if k % 2 else {"range": [0, 1.02]}
        fig.layout[y.replace("y", "yaxis")].update(scale)
    return _make_room(fig, 2).update_layout(bargap=0.25, bargroupgap=0.08)


def distributions(
    panels: Mapping[str, pd.DataFrame], *, at: Sequence[float], alt: str, height: int = 300
) -> go.Figure:
    """Return a figure of distributions over the log odds of a probability, an outline for each column of each table.

    The index is the middles of equal bins (nats), the values shares of all; `at` are the probabilities that are
    written under the axis in the place of their log odds.
    """
    drawn = {title: {str(name): table[name] for name in table.columns} for title, table in panels.items()}
    fig = lines(drawn, x_title="P(forward), spaced by its log odds", y_title="share", alt=alt, height=height)
    fig.update_traces(line_shape="hvh", fill="tozeroy")
    for trace in fig.data:
        trace.fillcolor = _fade(trace.line.color, 0.16)
    odds = np.log(np.array(at) / (1 - np.array(at)))
    return fig.update_xaxes(tickvals=odds.astype(np.float32), ticktext=[f"{p:g}" for p in at])
