"""The report: one HTML file that holds everything it needs and asks the network for nothing.

Text of models and prompts never becomes markup: Jinja escapes what it writes, and the samples travel as JSON that the
page's script puts in place as text nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infalign._io.files import write_text
from infalign._io.wording import visible
from infalign.errors import InputError
from infalign.evaluation.compare import compare
from infalign.evaluation.frontier import frontier
from infalign.evaluation.results import Measured, MethodResult, Predictability
from infalign.evaluation.runs import MatchedDifference
from infalign.report import curves, figures
from infalign.report.reshaped import cost_rows, prediction_rows, shape_figures
from infalign.report.words import (
    captured_cell,
    cautions,
    markdown_table,
    methods_paragraph,
    nats,
    percent,
    points,
    predictability_lines,
    share_of_gain,
    verdict,
    worse_rows,
)

__all__ = ["ReportData", "markdown_table", "write_report"]


def _standard(result: MethodResult) -> str:
    """The standard win rate, if it was measured."""
    found = next((entry.win_rate for entry in result.procedures if entry.procedure == "Standard"), None)
    return _share(found)


def _share(measured: Measured | None) -> str:
    return "–" if measured is None else percent(measured)


def _mean_length(length: float | None) -> str:
    return "–" if length is None else f"{length:.1f}"


def _reasons(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{reason} {share:.0%}" for reason, share in shares.items()) or "–"


FILTERS = {
    "percent": percent,
    "points": points,
    "nats": nats,
    "share_of_gain": share_of_gain,
    "captured_cell": captured_cell,
    "share": _share,
    "standard": _standard,
    "mean_length": _mean_length,
    "reasons": _reasons,
}
"""How numbers are written in templates."""

SAMPLE_CHARACTERS = 3_000_000
"""Text of samples that a page carries; further prompts are left out, and the page says how many."""


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows, as plain data.

    Attributes:
        results: Methods, measured on the same prompts. At least one.
        procedure: Label of the procedure the user deploys; it leads the page.
        title: Heading.
        baseline: Label of the method to compare the others with, or None.
        headline_procedures: Labels of the table's columns; None for all if there are at most four, else for those with
            the n of `procedure`, and standard sampling.
        matched: Differences at one KL, from `infalign.evaluation.runs.compare_runs`.
        warnings: What a reader must know before the numbers, in sentences.
        held_out: Whether no prompt is known to have been trained on.
        predictability: As stored by the evaluation, for the second limit.
        plan: The stored plan: "best" with "kl" and "beta" is used.
        settings: The recipe that was run.
        versions: Package or device name → version.
        samples: Held-out prompts, each {"prompt": str or list of chat messages, "methods": {label: {"candidates":
            [{"text", "reward", "calibrated_reward", "finish_reason", "chosen", "gold": {name: score}}, ...]}}}. The
            reference may be among the methods, under `reference`; wins and losses are then against its chosen response.
        curves: For each method the training records: {"step", "kl", "calibrated_reward", "beta"}.
        rewards: For each method, and the reference, {"rewards": [...], "calibrated_rewards": [...]}.
        reshapings: For each reshaped policy what its `reshape.json` holds: "reshaping", "histogram".
        reference: Name of the reference in `samples` and `rewards`.
    """

    results: Sequence[MethodResult]
    procedure: str
    title: str = "Inference-aware alignment"
    baseline: str | None = None
    headline_procedures: Sequence[str] | None = None
    matched: Sequence[MatchedDifference] = ()
    warnings: Sequence[str] = ()
    held_out: bool = True
    predictability: Predictability | None = None
    plan: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    rewards: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    reshapings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: str = "reference"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReportData:
        """From plain JSON, in which each of `results` is what `MethodResult.to_dict` returned.

        Args:
            data: The fields above.

        Raises:
            InputError: If a field is missing or unknown.
        """
        try:
            given = dict(data)
            found = given.get("predictability")
            given["predictability"] = None if found is None else Predictability(**found)
            return cls(**{**given, "results": [MethodResult.from_dict(entry) for entry in data["results"]]})
        except (KeyError, TypeError) as error:
            raise InputError(f"not the data of a report ({error})", hint="Run the evaluation again") from error

    def columns(self) -> list[str]:
        """Labels of the procedures in the headline table."""
        if self.headline_procedures is not None:
            return list(self.headline_procedures)
        entries = self.results[0].procedures
        if len(entries) <= 4:
            return [entry.procedure for entry in entries]
        n = self.results[0].of(self.procedure).n
        return [entry.procedure for entry in entries if entry.n in (1, n)]


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the report.

    Args:
        path: The HTML file; its folder is made if need be.
        data: What it shows.

    Returns:
        The path.

    Raises:
        InputError: If there are no results, a label is unknown, or the extra `report` is not installed.
        StorageError: If the file cannot be written.
    """
    return write_page(Path(path), render(data))


def write_page(path: Path, text: str) -> Path:
    """Write a page whole or not at all; its folder is made if need be.

    Raises:
        StorageError: If the file cannot be written.
    """
    write_text(path, text)
    return path


def render_page(template: str, script: str, **content: Any) -> str:
    """A self-contained page: a template with the shared style, Plotly, and `page.js` before the page's own script.

    Args:
        template: Name of the template in `templates/`.
        script: Name of the page's script there.
        **content: What the template shows.

    Raises:
        InputError: If the extra `report` is not installed.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed", hint="Install it with: pip install 'infalign[report]'"
        ) from error
    loader = jinja2.PackageLoader("infalign.report", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)

    def asset(name: str) -> str:
        return loader.get_source(environment, name)[0]

    return environment.get_template(template).render(
        css=asset("report.css"),
        script=f"{asset('page.js')}\n{asset(script)}",
        plotly=get_plotlyjs(),
        **content,
    )


