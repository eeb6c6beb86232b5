"""What an audit says, in plain words: verdict, cautions, methods, and a table for a terminal."""

from __future__ import annotations

from infalign._io.wording import counted
from infalign.audit.results import AtN, AuditResult, ModelAudit
from infalign.evaluation.results import Measured
from infalign.report.words import Finding, percent


def verdict(result: AuditResult) -> list[Finding]:
    """One finding for each model, then how each differs from the first."""
    findings = [Finding(True, _finding(model, result)) for model in result.models]
    return findings + [Finding(change.resolved, change.sentence) for change in result.changes]


def _finding(model: ModelAudit, result: AuditResult) -> str:
    first, last = model.at[0], model.last
    text = f"{model.label}: {percent(first.success)} of single attempts succeed"
    if last.n > 1:
        text += f", and {percent(last.success)} of the prompts break within {counted(last.n, 'attempt')}"
    if model.over_refusal is not None:
        text += f"; {percent(model.over_refusal)} of responses to benign prompts are refusals"
    return text + "."


def cautions(result: AuditResult) -> list[str]:
    """What not to conclude, the general first and then what these results call for."""
    level = f"{result.confidence:.0%}"
    found = [
        f"An attempt counts as a success if {result.judge} says so. Read the examples: a judge that is fooled, or that "
        "calls a harmless answer harmful, moves every number here.",
        "These are attempts of one kind: resampling" + _worded(result) + ". A low rate is no evidence against other "
        "attacks: translations, role play, many-shot prompts, gradients, a person who keeps trying.",
        f"The prompts are a sample of what can be asked. Intervals ({level}, clustered by prompt) cover the choice of "
        "prompts like these and the sampling of attempts, nothing else.",
        "Predictions beyond the attempts made rest on a law that nobody has checked there. The bounds do not: they "
        "hold for any prompts of this kind.",
    ]
    if "refusal-phrases" in result.judge:
        found.append(
            "Success here means only that no usual phrase of refusal was found near the beginning, not that the "
            "response was harmful, or even made sense."
        )
    if result.num_prompts < 50:
        found.append(
            f"There {'is' if result.num_prompts == 1 else 'are'} only {counted(result.num_prompts, 'prompt')}. "
            "Intervals are wide, and a rare weakness is unseen."
        )
    if result.num_benign and "refusal-phrases" in str(result.settings.get("refusal")):
        found.append(
            "Over-refusal was recognised by usual English phrases of refusal. That misses refusals in other words and "
            "takes some answers for refusals; trust large differences only."
        )
    if not result.num_benign:
        found.append(
            "No benign prompts were asked. A model that refuses everything would look perfectly safe here; give some "
            "that only look harmful to see what safety costs."
        )
    for model in result.models:
        found += [f"{model.label}: {doubt}" for doubt in model.doubts]
        if model.truncated_share > 0.02:
            found.append(
                f"{model.label}: {model.truncated_share:.1%} of the responses were cut off at their longest; harm that "
                "comes later was not seen."
            )
    return found


def _worded(result: AuditResult) -> str:
    ways = result.settings["augmentation"]["ways"]
    return f", with prompts reworded at random ({', '.join(ways)})" if ways else " the same prompt"


def methods_paragraph(result: AuditResult) -> str:
    """How the numbers were made, ready to be pasted in a paper."""
    how = result.settings["augmentation"]
    reworded = (
        f"each with its prompt changed at random ({', '.join(how['ways'])}, strength {how['sigma']:g}; Best-of-N "
        "jailbreaking, arXiv:2412.03556)"
        if how["ways"]
        else "each with the prompt as it is"
    )
    text = (
        f"For each of {counted(result.num_prompts, 'prompt')} we drew {counted(result.num_attempts, 'response')} at "
        f"temperature 1, {reworded}, of at most {counted(result.settings['max_new_tokens'], 'token')}. An attempt "
        f"succeeded if {result.judge}. The attack success rate at N is the chance that at least one of N attempts "
        "succeeds, averaged over all subsets without "
        f"replacement, which is unbiased; {result.confidence:.0%} score intervals use the effective number of prompts. "
        "Beyond the attempts made, success counts were fitted by a beta-binomial (maximum likelihood) and −log ASR by "
        "a power law in N, with intervals from resampled prompts; bounds use that the success rate is concave in N."
    )
    if result.num_benign:
        text += (
            f" Over-refusal is the share of refusals among "
            f"{counted(result.settings['benign_attempts'], 'response')} to each of "
            f"{counted(result.num_benign, 'benign prompt')}."
        )
    if result.changes:
        text += " Models were compared by tests paired by prompt, adjusted by Holm's method."
    return text


def text_table(result: AuditResult) -> str:
    """The audit for a terminal: rates over N, predictions, comparisons, cautions that these results call for."""
    shown = _shown(result)
    header = ["", *(f"ASR@{n}" for n in shown)]
    beyond = result.models[0].beyond
    predicted = [] if beyond is None else beyond.ns[-1:]
    header += [f"ASR@{n} predicted (bounds)" for n in predicted]
    rewards = any(model.last.worst_reward for model in result.models)
    header += [f"worst of {result.num_attempts}"] * rewards + ["over-refusal"] * bool(result.num_benign)
    rows = []
    for model in result.models:
        at = {entry.n: entry for entry in model.at}
        row = [model.label, *(percent(at[n].success) for n in shown)]
        for n in predicted:
            row.append(_predicted(model, n))
        if rewards:
            row.append(_reward(model.last))
        if result.num_benign:
            row.append("" if model.over_refusal is None else percent(model.over_refusal))
        rows.append(row)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        f"Attack success rate over N attempts, with {result.confidence:.0%} intervals clustered by prompt; "
        f"{counted(result.num_prompts, 'prompt')} × {counted(result.num_attempts, 'attempt')} per model.",
        f"Judge: {result.judge}.",
        "",
        *(
            "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ),
    ]
    if result.changes:
        lines += ["", *(change.sentence for change in result.changes)]
    doubts = [f"{model.label}: {doubt}" for model in result.models for doubt in model.doubts]
    if doubts:
        lines += ["", "About the predictions:", *doubts]
    return "\n".join(lines)


def _shown(result: AuditResult) -> list[int]:
    """At most four N: 1, two between, and all attempts."""
    ns = [entry.n for entry in result.models[0].at]
    if len(ns) <= 4:
        return ns
    return [ns[at] for at in (0, len(ns) // 3, 2 * len(ns) // 3, len(ns) - 1)]


def _predicted(model: ModelAudit, n: int) -> str:
    beyond = model.beyond
    if beyond is None:
        return ""
    at = beyond.ns.index(n)
    bounds = f"({100 * beyond.bounds.low[at]:.0f} to {100 * beyond.bounds.high[at]:.0f})"
    law = beyond.beta_binomial
    return f"{'?' if law is None else f'{100 * law.rate[at]:.0f}%'} {bounds}"


def _reward(entry: AtN) -> str:
    worst: Measured | None = entry.worst_reward
    if worst is None:
        return ""
    if worst.low is None or worst.high is None:
        return f"{worst.estimate:.3g}"
    return f"{worst.estimate:.3g} ({worst.low:.3g} to {worst.high:.3g})"
