"""What the numbers say, in plain words: verdict, cautions, a paragraph for a paper, and a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infalign._io.wording import counted, visible
from infalign.estimators import difference_estimate, holm
from infalign.evaluation.compare import Comparison, compare_pairs
from infalign.evaluation.predictability import limit_name
from infalign.evaluation.reshaped import ReshapedRecord
from infalign.evaluation.results import Measured, MethodResult, Predictability, ProcedureResult
from infalign.evaluation.tied_limit import tie_notes

STANDARD = "Standard"


@dataclass(frozen=True)
class Finding:
    """One finding for the head of the report: its status in a word, and the sentence."""

    resolved: bool
    sentence: str


def percent(measured: Measured) -> str:
    """A share with its interval, such as "84.1% (82.0 to 86.1)"."""
    if measured.low is None or measured.high is None:
        return f"{100 * measured.estimate:.1f}% (no interval)"
    return f"{100 * measured.estimate:.1f}% ({100 * measured.low:.1f} to {100 * measured.high:.1f})"


def points(measured: Measured) -> str:
    """A difference of shares with its interval, such as "+1.4 (−0.2 to +3.0)"."""
    if measured.low is None or measured.high is None:
        return f"{100 * measured.estimate:+.1f} (no interval)"
    return f"{100 * measured.estimate:+.1f} ({100 * measured.low:+.1f} to {100 * measured.high:+.1f})"


def nats(measured: Measured) -> str:
    """A KL with its interval, such as "0.512 (0.481 to 0.543)"."""
    if measured.low is None or measured.high is None:
        return f"{measured.estimate:.3f} (no interval)"
    return f"{measured.estimate:.3f} ({measured.low:.3f} to {measured.high:.3f})"


def unmoved(result: MethodResult) -> str | None:
    """Why nothing is divided by a method's KL, in a sentence; None where it has moved (see `MethodResult.moved`)."""
    if result.moved:
        return None
    if result.kl.low is None:
        return f"{result.label}: its KL of {nats(result.kl)} nats cannot be told from 0 by these prompts."
    return (
        f"{result.label} has hardly moved from the reference, if at all: its KL is {nats(result.kl)} nats. No share "
        "of a gain and no KL efficiency is given for it; they would be ratios to noise."
    )


def share_of_gain(entry: ProcedureResult) -> str:
    """The share of the limit's gain that was reached, in words; empty where there is none to state."""
    if entry.captured is None or entry.limit is None:
        return ""
    limit = f"the limit ({100 * entry.limit:.1f}%)"
    if entry.captured.estimate <= 0:
        return f"none of the gain at {limit}"
    return f"{100 * entry.captured.estimate:.0f}% of the gain at {limit}"


def captured_cell(result: MethodResult, entry: ProcedureResult) -> str:
    """The same with its interval, for a column of its own."""
    if entry.captured is None:
        return "" if result.moved else "hardly moved"
    return "none" if entry.captured.estimate <= 0 else percent(entry.captured)


def verdict(results: Sequence[MethodResult], procedure: str, comparisons: Sequence[Comparison]) -> list[Finding]:
    """The findings that matter for the procedure in view: each method against the reference, then against the baseline.

    Of reshaped policies also what one sample is worth, since they were made for many.

    Args:
        results: Methods.
        procedure: Label of the procedure the user deploys.
        comparisons: From `infalign.evaluation.compare.compare`; those of other procedures are left out.
    """
    findings: list[Finding] = []
    wins = [result.of(procedure).win_rate for result in results]
    # Several methods are several chances of a false claim, here as between methods.
    adjusted = holm([difference_estimate(np.subtract(win.per_prompt, 0.5), bounds=(-0.5, 0.5)).p_value for win in wins])
    for result, win, p_value in zip(results, wins, adjusted, strict=True):
        excludes_half = win.low is not None and win.high is not None and not win.low <= 0.5 <= win.high
        resolved = excludes_half and p_value < 1 - result.confidence
        if resolved:
            claim = f"{result.label} {'beats' if win.estimate > 0.5 else 'loses to'} the reference used the same way"
        else:
            claim = f"it is not resolved whether {result.label} differs from the reference used the same way"
        findings.append(
            Finding(
                resolved,
                f"With {procedure}, {claim}: win rate {percent(win)} at a KL of {nats(result.kl)} nats.",
            )
        )
    findings += [Finding(c.resolved, c.sentence) for c in comparisons if c.procedure == procedure]
    return findings + single_samples(results)


