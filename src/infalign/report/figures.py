"""Figures as plain Plotly dictionaries for the page, and the frontier as a PNG for a README.

A figure here is data and layout only. Colours of text and grid come from the page, which knows whether it is light or
dark; colours of methods are chosen to be told apart on both, and shapes and dashes say the same without colour.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from infalign._io.files import write_file
from infalign.errors import InputError
from infalign.evaluation.frontier import Frontier, FrontierPoint, family_of
from infalign.evaluation.results import MethodResult

Figure = dict[str, Any]

# Contrast of at least 3:1 with both page backgrounds (tests/report checks it).
_COLOURS = ("#2f74d0", "#c9661c", "#23895d", "#9557c9", "#c83f5b", "#1d8794", "#8a7a1e", "#6d7683")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "x")
_MARKERS = ("o", "D", "s", "^", "P", "*", "h", "X")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
REFERENCE_COLOUR = "#7b8190"
MOST_IN_LEGEND = 12  # more names would leave no room for the figure; they are still under the pointer and in the table


@dataclass(frozen=True)
class Style:
    """How one method is drawn everywhere. The marker of a reshaped policy is not `filled`."""

    colour: str
    symbol: str
    marker: str
    dash: str
    filled: bool = True


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each method, in order; they repeat after eight, with another shape for the same colour.

    Args:
        labels: Names of the methods.
    """
    size = len(_COLOURS)
    return {
        label: Style(
            _COLOURS[i % size], _SYMBOLS[(i + i // size) % size], _MARKERS[(i + i // size) % size], _DASHES[i % size]
        )
        for i, label in enumerate(labels)
    }


def styles_of(results: Sequence[MethodResult]) -> dict[str, Style]:
    """A style for each result by label, and for each series by its name; the results of one series share theirs.

    A reshaped policy and its plain form share colour and shape.
    """
    series = [result.series or result.label for result in results]
    look = family_styles(
        [(name, family_of(one), one.reshaped is not None) for name, one in zip(series, results, strict=True)]
    )
    return look | {result.label: look[name] for result, name in zip(results, series, strict=True)}


def family_styles(members: Sequence[tuple[str, str, bool]]) -> dict[str, Style]:
    """A style for each series: one colour and shape for each family, hollow for reshaped policies.

    Args:
        members: Series, family, and whether it is reshaped.
    """
    of_family = styles(list(dict.fromkeys(family for _, family, _ in members)))
    look: dict[str, Style] = {}
    for series, family, reshaped in members:
        if series in look:
            continue
        style = replace(of_family[family], dash=_DASHES[len(look) % len(_DASHES)])
        look[series] = replace(style, symbol=f"{style.symbol}-open", filled=False) if reshaped else style
    return look


def family_lines(points: Sequence[FrontierPoint]) -> list[tuple[str, list[FrontierPoint]]]:
    """Lines from a plain policy to its reshaped form, where a family has one of each: series for the style, points."""
    families: dict[str, list[FrontierPoint]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    return [
        (some[0].series, sorted(some, key=lambda point: point.reshaped))
        for some in families.values()
        if [point.reshaped for point in sorted(some, key=lambda point: point.reshaped)] == [False, True]
    ]


def by_series(points: Sequence[FrontierPoint]) -> dict[str, list[FrontierPoint]]:
    """Points of one series together, by KL."""
    groups: dict[str, list[FrontierPoint]] = {}
    for point in sorted(points, key=lambda point: point.kl):
        groups.setdefault(point.series, []).append(point)
    order = dict.fromkeys(point.series for point in points)
    return {name: groups[name] for name in order}


def frontier_figure(data: Frontier, look: Mapping[str, Style]) -> Figure:
    """Win rate against KL: points with errors both ways, and the limit as a curve.

    Args:
        data: Points and limit of one procedure.
        look: Style of each method.
    """
    traces: list[dict[str, Any]] = []
    if data.limit_kls:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "theoretical limit, with ties" if data.limit_with_ties else "theoretical limit",
                "x": data.limit_kls,
                "y": data.limit_win_rates,
                "line": {"color": REFERENCE_COLOUR, "width": 2},
                "hovertemplate": "limit at KL %{x:.3f}: %{y:.1%}<extra></extra>",
            }
        )
    if data.predictable_win_rates:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": escaped(data.predictable_label),
                "x": data.limit_kls,
                "y": data.predictable_win_rates,
                "line": {"color": REFERENCE_COLOUR, "width": 2, "dash": "dash"},
                "hovertemplate": "Gaussian model at KL %{x:.3f}: %{y:.1%}<extra></extra>",
            }
        )
    for series, points in family_lines(data.points):
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [point.kl for point in points],
                "y": [point.win_rate for point in points],
                "line": {"color": look[series].colour, "width": 1},
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
    for series, points in by_series(data.points).items():
        style = look[series]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(points) > 1 else "markers",
                "name": escaped(series),
                "x": [point.kl for point in points],
                "y": [point.win_rate for point in points],
                "error_x": error_bars(
                    [p.kl for p in points], [p.kl_low for p in points], [p.kl_high for p in points], style.colour
                ),
                "error_y": error_bars(
                    [p.win_rate for p in points], [p.low for p in points], [p.high for p in points], style.colour
                ),
                "line": {"color": style.colour, "width": 1, "dash": "dot"},
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 11},
                "hovertext": [
                    f"<b>{escaped(point.label)}</b><br>{escaped(data.procedure)} win rate {point.win_rate:.1%} "
                    f"({point.low:.1%} to {point.high:.1%})<br>KL {point.kl:.3f} "
                    f"({point.kl_low:.3f} to {point.kl_high:.3f}) nats"
                    for point in points
                ],
                "hoverinfo": "text",
            }
        )
    lows, highs = [0.5, *(point.low for point in data.points)], [*(point.high for point in data.points)]
    # An axis that begins where the data do would magnify small differences; ½ at KL 0 is always in the picture.
    layout = base_layout(
        x={"title": {"text": "KL(policy ‖ reference), nats"}, "rangemode": "tozero"},
        y={
            "title": {"text": f"{escaped(data.procedure)} win rate"},
            "tickformat": ".0%",
            "range": [min(lows) - 0.02, min(1.005, max([*highs, *data.limit_win_rates, 0.55]) + 0.02)],
        },
        height=430,
    )
    layout["shapes"] = [half_line()]
    layout["showlegend"] = len(by_series(data.points)) <= MOST_IN_LEGEND
    return {"data": traces, "layout": layout}


