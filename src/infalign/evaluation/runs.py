"""Several evaluations on one frontier: what they must share, and how their methods differ at one KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infalign.errors import InputError, MismatchError
from infalign.estimators import Difference, holm
from infalign.evaluation.frontier import Frontier, difference_at, frontier, least_favourable_at
from infalign.evaluation.record import Evaluation
from infalign.evaluation.results import Measured, MethodResult
from infalign.procedures import procedure_from_dict

MOST_KLS = 5  # at which two methods are compared


@dataclass(frozen=True)
class MatchedDifference:
    """Two methods at one KL, each interpolated between its own runs.

    Attributes:
        method: The method; all results of this name are points of its curve.
        baseline: What it is compared with.
        procedure: Label of the procedure.
        kl: KL in nats.
        difference: Win rate of the method less that of the baseline there, both taken as straight between runs.
        least_favourable: The same with the side ahead on its straight line and the other at its ceiling; see
            `infalign.evaluation.frontier.least_favourable_at`.
        p_value: Two-sided, of no difference; the larger of those of the two differences.
        adjusted_p_value: The same after Holm's adjustment over all differences of this table.
        resolved: Whether both differences have one sign, and it holds at the stated level in the whole table.
    """

    method: str
    baseline: str
    procedure: str
    kl: float
    difference: Measured
    least_favourable: Measured
    p_value: float
    adjusted_p_value: float
    resolved: bool


@dataclass(frozen=True)
class ComparedRuns:
    """All methods of several runs under one procedure.

    Attributes:
        procedure: Its label.
        results: Every method of every run, under its own name.
        frontier: Their points, and the limit.
        matched: Differences at matched KL; empty where there is one method.
        left_out: Methods that could not be compared, and why.
        folders: The runs, by the name they have here.
    """

    procedure: str
    results: list[MethodResult]
    frontier: Frontier
    matched: list[MatchedDifference]
    left_out: dict[str, str]
    folders: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; of the results the rows of the table, without values by prompt."""
        rows = [
            {
                "label": result.label,
                "series": result.series,
                "kl": _short(result.kl),
                "procedures": {
                    entry.procedure: {
                        "win_rate": _short(entry.win_rate),
                        "limit": entry.limit,
                        "judged": {name: _short(value) for name, value in entry.judged.items()},
                    }
                    for entry in result.procedures
                },
            }
            for result in self.results
        ]
        matched = [
            {**asdict(one), "difference": _short(one.difference), "least_favourable": _short(one.least_favourable)}
            for one in self.matched
        ]
        frontier = self.frontier.to_dict()
        return {"procedure": self.procedure, "results": rows, "frontier": frontier, "matched": matched,
                "left_out": self.left_out, "runs": self.folders}  # fmt: skip