SAME_KL = 0.25
"""How far two KLs may be apart, relative, for plain policies to be set beside a reshaped one in the recipe's order."""


def single_samples(results: Sequence[MethodResult]) -> list[Finding]:
    """What a user gets who takes one sample of a reshaped policy, beside one of a plain policy at about the same KL.

    Args:
        results: Methods; nothing is said where no policy is reshaped, or standard sampling was not measured.
    """
    if not any(entry.procedure == STANDARD for entry in results[0].procedures):
        return []
    plain = [result for result in results if result.reshaped is None]
    return [
        _single_sample(result, result.reshaped, plain)
        for result in results
        if result.reshaped is not None and result.reshaped.procedure != STANDARD
    ]


def _single_sample(result: MethodResult, made: ReshapedRecord, plain: Sequence[MethodResult]) -> Finding:
    win = result.of(STANDARD).win_rate
    head = f"One sample of {result.label} instead of {made.procedure}"
    why = f" {1 - made.weight:.0%} of its samples are the reference's own." if made.is_mixture else ""
    if not plain:
        resolved = win.low is not None and win.high is not None and not win.low <= 0.5 <= win.high
        through = next((e.win_rate for e in result.procedures if e.procedure == made.procedure), None)
        beside = "" if through is None else f"; through {made.procedure} it is {percent(through)}"
        return Finding(resolved, f"{head}: its standard win rate is {percent(win)}{beside}.{why}")

    def apart(other: MethodResult) -> float:
        return abs(other.kl.estimate - result.kl.estimate)

    near = [other for other in plain if apart(other) <= SAME_KL * abs(result.kl.estimate)]
    own = [other for other in near if other.label == made.method]
    other = (own or near or [min(plain, key=apart)])[0]
    found = next(c for c in compare_pairs([(result, other)]) if c.procedure == STANDARD)
    if found.resolved:
        claim = f"{head} is {'worth more' if found.difference.estimate > 0 else 'worth less'} than one of {other.label}"
    else:
        claim = f"{head}: not resolved whether it is worth less or more than one of {other.label}"
    numbers = (
        f"standard win rate {percent(win)} against {percent(other.of(STANDARD).win_rate)}, at a KL of "
        f"{result.kl.estimate:.2f} against {other.kl.estimate:.2f} nats"
    )
    return Finding(found.resolved, f"{claim}: {numbers}.{why}")


