"""Gather what a report shows from a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infalign.calibration import RewardCalibrator
from infalign.evaluation.results import MethodResult
from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.report.page import ReportData, write_report
from infalign.rollouts.store import RolloutStore

SAMPLE_PROMPTS = 100


def build_report(
    out: Path, *, title: str, reward_key: str, settings: Mapping[str, Any], versions: Mapping[str, str]
) -> Path:
    """Write `report.html` into a run folder whose evaluation is done.

    Args:
        out: The run folder.
        title: Heading.
        reward_key: Which stored rewards to show.
        settings: The recipe.
        versions: Versions of packages.
    """
    evaluation = _read(out / "evaluation.json")
    plan = _read(out / "plan.json")
    results = [MethodResult.from_dict(entry) for entry in evaluation["results"]]
    procedure = procedure_from_dict(evaluation["procedure"])
    prompts = [json.loads(line) for line in _lines(out / "prompts" / "evaluation.jsonl")]
    ids = [prompt["id"] for prompt in prompts]
    labels = ["reference", *(result.label for result in results)]
    count = results[0].num_samples
    stores = {label: RolloutStore.open(out / "rollouts" / f"evaluation-{label}") for label in labels}
    rewards = {label: store.rewards_PK(reward_key, ids, count) for label, store in stores.items()}
    calibrator = RewardCalibrator().fit(rewards["reference"])
    calibrated = {label: calibrator.calibrate(rewards_PG) for label, rewards_PG in rewards.items()}
    calibrated["reference"] = np.asarray(calibrator.calibrate_references())  # each against the others only
    data = ReportData(
        results=results,
        procedure=procedure.label,
        title=title,
        baseline=results[1].label if len(results) > 1 else None,
        plan={"best": {"kl": plan["kl"], "beta": plan["transforms"][0]["beta"]}},
        settings=settings,
        versions=versions,
        samples=_samples(prompts[:SAMPLE_PROMPTS], stores, rewards, calibrated, procedure),
        curves={result.label: _records(out / "policies" / result.label / "steps.jsonl") for result in results},
        rewards={
            label: {
                "rewards": rewards[label].ravel().tolist(),
                "calibrated_rewards": calibrated[label].ravel().tolist(),
            }
            for label in labels
        },
    )
    return write_report(out / "report.html", data)


def _samples(
    prompts: list[dict[str, Any]],
    stores: Mapping[str, RolloutStore],
    rewards: Mapping[str, np.ndarray],
    calibrated: Mapping[str, np.ndarray],
    procedure: InferenceProcedure,
) -> list[dict[str, Any]]:
    """The first n candidates of each prompt under each model, the one that the procedure returns marked."""
    n = procedure.n or 1
    ids = [prompt["id"] for prompt in prompts]
    texts = {label: store.column_PK("text", ids, n) for label, store in stores.items()}
    reasons = {label: store.column_PK("finish_reason", ids, n) for label, store in stores.items()}
    # Of exactly n candidates the procedure returns the one at a fixed rank.
    rank = int(np.argmax(procedure.selection_weights(n)))
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
                        "finish_reason": reasons[label][p, g],
                        "chosen": g == chosen,
                    }
                    for g in range(n)
                ]
            }
        samples.append({"prompt": prompt["prompt"], "methods": methods})
    return samples


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Lines that end with a newline and nothing else: text may hold other characters that Unicode counts as ends."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
