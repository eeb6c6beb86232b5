"""Offline solvers: losses on stored rollouts, on the Hugging Face `Trainer`.

Nothing is sampled and no reference model is in memory: its log-probabilities come from the store. A mixed training
adds fresh rollouts of the current policy from time to time (`fresh.py`), for losses to which their distribution does
not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed
from trl.trainer.utils import disable_dropout_in_model

from infalign._io.processes import is_main, join
from infalign._io.progress import Progress
from infalign.errors import InputError
from infalign.rollouts.prompts import Prompt
from infalign.training.checkpoints import FRESH
from infalign.training.fresh import FreshRollouts
from infalign.training.losses import Examples, OfflineLoss
from infalign.training.offline_trainer import OfflineStep, OfflineTrainer, Recorder
from infalign.training.pool import RolloutPool
from infalign.training.running import (
    AlignmentResult,
    Reference,
    common_settings,
    land_saved,
    lora_config,
    read_result,
    train,
    write_result,
)
from infalign.training.stream import ExampleStream
from infalign.training.trainer_settings import ELSEWHERE, RELIED_ON, divide_step, refuse_settings

# What the loss on examples in a given order relies on besides.
_RELIED_ON = {
    **RELIED_ON,
    "logging_nan_inf_filter": False,  # would hide the loss that says that something is wrong
    "dataloader_num_workers": 0,  # a worker would not see fresh rollouts
    "remove_unused_columns": False,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
}


def align_offline(
    policy: str | Path,
    out: Path,
    pool: RolloutPool,
    loss: OfflineLoss,
    *,
    max_new_tokens: int,
    steps: int,
    rollouts_per_step: int = 256,
    learning_rate: float = 1e-5,
    kl_budget: float | None = None,
    kl_prompts: Sequence[Prompt] | None = None,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
    save_steps: int = 25,
    keep_checkpoints: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    trainer: Mapping[str, Any] | None = None,
    fresh: FreshRollouts | None = None,
    examples: Examples | None = None,
    padding_side: Literal["left", "right"] = "left",
    progress: Progress | None = None,
) -> AlignmentResult[OfflineStep]:
    """Align `policy` with a loss on stored rollouts and save it as an ordinary Hugging Face folder (or adapter).

    An interrupted call, repeated with the same arguments, goes on from its last checkpoint (in `out/checkpoints`).
    β stays what it is: without rollouts of the policy there is no KL to steer by. A KL budget is met at the end, by
    scaling the update (`landing.py`).

    Args:
        policy: Folder or hub name of the reference policy, where training starts.
        out: Folder to write; the model itself goes to `out/model`.
        pool: The stored rollouts.
        loss: A solver (`losses.py`) or a comparator (`methods/`).
        max_new_tokens: Cap on a response, for the landing; the same as for the stored rollouts.
        steps: Optimiser steps.
        rollouts_per_step: Rollouts in one step, over all processes and accumulation steps.
        learning_rate: Peak learning rate; constant, then linear to 0 over the last quarter.
        kl_budget: Sequence KL to end at, in nats; `None` scales nothing.
        kl_prompts: Prompts to measure it on, best not among those of the pool, which serve if there are none.
        lora: `peft.LoraConfig` fields; `None` trains all weights.
        seed: Seeds the order of examples, adapter initialisation and fresh rollouts.
        save_steps: Steps between checkpoints.
        keep_checkpoints: Keep the model of every checkpoint, to be evaluated; else they go when the training ends.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
        trainer: Any further `TrainingArguments` fields.
        fresh: Mixed training: half of each step's examples come from rollouts drawn on the way.
        examples: Examples of the pool other than those that `loss` makes, with weights of their own.
        padding_side: Where shorter sequences are padded; changes nothing but rounding.
        progress: Called with (done, total, text).

    Raises:
        InputError: If `trainer` has a field that is unknown or set elsewhere, the numbers do not divide, or fresh
            rollouts are asked for with a loss that needs draws of the reference.
        TrainingError: If the loss stops being finite, or the device runs out of memory.
    """
    join()
    if (finished := read_result(out, OfflineStep, keep_checkpoints)) is not None:
        return finished
    if fresh is not None and not loss.any_distribution:
        raise InputError(f"{loss.label} needs draws of the reference, fresh rollouts are the policy's",
                         where="training", hint="Use offline-regression, or no fresh rollouts")  # fmt: skip
    set_seed(seed)
    reference = Reference(policy, trust_remote_code, allow_pickle)
    model, tokenizer = reference.load_to_train()
    made = loss.examples(pool) if examples is None else examples
    per_step = rollouts_per_step // made.rollouts_NM.shape[1]
    arguments = training_arguments(
        out / "checkpoints",
        steps=steps,
        examples_per_step=per_step,
        learning_rate=learning_rate,
        seed=seed,
        save_steps=save_steps,
        overrides={**(trainer or {}), **({"save_total_limit": None} if keep_checkpoints else {})},
    )
    if lora is not None:
        model = _with_adapter(model, lora)
    disable_dropout_in_model(model)
    data = ExampleStream(pool, made, tokenizer, steps=steps, per_step=per_step, seed=seed)
    if fresh is not None:
        frozen, _ = reference.load()
        fresh.begin(out / FRESH, frozen, tokenizer, pool.prompts, loss, data, max_new_tokens=max_new_tokens, seed=seed)
    shows_kl = examples is None and made.rollouts_NM.shape[1] == 1  # otherwise they are no draws of the reference
    recorder = Recorder(loss, out / "steps.jsonl", steps, fresh, shows_kl, progress)
    callbacks: list[TrainerCallback] = [recorder] if fresh is None else [fresh, recorder]
    hf_trainer = OfflineTrainer(loss, model, tokenizer, arguments, data, callbacks, padding_side)
    train(hf_trainer, tokenizer, out, recorder.restore)
    if not is_main():
        return AlignmentResult(out / "model", loss.beta, recorder.steps)
    landing = None
    if kl_budget is not None:
        where = kl_prompts or pool.prompts
        landing = land_saved(out / "model", reference, where, kl_budget, max_new_tokens=max_new_tokens, seed=seed)
    result = AlignmentResult(out / "model", loss.beta, recorder.steps, landing)
    write_result(out, result, keep_checkpoints)
    return result


def check_offline(
    *,
    steps: int,
    examples_per_step: int,
    learning_rate: float,
    lora: Mapping[str, Any] | None,
    trainer: Mapping[str, Any],
) -> None:
    """Refuse, before anything is computed, settings that training would stumble over; arguments as for `align_offline`.

    Raises:
        InputError: If a field is unknown, unusable or set elsewhere, or the numbers do not divide.
    """
    if lora is not None:
        lora_config(lora)
    training_arguments(
        Path("checkpoints"),
        steps=steps,
        examples_per_step=examples_per_step,
        learning_rate=learning_rate,
        seed=0,
        save_steps=25,
        overrides=trainer,
    )


def training_arguments(
    folder: Path,
    *,
    steps: int,
    examples_per_step: int,
    learning_rate: float,
    seed: int,
    save_steps: int,
    overrides: Mapping[str, Any],
) -> TrainingArguments:
    """The Trainer's settings.

    Raises:
        InputError: A field is unknown, unusable or set elsewhere, or the examples do not divide.
    """
    refuse_settings(overrides, "training.offline", elsewhere=ELSEWHERE, relied_on=_RELIED_ON)
    batch, _ = divide_step(examples_per_step, "examples", overrides, "training.offline")
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        **common_settings(steps=steps, learning_rate=learning_rate, seed=seed, save_steps=save_steps),
        **_RELIED_ON,
        **overrides,
    }
    try:
        return TrainingArguments(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(
            str(error), where="training.offline", hint="See transformers' TrainingArguments for the fields"
        ) from error


def _with_adapter(model: Any, lora: Mapping[str, Any]) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora_config(lora))
    except ValueError as error:  # a module that is not there
        raise InputError(str(error).strip(), where="training.lora", hint="See PEFT's LoraConfig") from error
