"""What a report says of reshaped policies: g over the log-ratio, prediction beside measurement, and the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infalign.evaluation.reshaped import ReshapedRecord
from infalign.evaluation.results import Measured, MethodResult
from infalign.report.figures import REFERENCE_COLOUR, Figure, Style, base_layout, escaped
from infalign.report.words import single_samples
from infalign.reshape import Predicted, Reshaping

_PLAIN_RANGE = (-5.0, 5.0)  # nats, where neither histogram nor knots say what to draw


@dataclass(frozen=True)
class PredictionRow:
    """One number of a reshaped policy, as predicted and as measured.

    Attributes:
        label: The policy's name.
        quantity: What it is, such as "Best-of-4 win rate".
        predicted: With its standard error.
        measured: With its standard error.
        apart: Their distance in standard errors of the difference, signed; empty where that is not known.
    """

    label: str
    quantity: str
    predicted: str
    measured: str
    apart: str


@dataclass(frozen=True)
class CostRow:
    """What a reshaped policy is made of and what it takes, in words."""

    label: str
    made: str
    acceptance: str
    per_response: str
    per_answer: str
    alone: str


def made_of(record: ReshapedRecord) -> str:
    """What a reshaped policy does, in words."""
    if record.is_mixture:
        inside = "" if record.trained_weight is None else f"; trained inside a mixture with {record.trained_weight:.1%}"
        share = f"{record.weight:.1%} from the aligned model ({record.method})"
        return f"mixture: {share}, the rest from the reference{inside}"
    inside = "" if record.trained_weight is None else f", which was trained as {record.trained_weight:.1%} of a mixture"
    return (
        f"reshaped by the log-ratio of the aligned model ({record.method}){inside}: rejection from a mixture with "
        f"{record.weight:.1%} of it"
    )


def prediction_rows(results: Sequence[MethodResult]) -> list[PredictionRow]:
    """Predicted and measured numbers of every reshaped policy: KL, then each win rate that was both."""
    rows: list[PredictionRow] = []
    for result in results:
        if result.reshaped is None:
            continue
        predictions = result.reshaped.predictions
        rows.append(_row(result, "KL, nats", predictions.kl, result.kl, 1, 3))
        for entry in result.procedures:
            if (rate := predictions.win_rates.get(entry.procedure)) is not None:
                rows.append(_row(result, f"{entry.procedure} win rate, %", rate, entry.win_rate, 100, 1))
    return rows


def cost_rows(results: Sequence[MethodResult]) -> list[CostRow]:
    """What every reshaped policy is made of, and what a response and an answer of the procedure take."""
    return [_cost(result, result.reshaped) for result in results if result.reshaped is not None]


def reshaped_lines(results: Sequence[MethodResult]) -> list[str]:
    """The same for a terminal: one sentence for each reshaped policy, then what a single sample is worth."""
    lines: list[str] = []
    for result in results:
        record = result.reshaped
        if record is None:
            continue
        rows = {row.quantity: row for row in prediction_rows([result])}
        kl, win = rows["KL, nats"], rows.get(f"{record.procedure} win rate, %")
        told = f"predicted KL {kl.predicted}, measured {kl.measured} nats"
        if win is not None:
            told += f"; {record.procedure} predicted {win.predicted} %, measured {win.measured} %"
        cost = _cost(result, record)
        if not record.is_mixture:
            told += f"; accepted {cost.acceptance}"
        lines.append(f"{result.label}: {made_of(record)}; {told}; tokens per response {cost.per_response}.")
    return lines + [finding.sentence for finding in single_samples(results)]


def shape_figure(content: Mapping[str, Any], style: Style) -> Figure:
    """Log g over the log-ratio ℓ, with the histograms of the rollouts that it was fitted on behind it.

    Of a mixture log g = log(π/p) exactly. Otherwise Z differs between prompts, and g is scaled here to the mean 1 over
    the reference's rollouts.

    Args:
        content: What `reshape.json` holds: "reshaping", and "histogram" where there is one.
        style: How the policy is drawn.
    """
    fit, histogram = Reshaping.from_dict(content["reshaping"]), content.get("histogram")
    traces: list[dict[str, Any]] = []
    shift = 0.0
    low, high = (float(fit.knots[0]), float(fit.knots[-1])) if fit.knots.size > 1 else _PLAIN_RANGE
    if histogram is not None:
        edges = np.asarray(histogram["edges"], dtype=np.float64)
        low, high = float(edges[0]), float(edges[-1])
        middle, masses = (edges[1:] + edges[:-1]) / 2, np.asarray(histogram["reference"]) * np.diff(edges)
        if fit.kind == "reshaped":
            shift = math.log(float(np.exp(fit.log_density(middle)) @ masses))
        for name, dash, fill in (("reference", "solid", "tozeroy"), ("aligned", "dash", "none")):
            if histogram[name] is None:
                continue
            told = "reference's responses" if name == "reference" else "aligned model's responses"
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": told,
                    "x": edges.tolist(),
                    "y": [*histogram[name], histogram[name][-1]],
                    "line": {"color": REFERENCE_COLOUR, "width": 1.4, "shape": "hv", "dash": dash},
                    "fill": fill,
                    "fillcolor": "rgba(123,129,144,0.22)",
                    "hovertemplate": f"{told}: density %{{y:.3f}}<extra></extra>",
                }
            )
    at = np.linspace(low, high, 161)
    log_g = fit.log_density(at) - shift
    bottom, top = min(float(log_g.min()), 0.0), max(float(log_g.max()), 0.0)
    margin = 0.08 * max(top - bottom, 0.5)
    traces += [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "the aligned model alone, log g = ℓ",
            "x": [low, high],
            "y": [low, high],
            "yaxis": "y2",
            "line": {"color": style.colour, "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "log g",
            "x": at.tolist(),
            "y": log_g.tolist(),
            "yaxis": "y2",
            "line": {"color": style.colour, "width": 3},
            "hovertemplate": "ℓ = %{x:.2f}: log g = %{y:.2f}<extra></extra>",
        },
    ]
    layout = base_layout(
        x={"title": {"text": "log-ratio ℓ of the aligned model to the reference, nats"}, "range": [low, high]},
        y={"title": {"text": "density"}, "side": "right", "rangemode": "tozero", "showgrid": False},
        height=360,
    )
    layout["margin"]["r"] = 64
    layout["yaxis2"] = {
        **layout["yaxis"],
        "title": {"text": f"log g of {escaped(content.get('label', 'the policy'))}"},
        "side": "left",
        "overlaying": "y",
        "showgrid": True,
        "rangemode": "normal",
        "range": [bottom - margin, top + margin],
    }
    return {"data": traces, "layout": layout}


def shape_figures(
    reshapings: Mapping[str, Mapping[str, Any]], results: Sequence[MethodResult], look: Mapping[str, Style]
) -> dict[str, Figure]:
    """The figure of every reshaped policy whose fit is at hand, by the id of its place in the page."""
    return {
        f"reshaped:{result.label}": shape_figure(
            {**reshapings[result.label], "label": result.label}, look[result.label]
        )
        for result in results
        if result.reshaped is not None and result.label in reshapings
    }


def _row(
    result: MethodResult, quantity: str, predicted: Predicted, measured: Measured, factor: float, digits: int
) -> PredictionRow:
    errors = predicted.standard_error, measured.standard_error
    apart = ""
    if errors[1] is not None and math.isfinite(errors[0]) and (error := math.hypot(errors[0], errors[1])) > 0:
        apart = f"{(measured.estimate - predicted.estimate) / error:+.1f}"
    return PredictionRow(
        result.label,
        quantity,
        with_error(predicted.estimate, predicted.standard_error, factor, digits),
        with_error(measured.estimate, measured.standard_error, factor, digits),
        apart,
    )


def _cost(result: MethodResult, record: ReshapedRecord) -> CostRow:
    predictions = record.predictions
    if record.is_mixture:
        acceptance = "nothing is rejected"
    else:
        measured = "not counted" if record.acceptance is None else f"{record.acceptance:.1%}"
        acceptance = f"{measured} (predicted {predictions.acceptance.estimate:.1%})"
    tokens = "not counted" if record.tokens is None else f"{record.tokens:.1f}"
    if predictions.tokens is not None:
        tokens += f" (predicted {predictions.tokens.estimate:.1f})"
    n = next((entry.n for entry in result.procedures if entry.procedure == record.procedure), None)
    answer = "–" if record.tokens is None or n is None else f"{n * record.tokens:.0f}"
    alone = record.alone_kl
    alone_kl = "–" if alone is None else with_error(alone.estimate, alone.standard_error, 1, 3)
    return CostRow(result.label, made_of(record), acceptance, tokens, answer, alone_kl)


def with_error(estimate: float, standard_error: float | None, factor: float, digits: int) -> str:
    """A number with its standard error, such as "0.498 ± 0.012"."""
    value = f"{factor * estimate:.{digits}f}"
    if standard_error is None or not math.isfinite(standard_error):
        return value
    return f"{value} ± {factor * standard_error:.{digits}f}"
