"""Reshape an aligned model by a function of its own log-ratio (M16), fitted on prompts that no update has seen.

The fit sees the reference rollouts that calibrated the reward and fresh rollouts of the aligned model, on the training
prompts that training kept aside. It says what it predicts before anything is drawn from it, and is kept only where it
predicts more than the aligned model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign._io.files import write_json
from infalign._io.progress import Progress
from infalign.calibration.combined import CombinedCalibrator
from infalign.procedures import InferenceProcedure
from infalign.reshape import Goal, Reshaping, ReshapingData, fit_reshaping_to, predict_reshaping
from infalign.reshape.histogram import log_ratio_histogram
from infalign.rollouts.logprobs import flat_responses
from infalign.rollouts.policy import Policy
from infalign.rollouts.policy_file import MIXTURE, RESHAPED, PolicyFile, write_policy_file
from infalign.rollouts.prompts import Prompt, PromptSet
from infalign.rollouts.store import RolloutStore
from infalign.run.rewards import scored_by_all
from infalign.run.stages.card import write_card
from infalign.run.stages.planned import PlannedMethod
from infalign.run.stages.rollout import draw
from infalign.run.stages.run import Run

Float = NDArray[np.float64]

FILE = "reshape.json"
_PROMPTS_AT_ONCE = 8
KINDS = ("mixture", "reshaped")


@dataclass(frozen=True)
class Choice:
    """What was fitted, and what is to be used.

    Attributes:
        reshaping: The best fit.
        plain: What the aligned model alone is predicted to do: win rate of the procedure and KL, with their errors.
        chosen: Whether the reshaping is to be used, rather than the aligned model alone.
        reason: Why, in one sentence.
    """

    reshaping: Reshaping
    plain: dict[str, Any]
    chosen: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "reshaping": self.reshaping.to_dict(),
            "plain": self.plain,
            "chosen": self.chosen,
            "reason": self.reason,
        }


def reshape_policy(run: Run, planned: PlannedMethod, progress: Progress) -> None:
    """Fit, choose, and write the reshaped policy of one aligned model beside it."""
    recipe = run.recipe
    prompts = run.kept_prompts()
    data = reshaping_data(run, planned.name, prompts, recipe.reshape.num_samples, progress)
    goal = Goal(recipe.target_procedure, kl_budget=float(run.read_json("plan.json")["kl"]))
    kinds = KINDS if recipe.reshape.kind == "auto" else (recipe.reshape.kind,)
    choice = choose(data, goal, kinds, recipe.evaluation_procedures, alone=planned.mixture_weight == 1.0)
    folder = run.reshaped_folder(planned.name)
    if choice.chosen:
        write_policy(folder, run.reference, run.policy_folder(planned.name), choice.reshaping)
    about = {"method": planned.name, "trained_weight": planned.trained_weight, "prompts": len(prompts)}
    write_json(folder / FILE, {**choice.to_dict(), **about, "histogram": log_ratio_histogram(data)})
    write_card(run, planned, None)
    run.say(f"  {choice.reason}")


def choose(
    data: ReshapingData,
    goal: Goal,
    kinds: Sequence[str],
    report: Sequence[InferenceProcedure],
    *,
    alone: bool,
) -> Choice:
    """The best of the fits, and whether it beats the aligned model alone.

    Of several kinds a mixture is preferred, which costs nothing, unless another is better by more than its standard
    error. The aligned model alone counts as well where it is `alone` what was trained for this budget.

    Args:
        data: Rollouts of prompts that no update has seen.
        goal: Procedure and KL budget.
        kinds: Kinds of reshaping to fit.
        report: Further procedures to predict win rates for.
        alone: Whether the aligned model by itself is an alternative.
    """
    fits = [fit_reshaping_to(data, goal, kind=kind, report=report) for kind in kinds]  # pyright: ignore[reportArgumentType]
    best, label = fits[0], goal.procedure.label
    # One price of KL for all, that of the widest family: where they meet one budget, the win rates decide.
    beta = fits[-1].beta or 0.0
    for other in fits[1:]:
        assert other.predictions is not None, "a fit predicts"
        error = other.predictions.win_rates[label].standard_error
        if _objective(other, label, beta) > _objective(best, label, beta) + error:
            best = other
    own = predict_reshaping(data, Reshaping.mixture(1.0), [goal.procedure], opponent=goal.opponent)
    plain = {"kl": own.kl.to_dict(), "win_rate": own.win_rates[label].to_dict()}
    assert best.predictions is not None, "a fit predicts"
    predicted, kl = best.predictions.win_rates[label], best.predictions.kl
    told = (
        f"{describe(best)}: predicted {label} {100 * predicted.estimate:.1f} ± {100 * predicted.standard_error:.1f} %"
    )
    told += f" at {kl.estimate:.3f} nats"
    if best.kind == "reshaped":
        told += f", {best.predictions.acceptance.estimate:.0%} of the proposals accepted"
    alone_told = f"the model alone {100 * own.win_rates[label].estimate:.1f} % at {own.kl.estimate:.3f} nats"
    if not alone:
        return Choice(best, plain, True, told)
    gain = _objective(best, label, beta) - (own.win_rates[label].estimate - beta * own.kl.estimate)
    if gain > 0:
        return Choice(best, plain, True, f"{told}; {alone_told}")
    return Choice(best, plain, False, f"no reshaping is predicted to gain over {alone_told}: it stays as it is")


def _objective(fit: Reshaping, label: str, beta: float) -> float:
    """J = W − β KL as predicted."""
    assert fit.predictions is not None, "a fit predicts"
    return fit.predictions.win_rates[label].estimate - beta * fit.predictions.kl.estimate


def describe(reshaping: Reshaping) -> str:
    """What a reshaping does, in a few words."""
    if reshaping.kind == "mixture":
        return f"a mixture with {reshaping.mixture_weight:.1%} of the aligned model"
    return "reshaped by the log-ratio"


def write_policy(folder: Path, base: str, aligned: Path, reshaping: Reshaping) -> None:
    """Write a reshaped policy as a folder that `open_policy` opens."""
    content = reshaping.to_dict()
    if reshaping.kind == "mixture":
        file = PolicyFile(MIXTURE, base, (str(aligned),), {"weights": list(reshaping.weights)})
        write_policy_file(folder, file, reshaping=content)
    else:
        write_policy_file(folder, PolicyFile(RESHAPED, base, (str(aligned),), {"reshaping": content}))


def reshaping_data(
    run: Run, name: str, prompts: PromptSet, num_samples: int, progress: Progress, *, model: Path | None = None
) -> ReshapingData:
    """Rollouts of the reference and of one aligned model, with log-ratios and rewards; what is missing is drawn.

    Args:
        run: A calibrated run with this aligned model.
        name: The method's name, or that of another model's rollouts.
        prompts: Calibrated prompts, best ones that no update has seen.
        num_samples: Rollouts of the aligned model for each prompt.
        progress: Called as rollouts are drawn and log-probabilities computed.
        model: Folder of the model, if it is not the method's.
    """
    folder, source = f"reshape-{name}", str(model or run.policy_folder(name))
    # A seed apart from those of the calibration, the evaluation and the landing.
    draw(run, folder, source, prompts, num_samples, run.recipe.seed + 777, progress)
    own_store, ref_store = run.store(folder), run.store("reference")
    run.rewards.score(own_store, prompts, progress, retry_unscored=True)
    aligned, reference = run.pair(source)
    num_ref = run.recipe.rollouts.num_ref
    ref = _side(run, ref_store, prompts, num_ref)
    own = _side(run, own_store, prompts, num_samples)
    progress(0, 2 * len(prompts), "log-probabilities")

    def told(done: int) -> None:
        progress(done, 2 * len(prompts), "log-probabilities")

    def told_later(done: int) -> None:
        told(len(prompts) + done)

    ref_ratios = stored_logprobs(aligned, ref_store, prompts, num_ref, told)
    ref_ratios -= stored_logprobs(reference, ref_store, prompts, num_ref, told, drew=True)
    own_ratios = stored_logprobs(aligned, own_store, prompts, num_samples, told_later, drew=True)
    own_ratios -= stored_logprobs(reference, own_store, prompts, num_samples, told_later)
    return ReshapingData.from_rewards(
        _picked(ref_ratios, ref.scored_PK),
        _picked(ref.rewards_PK, ref.scored_PK),
        aligned_log_ratios_PG=_picked(own_ratios, own.scored_PK),
        aligned_rewards_PG=_picked(own.rewards_PK, own.scored_PK),
        lengths_PK=_picked(ref.lengths_PK, ref.scored_PK),
        aligned_lengths_PG=_picked(own.lengths_PK, own.scored_PK),
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """One model's rollouts: rewards (several as one), what could be scored, and lengths; each (P, K)."""

    rewards_PK: Float  # noqa: N815
    scored_PK: NDArray[np.bool_]  # noqa: N815
    lengths_PK: Float  # noqa: N815


