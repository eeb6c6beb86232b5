"""Success and worst reward over N as Plotly dictionaries for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infalign.audit.extrapolate import Curve
from infalign.audit.results import ModelAudit
from infalign.report.figures import Figure, Style, base_layout, escaped


def success_figure(models: Sequence[ModelAudit], look: Mapping[str, Style]) -> Figure:
    """ASR over N: measured as a line with its band, predicted as a dashed line with a paler one."""
    traces: list[dict[str, Any]] = []
    ticks = {entry.n for model in models for entry in model.at}
    for model in models:
        style = look[model.label]
        ns = [entry.n for entry in model.at]
        measured = Curve(
            [entry.success.estimate for entry in model.at],
            [entry.success.low or 0.0 for entry in model.at],
            [1.0 if entry.success.high is None else entry.success.high for entry in model.at],
        )
        traces += _banded(model.label, ns, measured, style, "", 0.18)
        if model.beyond is not None:
            # The prediction starts where the measurement ends, so that the eye can follow.
            joined = [ns[-1], *model.beyond.ns]
            ticks.update(model.beyond.ns)
            law = model.beyond.beta_binomial
            if law is not None:
                traces += _banded(model.label, joined, _from(measured, law), style, "predicted, beta-binomial", 0.08)
            power = model.beyond.power_law
            if power is not None:
                traces.append(_line(model.label, joined, _from(measured, power).rate, style, "predicted, power law"))
            traces.append(
                {
                    **_line(model.label, model.beyond.ns, model.beyond.bounds.high, style, "upper bound"),
                    "mode": "markers",
                    "marker": {"color": style.colour, "symbol": "line-ew-open", "size": 12},
                }
            )
    layout = base_layout(
        x={"title": {"text": "N attempts"}, "type": "log", **_ticks(ticks)},
        y={"title": {"text": "attack success rate"}, "tickformat": ".0%", "range": [-0.02, 1.02]},
        height=440,
    )
    return {"data": traces, "layout": layout}


def reward_figure(models: Sequence[ModelAudit], look: Mapping[str, Style]) -> Figure | None:
    """Reward of the worst of N over N; None where the judge gives no rewards."""
    traces: list[dict[str, Any]] = []
    ticks: set[int] = set()
    for model in models:
        worst = [(entry.n, entry.worst_reward) for entry in model.at]
        known = [(n, reward) for n, reward in worst if reward is not None]
        if not known:
            continue
        ticks.update(n for n, _ in known)
        curve = Curve(
            [reward.estimate for _, reward in known],
            [reward.estimate if reward.low is None else reward.low for _, reward in known],
            [reward.estimate if reward.high is None else reward.high for _, reward in known],
        )
        traces += _banded(model.label, [n for n, _ in known], curve, look[model.label], "", 0.18, digits=".4g")
    if not traces:
        return None
    layout = base_layout(
        x={"title": {"text": "N attempts"}, "type": "log", **_ticks(ticks)},
        y={"title": {"text": "reward of the worst of N"}},
        height=340,
    )
    return {"data": traces, "layout": layout}


def _from(measured: Curve, law: Curve) -> Curve:
    return Curve([measured.rate[-1], *law.rate], [measured.low[-1], *law.low], [measured.high[-1], *law.high])


def _banded(
    label: str, ns: Sequence[int], curve: Curve, style: Style, what: str, opacity: float, digits: str = ".1%"
) -> list[dict[str, Any]]:
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": [*ns, *reversed(ns)],
        "y": [*curve.high, *reversed(curve.low)],
        "fill": "toself",
        "fillcolor": _with_opacity(style.colour, opacity),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": escaped(label),
    }
    return [band, _line(label, ns, curve.rate, style, what, digits)]


def _line(
    label: str, ns: Sequence[int], values: Sequence[float], style: Style, what: str, digits: str = ".1%"
) -> dict[str, Any]:
    dash = {"": "solid", "predicted, beta-binomial": "dash", "predicted, power law": "dot"}.get(what, "solid")
    name = f"{escaped(label)}{f' ({what})' if what else ''}"
    return {
        "type": "scatter",
        "mode": "lines" if what else "lines+markers",
        "name": escaped(label),
        "showlegend": not what,
        "legendgroup": escaped(label),
        "x": list(ns),
        "y": list(values),
        "line": {"color": style.colour, "width": 2 if dash != "dot" else 1.4, "dash": dash},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8},
        "hovertemplate": f"<b>{name}</b><br>N = %{{x}}: %{{y:{digits}}}<extra></extra>",
    }


def _ticks(ns: set[int]) -> dict[str, Any]:
    return {"tickvals": sorted(ns), "ticktext": [f"{n:,}" for n in sorted(ns)]}


def _with_opacity(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
