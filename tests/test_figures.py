"""Figures: what is drawn is what was given, readable in both themes, and described in words."""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pygame
import pytest
from myst_nb.core.variables import format_plain_text

from dtbook import figures
from dtbook.figures import display as style
from dtbook.figures.display import PLOTLY_MIME, BookRenderer

STATIC = Path(__file__).parent.parent / "book" / "_static"
THEMES = ("light", "dark")
PALETTE = ("blue", "vermillion", "green", "purple", "grey")
# Machado, Oliveira and Fernandes (2009), "A physiologically-based model for simulation of color vision deficiency",
# severity 1, for linear RGB.
COLOUR_BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def css_colors(theme):
    css = (STATIC / "book.css").read_text()
    block = re.search(rf'html\[data-theme="{theme}"\] {{(.*?)}}', css, re.S)[1]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def linear(color):
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(0.05 + linear(color) @ [0.2126, 0.7152, 0.0722] for color in (one, other))
    return high / low


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(
        0, 1
    )
    ratio = xyz / [0.9505, 1.0, 1.089]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_reference():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)  # WCAG's own example


@pytest.mark.parametrize("theme", THEMES)
def test_colours_stand_out_from_the_page(theme):
    colors = css_colors(theme)
    for name in PALETTE:
        assert contrast(colors[name], colors["paper"]) >= 3, name
    for name in ("ink", "pst-color-text-muted", "pst-color-link"):
        if name in colors:
            assert contrast(colors[name], colors["paper"]) >= 4.5, name


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", COLOUR_BLIND)
def test_colour_blind_readers_tell_the_palette_apart(theme, kind):
    colors = css_colors(theme)
    for one, other in itertools.combinations(PALETTE, 2):
        seen = [lab(COLOUR_BLIND[kind] @ linear(colors[name])) for name in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) >= 12, (one, other)  # ΔE of 2.3 is just noticeable


def test_page_replaces_the_colours_that_figures_use():
    script = (STATIC / "figures.js").read_text()
    replaced = dict(re.findall(r'(\w+): "(#[0-9a-f]{6})"', script))
    assert replaced == {name: getattr(style, name.upper()) for name in ("ink", "grid", "paper", *PALETTE)}
    for theme in THEMES:
        assert set(replaced) <= set(css_colors(theme))


@pytest.mark.parametrize("name", ["architecture.svg", "decision-transformer.svg"])
def test_diagrams_alone_have_the_colours_of_the_themes(name):
    light, dark = re.findall(r"svg:root {(.*?)}", (STATIC / name).read_text())
    for block, theme in ((light, "light"), (dark, "dark")):
        for variable, color in re.findall(r"--(\w+): (#[0-9a-f]{6})", block):
            assert color == css_colors(theme).get(variable, color), variable


def test_figure_needs_alternative_text():
    with pytest.raises(ValueError, match="alt must say in words what the figure shows"):
        figures.new_figure(alt="  ")
    with pytest.raises(ValueError, match=r"layout\.meta\['alt'\] must say in words"):
        BookRenderer().to_mimebundle(go.Figure().to_dict())


def test_renderer_gives_two_equal_representations_that_cannot_break_out():
    fig = figures.new_figure(
        alt='two "points" & more', title="</script><b>", narrow={"height": 500}, height=300
    )
    fig.add_scatter(x=[1, 2], y=[3, 4])
    bundle = BookRenderer().to_mimebundle(fig.to_dict())
    html = bundle["text/html"]
    assert html.count("</script>") == 2  # the JSON's and the fallback's own
    assert json.loads(re.search(r'application/json">(.*?)</script>', html, re.S)[1]) == bundle[PLOTLY_MIME]
    assert bundle[PLOTLY_MIME]["data"][0]["y"] == [3, 4]
    assert 'aria-label="two &quot;points&quot; &amp; more"' in html
    assert 'style="height:300px;--narrow-height:500px"' in html


def test_style_is_small():
    assert len(figures.new_figure(alt="x").to_json()) < 2500


