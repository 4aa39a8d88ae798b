"""Pictures in the book's style: functions that return figures and compute nothing about the model."""

from dtbook.figures.curves import calibration, distributions, learning_curves, lines
from dtbook.figures.display import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    GRID,
    INK,
    PALETTE,
    PAPER,
    PURPLE,
    SEQUENTIAL,
    VERMILLION,
    attention_heads,
    glue,
    picture,
    use_book_style,
)
from dtbook.figures.effects import before_after, forest, grouped_bars
from dtbook.figures.panels import axes, new_figure, panel_figure
from dtbook.figures.task import CHANNELS, CLASS_COLORS, CLASS_TITLES, return_by_length, view_maps

__all__ = [
    "BLUE",
    "CHANNELS",
    "CLASS_COLORS",
    "CLASS_TITLES",
    "DIVERGING",
    "GREEN",
    "GREY",
    "GRID",
    "INK",
    "PALETTE",
    "PAPER",
    "PURPLE",
    "SEQUENTIAL",
    "VERMILLION",
    "attention_heads",
    "axes",
    "before_after",
    "calibration",
    "distributions",
    "forest",
    "glue",
    "grouped_bars",
    "learning_curves",
    "lines",
    "new_figure",
    "panel_figure",
    "picture",
    "return_by_length",
    "use_book_style",
    "view_maps",
]
