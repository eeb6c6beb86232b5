"""The model card of an aligned policy, from what its run folder holds."""

from __future__ import annotations

from infalign.evaluation.reshaped import ReshapedRecord, read_fit
from infalign.evaluation.results import MethodResult
from infalign.run.folder import versions
from infalign.run.model_card import CardFacts, ReshapedFacts, write_model_card, write_reshaped_card
from infalign.run.stages.planned import PlannedMethod
from infalign.run.stages.run import Run
from infalign.training.landing import Landing


def write_card(
    run: Run, planned: PlannedMethod, result: MethodResult | None, reshaped_result: MethodResult | None = None
) -> None:
    """The model card of an aligned policy, and of its reshaped form, with what was measured if that is known."""
    recipe, calibration = run.recipe, run.read_json("calibration/summary.json")
    trained = run.read_json(f"policies/{planned.name}/result.json")
    folder = run.policy_folder(planned.name)
    landing = trained["landing"]
    facts = CardFacts(
        name=recipe.name,
        base=run.reference,
        procedure=recipe.target_procedure.label,
        transform=planned.name,
        beta=trained["beta"],
        planned_kl=run.read_json("plan.json")["kl"],
        kl_budget=recipe.kl_budget,
        landing=None if landing is None else Landing(**landing),
        steps=recipe.training.steps,
        rollouts_per_step=recipe.training.prompts_per_step * recipe.training.num_generations,
        max_new_tokens=recipe.rollouts.max_new_tokens,
        adapter=(folder / "adapter_config.json").exists(),
        rewards=tuple(one.function or one.name or one.model or "reward of the testbed" for one in recipe.reward),
        reward_key=run.rewards.source().key,
        num_ref=calibration["num_ref"],
        ties=recipe.calibration.ties,
        tie_mass=calibration["tie_mass"],
        prompts=recipe.prompts.source or "prompts of the testbed",
        num_train=len(run.prompts("train")),
        num_evaluation=len(run.prompts("evaluation")),
        seed=recipe.seed,
        versions={name: version for name, version in versions().items() if name != "platform"},
        result=result,
        trained_weight=planned.trained_weight,
        reshaped=_reshaped(run, planned, reshaped_result),
    )
    write_model_card(folder, facts)
    if facts.reshaped is not None:
        write_reshaped_card(run.reshaped_folder(planned.name), facts)


def _reshaped(run: Run, planned: PlannedMethod, result: MethodResult | None) -> ReshapedFacts | None:
    """What is known of the method's reshaped policy; None where there is none to be used."""
    content = read_fit(run.reshaped_folder(planned.name))
    if not run.reshapes(planned) or content is None or not content["chosen"]:
        return None
    record = None if result is None else result.reshaped
    record = record or ReshapedRecord.of_fit(content)
    return ReshapedFacts(planned.reshaped_name, record, content["prompts"], result)
