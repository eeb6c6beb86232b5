"""Several runs side by side: a table for a terminal, and the frontier as a figure or a page."""

from __future__ import annotations

from pathlib import Path

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.evaluation.runs import ComparedRuns
from infalign.evaluation.tied_limit import tie_notes
from infalign.report.figures import save_frontier_png
from infalign.report.page import ReportData, write_report
from infalign.report.table import columns, with_margin
from infalign.report.words import points

PICTURES = (".png", ".svg", ".pdf")


def comparison_text(compared: ComparedRuns) -> str:
    """Every method's KL, win rate and limit, then the differences at matched KL."""
    rows = [["", "KL (nats)", f"{compared.procedure} (limit)"]]
    judges = list(dict.fromkeys(name for result in compared.results for name in result.of(compared.procedure).judged))
    rows[0] += [f"by {name}" for name in judges]
    for result in sorted(compared.results, key=lambda result: result.kl.estimate):
        entry = result.of(compared.procedure)
        limits = [f"{100 * one:.1f}" for one in (entry.limit, entry.predictable_limit) if one is not None]
        limit = f" ({', '.join(limits)})" if limits and result.moved else ""
        judged = [entry.judged.get(name) for name in judges]
        rows.append(
            [
                result.label,
                with_margin(result.kl, 1),
                f"{with_margin(entry.win_rate, 100)}{limit}",
                *("not scored" if one is None else with_margin(one, 100) for one in judged),
            ]
        )
    first = compared.results[0]
    second = any(result.of(compared.procedure).predictable_limit is not None for result in compared.results)
    lines = [
        f"{compared.procedure} win rate against the reference used the same way, in %, ± {first.confidence:.0%} "
        f"interval; {counted(first.num_prompts, 'prompt')}.",
        "In brackets the theoretical limit at the measured KL"
        + (", then the one at its own run's predictability (Gaussian model)." if second else "."),
        *tie_notes(compared.results, [compared.procedure]),
        "",
        *columns(rows),
    ]
    if compared.matched:
        table = [["", "KL (nats)", "difference, points", "least favourable", ""]]
        for one in compared.matched:
            verdict = "resolved" if one.resolved else "not resolved"
            found = [points(one.difference), points(one.least_favourable)]
            table.append([one.method, f"{one.kl:.3f}", *found, verdict])
        lines += [
            "",
            f"Against {compared.matched[0].baseline} at the same KL, interpolated and paired by prompt; all "
            f"{len(compared.matched)} differences counted.",
            "",
            *columns(table),
        ]
    lines += [f"{name} is left out: {reason}." for name, reason in compared.left_out.items()]
    return "\n".join(lines)


def check_ending(path: Path) -> None:
    """Refuse a file that no figure can be written to.

    Raises:
        InputError: If the ending is not known.
    """
    if path.suffix not in (*PICTURES, ".html"):
        raise InputError(
            f"{path.name} has no ending that says what to draw", where="--plot", hint="Use .png, .svg, .pdf or .html"
        )


def draw_comparison(compared: ComparedRuns, path: Path) -> Path:
    """The frontier as a picture, or everything as a page.

    Args:
        compared: The runs.
        path: The ending chooses the format.

    Raises:
        InputError: If the ending is not known, or the extra `report` is not installed.
        StorageError: If the file cannot be written.
    """
    check_ending(path)
    if path.suffix in PICTURES:
        return save_frontier_png(path, [compared.frontier])
    several = len({result.series for result in compared.results}) > 1
    title = f"{counted(len(compared.results), 'result')}{' of several methods' if several else ''}"
    return write_report(path, ReportData(compared.results, compared.procedure, title, matched=compared.matched))
