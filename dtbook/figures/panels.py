"""The paper of a figure: an empty one in the book's style, panels in it, room for a legend."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from dtbook.figures.display import template


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


def fade(color: str, opacity: float) -> str:
    """Return a colour that lets through what lies behind it; it still begins with the colour that a page replaces."""
    return f"{color}{round(255 * opacity):02x}"


def make_room(fig: go.Figure, entries: int) -> go.Figure:
    """Make room for a legend above the panels of a figure on a phone, in rows of two entries."""
    fig.layout.meta["narrow"]["margin.t"] = 24 + 24 * -(-entries // 2)
    return fig.update_layout(showlegend=True)