def cautions(results: Sequence[MethodResult]) -> list[str]:
    """What not to conclude, the general first and then what these results call for.

    Args:
        results: Methods.
    """
    first = results[0]
    level = f"{first.confidence:.0%}"
    found = [
        f"A win is a higher {first.reward} on the same prompt. It says nothing of what people would prefer, unless "
        "that reward has been checked against them.",
        "Intervals cover the choice of prompts and the sampling of responses. They do not cover another training seed, "
        "another reward, or prompts of another kind.",
        "A higher win rate at a higher KL is not a better method: compare points at the same KL, or against the limit.",
        "The limit is the best that any policy can do that depends on a response through its calibrated reward alone, "
        "at that KL. It is a yardstick, not a promise that training can reach it.",
        f"Each interval holds at {level} for itself. Claims marked resolved hold at {level} for all claims of their "
        "kind together (Holm); those between methods also hold at matched KL, if frontiers rise and are concave.",
    ]
    if first.num_prompts < 50:
        found.append(
            f"There {'is' if first.num_prompts == 1 else 'are'} only {counted(first.num_prompts, 'prompt')}. "
            f"Intervals are then wide, and too narrow where nearly "
            "every prompt is won or lost."
        )
    found += [sentence for result in results if (sentence := unmoved(result)) is not None]
    for result in results:
        for entry in result.procedures:
            for name, judged in entry.judged.items():
                if _below(judged, entry.win_rate):
                    found.append(
                        f"{result.label}, {entry.procedure}: by {name} the win rate is {percent(judged)}, clearly less "
                        f"than by {first.reward}. Part of the gain is particular to {first.reward}."
                    )
        matched = result.diagnostics.length_matched
        standard = next((e.win_rate for e in result.procedures if e.procedure == "Standard"), None)
        if _below(matched, standard):
            assert matched is not None, "it was compared"
            assert standard is not None, "it was compared"
            found.append(
                f"{result.label}: among responses of about equal length the standard win rate is {percent(matched)}, "
                f"less than {percent(standard)} over all. Part of the gain is length."
            )
        clearly = result.diagnostics.worse.clearly
        if clearly.low is not None and clearly.low > result.diagnostics.worse.clearly_by_chance:
            found.append(
                f"{result.label}: {percent(clearly)} of the prompts got worse beyond their own noise; the mean hides "
                "them."
            )
        if result.tie_share > 0.05:
            notes = tie_notes([result], [entry.procedure for entry in result.procedures])
            ties = f"{result.label}: {result.tie_share:.0%} of the pairs are ties, counted one half."
            found.append(" ".join([ties, *notes]))
        if result.truncated_share is not None and result.truncated_share > 0.02:
            found.append(
                f"{result.label}: {result.truncated_share:.1%} of the responses were cut off before their end; they "
                "were judged as they stand."
            )
        if result.mean_length is not None and result.ref_mean_length:
            change = result.mean_length / result.ref_mean_length - 1
            if abs(change) > 0.1:
                found.append(
                    f"{result.label}: responses are {abs(change):.0%} {'longer' if change > 0 else 'shorter'} than the "
                    "reference's. If the reward likes length, part of the win rate may be length."
                )
    return found


def predictability_lines(found: Predictability | None) -> list[str]:
    """What the second limit is, what it assumes and where it fails; nothing where it was not looked for."""
    if found is None:
        return []
    if found.estimate is None:
        return [f"No limit for a policy of limited predictability is given: {found.reason}."]
    lines = [
        f"The second limit is the {limit_name(found)}. It assumes that reward and what the policy can tell of it are "
        "jointly Gaussian. Where noise is heavy-tailed its level can be off by up to 5 points, where tails are "
        "one-sided by up to 19; it is good for choosing a transform, not as a bound."
    ]
    if not found.identity:
        lines.append(
            f"{found.policy} may not have been aligned for single samples; ρ is then too low, and so is this limit."
        )
    if found.reason is not None:
        lines.append(f"Of ρ {found.reason}.")
    return lines


def worse_rows(results: Sequence[MethodResult]) -> list[tuple[str, str]]:
    """One sentence for each method on the prompts that got worse, with what chance alone gives."""
    return [(result.label, worse_sentence(result)) for result in results]


def worse_sentence(result: MethodResult) -> str:
    """How many prompts got worse, and how many would seem to by chance."""
    worse = result.diagnostics.worse
    return (
        f"{percent(worse.share)} of the prompts have a standard win rate below one half; with {result.num_samples} "
        f"responses each, {worse.by_chance_alike:.0%} would by chance alone if all prompts had gained alike, and "
        f"{worse.by_chance_unchanged:.0%} if nothing had changed. Worse beyond their own noise: "
        f"{percent(worse.clearly)}, where chance gives at most {worse.clearly_by_chance:.1%}."
    )


