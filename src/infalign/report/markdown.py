"""The report as Markdown: the same findings as the page, without figures and samples."""

from __future__ import annotations

from collections.abc import Sequence

from infalign.evaluation.compare import compare
from infalign.evaluation.results import MethodResult
from infalign.report.page import ReportData, judges_of
from infalign.report.reshaped import cost_rows, prediction_rows
from infalign.report.words import (
    cautions,
    cell,
    markdown_table,
    methods_paragraph,
    percent,
    predictability_lines,
    verdict,
    worse_rows,
)


def render_markdown(data: ReportData) -> str:
    """The report as text.

    Args:
        data: What it shows.
    """
    results = list(data.results)
    comparisons = compare(results, baseline=data.baseline) if data.baseline is not None and len(results) > 1 else []
    lines = [f"# {cell(data.title)}", ""]
    lines += [f"- **Note**: {cell(text)}" for text in data.warnings]
    for finding in verdict(results, data.procedure, comparisons):
        lines.append(f"- **{'resolved' if finding.resolved else 'not resolved'}**: {cell(finding.sentence)}")
    lines += ["", "## Numbers", "", markdown_table(results)]
    lines += _reshaped(results)
    judges = judges_of(results)
    if judges:
        first = results[0].reward
        lines += [f"## Judged by other rewards (procedures choose by {cell(first)})", ""]
        head = ["method", "procedure", first, *judges]
        lines += ["| " + " | ".join(cell(text) for text in head) + " |", "|" + "---|" * len(head)]
        for result in results:
            for entry in result.procedures:
                judged = [percent(entry.judged[name]) if name in entry.judged else "not scored" for name in judges]
                row = [result.label, entry.procedure, percent(entry.win_rate), *judged]
                lines.append("| " + " | ".join(cell(text) for text in row) + " |")
        lines.append("")
    lines += ["## What the mean may hide", ""]
    head = ["method", "at equal length", "mean length", "distinct word pairs", "overlap", "ended"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        found = result.diagnostics
        ended = ", ".join(f"{reason} {share:.0%}" for reason, share in found.finish_reasons.items())
        numbers = [
            "–" if one is None else percent(one)
            for one in (found.length_matched, found.distinct, found.self_similarity)
        ]
        length = "–" if result.mean_length is None else f"{result.mean_length:.1f}"
        row = [cell(result.label), numbers[0], length, *numbers[1:], cell(ended)]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *(f"- {cell(label)}: {text}" for label, text in worse_rows(results)), ""]
    lines += ["## What not to conclude", ""]
    lines += [f"- {cell(text)}" for text in (*cautions(results), *predictability_lines(data.predictability))]
    lines += [""]
    lines += ["## Methods", "", cell(methods_paragraph(results, data.plan, held_out=data.held_out)), ""]
    if data.versions:
        lines += ["Versions: " + ", ".join(f"{cell(name)} {cell(text)}" for name, text in data.versions.items()), ""]
    return "\n".join(lines)


def _reshaped(results: Sequence[MethodResult]) -> list[str]:
    """What reshaped policies are made of and take, and what was predicted of them; nothing where there are none."""
    costs = cost_rows(results)
    if not costs:
        return []
    answer = "tokens per answer"
    head = ["policy", "made of", "accepted", "tokens per response", answer, "KL of the aligned model alone, predicted"]
    lines = ["## Reshaped policies", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cost in costs:
        row = [cost.label, cost.made, cost.acceptance, cost.per_response, cost.per_answer, cost.alone]
        lines.append("| " + " | ".join(cell(text) for text in row) + " |")
    head = ["policy", "", "predicted", "measured", "apart, in standard errors"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in prediction_rows(results):
        row = [one.label, one.quantity, one.predicted, one.measured, one.apart]
        lines.append("| " + " | ".join(cell(text) for text in row) + " |")
    return [*lines, ""]