def _side(run: Run, store: RolloutStore, prompts: PromptSet, count: int) -> _Side:
    rewards_PKM = run.rewards.read_PKM(store, prompts.ids, count)
    scored_PK = scored_by_all(rewards_PKM)
    lengths_PK = np.asarray(store.column_PK("num_tokens", prompts.ids, count), dtype=np.float64)
    if not run.rewards.combined:
        return _Side(rewards_PKM[..., 0], scored_PK, lengths_PK)
    calibrator = run.calibrator()
    assert isinstance(calibrator, CombinedCalibrator), "there are several rewards"
    row_of = {prompt_id: row for row, prompt_id in enumerate(run.prompts("train").ids)}
    rows_PK = np.repeat([[row_of[prompt_id]] for prompt_id in prompts.ids], count, axis=1)
    rewards_PK = np.full(scored_PK.shape, np.nan)
    rewards_PK[scored_PK] = calibrator.score(rewards_PKM[scored_PK], prompt_index=rows_PK[scored_PK])
    return _Side(rewards_PK, scored_PK, lengths_PK)


def stored_logprobs(
    policy: Policy,
    store: RolloutStore,
    prompts: Sequence[Prompt],
    count: int,
    told: Callable[[int], None],
    *,
    drew: bool = False,
) -> Float:
    """Log-probability of each rollout under one policy, (P, K), in nats; what it told as it `drew` them is kept."""
    ids = [prompt.id for prompt in prompts]
    token_ids_PK = store.lists_PK("token_ids", ids, count)
    stored = store.column_PK("logprob", ids, count) if drew else np.full((len(ids), count), np.nan)
    out_PK = np.asarray(stored, dtype=np.float64).copy()
    for start in range(0, len(ids), _PROMPTS_AT_ONCE):
        part = slice(start, start + _PROMPTS_AT_ONCE)
        if not np.isfinite(out_PK[part]).all():
            prompt_ids, responses, shape = flat_responses(policy.tokenizer, prompts[part], token_ids_PK[part])
            out_PK[part] = policy.logprobs(prompt_ids, responses).reshape(shape)
            told(min(start + _PROMPTS_AT_ONCE, len(ids)))
    return out_PK


def _picked(values_PK: Float, scored_PK: NDArray[np.bool_]) -> list[Float]:
    """The values of the scored rollouts, prompt by prompt."""
    return [np.asarray(row[kept], dtype=np.float64) for row, kept in zip(values_PK, scored_PK, strict=True)]