def test_glued_numbers_can_be_formatted(monkeypatch):
    text = {}

    def record(data, metadata, raw):
        text[metadata["scrapbook"]["name"]] = data["application/papermill.record/text/plain"]

    monkeypatch.setattr(style, "display", record)
    figures.glue(share=np.float64(0.25), count=np.int64(892_298), verdict="supported")
    assert format_plain_text(text["share"], ".1%") == "25.0%"
    assert format_plain_text(text["count"], ",d") == "892,298"
    assert format_plain_text(text["verdict"], "s") == "supported"


def test_picture_holds_the_pixels_and_a_clear_gap():
    rng = np.random.default_rng(0)
    tall, low = rng.integers(0, 256, (6, 4, 3), np.uint8), rng.integers(0, 256, (3, 5, 3), np.uint8)
    surface = pygame.image.load(io.BytesIO(figures.picture(tall, low, gap=2).data), "x.png")
    rgb = pygame.surfarray.array3d(surface).transpose(1, 0, 2)
    alpha = pygame.surfarray.array_alpha(surface).T
    np.testing.assert_array_equal(rgb[:, :4], tall)
    np.testing.assert_array_equal(rgb[3:, 6:], low)
    assert (alpha[:, :4] == 255).all()
    assert (alpha[:, 4:6] == 0).all()
    assert (alpha[:3, 6:] == 0).all()


def test_view_maps_draw_each_cell_where_the_agent_sees_it():
    values = np.zeros((2, 7, 7))
    values[1, 3, 5] = -4.0  # the cell in front of the agent
    fig = figures.view_maps(values, ["object", "colour"], alt="x")
    column, row = np.argwhere(np.asarray(fig.data[1].z).T)[0]
    assert (column, row) == (3, 5)
    assert fig.layout.yaxis2.autorange == "reversed"  # row 0 is at the top
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-4, 4)
    assert {trace.coloraxis for trace in fig.data} == {"coloraxis"}
    agents = [(a.x, a.y) for a in fig.layout.annotations if a.text == "▲"]
    assert agents == [(3, 6), (3, 6)]


def test_view_maps_refuse_titles_that_do_not_fit():
    with pytest.raises(ValueError, match="titles must name the 2 panels of values, not 3"):
        figures.view_maps(np.zeros((2, 7, 7)), alt="x")


def test_labelled_map_prints_the_numbers_but_not_under_the_agent():
    fig = figures.view_maps(np.full((1, 7, 7), 8), ["object"], alt="x", signed=False, labels=True)
    text = np.asarray(fig.data[0].text)
    assert text[6, 3] == ""
    assert (np.delete(text.ravel(), 6 * 7 + 3) == "8").all()


def test_panels_neither_overlap_nor_leave_the_figure():
    fig = figures.panel_figure(list("abcde"), alt="x", height=200)
    assert fig.layout.height == 400
    narrow = fig.layout.meta["narrow"]
    assert narrow["height"] == 1000
    slots = [narrow[f"yaxis{k}.domain"] for k in ("", 2, 3, 4, 5)]
    edges = np.array(slots[::-1]).ravel()
    assert (np.diff(edges) > 0).all()
    assert edges[0] == 0
    assert edges[-1] == 1
    assert fig.layout.xaxis2.domain[0] > fig.layout.xaxis.domain[1]
    assert fig.layout.yaxis4.domain[1] < fig.layout.yaxis.domain[0]
    with pytest.raises(ValueError, match="titles must name at least one panel"):
        figures.panel_figure([], alt="x")


def curve(mean):
    return pd.DataFrame(
        {"rtg": [-1.0, 0.0, 1.0], "mean": mean, "low": [-1.0, -0.5, 0.5], "high": [-0.9, 0.5, 0.75]}
    )


