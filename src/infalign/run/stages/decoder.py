"""A recipe whose procedure is a decoder: measure its distortion, and judge through the decoder itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign._io.files import write_json
from infalign._io.progress import Progress
from infalign.calibration.calibrator import RewardCalibrator
from infalign.estimators import mean_estimate, paired_difference, win_rate
from infalign.evaluation.results import Measured
from infalign.procedures import FittedProcedure, Standard
from infalign.procedures.measured import MeasuredProcedure
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_policy
from infalign.rollouts.store import RolloutStore
from infalign.run.stages.run import Run
from infalign.select.black_box import decoder_key, run_decoder

PROCEDURE, THROUGH = "procedure.json", "through.json"


def measure_procedure(run: Run, decoder: MeasuredProcedure, progress: Progress) -> None:
    """The distortion of a decoder: ranks of what it returns on the reference, among the references that calibrate.

    It runs with a seed of its own, so that its outputs are none of those references.
    """
    recipe, prompts = run.recipe, run.prompts("train")
    rewards_PD = _scored(run, "procedure", run.reference, "train", decoder, recipe.seed + 555, progress)
    calibrator = run.calibrator()
    assert isinstance(calibrator, RewardCalibrator), "held by the recipe"
    ranks_PD, num_ref_P = calibrator.calibrate(rewards_PD), calibrator.num_ref_P
    fitted = FittedProcedure.from_ranks(
        ranks_PD,
        num_ref=int(num_ref_P[0]) if num_ref_P.min() == num_ref_P.max() else None,
        max_degree=recipe.evaluation.num_samples,
        seed=recipe.seed,
    )
    mean = mean_estimate(ranks_PD.mean(axis=1))
    content = {
        **fitted.to_dict(),
        "decoder": decoder.label,
        "prompts": len(prompts),
        "rollouts_per_prompt": decoder.rollouts_per_prompt,
        "mean_rank": mean.estimate,
        "mean_rank_error": mean.standard_error,
        "rank_histogram": np.histogram(ranks_PD, 20, (0.0, 1.0))[0].tolist(),
    }
    write_json(run.out / PROCEDURE, content)
    run.say(f"  {decoder.label}: mean rank {mean.estimate:.3f} ± {mean.standard_error:.3f}; {fitted.label}")


def fitted_procedure(run: Run) -> FittedProcedure:
    """The decoder's distortion, once it has been measured."""
    content = run.read_json(PROCEDURE)
    return FittedProcedure(
        tuple(content["weights"]),
        content["num_samples"],
        misfit=content.get("misfit", 0.0),
        rank_counts=tuple(content.get("rank_counts", ())),
    )


def run_through(run: Run, name: str, model: str, number: int, decoder: MeasuredProcedure, progress: Progress) -> None:
    """What the decoder returns on held-out prompts with one model, scored."""
    _scored(run, f"through-{name}", model, "evaluation", decoder, run.recipe.seed + 1000 * number + 1, progress)


def measure_through(run: Run, decoder: MeasuredProcedure, progress: Progress) -> None:
    """Win rates of each policy over the reference, both used through the decoder itself."""
    ids, key, count = run.prompts("evaluation").ids, run.rewards.source().key, decoder.rollouts_per_prompt
    names = [one.name for one in run.evaluated()]
    reference, *policies = (run.store(f"through-{name}").rewards_PK(key, ids, count) for name in ("reference", *names))
    level = run.recipe.evaluation.confidence
    first, *others = found = [win_rate(rewards_PD, reference, Standard(), confidence=level) for rewards_PD in policies]
    content = {
        "decoder": decoder.label,
        "win_rates": [{"name": name, **asdict(Measured.of(one))} for name, one in zip(names, found, strict=True)],
        "differences": [
            {"name": name, "p_value": one.p_value, **asdict(Measured.of(one))}
            for name, one in zip(names[1:], (paired_difference(first, other) for other in others), strict=True)
        ],
    }
    write_json(run.out / THROUGH, content)


def _scored(
    run: Run, folder: str, model: str, side: str, decoder: MeasuredProcedure, seed: int, progress: Progress
) -> NDArray[np.float64]:
    """Rewards of what a decoder returns, shape (P, D)."""
    settings: dict[str, Any] = run.recipe.policy.model_dump(include={"trust_remote_code", "allow_pickle"})
    policy, tokenizer = load_policy(model, **settings)
    length, prompts = run.recipe.rollouts.max_new_tokens, run.prompts(side)
    key = RolloutKey.of(model, tokenizer, max_new_tokens=length, seed=seed, sampler=decoder_key(decoder))
    store = RolloutStore.open(run.out / "rollouts" / folder, key)
    run_decoder(decoder, policy, tokenizer, prompts, store=store, progress=progress)
    run.rewards.score(store, prompts, progress, retry_unscored=True)
    return store.rewards_PK(run.rewards.source().key, prompts.ids, decoder.rollouts_per_prompt)
