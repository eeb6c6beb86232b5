"""One model in place of two: train the reference on samples of a mixture or of a reshaped policy.

Whoever needs a single set of weights pays for it: the trained model is close to the policy only as far as it can be
told from samples. So the loss is measured, on prompts that neither model was trained on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from infalign._io.progress import Progress
from infalign.procedures import InferenceProcedure
from infalign.reshape import Reshaping, predict_reshaping
from infalign.reshape.reshaping import Predictions
from infalign.rollouts.prompts import PromptSet
from infalign.rollouts.store import RolloutStore
from infalign.run.folder import fingerprint
from infalign.run.stages.reshape import reshaping_data, stored_logprobs
from infalign.run.stages.run import Run
from infalign.training.losses import Likelihood
from infalign.training.offline import align_offline
from infalign.training.pool import RolloutPool


@dataclass(frozen=True)
class Distillation:
    """How a policy is distilled.

    Attributes:
        num_samples: Samples of it for each training prompt.
        epochs: How often each sample is seen.
        learning_rate: Peak learning rate; the recipe's own if None.
    """

    num_samples: int = 64
    epochs: float = 2.0
    learning_rate: float | None = None


def distil(run: Run, folder: Path, settings: Distillation, progress: Progress) -> Path:
    """Train the reference on samples of the policy in `folder`, by maximum likelihood.

    Args:
        run: The run that the policy belongs to; its settings of training are used.
        folder: The policy's folder; the model goes into it.
        settings: How.
        progress: Called as samples are drawn and steps made.

    Returns:
        The model's folder, `distilled-…/model` in the policy's.
    """
    recipe, training = run.recipe, run.recipe.training
    kept = len(run.kept_prompts())
    prompts = run.prompts("train")[kept:]
    policy = run.open(str(folder))
    # What was trained on samples of another policy, or otherwise, stays beside it.
    made_by = fingerprint([policy.fingerprint, asdict(settings), training.model_dump(), recipe.seed])
    out = folder / f"distilled-{made_by[:8]}"
    # A seed apart from those of the calibration, the evaluation, the landing and the fit.
    key = policy.key(max_new_tokens=recipe.rollouts.max_new_tokens, seed=recipe.seed + 888)
    store = RolloutStore.open(out / "rollouts", key)
    policy.draw(prompts, settings.num_samples, store=store, batch_size=recipe.rollouts.batch_size, progress=progress)
    pool = _pool(run, store, prompts, settings.num_samples, progress)
    per_step = training.prompts_per_step * training.num_generations
    align_offline(
        run.reference,
        out,
        pool,
        Likelihood(),
        max_new_tokens=recipe.rollouts.max_new_tokens,
        steps=max(1, round(settings.epochs * len(pool) / per_step)),
        rollouts_per_step=per_step,
        learning_rate=settings.learning_rate or training.learning_rate,
        lora=training.lora,
        seed=recipe.seed,
        trust_remote_code=recipe.policy.trust_remote_code,
        allow_pickle=recipe.policy.allow_pickle,
        progress=progress,
    )
    return out / "model"


def measure_distilled(
    run: Run, model: Path, procedure: InferenceProcedure, num_samples: int, progress: Progress
) -> Predictions:
    """KL and win rates of a distilled model on the prompts that training kept aside, with their errors.

    Args:
        run: The run.
        model: The model's folder.
        procedure: The procedure whose win rate is measured, besides that of one sample.
        num_samples: Rollouts for each prompt.
        progress: Called as rollouts are drawn.
    """
    name = model.parent.name  # tells it from others
    data = reshaping_data(run, name, run.kept_prompts(), num_samples, progress, model=model)
    return predict_reshaping(data, Reshaping.mixture(1.0), [procedure])


def _pool(run: Run, store: RolloutStore, prompts: PromptSet, count: int, progress: Progress) -> RolloutPool:
    """The samples with the reference's log-probabilities; ranks play no part."""
    token_ids_PG = store.lists_PK("token_ids", prompts.ids, count)
    reference = run.open(run.reference)
    logprobs_PG = stored_logprobs(
        reference, store, prompts, count, lambda done: progress(done, len(prompts), "log-probabilities")
    )
    unranked_R = np.zeros(logprobs_PG.size)
    return RolloutPool(
        tuple(prompts),
        np.repeat(np.arange(len(prompts)), count),
        [tokens for row in token_ids_PG for tokens in row],
        logprobs_PG.ravel(),
        unranked_R,
        unranked_R.astype(np.int64),
        unranked_R.astype(np.int64),
    )
