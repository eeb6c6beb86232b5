"""Curves of the page: win rate over N and over KL by the trained reward and by others, and training over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infalign.evaluation.results import Band, MethodResult
from infalign.report.figures import (
    MOST_IN_LEGEND,
    REFERENCE_COLOUR,
    Figure,
    Style,
    axis,
    base_layout,
    error_bars,
    escaped,
    finite_number,
    half_line,
)

MOST_WITH_BANDS = 4  # methods: more intervals on top of each other could not be told apart


def win_rate_over_n_figure(
    results: Sequence[MethodResult], family: str, look: Mapping[str, Style], *, judge: str | None = None
) -> Figure | None:
    """Win rate against N for one family of procedures, with intervals; None if fewer than three N were measured.

    Args:
        results: Methods.
        family: "best-of-n" or "worst-of-n".
        look: Style of each method. Of a series only the result with the largest KL is drawn.
        judge: Name of a further reward, drawn dashed beside the one that procedures choose by; None for that one alone.
    """
    traces: list[dict[str, Any]] = []
    sizes: set[int] = set()
    results = furthest(results)
    for result in results:
        curve = result.over_n[family]
        sizes.update(curve.n)
        bands = [(result.reward, curve.win_rate, "solid")]
        if judge is not None:
            if judge not in curve.judged:
                continue
            bands.append((judge, curve.judged[judge], "dash"))
        for name, band, dash in bands:
            label = result.label if judge is None else f"{result.label}, by {name}"
            if len(results) <= MOST_WITH_BANDS:
                traces.append(_shade(curve.n, band, look[result.label].colour))
            line = _line(curve.n, band, label, look[result.label], dash if judge else None)
            # Solid and dashed are told apart below the figure; the legend names methods.
            traces.append({**line, "name": escaped(result.label), "showlegend": dash == "solid"})
    if len(sizes) < 3 or not traces:
        return None
    ticks = [n for n in sorted(sizes) if n & (n - 1) == 0]  # powers of two
    name = "Best-of-N" if family == "best-of-n" else "Worst-of-N"
    layout = base_layout(
        x={"title": {"text": "N"}, "type": "log", "tickvals": ticks, "ticktext": [str(n) for n in ticks]},
        y={"title": {"text": f"{name} win rate"}, "tickformat": ".0%"},
        height=360 if judge is None else 400,
    )
    layout["shapes"] = [half_line()]
    layout["showlegend"] = len(results) <= MOST_IN_LEGEND
    return {"data": traces, "layout": layout}


def furthest(results: Sequence[MethodResult]) -> list[MethodResult]:
    """Of each series the result with the largest KL; the others would be drawn in the same style."""
    best: dict[str, MethodResult] = {}
    for result in results:
        series = result.series or result.label
        if series not in best or result.kl.estimate > best[series].kl.estimate:
            best[series] = result
    return list(best.values())


def over_kl_figure(
    results: Sequence[MethodResult], procedure: str, look: Mapping[str, Style], judges: Sequence[str]
) -> Figure | None:
    """Win rate over a series' KL, by the trained reward and by others: how far more optimisation buys the truth.

    Args:
        results: Methods, of which some share a series (checkpoints of one training, or runs at several KLs).
        procedure: Label of the procedure.
        look: Style of each method.
        judges: Names of the further rewards, drawn dashed.

    Returns:
        None where no series has two results.
    """
    series: dict[str, list[MethodResult]] = {}
    for result in results:
        series.setdefault(result.series or result.label, []).append(result)
    traces: list[dict[str, Any]] = []
    dashes = ("dash", "dot", "dashdot", "longdash")
    for name, some in series.items():
        if len(some) < 2:
            continue
        some = sorted(some, key=lambda result: result.kl.estimate)
        entries = [result.of(procedure) for result in some]
        steps = ["" if result.step is None else f" (step {result.step})" for result in some]
        curves = [(some[0].reward, [entry.win_rate for entry in entries], "solid")]
        for number, judge in enumerate(judges):
            if all(judge in entry.judged for entry in entries):
                curves.append((judge, [entry.judged[judge] for entry in entries], dashes[number % len(dashes)]))
        for judge, wins, dash in curves:
            middle = [0.5, *(win.estimate for win in wins)]
            lows = [0.5, *(win.estimate if win.low is None else win.low for win in wins)]
            highs = [0.5, *(win.estimate if win.high is None else win.high for win in wins)]
            style = look[name]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": escaped(f"{name}, by {judge}"),
                    "x": [0.0, *(result.kl.estimate for result in some)],
                    "y": middle,
                    "error_y": error_bars(middle, lows, highs, style.colour),
                    "line": {"color": style.colour, "width": 2, "dash": dash},
                    "marker": {"color": style.colour, "symbol": style.symbol, "size": 8},
                    "text": ["reference", *(escaped(f"{r.label}{step}") for r, step in zip(some, steps, strict=True))],
                    "hovertemplate": f"<b>%{{text}}</b><br>{escaped(judge)}, KL %{{x:.3f}}: %{{y:.1%}}<extra></extra>",
                }
            )
    if not traces:
        return None
    layout = base_layout(
        x={"title": {"text": "KL(policy ‖ reference), nats"}, "rangemode": "tozero"},
        y={"title": {"text": f"{escaped(procedure)} win rate"}, "tickformat": ".0%"},
        height=430,
    )
    layout["shapes"] = [half_line()]
    layout["showlegend"] = len(traces) <= MOST_IN_LEGEND
    return {"data": traces, "layout": layout}


CURVES = (  # key in a training record, axis title
    ("kl", "KL, nats"),
    ("calibrated_reward", "calibrated reward"),
    ("beta", "β"),
)


def training_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], look: Mapping[str, Style], *, kl_target: float | None = None
) -> Figure | None:
    """KL, calibrated reward and β over steps: each step faint, a running mean strong. None if nothing was recorded.

    Args:
        curves: For each method a list of records with "step" and any of "kl", "calibrated_reward", "beta".
        look: Style of each method.
        kl_target: KL budget in nats, drawn as a line.
    """
    present = [
        (key, title)
        for key, title in CURVES
        if any(finite_number(record.get(key)) is not None for records in curves.values() for record in records)
    ]
    if not present:
        return None
    layout = base_layout(x={}, y={}, height=150 + 190 * len(present))
    del layout["xaxis"], layout["yaxis"]
    traces: list[dict[str, Any]] = []
    gap, height = 0.08, (1 - 0.08 * (len(present) - 1)) / len(present)
    for row, (key, title) in enumerate(present):
        suffix = "" if row == 0 else str(row + 1)
        top = 1 - row * (height + gap)
        layout[f"yaxis{suffix}"] = axis(title={"text": title}, domain=[max(top - height, 0), top], anchor=f"x{suffix}")
        layout[f"xaxis{suffix}"] = axis(anchor=f"y{suffix}", showticklabels=row == len(present) - 1)
        if row:
            layout[f"xaxis{suffix}"]["matches"] = "x"
        if row == len(present) - 1:
            layout[f"xaxis{suffix}"]["title"] = {"text": "training step"}
        for label, records in curves.items():
            pairs = [(finite_number(record.get("step")), finite_number(record.get(key))) for record in records]
            known = [(step, value) for step, value in pairs if step is not None and value is not None]
            if not known:
                continue
            steps, values = [step for step, _ in known], [value for _, value in known]
            style = look[label]
            common = {"type": "scatter", "mode": "lines", "xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "x": steps}
            smooth = _running_mean(values)
            line = {"color": style.colour, "dash": style.dash}
            if smooth != values:
                faint = {"color": style.colour, "width": 1}
                traces.append(
                    {**common, "y": values, "line": faint, "opacity": 0.28, "hoverinfo": "skip", "showlegend": False}
                )
            traces.append(
                {
                    **common,
                    "y": smooth,
                    "name": escaped(label),
                    "legendgroup": escaped(label),
                    "showlegend": row == 0,
                    "line": {**line, "width": 2.4},
                    "hovertemplate": f"<b>{escaped(label)}</b><br>step %{{x}}: %{{y:.4g}}<extra></extra>",
                }
            )
        if key == "kl" and kl_target is not None:
            layout["shapes"] = [
                {
                    "type": "line",
                    "xref": "paper",
                    "yref": f"y{suffix}",
                    "x0": 0,
                    "x1": 1,
                    "y0": kl_target,
                    "y1": kl_target,
                    "line": {"color": REFERENCE_COLOUR, "dash": "dash", "width": 1.5},
                    "label": {"text": "budget", "textposition": "start", "font": {"color": REFERENCE_COLOUR}},
                }
            ]
    return {"data": traces, "layout": layout}


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the series, shorter at its ends."""
    half = len(values) // 40
    start = values[0]  # sums of what is left: a constant stays one, without rounding that an axis would magnify
    total = np.concatenate(([0.0], np.cumsum(np.subtract(values, start))))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return list(values) if half == 0 else (start + (total[high] - total[low]) / (high - low)).tolist()


def _line(n: Sequence[int], band: Band, label: str, style: Style, dash: str | None) -> dict[str, Any]:
    """The estimates; the ends of intervals are said under the pointer."""
    ends = [
        "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
        for low, high in zip(band.low, band.high, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(n) <= 10 else "lines",
        "name": escaped(label),
        "x": list(n),
        "y": band.estimate,
        "text": ends,
        "line": {"color": style.colour, "width": 2.4, "dash": dash or style.dash},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8},
        "hovertemplate": f"<b>{escaped(label)}</b><br>N = %{{x}}: %{{y:.1%}}%{{text}}<extra></extra>",
    }


def _shade(n: Sequence[int], band: Band, colour: str) -> dict[str, Any]:
    """The intervals as an area."""
    known = [(x, low, high) for x, low, high in zip(n, band.low, band.high, strict=True) if low is not None]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _, _ in known] + [x for x, _, _ in reversed(known)],
        "y": [low for _, low, _ in known] + [high for _, _, high in reversed(known)],
        "fill": "toself",
        "fillcolor": _faint(colour),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _faint(colour: str) -> str:
    """The colour, mostly transparent."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
