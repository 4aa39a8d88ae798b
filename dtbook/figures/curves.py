"""Lines: curves with bands, calibration, learning curves, distributions."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dtbook.figures.display import GREY, PALETTE, drawn
from dtbook.figures.panels import axes, fade, make_room, panel_figure

DASHES = ("solid", "dash", "dot", "dashdot")  # with five colours, twenty lines that differ


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
    has one colour and dash in all panels. `y_title` labels the first panel. NaN is a gap in a line, and
    left out of its band. Raises ValueError for other numbers that are not finite.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    fig = panel_figure(list(panels), alt=alt, height=height, showlegend=False)
    for k, panel in enumerate(panels.values(), start=1):
        for name, values in panel.items():
            _add_line(fig, k, values, name, names.index(name), markers)
    fig.update_xaxes(title_text=x_title)
    fig.update_layout(yaxis_title=y_title)
    return make_room(fig, len(names)) if len(names) > 1 else fig


def _add_line(
    fig: go.Figure, panel: int, values: pd.Series | pd.DataFrame, name: str, style: int, markers: bool
) -> None:
    color, dash = PALETTE[style % len(PALETTE)], DASHES[style % len(DASHES)]
    place = dict(zip(("xaxis", "yaxis"), axes(panel), strict=True)) | {"legendgroup": name}
    x = values.index.to_numpy()
    if np.issubdtype(x.dtype, np.number):
        drawn(f"the index of {name!r}", x)
    if isinstance(values, pd.DataFrame):
        inside = values.dropna(subset=["low", "high"])
        outline = drawn(f"the band of {name!r}", np.concatenate([inside["low"], inside["high"][::-1]]))
        band = {"fill": "toself", "fillcolor": fade(color, 0.16), "line_width": 0, "hoverinfo": "skip"}
        around = np.concatenate([inside.index, inside.index[::-1]])
        fig.add_scatter(x=around, y=outline, mode="lines", showlegend=False, **band, **place)
        values = values["mean"]
    fig.add_scatter(
        x=x,
        y=drawn(repr(name), values, gaps=True),
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
    curves_of = {
        title: {name: curve.set_index("rtg")[["mean", "low", "high"]] for name, curve in curves.items()}
        for title, curves in panels.items()
    }
    titles = {"x_title": "return asked for (RTG)", "y_title": "return achieved"}
    fig = lines(curves_of, **titles, alt=alt, height=height, markers=True)
    ends, style = np.array([-1, 1], np.float32), {"color": GREY, "dash": "dot", "width": 1.5}
    for k in range(1, len(panels) + 1):
        x, y = axes(k)
        perfect = {"name": "perfect", "legendgroup": "perfect", "showlegend": k == 1, "hoverinfo": "skip"}
        fig.add_scatter(x=ends, y=ends, mode="lines", line=style, xaxis=x, yaxis=y, **perfect)
    fig.update_xaxes(range=[-1.08, 1.08])
    fig.update_yaxes(range=[-1.08, 1.08])
    return make_room(fig, 1 + len({name for curves in panels.values() for name in curves}))


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
    columns = {
        title: {name: run.set_index(x)[column] for name, run in runs.items()}
        for column, title in panels.items()
    }
    return lines(columns, x_title=x_title, y_title="", alt=alt, height=height)


def distributions(
    panels: Mapping[str, pd.DataFrame], *, at: Sequence[float], alt: str, height: int = 300
) -> go.Figure:
    """Return a figure of distributions over the log odds of a probability, an outline for each column of each table.

    The index is the middles of equal bins (nats), the values shares of all; `at` are the probabilities that are
    written under the axis in the place of their log odds. Raises ValueError for one that has none.
    """
    if wrong := [p for p in at if not 0 < p < 1]:
        raise ValueError(f"at holds {wrong[0]}; a probability that has log odds lies between 0 and 1.")
    columns = {title: {str(name): table[name] for name in table.columns} for title, table in panels.items()}
    fig = lines(
        columns, x_title="P(forward), spaced by its log odds", y_title="share", alt=alt, height=height
    )
    fig.update_traces(line_shape="hvh", fill="tozeroy")
    for trace in fig.data:
        trace.fillcolor = fade(trace.line.color, 0.16)
    odds = np.log(np.array(at) / (1 - np.array(at)))
    return fig.update_xaxes(tickvals=odds.astype(np.float32), ticktext=[f"{p:g}" for p in at])