def _shown(value: Any) -> Any:
    """What a template shows, with unseen characters written out; parts of the page itself as they are."""
    return visible(value) if type(value) is str else value


def render(data: ReportData) -> str:
    """The page as text; see `write_report`."""
    if not data.results:
        raise InputError("there is no result to report", hint="Evaluate at least one method")

    results = list(data.results)
    comparisons = compare(results, baseline=data.baseline) if data.baseline is not None and len(results) > 1 else []
    columns = data.columns()
    look = figures.styles_of(results)
    samples, left_out = _samples(data)
    return render_page(
        "report.html.j2",
        "report.js",
        data=data,
        results=results,
        columns=columns,
        findings=verdict(results, data.procedure, comparisons),
        judges=judges_of(results),
        predictions=prediction_rows(results),
        costs=cost_rows(results),
        comparisons=[comparison for comparison in comparisons if comparison.procedure in columns],
        look=look,
        strip=_strip_scale(results, columns),
        cautions=[*data.warnings, *cautions(results), *predictability_lines(data.predictability)],
        second_limit=data.predictability is not None and data.predictability.estimate is not None,
        methods_text=methods_paragraph(results, data.plan, held_out=data.held_out),
        figures=_figures(data, results, look),
        samples=samples,
        samples_left_out=left_out,
        changes=worse_rows(results),
        settings=flat(data.settings),
        plan=flat({key: value for key, value in (data.plan or {}).items() if key in ("best", "procedure")}),
    )


def _figures(
    data: ReportData, results: list[MethodResult], look: Mapping[str, figures.Style]
) -> dict[str, figures.Figure]:
    """Every figure that there is data for, by the id of its place in the page."""
    order = [data.procedure] + [e.procedure for e in results[0].procedures if e.procedure != data.procedure]
    found: dict[str, figures.Figure | None] = {}
    frontiers = {
        label: figures.frontier_figure(frontier(results, label, predictability=data.predictability), look)
        for label in order
    }
    for label, figure in frontiers.items():
        found[f"frontier:{label}"] = figure
    for family in ("best-of-n", "worst-of-n"):
        found[family] = curves.win_rate_over_n_figure(results, family, look)
        for judge in judges_of(results):
            found[f"{family}:{judge}"] = curves.win_rate_over_n_figure(results, family, look, judge=judge)
    found["over-kl"] = curves.over_kl_figure(results, data.procedure, look, judges_of(results))
    target = ((data.plan or {}).get("best") or {}).get("kl")
    known_curves = {label: records for label, records in data.curves.items() if label in look}
    found["training"] = curves.training_figure(known_curves, look, kl_target=target)
    for key, place, title in (
        ("rewards", "rewards", f"{results[0].reward}, as scored"),
        ("calibrated_rewards", "calibrated", "calibrated reward"),
    ):
        values = {label: entry[key] for label, entry in data.rewards.items() if key in entry}
        found[place] = figures.histogram_figure(values, look, calibrated=place == "calibrated", title=title)
    found |= shape_figures(data.reshapings, results, look)
    return {place: figure for place, figure in found.items() if figure is not None}


def judges_of(results: Sequence[MethodResult]) -> list[str]:
    """Names of the further rewards, in order of appearance."""
    return list(dict.fromkeys(name for result in results for entry in result.procedures for name in entry.judged))


def _strip_scale(results: Sequence[MethodResult], columns: Sequence[str]) -> dict[str, float]:
    """The win rates between which the small interval strips of the table are drawn, one scale for all."""
    values = [0.5]
    for result in results:
        for label in columns:
            entry = result.of(label)
            values += [value for value in (entry.win_rate.low, entry.win_rate.high, entry.limit) if value is not None]
    low, high = min(values), max(values)
    margin = 0.06 * max(high - low, 0.05)
    return {"low": low - margin, "high": high + margin}


def _samples(data: ReportData) -> tuple[list[dict[str, Any]], int]:
    """Samples in the form that the page's script reads, and how many did not fit."""
    kept: list[dict[str, Any]] = []
    used = 0
    for sample in data.samples:
        methods: list[dict[str, Any]] = []
        reference = _chosen_reward(sample, data.reference)
        for label, entry in sample["methods"].items():
            outcome = None
            reward = _chosen_reward(sample, label)
            if label != data.reference and reward is not None and reference is not None:
                outcome = "win" if reward > reference else "loss" if reward < reference else "tie"
            candidates = [
                {
                    "text": str(candidate["text"]),
                    "reward": figures.finite_number(candidate.get("reward")),
                    "calibrated": figures.finite_number(candidate.get("calibrated_reward")),
                    "gold": {name: figures.finite_number(score) for name, score in candidate.get("gold", {}).items()},
                    "finish": str(candidate.get("finish_reason") or ""),
                    "chosen": bool(candidate.get("chosen")),
                }
                for candidate in entry["candidates"]
            ]
            methods.append({"label": label, "outcome": outcome, "candidates": candidates})
        prompt = _prompt_text(sample["prompt"])
        size = len(prompt) + sum(len(c["text"]) for method in methods for c in method["candidates"])
        if kept and used + size > SAMPLE_CHARACTERS:
            break
        used += size
        kept.append({"prompt": prompt, "methods": methods})
    return kept, len(data.samples) - len(kept)


def _chosen_reward(sample: Mapping[str, Any], label: str) -> float | None:
    """Reward of the response that the procedure returned."""
    for candidate in sample["methods"].get(label, {}).get("candidates", ()):
        if candidate.get("chosen"):
            return figures.finite_number(candidate.get("reward"))
    return None


def _prompt_text(prompt: Any) -> str:
    """A prompt as text: a string, or chat messages one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with their values."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows
