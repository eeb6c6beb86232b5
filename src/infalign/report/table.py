"""The results as a table for a terminal, with what they do and do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infalign._io.wording import counted
from infalign.evaluation.results import Measured, MethodResult, Predictability
from infalign.evaluation.tied_limit import tie_notes
from infalign.report.reshaped import reshaped_lines
from infalign.report.words import nats, predictability_lines, unmoved


def text_table(
    results: Sequence[MethodResult],
    comparisons: Sequence[Mapping[str, Any]],
    n: int | None,
    kl_budget: float | None,
    *,
    judge: str | None = None,
    held_out: bool = True,
    predictability: Predictability | None = None,
) -> str:
    """Win rates, KL and limits in aligned columns, then the comparisons in sentences.

    Args:
        results: Methods, measured on the same prompts.
        comparisons: As stored by the evaluation.
        n: Only standard sampling and procedures of this n are shown, where more than four were measured.
        kl_budget: The KL all methods were steered to, if there was one.
        judge: What to call the reward; its own name if None.
        held_out: Whether no prompt is known to have been trained on.
        predictability: As stored by the evaluation, for the second limit.
    """
    first = results[0]
    shown = first.procedures if len(first.procedures) <= 4 else [e for e in first.procedures if e.n in (1, n)]
    labels = [entry.procedure for entry in shown]
    header = ["", "KL (nats)", *(f"{label} (limit)" for label in labels)]
    rows = [["reference", "0", *("50.0" for _ in labels)]]
    for result in results:
        cells = []
        for label in labels:
            entry = result.of(label)
            limits = [f"{100 * one:.1f}" for one in (entry.limit, entry.predictable_limit) if one is not None]
            limit = f" ({', '.join(limits)})" if limits and result.moved else ""
            cells.append(f"{with_margin(entry.win_rate, 100)}{limit}")
        rows.append([result.label, nats(result.kl), *cells])
    lines = [
        f"Win rate against the reference used the same way, in %, ± {first.confidence:.0%} interval; "
        f"{counted(first.num_prompts, 'held-out prompt' if held_out else 'prompt')} × "
        f"{counted(first.num_samples, 'fresh rollout')} per model.",
        f"In brackets the theoretical limit at the measured KL. Judge: {judge or first.reward}.",
        *tie_notes(results, labels),
        *predictability_lines(predictability),
        "",
        *columns([header, *rows]),
        "",
        *_judged(results, labels),
        *(sentence for result in results if (sentence := unmoved(result)) is not None),
        *(comparison["sentence"] for comparison in comparisons if comparison["procedure"] in labels),
        *reshaped_lines(results),
    ]
    if kl_budget is not None:
        reached = ", ".join(f"{r.label} {r.kl.estimate:.3f} ({r.kl.estimate / kl_budget - 1:+.0%})" for r in results)
        lines.append(f"KL budget {kl_budget:g} nats; reached: {reached}.")
    return "\n".join(lines)


def _judged(results: Sequence[MethodResult], labels: Sequence[str]) -> list[str]:
    """The same win rates judged by each further reward; the procedure still chooses by the first."""
    lines: list[str] = []
    for name in results[0].of(labels[0]).judged:
        rows = [["", *labels]]
        for result in results:
            entries = [result.of(label).judged.get(name) for label in labels]
            rows.append([result.label, *("not scored" if e is None else with_margin(e, 100) for e in entries)])
        lines += [f"Judged by {name}, which training never saw:", *columns(rows), ""]
    return lines


def through_lines(content: Mapping[str, Any]) -> str:
    """Win rates through a decoder itself, in sentences.

    Args:
        content: As stored by the evaluation.
    """
    lines = [f"Through the decoder itself ({content['decoder']}), win rate against the reference used the same way:"]
    for entry in content["win_rates"]:
        lines.append(f"  {entry['name']}: {_points(entry, '')}")
    first = content["win_rates"][0]["name"]
    for entry in content["differences"]:
        lines.append(f"  {first} less {entry['name']}: {_points(entry, '+')}, p = {entry['p_value']:.2g}")
    return "\n".join(lines)


def _points(entry: Mapping[str, Any], sign: str) -> str:
    if entry["low"] is None or entry["high"] is None:
        return f"{100 * entry['estimate']:{sign}.1f}% (no interval)"
    ends = f"{100 * entry['low']:{sign}.1f} to {100 * entry['high']:{sign}.1f}"
    return f"{100 * entry['estimate']:{sign}.1f}% ({ends})"


def with_margin(measured: Measured, scale: float) -> str:
    """The estimate and the distance to the farther end of its interval: in percent at a scale of 100, else 3 digits."""
    digits = 1 if scale == 100 else 3
    if measured.low is None or measured.high is None:
        return f"{scale * measured.estimate:.{digits}f} (no interval)"
    margin = scale * max(measured.high - measured.estimate, measured.estimate - measured.low)
    return f"{scale * measured.estimate:.{digits}f} ± {margin:.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines whose cells stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
