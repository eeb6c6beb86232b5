"""Fresh rollouts of every model on held-out prompts, and what they say."""

from __future__ import annotations

from functools import partial

from infalign._io.files import write_json
from infalign._io.progress import Progress
from infalign._io.wording import distinct
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.evaluation.compare import compare_pairs
from infalign.evaluation.fresh import exact_kls, measure_store, with_record
from infalign.evaluation.predictability import with_predictability
from infalign.evaluation.record import FILE, Evaluation
from infalign.rewards.score import score_store
from infalign.rollouts.key import model_fingerprint
from infalign.run.folder import versions
from infalign.run.recipe import GoldReward
from infalign.run.rewards import open_reward
from infalign.run.stages.card import write_card
from infalign.run.stages.rollout import draw
from infalign.run.stages.run import Run
from infalign.transforms import RewardTransform


def calibrate_evaluation(run: Run, progress: Progress) -> None:
    """Several rewards: reference rollouts of the held-out prompts, by which their quantiles are combined there.

    They are drawn apart from those that are judged, so that a response's score depends on nothing but itself.
    """
    prompts, num_ref = run.prompts("evaluation"), run.recipe.rollouts.num_ref
    draw(run, "evaluation-calibration", run.reference, prompts, num_ref, run.recipe.seed + 999, progress)
    store = run.store("evaluation-calibration")
    run.rewards.score(store, prompts, progress)
    rewards_PKM = run.rewards.read_PKM(store, prompts.ids, num_ref)
    run.rewards.fit(rewards_PKM, prompts.ids).save(run.out / "calibration-evaluation")


def draw_for_evaluation(run: Run, name: str, model: str, number: int, progress: Progress) -> None:
    """Fresh rollouts on held-out prompts, scored, and (for a policy) its log-ratios to the reference."""
    folder, prompts, samples = f"evaluation-{name}", run.prompts("evaluation"), run.recipe.evaluation.num_samples
    # Another seed for every model: its rollouts are independent of the others' and of the calibration's.
    draw(run, folder, model, prompts, samples, run.recipe.seed + 1000 * number, progress)
    run.rewards.score(run.store(folder), prompts, progress, retry_unscored=True)
    if run.rewards.combined:
        calibrator = CombinedCalibrator.load(run.out / "calibration-evaluation")
        run.rewards.combine(run.store(folder), calibrator, prompts.ids, samples)
    if name != "reference":
        reference = model_fingerprint(run.reference)
        ref_store = run.store("evaluation-reference")
        exact_kls(run.store(folder), prompts, samples, reference, partial(run.pair, model), progress, ref_store)


def score_gold(run: Run, gold: GoldReward, progress: Progress) -> None:
    """Scores by a reward that training never saw, for every model's rollouts."""
    source, prompts = run.rewards.open(gold), run.prompts("evaluation")
    if source.key in [one.key for one in run.rewards.sources()]:
        raise InputError(
            "this is a reward that is trained on, so it tells nothing new",
            where=f"evaluation.gold {gold.label}",
            hint="Remove it, or give another",
        )
    for name in ("reference", *(one.name for one in run.evaluated())):
        score_store(run.store(f"evaluation-{name}"), source, prompts, progress=progress, retry_unscored=True)


def measure(run: Run, progress: Progress) -> None:
    """Win rates, KL and their errors for every policy, and paired comparisons."""
    recipe, prompts = run.recipe, run.prompts("evaluation")
    samples, source = recipe.evaluation.num_samples, run.rewards.source()
    gold = {one.label: open_reward(one).key for one in recipe.evaluation.gold}
    reference = model_fingerprint(run.reference)
    policies = run.evaluated()
    names = [one.name for one in policies]
    results = [
        measure_store(
            one.name,
            store := run.store(f"evaluation-{one.name}"),
            run.store("evaluation-reference"),
            exact_kls(
                *(store, prompts, samples, reference, partial(run.pair, str(one.folder))),
                ref_store=run.store("evaluation-reference"),
            ),
            prompts,
            recipe.evaluation_procedures,
            reward_key=source.key,
            reward=distinct([*gold, str(source)])[-1],
            gold=gold,
            confidence=recipe.evaluation.confidence,
        )
        for one in policies
    ]
    results = [
        with_record(result, one.folder, run.store(f"evaluation-{one.name}"))
        for one, result in zip(policies, results, strict=True)
    ]
    results, predictability = with_predictability(results, recipe.evaluation_procedures, _calibrated(run))
    evaluation = Evaluation(
        name=recipe.name,
        procedure=recipe.target_procedure.to_dict(),
        kl_budget=recipe.kl_budget,
        reference=reference,
        reward=source.key,
        gold=gold,
        max_new_tokens=recipe.rollouts.max_new_tokens,
        stores={name: f"rollouts/evaluation-{name}" for name in ("reference", *names)},
        results=results,
        comparisons=[one.to_dict() for one in compare_pairs([(results[0], other) for other in results[1:]])],
        baseline=names[1] if len(names) > 1 else None,
        settings=recipe.model_dump(),
        versions=versions(),
        predictability=predictability,
    )
    write_json(run.out / FILE, evaluation.to_dict())
    for planned in run.planned():
        of_planned = [
            (one, result) for one, result in zip(policies, results, strict=True) if one.method.name == planned.name
        ]
        plain = next((result for one, result in of_planned if not one.reshaped), None)
        reshaped = next((result for one, result in of_planned if one.reshaped), None)
        write_card(run, planned, plain, reshaped)


def _calibrated(run: Run) -> dict[str, RewardTransform]:
    """What each policy on calibrated rewards was aligned with; comparators on raw rewards tell nothing of ρ."""
    return {planned.name: planned.method.aim for planned in run.planned() if planned.method.aim is not None}