def histogram_figure(
    values: Mapping[str, Sequence[float]], look: Mapping[str, Style], *, calibrated: bool, title: str
) -> Figure | None:
    """Density of rewards for each method, as steps. None if there are no finite values.

    Args:
        values: For each method (and the reference) its rewards.
        look: Style of each method; a label without one is drawn as the reference.
        calibrated: Whether values lie in [0, 1], where the reference is uniform.
        title: Title of the horizontal axis.
    """
    finite = {label: np.asarray(v, np.float64)[np.isfinite(np.asarray(v, np.float64))] for label, v in values.items()}
    finite = {label: array for label, array in finite.items() if array.size}
    if not finite:
        return None
    if calibrated:
        edges = np.linspace(0, 1, 21)
    else:
        pooled = np.concatenate(list(finite.values()))
        low, high = np.quantile(pooled, [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1, 41)
    traces: list[dict[str, Any]] = []
    for label, array in finite.items():
        # Values beyond the drawn range are kept in the end bins, so that areas stay comparable.
        counts = np.histogram(np.clip(array, edges[0], edges[-1]), edges)[0]
        density = counts / (array.size * np.diff(edges))
        style = look.get(label)
        colour = REFERENCE_COLOUR if style is None else style.colour
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": escaped(label),
                "x": edges.tolist(),
                "y": [*density.tolist(), float(density[-1])],
                "line": {"color": colour, "width": 2, "shape": "hv", "dash": "solid" if style is None else style.dash},
                "hovertemplate": f"<b>{escaped(label)}</b><br>density %{{y:.2f}}<extra></extra>",
            }
        )
    layout = base_layout(
        x={"title": {"text": title}}, y={"title": {"text": "density"}, "rangemode": "tozero"}, height=320
    )
    if calibrated:
        layout["shapes"] = [{**half_line(), "y0": 1, "y1": 1}]
    return {"data": traces, "layout": layout}


