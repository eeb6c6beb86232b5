"""Gather what a report shows from a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infalign._io.inventory import read_object, require_whole
from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import StorageError
from infalign.evaluation.compare import compare
from infalign.evaluation.record import Evaluation
from infalign.evaluation.reshaped import ReshapedRecord, read_fit
from infalign.evaluation.results import MethodResult
from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.report.markdown import render_markdown
from infalign.report.page import ReportData, write_page, write_report
from infalign.report.words import cautions, predictability_lines, verdict
from infalign.rollouts.store import RolloutStore

SAMPLE_PROMPTS = 100
_AGAIN = "Give the command again that made this folder: what is whole is kept, the rest is made again"


def build_report(out: Path, form: Literal["html", "md", "json"] = "html") -> tuple[Path, dict[str, Any]]:
    """Write `report.html`, `report.md` or `report.json` into the folder of a finished evaluation.

    Args:
        out: The folder of a run or of an evaluation.
        form: A page with everything in it, the findings as text, or the findings and all numbers as data.

    Returns:
        The file, and the data.

    Raises:
        StorageError: If there is no finished evaluation, or the file cannot be written.
        InputError: If the evaluation is of an earlier version, or a rollout is missing.
    """
    evaluation = Evaluation.read(out)
    require_whole(out, ["prompts", "plan", "evaluation-*"])
    content = evaluation.to_dict()
    path = out / f"report.{form}"
    if form == "html":
        write_report(path, report_data(out, evaluation))
    elif form == "md":
        write_page(path, render_markdown(report_data(out, evaluation)))
    else:
        comparisons = compare(evaluation.results, baseline=evaluation.baseline) if evaluation.baseline else []
        label = procedure_from_dict(evaluation.procedure).label
        content |= {
            "findings": [asdict(finding) for finding in verdict(evaluation.results, label, comparisons)],
            "cautions": [
                *evaluation.warnings,
                *cautions(evaluation.results),
                *predictability_lines(evaluation.predictability),
            ],
        }
        write_page(path, json.dumps(content, indent=1, ensure_ascii=False))
    return path, content


def report_data(out: Path, evaluation: Evaluation) -> ReportData:
    """What a report shows of the evaluation in a folder; errors as in `build_report`."""
    results, procedure = evaluation.results, procedure_from_dict(evaluation.procedure)
    plan = read_object(out / "plan.json", _AGAIN) if (out / "plan.json").exists() else None
    prompts = _records(out / "prompts" / "evaluation.jsonl")
    ids = [prompt["id"] for prompt in prompts]
    labels = ["reference", *(result.label for result in results)]
    count = results[0].num_samples
    stores = {label: RolloutStore.open(out / evaluation.stores[label]) for label in labels}
    rewards = {label: store.rewards_PK(evaluation.reward, ids, count) for label, store in stores.items()}
    gold = {
        name: {label: store.rewards_PK(key, ids, count) for label, store in stores.items()}
        for name, key in evaluation.gold.items()
    }
    calibrator = RewardCalibrator().fit(rewards["reference"])
    calibrated = {label: calibrator.calibrate(rewards_PG) for label, rewards_PG in rewards.items()}
    calibrated["reference"] = np.asarray(calibrator.calibrate_references())  # each against the others only
    return ReportData(
        results=results,
        procedure=procedure.label,
        title=evaluation.name,
        baseline=evaluation.baseline,
        warnings=evaluation.warnings,
        held_out=evaluation.held_out,
        predictability=evaluation.predictability,
        plan=None if plan is None else {"best": {"kl": plan["kl"], "beta": plan["transforms"][0]["beta"]}},
        settings=evaluation.settings,
        versions=evaluation.versions,
        samples=_samples(prompts[:SAMPLE_PROMPTS], stores, rewards, calibrated, gold, procedure),
        curves={
            result.label: _records(path)
            for result in results
            if (path := out / "policies" / _trained(result) / "steps.jsonl").exists()
        },
        rewards={
            label: {
                "rewards": rewards[label].ravel().tolist(),
                "calibrated_rewards": calibrated[label].ravel().tolist(),
            }
            for label in labels
        },
        reshapings={
            result.label: fit
            for result in results
            if result.reshaped is not None
            and (fit := read_fit(_fit_folder(out, evaluation, result.label, result.reshaped))) is not None
        },
    )


def _fit_folder(out: Path, evaluation: Evaluation, label: str, record: ReshapedRecord) -> Path:
    """Where a reshaped policy is: in the run, or wherever the policy is that was evaluated."""
    models = evaluation.settings.get("models", {})
    return Path(models[label]) if label in models else out / "policies" / record.method / "reshaped"


def _trained(result: MethodResult) -> str:
    """Whose training a result shows: a mixture's own where it was trained as one, else that of the model itself."""
    made = result.reshaped
    return result.label if made is None or made.trained_weight is None else made.method


def _samples(
    prompts: list[dict[str, Any]],
    stores: Mapping[str, RolloutStore],
    rewards: Mapping[str, np.ndarray],
    calibrated: Mapping[str, np.ndarray],
    gold: Mapping[str, Mapping[str, np.ndarray]],
    procedure: InferenceProcedure,
) -> list[dict[str, Any]]:
    """The first n candidates of each prompt under each model, the one that the procedure returns marked."""
    n = procedure.n or 1
    ids = [prompt["id"] for prompt in prompts]
    texts = {label: store.column_PK("text", ids, n) for label, store in stores.items()}
    reasons = {label: store.column_PK("finish_reason", ids, n) for label, store in stores.items()}
    # Of exactly n candidates the procedure returns the one at a fixed rank; of a fitted one a single sample is shown.
    rank = 0 if procedure.n is None else int(np.argmax(procedure.selection_weights(n)))
    samples = []
    for p, prompt in enumerate(prompts):
        methods = {}
        for label in stores:
            chosen = int(np.argsort(rewards[label][p, :n], kind="stable")[rank])
            methods[label] = {
                "candidates": [
                    {
                        "text": texts[label][p, g],
                        "reward": float(rewards[label][p, g]),
                        "calibrated_reward": float(calibrated[label][p, g]),
                        "gold": {name: float(scores[label][p, g]) for name, scores in gold.items()},
                        "finish_reason": reasons[label][p, g],
                        "chosen": g == chosen,
                    }
                    for g in range(n)
                ]
            }
        samples.append({"prompt": prompt["prompt"], "methods": methods})
    return samples


def _records(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file. Only a newline ends one: Unicode counts more characters as ends."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError("the file cannot be read, or is damaged", where=str(path), hint=_AGAIN) from error
    if not all(isinstance(record, dict) for record in records):
        raise StorageError("the file is damaged", where=str(path), hint=_AGAIN)
    return records