def test_calibration_draws_curve_band_and_perfect_line():
    panels = {
        "greedy": {"ours": curve([-1, 0.25, 0.5])},
        "sampled": {"post": curve([0, 0, 0]), "ours": curve([1, 1, 1])},
    }
    fig = figures.calibration(panels, alt="x")
    line = next(trace for trace in fig.data if trace.name == "ours")
    np.testing.assert_array_equal(line.y, [-1, 0.25, 0.5])
    np.testing.assert_array_equal(fig.data[0].x, [-1, 0, 1, 1, 0, -1])
    np.testing.assert_array_equal(fig.data[0].y, np.float32([-1, -0.5, 0.5, 0.75, 0.5, -0.9]))
    perfect = [trace for trace in fig.data if trace.name == "perfect"]
    assert len(perfect) == 2
    for trace in perfect:
        np.testing.assert_array_equal(trace.x, trace.y)


def test_one_name_has_one_colour_and_one_entry_in_the_legend():
    panels = {
        "greedy": {"ours": curve([-1, 0, 1])},
        "sampled": {"post": curve([0, 0, 0]), "ours": curve([1, 1, 1])},
    }
    fig = figures.calibration(panels, alt="x")
    ours = [trace for trace in fig.data if trace.name == "ours"]
    assert [trace.showlegend for trace in ours] == [True, False]
    assert len({(trace.line.color, trace.line.dash) for trace in ours}) == 1
    post = next(trace for trace in fig.data if trace.name == "post")
    assert post.line.color != ours[0].line.color


def test_learning_curves_give_each_column_its_panel():
    run = pd.DataFrame({"steps": [0, 10], "kl": [0.5, 0.25], "entropy": [1.0, 0.5]})
    fig = figures.learning_curves(
        {"seed 0": run, "seed 1": run * 2},
        {"entropy": "entropy (nats)", "kl": "KL (nats)"},
        x="steps",
        x_title="steps",
        alt="x",
    )
    drawn = {(trace.name, trace.yaxis or "y"): list(trace.y) for trace in fig.data}
    assert drawn == {
        ("seed 0", "y"): [1, 0.5],
        ("seed 1", "y"): [2, 1],
        ("seed 0", "y2"): [0.5, 0.25],
        ("seed 1", "y2"): [1, 0.5],
    }
    assert [a.text for a in fig.layout.annotations] == ["entropy (nats)", "KL (nats)"]


def test_return_by_length_counts_every_episode_once_in_each_histogram():
    returns = np.array([-1, -1, 0, 0.55, 0.55, 0.1], np.float32)
    lengths = np.array([3, 3, 300, 150, 150, 300])
    fig = figures.return_by_length(returns, lengths, alt="x")
    bars = [trace for trace in fig.data if trace.type == "bar"]
    assert sum(trace.y.sum() for trace in bars if trace.yaxis == "y2") == 6
    assert sum(trace.x.sum() for trace in bars if trace.xaxis == "x2") == 6
    discs = [
        (float(x), round(float(y), 2), int(n))
        for trace in fig.data
        if trace.type == "scatter"
        for x, y, n in zip(trace.x, trace.y, trace.customdata, strict=True)
    ]
    assert sorted(discs) == [(3, -1, 2), (150, 0.55, 2), (300, 0, 1), (300, 0.1, 1)]


def test_grouped_bars_draw_the_table():
    table = pd.DataFrame({"history": [0.25, 0.75], "quota": [0.5, 0.5]}, index=["−1", "+"])
    fig = figures.grouped_bars(table, y_title="share", alt="x")
    assert {trace.name: list(trace.y) for trace in fig.data} == {"history": [0.25, 0.75], "quota": [0.5, 0.5]}
    assert list(fig.data[0].x) == ["−1", "+"]


def test_before_and_after_stand_beside_the_probability():
    contributions = pd.DataFrame({"intact": [1.0, -2.0], "without": [1.0, 0.0]}, index=["state", "L0H1"])
    probabilities = pd.DataFrame({"intact": [0.75, 0.25], "without": [0.5, 0.5]}, index=["left", "forward"])
    fig = figures.before_after({"goal": (contributions, probabilities)}, unit="logits", alt="x")
    drawn = {(trace.name, trace.yaxis): list(trace.y) for trace in fig.data}
    assert drawn == {
        ("intact", "y"): [1, -2],
        ("without", "y"): [1, 0],
        ("intact", "y2"): [0.75, 0.25],
        ("without", "y2"): [0.5, 0.5],
    }
    assert list(fig.data[0].x) == ["state", "L0H1"]
    assert tuple(fig.layout.yaxis2.range) == (0, 1.02)
    assert [trace.showlegend for trace in fig.data] == [True, True, False, False]


