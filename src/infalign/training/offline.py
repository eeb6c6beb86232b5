"""Offline solvers: losses on stored rollouts, on the Hugging Face `Trainer`.

Nothing is sampled and no reference model is in memory: its log-probabilities come from the store. A mixed training
adds fresh rollouts of the current policy from time to time (`fresh.py`), for losses to which their distribution does
not matter.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import set_seed
from trl.trainer.utils import disable_dropout_in_model, selective_log_softmax

from infalign.data import Prompt
from infalign.errors import InputError, TrainingError
from infalign.processes import is_main, wait_for_all
from infalign.rollouts.models import load_policy
from infalign.rollouts.progress import Progress
from infalign.training.fresh import FreshRollouts
from infalign.training.landing import Landing, land
from infalign.training.losses import Examples, OfflineLoss
from infalign.training.pool import RolloutPool
from infalign.training.running import (
    ADVICE,
    STATE,
    common_settings,
    last_checkpoint,
    lora_config,
    out_of_memory,
    read_result,
    refuse_adapter,
    run_trainer,
    write_result,
)
from infalign.training.stream import ExampleStream, collate
from infalign.training.trainer_settings import ELSEWHERE, RELIED_ON, refuse_settings

# What the loss on examples in a given order relies on besides.
_RELIED_ON = {
    **RELIED_ON,
    "logging_nan_inf_filter": False,  # would hide the loss that says that something is wrong
    "dataloader_num_workers": 0,  # a worker would not see fresh rollouts
    "remove_unused_columns": False,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
}


@dataclass(frozen=True)
class OfflineStep:
    """What one optimiser step saw.

    Attributes:
        step: Its number, from 1.
        loss: Mean loss over its examples; for a regression the mean square of the residual (M12), in nats².
        beta: KL coefficient.
        kl: Sequence KL in nats as far as the rollouts tell it: from draws of the reference by importance weights, from
            fresh rollouts directly; None where neither is at hand (pairs chosen by their reward).
        log_ratio: Mean log π − log p of its rollouts, in nats.
    """

    step: int
    loss: float
    beta: float
    kl: float | None
    log_ratio: float


@dataclass(frozen=True)
class OfflineResult:
    """A finished offline alignment."""

    model: Path
    beta: float
    steps: list[OfflineStep]
    landing: Landing | None = None  # how the KL budget was met; None without one


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
) -> OfflineResult:
    """Align `policy` with a loss on stored rollouts and save it as an ordinary Hugging Face folder (or adapter).

    An interrupted call, repeated with the same arguments, goes on from its last checkpoint (in `out/checkpoints`).
    β stays what it is: without rollouts of the policy there is no KL to steer by. A KL budget is met at the end, by
    scaling the update (`landing.py`).

    Args:
        policy: Folder or hub name of the reference policy, where training starts.
        out: Folder to write; the model itself goes to `out/model`.
        pool: The stored rollouts.
        loss: A solver (`losses.py`) or a baseline (`baselines.py`).
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
    if (out / "result.json").exists():
        return _read_result(out)
    if fresh is not None and not loss.any_distribution:
        raise InputError(f"{loss.label} needs draws of the reference, fresh rollouts are the policy's",
                         where="training", mend="Use offline-regression, or no fresh rollouts")  # fmt: skip
    set_seed(seed)
    model, tokenizer = load_policy(policy, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if hasattr(model, "peft_config"):
        refuse_adapter(policy)
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
        reference, _ = load_policy(policy, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        fresh.begin(
            out / "fresh", reference, tokenizer, pool.prompts, loss, data, max_new_tokens=max_new_tokens, seed=seed
        )
    shows_kl = examples is None and made.rollouts_NM.shape[1] == 1  # otherwise they are no draws of the reference
    recorder = _Recorder(loss, out / "steps.jsonl", steps, fresh, shows_kl, progress)
    if is_main():
        last_checkpoint(out / "checkpoints")
    wait_for_all()
    checkpoint = last_checkpoint(out / "checkpoints")
    recorder.restore(checkpoint)
    callbacks: list[TrainerCallback] = [recorder] if fresh is None else [fresh, recorder]
    hf_trainer = _OfflineTrainer(loss, model, tokenizer, arguments, data, callbacks, padding_side)
    run_trainer(hf_trainer, checkpoint)
    hf_trainer.save_model(str(out / "model"))
    (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle, and no part of the model
    tokenizer.save_pretrained(str(out / "model"))
    if not hf_trainer.accelerator.is_main_process:
        return OfflineResult(out / "model", loss.beta, recorder.steps)
    landing = None
    if kl_budget is not None:
        trained, _ = load_policy(out / "model", trust_remote_code=trust_remote_code)
        reference, _ = load_policy(policy, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        where = list(kl_prompts or pool.prompts)
        landing = land(trained, reference, tokenizer, where, kl_budget, max_new_tokens=max_new_tokens, seed=seed)
        trained.save_pretrained(out / "model")
    result = OfflineResult(out / "model", loss.beta, recorder.steps, landing)
    write_result(out, result.beta, result.steps, result.landing, keep_checkpoints)
    shutil.rmtree(out / "fresh", ignore_errors=True)
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
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = overrides.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise InputError(f"gradient_accumulation_steps={accumulation!r}", where="training.offline",
                         mend="Give a whole number from 1")  # fmt: skip
    if examples_per_step < 1 or examples_per_step % (accumulation * world_size):
        raise InputError(
            f"{examples_per_step} examples per step do not divide among {world_size} processes × {accumulation} "
            "accumulation steps",
            where="training",
            mend="Change prompts_per_step, num_generations or gradient_accumulation_steps",
        )
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": examples_per_step // (accumulation * world_size),
        **common_settings(steps=steps, learning_rate=learning_rate, seed=seed, save_steps=save_steps),
        **_RELIED_ON,
        **overrides,
    }
    try:
        return TrainingArguments(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(
            str(error), where="training.offline", mend="See transformers' TrainingArguments for the fields"
        ) from error


def response_logprobs(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log π(y|x) of each row of a collated batch, summed over the response's tokens, shape (R,), differentiable."""
    ids_RL, counts_RL = batch["input_ids"], batch["counts"]
    first = int(counts_RL.int().argmax(dim=1).min())  # the earliest token of any response; each follows a prompt
    logits_RTV = model(
        input_ids=ids_RL,
        attention_mask=batch["attention_mask"],
        position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=ids_RL.shape[1] - first + 1,
    ).logits[:, :-1]
    logprobs_RT = selective_log_softmax(logits_RTV.float(), ids_RL[:, first:])
    return logprobs_RT.masked_fill(~counts_RL[:, first:], 0.0).sum(dim=1)


class _OfflineTrainer(Trainer):
    """The Trainer with a loss on log-ratios, in the given order of the examples."""

    # A mean over equally many examples in every batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        loss: OfflineLoss,
        model: Any,
        tokenizer: Any,
        arguments: TrainingArguments,
        data: ExampleStream,
        callbacks: list[TrainerCallback],
        padding_side: str,
    ) -> None:
        try:
            super().__init__(
                model=model,
                args=arguments,
                processing_class=tokenizer,  # saved with every checkpoint, which can then be evaluated
                train_dataset=data,
                data_collator=lambda items: {"pieces": collate(items, data.pad, padding_side)},
                callbacks=callbacks,
            )
        except torch.OutOfMemoryError as error:
            raise out_of_memory() from error
        except (ImportError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the trainer does not take these settings ({str(error).strip()})",
                where="training",
                mend="See transformers' TrainingArguments for the fields of training.offline",
            ) from error
        self.model_accepts_loss_kwargs = False  # by this older versions decide what `loss_is_scaled_for_ga` says
        for chatty in (PrinterCallback, ProgressCallback):
            self.remove_callback(chatty)
        self._loss = loss
        self._seen: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Weighted mean of the loss over the batch's examples: every sequence counts alike, however long."""
        pieces: list[dict[str, torch.Tensor]] = inputs["pieces"]
        ratios = [response_logprobs(model, b).view_as(b["ref_logprobs"]) - b["ref_logprobs"] for b in pieces]
        log_ratios_NM = torch.cat(ratios)
        targets_N, weights_N = (torch.cat([b[name] for b in pieces]) for name in ("targets", "weights"))
        loss = (weights_N * self._loss(log_ratios_NM, targets_N)).mean()
        seen = log_ratios_NM.detach().double()
        # For draws y of p, E[(π/p) log(π/p) − π/p + 1] is KL(π‖p), and no term is negative.
        kl = (seen.exp() * seen - seen.exp() + 1.0).mean()
        self._seen.append(torch.stack([loss.detach().double(), kl, seen.mean()]))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the step's batches showed, averaged over all processes."""
        if self._seen and "loss" in logs:
            mean = self.accelerator.reduce(torch.stack(self._seen).mean(dim=0), reduction="mean")
            logs |= dict(zip(("loss", "importance_kl", "log_ratio"), cast("torch.Tensor", mean).tolist(), strict=True))
            self._seen = []
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # pyright: ignore[reportArgumentType]  it is an ExampleStream


class _Recorder(TrainerCallback):
    """Records every step and keeps the record with the checkpoints."""

    def __init__(
        self,
        loss: OfflineLoss,
        record: Path,
        total_steps: int,
        fresh: FreshRollouts | None,
        shows_kl: bool,
        progress: Progress | None,
    ) -> None:
        self.loss, self.record, self.total_steps = loss, record, total_steps
        self.fresh, self.shows_kl, self.progress = fresh, shows_kl, progress
        self.steps: list[OfflineStep] = []

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint (or start afresh)."""
        if checkpoint is not None:
            state = json.loads((checkpoint / STATE).read_text())
            self.steps = [OfflineStep(**step) for step in state["steps"]]
            if self.fresh is not None:
                self.fresh.restore(self.steps[-1].step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """After each optimiser step."""
        if logs is None or "log_ratio" not in logs:
            return
        numbers = {name: logs.get(name, 0.0) for name in ("loss", "log_ratio", "grad_norm")}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{bad[0]} ({numbers[bad[0]]}) is not finite at step {state.global_step}", where="training", mend=ADVICE
            )
        kl = self.fresh.kl if self.fresh is not None else logs["importance_kl"] if self.shows_kl else None
        self.steps.append(OfflineStep(state.global_step, logs["loss"], self.loss.beta, kl, logs["log_ratio"]))
        if state.is_world_process_zero:
            self.record.write_text("".join(json.dumps(asdict(step)) + "\n" for step in self.steps))
        if self.progress is not None:
            shown = "" if kl is None else f"KL about {kl:.2f}  "
            self.progress(state.global_step, self.total_steps, f"{shown}loss {logs['loss']:.3g}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the trainer's own checkpoint."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            temporary = checkpoint / (STATE + ".tmp")
            temporary.write_text(json.dumps({"steps": [asdict(step) for step in self.steps]}))
            temporary.replace(checkpoint / STATE)


def _with_adapter(model: Any, lora: Mapping[str, Any]) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora_config(lora))
    except ValueError as error:  # a module that is not there
        raise InputError(str(error).strip(), where="training.lora", mend="See PEFT's LoraConfig") from error


def _read_result(out: Path) -> OfflineResult:
    content = read_result(out)
    return OfflineResult(out / "model", content["beta"], [OfflineStep(**step) for step in content["steps"]],
                         content["landing"])  # fmt: skip
