"""Effects: bars by group, before and after an intervention, intervals over replications."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dtbook.figures.display import BLUE, GREY, INK, PALETTE, VERMILLION, drawn
from dtbook.figures.panels import axes, make_room, new_figure, panel_figure


def grouped_bars(
    table: pd.DataFrame,
    *,
    y_title: str,
    alt: str,
    x_title: str = "",
    height: int = 360,
    colors: Sequence[str] = PALETTE,
) -> go.Figure:
    """Return a figure with a group of bars for each row of `table` and a colour for each of its columns.

    Where there is NaN, a bar is missing. Raises ValueError for other numbers that are not finite.
    """
    fig = new_figure(alt=alt, height=height, barmode="group", bargap=0.25, bargroupgap=0.08)
    x = [str(label) for label in table.index]
    for column, color in zip(table.columns, itertools.cycle(colors), strict=False):
        values = drawn(repr(column), table[column], gaps=True)
        fig.add_bar(x=x, y=values, name=str(column), marker_color=color)
    legend = len(table.columns) > 1
    return fig.update_layout(
        showlegend=legend, xaxis_title=x_title, xaxis_type="category", yaxis_title=y_title
    )


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
            values = drawn(f"{column!r} of {titles[k - 1]!r}", table[column], gaps=True)
            fig.add_bar(x=[str(label) for label in table.index], y=values, xaxis=x, yaxis=y, **style)
        scale = {"title_text": unit} if k % 2 else {"range": [0, 1.02]}
        fig.layout[y.replace("y", "yaxis")].update(scale)
    return make_room(fig, 2).update_layout(bargap=0.25, bargroupgap=0.08)


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
    `label`, `effect`. NaN is no mark. Raises ValueError for other numbers that are not finite.
    """
    fig = new_figure(alt=alt, height=96 + row_height * len(card), narrow={"margin.t": 72})
    y = list(card["label"])
    spread: dict[str, Any] = {"symmetric": False, "thickness": 2, "width": 0, "color": BLUE}
    spread |= {"array": _marks("high", card["high"] - card["effect"])}
    spread |= {"arrayminus": _marks("low", card["effect"] - card["low"])}
    diamond = {"symbol": "diamond", "size": 9, "color": VERMILLION}
    marks: dict[str, tuple[pd.DataFrame, str, dict[str, Any]]] = {
        "speaks against": (card, "none", {"marker": {"symbol": "line-ns-open", "size": 18, "color": INK}}),
        "one replication": (
            points,
            "effect",
            {"marker": {"symbol": "circle-open", "size": 7, "color": GREY}},
        ),
        "mean, 95 % interval": (card, "effect", {"marker": {"size": 9, "color": BLUE}, "error_x": spread}),
        "the post's weights": (card, "posts_weights", {"marker": diamond}),
    }
    for name, (table, column, style) in marks.items():
        values, hover = _marks(column, table[column]), "%{y}: %{x:.3g}<extra>" + name + "</extra>"
        place = {"x": values, "y": list(table["label"])}
        fig.add_scatter(mode="markers", name=name, hovertemplate=hover, **place, **style)
    fig.update_yaxes(categoryorder="array", categoryarray=y[::-1], showgrid=True, range=[-0.6, len(y) - 0.4])
    return fig.update_xaxes(title_text=x_title, range=list(x_range) if x_range else None)


def _marks(name: str, values: pd.Series) -> np.ndarray:
    """Return the numbers of a column that may have none, as `drawn`."""
    return drawn(name, values, gaps=True) if values.notna().any() else values.to_numpy(np.float32)