def test_distributions_write_probabilities_under_log_odds():
    table = pd.DataFrame({"RTG 0": [0.25, 0.75], "RTG 0.9": [0.5, 0.5]}, index=[-0.25, 0.25])
    fig = figures.distributions({"wall": table}, at=[0.05, 0.5], alt="x")
    assert {trace.name: list(trace.y) for trace in fig.data} == {"RTG 0": [0.25, 0.75], "RTG 0.9": [0.5, 0.5]}
    assert list(fig.layout.xaxis.ticktext) == ["0.05", "0.5"]
    np.testing.assert_allclose(fig.layout.xaxis.tickvals, [-2.944439, 0], atol=1e-5)
    assert all(trace.fillcolor.startswith(trace.line.color) for trace in fig.data)


NAN, INF, ALT = float("nan"), float("inf"), {"alt": "words"}
GAPPY = pd.Series([1.0, NAN, 2.0], [0, 1, 2])


def bundle(fig):
    """What the book gets of a figure, whose JSON a browser must be able to read."""

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    text = BookRenderer().to_mimebundle(fig.to_dict())["text/html"]
    return json.loads(re.search(r'"application/json">(.*?)</script>', text, re.S)[1], parse_constant=refuse)


def test_what_is_missing_is_a_gap_and_no_error():
    band = pd.DataFrame({"mean": GAPPY, "low": GAPPY - 1, "high": GAPPY + 1})
    fig = figures.lines({"": {"line": GAPPY, "band": band}}, x_title="", y_title="", **ALT)
    assert np.array_equal(fig.data[0].y, GAPPY.astype(np.float32), equal_nan=True)
    assert (list(fig.data[1].x), list(fig.data[1].y)) == ([0, 2, 2, 0], [0, 1, 3, 2])
    bundle(fig)
    bundle(figures.grouped_bars(pd.DataFrame({"some": GAPPY}), y_title="", **ALT))
    bundle(figures.new_figure(**ALT).add_scatter(y=[1, NAN, INF]).update_xaxes(range=[0, NAN]))
    card = pd.DataFrame(
        {"label": ["a"], "posts_weights": NAN, "none": 0.0, "effect": 1.0, "low": 0.0, "high": 2.0}
    )
    bundle(figures.forest(card, card, x_title="", **ALT))


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (
            lambda x: figures.lines({"": {"loss": pd.Series([1.0, x])}}, x_title="", y_title="", **ALT),
            "'loss'",
        ),
        (
            lambda x: figures.lines({"": {"loss": pd.Series([1.0], [x])}}, x_title="", y_title="", **ALT),
            "the index of 'loss'",
        ),
        (lambda x: figures.grouped_bars(pd.DataFrame({"loss": [1, x]}), y_title="", **ALT), "'loss'"),
        (
            lambda x: figures.before_after(
                {"case": (pd.DataFrame({"before": [x], "after": [1.0]}),) * 2}, unit="", **ALT
            ),
            "'before' of 'case'",
        ),
        (lambda x: figures.view_maps(np.full((1, 7, 7), x), ["map"], **ALT), "values"),
        (lambda x: figures.return_by_length(np.array([x]), np.array([1]), **ALT), "returns"),
        (lambda x: figures.attention_heads(np.full((1, 1, 1), x), ["R"], ["L0H1"], **ALT), "patterns"),
        (lambda x: figures.attention_heads(np.ones((1, 1, 1)), ["R"], ["L0H1"], largest=x, **ALT), "largest"),
    ],
)
@pytest.mark.parametrize("number", [INF, -INF, NAN])
def test_numbers_that_are_not_finite_are_refused(draw, named, number):
    if np.isnan(number) and named == "'loss'":
        number = np.float64(1e39)  # too large for float32; a single NaN is a gap
    with pytest.raises(
        ValueError, match=rf"^{named} holds -?(inf|nan); every number of a figure must be finite"
    ):
        draw(number)