def read_runs(folders: Sequence[str | Path]) -> dict[str, Evaluation]:
    """The evaluations in some folders, by a short name for each.

    Raises:
        InputError: If a folder comes twice, or an evaluation is of an earlier version.
        StorageError: If there is no evaluation in one.
    """
    paths = [Path(folder).resolve() for folder in folders]
    repeated = [str(path) for path in paths if paths.count(path) > 1]
    if repeated:
        raise InputError("this run is given twice", where=repeated[0], hint="Name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): Evaluation.read(path) for path in paths}


def compare_runs(
    runs: Mapping[str, Evaluation],
    *,
    procedure: str | None = None,
    baseline: str | None = None,
    folders: Mapping[str, str] | None = None,
) -> ComparedRuns:
    """Put the methods of several runs on one frontier.

    Results of one name (the transform they were trained with) are points of one curve that starts where every policy
    does, at the reference. At each KL that both curves reach, the difference is interpolated, paired by prompt, with
    the error of the win rates and KLs of all runs involved.

    Args:
        runs: Evaluations by name.
        procedure: Label of the procedure; that of the first run if None.
        baseline: Name of the method to compare the others with; "identity" if there is one, else the first.
        folders: Where the runs are, for the record.

    Raises:
        InputError: If there is no run, or no such method or procedure.
        MismatchError: If runs differ in prompts, reward, reference, or length of responses; says in what.
    """
    if not runs:
        raise InputError("there is nothing to compare", where="compare", hint="Give the folders of evaluated runs")
    check_comparable(runs)
    first = next(iter(runs.values()))
    label = procedure or procedure_from_dict(first.procedure).label
    _require_measured(runs, label)
    results = [
        replace(result, label=f"{name}/{result.label}" if len(runs) > 1 else result.label,
                series=result.series or result.label)
        for name, run in runs.items()
        for result in run.results
    ]  # fmt: skip
    curves: dict[str, list[MethodResult]] = {}
    for result in results:
        assert result.series is not None, "just given"
        curves.setdefault(result.series, []).append(result)
    base = baseline or ("identity" if "identity" in curves else next(iter(curves)))
    if base not in curves:
        raise InputError(f"no method is called {base!r}", where="--baseline", hint=f"There are: {', '.join(curves)}")
    confidence = results[0].confidence
    found: list[tuple[str, float, Difference, Difference]] = []
    left_out: dict[str, str] = {}
    for name, curve in curves.items():
        if name == base:
            continue
        kls = _common_kls(curve, curves[base])
        if not kls:
            left_out[name] = "its KL is not above zero, or that of the baseline is not"
        for kl in kls:
            ends = [
                at(curve, curves[base], label, kl, confidence=confidence) for at in (difference_at, least_favourable_at)
            ]
            found.append((name, kl, ends[0], ends[1]))
    p_values = [max(difference.p_value, least.p_value) for _, _, difference, least in found]
    matched = [
        MatchedDifference(
            method=name,
            baseline=base,
            procedure=label,
            kl=kl,
            difference=Measured.of(difference),
            least_favourable=Measured.of(least),
            p_value=p_value,
            adjusted_p_value=adjusted,
            resolved=adjusted < 1 - confidence and difference.estimate * least.estimate > 0,
        )
        for (name, kl, difference, least), p_value, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]
    known = [run.predictability for run in runs.values() if run.predictability is not None]
    shared = next((found for found in known if found.estimate is not None), None)
    return ComparedRuns(
        label, results, frontier(results, label, predictability=shared), matched, left_out, dict(folders or {})
    )


def check_comparable(runs: Mapping[str, Evaluation]) -> None:
    """Refuse runs whose win rates mean different things.

    Raises:
        MismatchError: Naming what differs, and between which runs.
    """
    (name, first), *others = runs.items()
    for other, run in others:
        different: list[str] = []
        if run.results[0].prompt_ids != first.results[0].prompt_ids:
            ours, theirs = set(first.results[0].prompt_ids or ()), set(run.results[0].prompt_ids or ())
            shared = f"{len(ours & theirs)} of {len(ours)} and {len(theirs)} are shared"
            different.append(f"prompts ({shared})" if ours != theirs else "the order of prompts")
        for what, mine, its in (
            ("reward", *_told_apart(first, run)),
            ("reference", first.reference, run.reference),
            ("longest response", f"{first.max_new_tokens} tokens", f"{run.max_new_tokens} tokens"),
            ("level of intervals", first.results[0].confidence, run.results[0].confidence),
        ):
            if mine != its:
                different.append(f"{what} ({mine} in one, {its} in the other)")
        if different:
            raise MismatchError(
                f"{name} and {other} differ in {'; '.join(different)}",
                where="compare",
                hint="Evaluate both alike: `infalign evaluate --model … --model … --reference … --prompts …`",
            )


def _told_apart(first: Evaluation, other: Evaluation) -> tuple[str, str]:
    """The names of two rewards; their keys where two rewards have one name, and one name where they are one reward."""
    names = first.results[0].reward, other.results[0].reward
    if first.reward == other.reward:
        return names[0], names[0]
    return names if names[0] != names[1] else (first.reward, other.reward)


def _require_measured(runs: Mapping[str, Evaluation], procedure: str) -> None:
    """Refuse runs of which one was not measured under the procedure.

    Raises:
        InputError: Naming the run, and the procedures that all of them were measured under.
    """
    measured = [
        (name, [e.procedure for e in result.procedures]) for name, run in runs.items() for result in run.results
    ]
    lacking = next((name for name, labels in measured if procedure not in labels), None)
    if lacking is None:
        return
    own = procedure_from_dict(next(iter(runs.values())).procedure).label
    which = ", the one that the first run is for" if procedure == own else ""
    shared = [label for label in measured[0][1] if all(label in labels for _, labels in measured)]
    choose = f"choose with --procedure one that all were measured under ({', '.join(shared)}), or " if shared else ""
    again = f"evaluate it under this one too: `infalign evaluate --run {lacking} --procedures …`"
    raise InputError(
        f"{lacking} was not measured under {procedure}{which}",
        where="compare",
        hint=f"To compare them, {choose}{again}, or evaluation.procedures in its recipe",
    )


def _common_kls(curve: Sequence[MethodResult], base: Sequence[MethodResult]) -> list[float]:
    """Measured KLs that both curves reach, the largest first in mind: it is where they can be told apart best."""
    reach = min(max(result.kl.estimate for result in some) for some in (curve, base))
    kls = sorted({result.kl.estimate for result in (*curve, *base) if 0 < result.kl.estimate <= reach})
    if len(kls) <= MOST_KLS:
        return kls
    return [kls[round(index * (len(kls) - 1) / (MOST_KLS - 1))] for index in range(MOST_KLS)]


def _short(measured: Measured) -> dict[str, float | None]:
    """Without the values by prompt."""
    return {name: value for name, value in asdict(measured).items() if name != "per_prompt"}
