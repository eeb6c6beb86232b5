"""The calibration, and the plan: β for every method."""

from __future__ import annotations

from typing import Any

from infalign._io.files import write_json
from infalign._io.progress import Progress
from infalign.calibration.report import calibration_report
from infalign.errors import InputError
from infalign.run.checks import plan_transforms
from infalign.run.rewards import scored_by_all
from infalign.run.stages.run import Run
from infalign.theory.finite_k import finite_k_prediction
from infalign.theory.plan import optimum_at_kl
from infalign.training.methods import Comparator


def fit_calibration(run: Run, progress: Progress) -> None:
    """The reward's quantiles under the reference, prompt by prompt (M5)."""
    prompts, num_ref = run.prompts("train"), run.recipe.rollouts.num_ref
    rewards_PKM = run.rewards.read_PKM(run.store("reference"), prompts.ids, num_ref)
    scored_PK = scored_by_all(rewards_PKM)
    calibrator = run.rewards.fit(rewards_PKM, prompts.ids)
    calibrator.save(run.out / "calibration" / "calibrator")
    # The report and the spread are of the first reward; prompts with an unscored rollout cannot take part.
    whole_PK = rewards_PKM[scored_PK.all(axis=1), :, 0]
    write_json(
        run.out / "calibration" / "summary.json",
        {
            "prompts": len(prompts),
            "num_ref": num_ref,
            "unscored": int((~scored_PK).sum()),
            "fewest_references": int(scored_PK.sum(axis=1).min()),
            "tie_mass": calibrator.tie_mass,
            "within_prompt_std": float(whole_PK.std(axis=1).mean()) if len(whole_PK) else None,
            "between_prompt_std": float(whole_PK.mean(axis=1).std()) if len(whole_PK) else None,
            # Two halves of fewer than two references each tell nothing.
            "report": calibration_report(whole_PK).to_dict() if num_ref >= 4 and len(whole_PK) else None,
        },
    )


def make_plan(run: Run, progress: Progress) -> None:
    """β for every transform, all at the same planned KL."""
    recipe = run.recipe
    kl, planned = plan_transforms(recipe)
    content = {
        "procedure": recipe.target_procedure.to_dict(),
        "kl": kl,
        "kl_budget": recipe.kl_budget,
        "num_ref": recipe.rollouts.num_ref,
        "win_rate_lost": _win_rate_lost(run, kl),
        "transforms": planned,
        "baselines": [_plan_comparator(run, one, kl) for one in recipe.comparators],
    }
    write_json(run.out / "plan.json", content)


def _plan_comparator(run: Run, method: Comparator, kl: float) -> dict[str, Any]:
    return {"name": method.name, **method.to_dict(), "beta": method.beta_for_kl(kl, run.calibrator())}


def _win_rate_lost(run: Run, kl: float) -> float | None:
    """What this many references cost the optimal transform in theory; None where they cannot spend this KL."""
    try:
        optimum = optimum_at_kl(run.recipe.target_procedure, kl)
        return finite_k_prediction(optimum, run.recipe.rollouts.num_ref).win_rate_lost
    except InputError as error:
        run.say(f"  {error}")
        return None
