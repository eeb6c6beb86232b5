"""The audit's report: one HTML file that asks the network for nothing; harmful text stays shut until it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infalign.audit.attempts import plan_attempts
from infalign.audit.augment import Augmentation
from infalign.audit.figures import reward_figure, success_figure
from infalign.audit.results import AuditResult
from infalign.audit.run import Judge
from infalign.audit.words import cautions, methods_paragraph, verdict
from infalign.report.figures import styles
from infalign.report.page import flat, render_page, write_page
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore

_PROMPTS = 60
_ATTEMPTS = 3
_CHARACTERS = 4000  # of one text


def write_audit_report(
    path: Path, result: AuditResult, examples: Sequence[Mapping[str, Any]], *, title: str, versions: Mapping[str, str]
) -> Path:
    """Write the report.

    Args:
        path: The HTML file.
        result: What the audit found.
        examples: From `worst_examples`.
        title: Heading.
        versions: Package → version.

    Raises:
        InputError: If the extra `report` is not installed.
        StorageError: If the file cannot be written.
    """
    look = styles([model.label for model in result.models])
    figures = {"success": success_figure(result.models, look), "reward": reward_figure(result.models, look)}
    page = render_page(
        "audit.html.j2",
        "audit.js",
        title=title,
        result=result,
        look=look,
        findings=verdict(result),
        cautions=cautions(result),
        methods_text=methods_paragraph(result),
        figures={place: figure for place, figure in figures.items() if figure is not None},
        examples=examples,
        settings=flat(result.settings),
        versions=versions,
    )
    return write_page(path, page)


def worst_examples(result: AuditResult, prompts: Sequence[Prompt], judge: Judge, out: Path) -> list[dict[str, Any]]:
    """The prompts that broke most often, each with the worst attempts of every model, as plain data.

    Args:
        result: What the audit found.
        prompts: Its prompts, in order.
        judge: Its judge.
        out: Its folder.

    Raises:
        InputError: The folder holds no such attempts.
    """
    broken_P = np.max([model.successes for model in result.models], axis=0)
    chosen = [int(p) for p in np.argsort(-broken_P, kind="stable")[:_PROMPTS] if broken_P[p]]
    if not chosen:
        return []
    how = result.settings["augmentation"]
    augmentation = Augmentation(tuple(how["ways"]), how["sigma"], how["seed"])
    attempts = plan_attempts([prompts[p] for p in chosen], result.num_attempts, augmentation)
    found: list[dict[str, Any]] = [{"prompt": prompts[p].text[:_CHARACTERS], "models": []} for p in chosen]
    for model in result.models:
        store = RolloutStore.read(out / "rollouts" / model.label / "attack")
        scores_PM, texts_PM = attempts.rewards_PM(store, judge.source), attempts.column_PM(store, "text")
        success_PM = judge.successes(scores_PM)
        # The judge's worst first: lowest rewards, or the attempts it called successes.
        order_PM = np.argsort(scores_PM if judge.threshold is not None else -scores_PM, axis=1, kind="stable")
        for p, entry in enumerate(found):
            worst = [
                {
                    "sent": attempts.sent_PM[p][m].text[:_CHARACTERS],
                    "text": texts_PM[p, m][:_CHARACTERS],
                    "score": float(scores_PM[p, m]),
                    "success": bool(success_PM[p, m]),
                    "attempt": int(m),
                }
                for m in order_PM[p, :_ATTEMPTS]
            ]
            entry["models"].append(
                {"label": model.label, "broken": int(success_PM[p].sum()), "of": result.num_attempts, "worst": worst}
            )
    return found
