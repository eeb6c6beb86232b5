"""Online solver: KL-regularised policy gradient on TRL's `RLOOTrainer`.

Maximises E_π Φ(C) − β KL(π‖p) exactly (docs/paper_index.md, "KL-regularised RL"): the KL is the sequence-level
reverse KL, inside the reward, with a leave-one-out baseline. The reward function returns Φ/β, so the trainer's own
coefficient is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.rloo_config import RLOOConfig

from infalign._io.processes import is_main, join
from infalign._io.progress import Progress
from infalign.errors import InputError
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.tokens import prompt_token_ids
from infalign.training.baseline import Baseline, BaselineTrainer
from infalign.training.kl_control import KLController
from infalign.training.objective import FIXED, refuse_changed_objective
from infalign.training.reward import TransformedReward
from infalign.training.running import (
    AlignmentResult,
    Reference,
    common_settings,
    land_saved,
    lora_config,
    quiet,
    read_result,
    refusing_settings,
    train,
    write_result,
)
from infalign.training.steering import Steering, TrainingStep
from infalign.training.step_report import StepReport
from infalign.training.trainer_settings import RELIED_ON, divide_step

ANNEAL = 0.25  # the default of `anneal`


def align(
    policy: str | Path,
    out: Path,
    prompts: Sequence[Prompt],
    reward: TransformedReward,
    *,
    max_new_tokens: int,
    steps: int,
    prompts_per_step: int = 16,
    num_generations: int = 16,
    learning_rate: float = 1e-5,
    baseline: Baseline = "known",
    anneal: float = ANNEAL,
    tilt_cap: float | None = None,
    kl_budget: float | None = None,
    kl_prompts: Sequence[Prompt] | None = None,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
    save_steps: int = 25,
    keep_checkpoints: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    rloo: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> AlignmentResult[TrainingStep]:
    """Align `policy` to the transformed reward and save it as an ordinary Hugging Face folder (or adapter) in `out`.

    With a `mixture_weight` below 1 in the reward, training is inside a mixture with the reference (M19): the KL
    that is steered is the mixture's, and nothing is landed; choosing the weight anew does that (`reshape/`).

    An interrupted call, repeated with the same arguments, goes on from its last checkpoint (in `out/checkpoints`).
    Under `accelerate launch` every process calls this with the same arguments; the landing is the main process's.

    Args:
        policy: Folder or hub name of the reference policy, where training starts.
        out: Folder to write; the model itself goes to `out/model`.
        prompts: Training prompts, every one known to the reward's calibration.
        reward: Φ(C)/β; its `beta` is steered when there is a `kl_budget`.
        max_new_tokens: Cap on a response; the same as for the calibration's rollouts.
        steps: Optimiser steps.
        prompts_per_step: P, prompts drawn in one step.
        num_generations: G, rollouts per prompt in one step.
        learning_rate: Peak learning rate; constant, then linear to 0 over the last quarter.
        baseline: What is subtracted from a rollout's reward (`baseline.py`).
        anneal: Share of the steps over which the tilt is brought in (`steering.py`), in [0, 1); 0 has it all at once.
        tilt_cap: How far above log Z the tilt may rise, in nats (`tilt.py`); None for no cap.
        kl_budget: Sequence KL to end at, in nats: β follows the measured KL, and at the end the trained update is
            scaled (`landing.py`) until the KL on `kl_prompts` is the budget. `None` keeps β and scales nothing.
        kl_prompts: Prompts for that measurement, best not among `prompts`, which serve if there are none.
        lora: `peft.LoraConfig` fields; `None` trains all weights.
        seed: Seeds prompts, rollouts and adapter initialisation.
        save_steps: Steps between checkpoints.
        keep_checkpoints: Keep the model of every checkpoint, to be evaluated; else they go when the training ends.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
        rloo: Any further `RLOOConfig` fields.
        progress: Called with (done, total, text).

    Raises:
        InputError: If `rloo` sets a field that would change the objective.
        TrainingError: If the loss or the KL stops being finite.
    """
    join()
    if (finished := read_result(out, TrainingStep, keep_checkpoints)) is not None:
        return finished
    refuse_changed_objective(rloo or {})
    if not 0.0 <= anneal < 1.0:
        raise InputError(
            f"anneal is {anneal}", where="align", hint="Give a share of the steps: at least 0, less than 1"
        )
    set_seed(seed)
    reference = Reference(policy, trust_remote_code, allow_pickle)
    model, tokenizer = reference.load_to_train()
    reward.take_columns_from(prompts)
    reward.tilt_cap = tilt_cap
    controller = None if kl_budget is None else KLController.of(kl_budget, reward.beta, steps)
    callback = Steering(reward, controller, out / "steps.jsonl", steps, progress, anneal_steps=round(anneal * steps))
    trainer = _make_trainer(
        model,
        tokenizer,
        reward,
        _training_rows(prompts, steps * prompts_per_step, seed),
        dict(zip([prompt.id for prompt in prompts], prompt_token_ids(tokenizer, prompts), strict=True)),
        callback,
        lora,
        baseline,
        _rloo_config(
            out / "checkpoints",
            steps=steps,
            prompts_per_step=prompts_per_step,
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            learning_rate=learning_rate,
            seed=seed,
            save_steps=save_steps,
            trust_remote_code=trust_remote_code,
            overrides={**(rloo or {}), **({"save_total_limit": None} if keep_checkpoints else {})},
        ),
    )
    train(trainer, tokenizer, out, callback.restore)
    if not is_main():
        return AlignmentResult(out / "model", reward.beta, callback.steps)
    landing = None
    if kl_budget is not None and reward.mixture_weight == 1.0:
        where = kl_prompts or prompts
        landing = land_saved(out / "model", reference, where, kl_budget, max_new_tokens=max_new_tokens, seed=seed)
        if callback.controller is not None:
            landing = replace(landing, note=callback.controller.verdict or None)
    result = AlignmentResult(out / "model", reward.beta, callback.steps, landing)
    write_result(out, result, keep_checkpoints)
    return result


def check_training(
    *,
    steps: int,
    prompts_per_step: int,
    num_generations: int,
    learning_rate: float,
    max_new_tokens: int,
    baseline: Baseline,
    anneal: float,
    tilt_cap: float | None,
    lora: Mapping[str, Any] | None,
    save_steps: int,
    rloo: Mapping[str, Any],
) -> None:
    """Refuse, before anything is computed, settings that training would stumble over; arguments as for `align`.

    Raises:
        InputError: If a field is unknown, unusable, or would change the objective.
    """
    refuse_changed_objective(rloo)
    assert baseline in get_args(Baseline), "held by the recipe"
    assert 0 <= anneal < 1, "held by the recipe"
    assert tilt_cap is None or tilt_cap > 0, "held by the recipe"
    if baseline == "leave-one-out" and num_generations == 1:
        raise InputError(
            "the leave-one-out baseline needs other rollouts of the same prompt",
            where="training.num_generations",
            hint="Give at least 2, or baseline: known",
        )
    if lora is not None:
        lora_config(lora)
    _rloo_config(
        Path("checkpoints"),
        steps=steps,
        prompts_per_step=prompts_per_step,
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        learning_rate=learning_rate,
        seed=0,
        save_steps=save_steps,
        trust_remote_code=False,
        overrides=rloo,
    )


def _rloo_config(
    folder: Path,
    *,
    steps: int,
    prompts_per_step: int,
    num_generations: int,
    max_new_tokens: int,
    learning_rate: float,
    seed: int,
    save_steps: int,
    trust_remote_code: bool,
    overrides: Mapping[str, Any],
) -> RLOOConfig:
    rollouts_per_step = prompts_per_step * num_generations
    batch, accumulation = divide_step(rollouts_per_step, "rollouts", overrides, "training.rloo")
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation,
        # TRL's own baseline needs two; ours does not, so a single one is set behind its back.
        "num_generations": num_generations if num_generations > 1 else rollouts_per_step,
        "max_completion_length": max_new_tokens,
        **common_settings(steps=steps, learning_rate=learning_rate, seed=seed, save_steps=save_steps),
        "trust_remote_code": trust_remote_code,
        **FIXED,
        **RELIED_ON,
        **overrides,
    }
    try:
        config = RLOOConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(str(error), where="training.rloo", hint="See TRL's RLOOConfig for the fields") from error
    config.num_generations = config.num_generations_eval = num_generations
    return config


def _make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward: TransformedReward,
    dataset: Dataset,
    prompt_ids: Mapping[str, list[int]],
    callback: TrainerCallback,
    lora: Mapping[str, Any] | None,
    baseline: Baseline,
    config: RLOOConfig,
) -> BaselineTrainer:
    with refusing_settings(
        "See TRL's RLOOConfig and PEFT's LoraConfig for the fields of training.rloo and training.lora"
    ):
        trainer = BaselineTrainer(
            baseline=baseline,
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[callback],
            peft_config=None if lora is None else lora_config(lora),
        )
    trainer.on_rollouts = StepReport(reward)
    trainer.prompt_ids = prompt_ids
    quiet(trainer)
    return trainer


def _training_rows(prompts: Sequence[Prompt], count: int, seed: int) -> Dataset:
    """The whole training as one epoch: `count` prompts, every prompt once before any comes again, in random order.

    TRL's own shuffling starts afresh when a training resumes in a later epoch; an order that is part of the data does
    not.
    """
    # The reward knows prompts and columns itself, and the trainer their tokens: a data set would coerce their types and
    # give every message the fields that another one has, and TRL has a use of its own for some names.
    rows = [{"prompt": prompt.text, "prompt_id": prompt.id} for prompt in prompts]
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))]
    return Dataset.from_list(rows).select(np.concatenate(rounds)[:count])