def test_a_line_of_nothing_but_gaps_and_a_certain_event_are_refused():
    with pytest.raises(ValueError, match="'loss' holds nan; every number of a figure must be finite, or NaN"):
        figures.lines({"": {"loss": GAPPY * NAN}}, x_title="", y_title="", **ALT)
    with pytest.raises(
        ValueError, match=r"at holds 1\.0; a probability that has log odds lies between 0 and 1"
    ):
        figures.distributions({"": pd.DataFrame({"share": [1.0]})}, at=[0.5, 1.0], **ALT)


def test_book_style_becomes_the_default_except_in_colab(monkeypatch):
    monkeypatch.setattr(pio.templates, "default", pio.templates.default)
    monkeypatch.setattr(pio.renderers, "default", pio.renderers.default)
    figures.use_book_style()
    fig = go.Figure(layout_meta={"alt": "a word"}).add_scatter(y=[1])
    assert fig.layout.template.layout.paper_bgcolor == figures.PAPER
    assert set(fig._repr_mimebundle_()) == {PLOTLY_MIME, "text/html"}
    monkeypatch.setitem(sys.modules, "google.colab", pio)
    figures.use_book_style()
    assert pio.renderers.default == "colab"


def test_forest_draws_each_effect_in_its_row():
    card = pd.DataFrame(
        {"label": ["a", "b"], "effect": [0.5, -1.0], "low": [0.25, -2.0], "high": [1.0, -0.5]}
        | {"posts_weights": [0.75, np.nan], "none": [0.0, 0.25]}
    )
    points = pd.DataFrame({"label": ["a", "a", "b"], "effect": [0.0, 1.0, -1.0]})
    fig = figures.forest(card, points, x_title="rise", alt="Two effects.")
    against, ours, mean, post = fig.data
    assert (list(against.x), list(ours.x), list(ours.y)) == ([0, 0.25], [0, 1, -1], ["a", "a", "b"])
    assert (list(mean.x), list(mean.error_x.array), list(mean.error_x.arrayminus)) == (
        [0.5, -1],
        [0.5, 0.5],
        [0.25, 1],
    )
    assert post.x[0] == 0.75
    assert list(fig.layout.yaxis.categoryarray) == ["b", "a"]  # plotly counts from below: "a" is on top


def test_attention_is_given_to_circuitsvis_as_its_own_code_would():
    import circuitsvis
    from circuitsvis.attention import attention_heads

    patterns = np.array([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
    names = ["L0H0", "L0H1"]
    text = figures.attention_heads(patterns, ["R0", "s<0"], names, alt='looks & "sees"').data
    shown = json.loads(re.search(r'application/json">(.*?)</script>', text, re.S)[1])
    theirs = attention_heads(
        patterns,
        ["R0", "s<0"],
        names,
        max_value=1.0,
        min_value=0,
        positive_color=style.BLUE,
        mask_upper_tri=True,
    )
    call = re.search(r'"[\w-]+",\s+(\w+),\s+({.*?})\s+\)\s+</script>', str(theirs), re.S)
    assert (shown["component"], shown["props"]) == (call[1], json.loads(call[2]))
    assert 'aria-label="looks &amp; &quot;sees&quot;"' in text
    assert "<0" not in text, "nothing in the data can end the script element"
    assert text == figures.attention_heads(patterns, ["R0", "s<0"], names, alt='looks & "sees"').data
    assert circuitsvis.__version__ == style.CIRCUITSVIS_VERSION
    assert "https://" not in text.partition("<script data-outside-the-book>")[0]


def test_attention_without_words_or_with_too_few_names_is_refused():
    with pytest.raises(ValueError, match="alt must say in words"):
        figures.attention_heads(np.ones((1, 1, 1)), ["s0"], ["L0H0"], alt=" ")
    with pytest.raises(ValueError, match=r"patterns has shape \(1, 2, 2\); 1 names and 1 tokens"):
        figures.attention_heads(np.ones((1, 2, 2)), ["s0"], ["L0H0"], alt="x")