def save_frontier_png(path: str | Path, panels: Sequence[Frontier], *, title: str | None = None) -> Path:
    """The frontier as a picture, one panel for each procedure.

    Args:
        path: Where to write; the suffix chooses the format (png, svg, pdf).
        panels: Frontiers of the same methods.
        title: Heading, or None.

    Raises:
        InputError: If there is no panel, or matplotlib is not installed.
        StorageError: If the file cannot be written.
    """
    if not panels:
        raise InputError("there is nothing to draw", where="save_frontier_png", hint="Give at least one frontier")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise InputError(
            "matplotlib is not installed", hint="Install it with: pip install 'infalign[report]'"
        ) from error

    look = family_styles([(point.series, point.family or point.series, point.reshaped) for point in panels[0].points])
    figure = Canvas(figsize=(4.6 * len(panels) + 0.4, 4.3), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        axes.axhline(0.5, color="#b5bac4", linewidth=1, linestyle=(0, (4, 3)))
        if panel.limit_kls:
            axes.plot(panel.limit_kls, panel.limit_win_rates, color=REFERENCE_COLOUR, linewidth=2, label="limit")
        if panel.predictable_win_rates:
            rho = panel.predictable_label.partition("(")[2].partition(";")[0]
            axes.plot(
                panel.limit_kls,
                panel.predictable_win_rates,
                color=REFERENCE_COLOUR,
                linewidth=2,
                linestyle="--",
                label=f"limit at {rho} (Gaussian model)",
            )
        for series, points in family_lines(panel.points):
            ends = [point.kl for point in points], [point.win_rate for point in points]
            axes.plot(*ends, color=look[series].colour, linewidth=1)
        for series, points in by_series(panel.points).items():
            style = look[series]
            axes.errorbar(
                [point.kl for point in points],
                [point.win_rate for point in points],
                xerr=[[p.kl - p.kl_low for p in points], [p.kl_high - p.kl for p in points]],
                yerr=[[p.win_rate - p.low for p in points], [p.high - p.win_rate for p in points]],
                color=style.colour,
                marker=style.marker,
                markersize=8,
                markerfacecolor=style.colour if style.filled else "white",
                linestyle=":" if len(points) > 1 else "none",
                linewidth=1,
                elinewidth=1.6,
                label=series.replace("$", r"\$").lstrip("_"),
            )
        axes.set_title(panel.procedure.replace("$", r"\$"), fontsize=12)
        axes.set_xlabel("KL(policy ‖ reference), nats")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlim(left=0)
        axes.grid(color="#e6e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("win rate over the reference")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 * len(panels)), frameon=False)
    if title:
        figure.suptitle(title.replace("$", r"\$"))
    path = Path(path)
    write_file(path, partial(figure.savefig, format=path.suffix.lower().removeprefix(".") or "png"), parents=False)
    return path


def base_layout(*, x: dict[str, Any], y: dict[str, Any], height: int) -> dict[str, Any]:
    """What every figure shares; font and line colours are filled in by the page."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 56},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "dragmode": False,  # so that a finger on the figure scrolls the page
        "xaxis": axis(**x),
        "yaxis": axis(**y),
    }


def axis(**options: Any) -> dict[str, Any]:
    """An axis with a grid that shows on light and dark."""
    return {"gridcolor": "rgba(127,127,127,0.2)", "zeroline": False, "automargin": True, **options}


def half_line() -> dict[str, Any]:
    """The line at a win rate of one half, where nothing was gained."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": 0.5,
        "y1": 0.5,
        "layer": "below",
        "line": {"color": REFERENCE_COLOUR, "dash": "dash", "width": 1.2},
    }


def error_bars(middle: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> dict[str, Any]:
    """Error bars from interval ends."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [h - m for m, h in zip(middle, high, strict=True)],
        "arrayminus": [m - lo for m, lo in zip(middle, low, strict=True)],
        "color": colour,
        "thickness": 1.6,
        "width": 4,
    }


def finite_number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def escaped(text: str) -> str:
    """Plotly reads a little HTML in names; a name is text."""
    return html.escape(text, quote=False)