def methods_paragraph(results: Sequence[MethodResult], plan: Mapping[str, Any] | None, *, held_out: bool = True) -> str:
    """How the numbers were made, ready to be pasted in a paper.

    Args:
        results: Methods.
        plan: The stored plan, or None.
        held_out: Whether no prompt is known to have been trained on.
    """
    first = results[0]
    names = ", ".join(entry.procedure for entry in first.procedures)
    text = (
        f"On {counted(first.num_prompts, 'held-out prompt' if held_out else 'prompt')} we drew "
        f"{counted(first.num_samples, 'fresh response')} from each policy and "
        f"{first.num_ref_samples} from the reference, and scored them with {first.reward}. Win rates of an "
        "inference-time procedure applied to the policy over the same procedure applied to the reference "
        f"({names}) are averages over all subsets of the required size without replacement, which is unbiased; ties "
        f"count one half. Standard errors are clustered by prompt; {first.confidence:.0%} intervals are score "
        "intervals with the effective number of prompts and Student's t, widened where values are skewed (Hall's "
        "transformed t). Differences between methods are paired by prompt, tested likewise and adjusted by Holm's "
        "method over all comparisons. The KL divergence is "
        "the reverse sequence-level KL of the policy from the reference in nats, estimated from full responses. The "
        "theoretical limit is the win rate of the optimal transform of calibrated rewards at the same KL (InfAlign, "
        "arXiv:2412.19792)."
    )
    best = (plan or {}).get("best")
    if isinstance(best, Mapping) and isinstance(best.get("kl"), int | float):
        text += f" Training aimed at a KL of {best['kl']:.3g} nats"
        beta = best.get("beta")
        text += f" (β = {beta:.4g} in theory)." if isinstance(beta, int | float) else "."
    return text


def markdown_table(
    results: Sequence[MethodResult],
    comparisons: Sequence[Comparison] = (),
    *,
    procedures: Sequence[str] | None = None,
) -> str:
    """The headline table in Markdown, followed by the findings of the comparisons.

    Args:
        results: Methods, one row each; a last row gives the limit at the largest measured KL among them.
        comparisons: Their sentences are listed below the table.
        procedures: Labels of the columns, or None for all of the first method.
    """
    if not results:
        return ""
    labels = list(procedures) if procedures is not None else [entry.procedure for entry in results[0].procedures]
    lines = [
        "| method | KL, nats | " + " | ".join(cell(f"{label} win rate") for label in labels) + " |",
        "|---|---|" + "---|" * len(labels),
    ]
    for result in results:
        cells = [percent(result.of(label).win_rate) for label in labels]
        lines.append(f"| {cell(result.label)} | {nats(result.kl)} | " + " | ".join(cells) + " |")
    furthest = max(results, key=lambda result: result.kl.estimate)
    limits = [furthest.of(label).limit if furthest.moved else None for label in labels]
    if any(value is not None for value in limits):
        cells = ["" if value is None else f"{100 * value:.1f}%" for value in limits]
        lines.append(f"| *limit at that KL* | {furthest.kl.estimate:.3f} | " + " | ".join(cells) + " |")
    second = [furthest.of(label).predictable_limit for label in labels]
    if any(value is not None for value in second):
        cells = ["" if value is None else f"{100 * value:.1f}%" for value in second]
        lines.append(f"| *at its predictability* | {furthest.kl.estimate:.3f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *tie_notes([furthest], labels),
        f"{counted(results[0].num_prompts, 'prompt')}; {results[0].confidence:.0%} intervals clustered by prompt.",
    ]
    lines += [f"- {cell(sentence)}" for result in results if (sentence := unmoved(result)) is not None]
    lines += [f"- {cell(c.sentence)}" for c in comparisons if c.procedure in labels]
    return "\n".join(lines) + "\n"


def _below(low: Measured | None, high: Measured | None) -> bool:
    """Whether one interval lies wholly below the other."""
    return low is not None and high is not None and (1 if low.high is None else low.high) < (high.low or 0)


def cell(text: str) -> str:
    """Text that neither ends a table cell nor starts markup nor hides anything, on one line."""
    text = visible(" ".join(text.split()))
    for mark in "\\|<>*_`[]":
        text = text.replace(mark, "\\" + mark)
    return text
