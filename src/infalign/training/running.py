"""The course of a training, the same for every solver: start, go on after a stop, save, land, write down the result.

What happens in a step is the solver's own: a Hugging Face `Trainer` and a callback that keeps its record.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from infalign._io.files import refuse_file_links, remove, write_text
from infalign._io.processes import is_main, wait_for_all
from infalign.errors import InputError, TrainingError
from infalign.rollouts.models import load_policy
from infalign.rollouts.prompts import Prompt
from infalign.training.checkpoints import FOLDER, FRESH, KeepsLastStep, discard_damaged, last_checkpoint
from infalign.training.landing import Landing, land

ADVICE = "Lower training.learning_rate; the last checkpoint is kept"

_log = logging.getLogger("infalign.training")
Step = TypeVar("Step")


@dataclass(frozen=True)
class AlignmentResult(Generic[Step]):
    """A finished alignment.

    Attributes:
        model: Folder of the trained policy.
        beta: Final KL coefficient.
        steps: What every optimiser step saw, a dataclass of the solver's.
        landing: How the KL budget was met; None without one.
    """

    model: Path
    beta: float
    steps: list[Step]
    landing: Landing | None = None


@dataclass(frozen=True)
class Reference:
    """The reference policy: where training starts, and what the KL is measured from.

    Attributes:
        path: Folder or hub name.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
    """

    path: str | Path
    trust_remote_code: bool
    allow_pickle: bool

    def load(self) -> tuple[Any, Any]:
        """A copy of the model, and its tokenizer."""
        return load_policy(self.path, trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle)

    def load_to_train(self) -> tuple[Any, Any]:
        """As `load`.

        Raises:
            InputError: If it is an adapter, whose bare base model would be taken for the reference.
        """
        model, tokenizer = self.load()
        if hasattr(model, "peft_config"):
            refuse_adapter(self.path)
        return model, tokenizer


def refuse_adapter(policy: str | Path) -> None:
    """An adapter cannot be where training starts.

    Raises:
        InputError: Always, with a hint.
    """
    raise InputError(
        "this is an adapter; alignment starts from full weights",
        where=f"policy.model {policy}",
        hint="Merge it into its base first: AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload()"
        ".save_pretrained(…), and save the tokenizer beside it",
    )


def train(trainer: Trainer, tokenizer: Any, out: Path, restore: Callable[[Path | None], None]) -> None:
    """Train from the start or from the last complete checkpoint, and save the policy in `out/model`.

    Args:
        trainer: Ready to train; its checkpoints go to `out/checkpoints`.
        tokenizer: Saved beside the policy.
        out: Folder of the training.
        restore: Called with the checkpoint to go on from, or None, before training.

    Raises:
        TrainingError: As for `run_trainer`.
        Interrupted: By Ctrl-C; the last finished step is kept.
    """
    if is_main():  # it removes what is damaged or was cut short
        for told in discard_damaged(out):
            _log.warning(told)
    refuse_file_links(out / FOLDER)
    wait_for_all()
    checkpoint = last_checkpoint(out / FOLDER)
    restore(checkpoint)
    keeper = KeepsLastStep()
    trainer.add_callback(keeper)
    try:
        with keeper.listening():
            run_trainer(trainer, checkpoint)
    except KeyboardInterrupt:
        raise keeper.save(trainer, out) from None
    if is_main():
        shutil.rmtree(out / "model", ignore_errors=True)  # of an attempt that was killed while it saved
    wait_for_all()
    if is_main():  # so that nothing of another attempt, and no link, is written through
        remove(out / "model")
    wait_for_all()
    trainer.save_model(str(out / "model"))
    if is_main():
        (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle, and no part of the model
        tokenizer.save_pretrained(str(out / "model"))


def run_trainer(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, telling apart the failures that a setting can fix; checkpoints made so far stay.

    Raises:
        TrainingError: The policy stopped being finite, or the device ran out of memory.
    """
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise out_of_memory() from error
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise TrainingError("the policy's probabilities are no longer finite", where="training", hint=ADVICE) from error
    assert trainer.model is not None, "it has just been trained"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters()):
        raise TrainingError("the policy's weights are no longer finite", where="training", hint=ADVICE)


def out_of_memory() -> TrainingError:
    """What to do when the device has no more memory."""
    return TrainingError(
        "the device ran out of memory",
        where="training",
        hint="Use fewer rollouts per step, training.rloo.gradient_accumulation_steps, or training.lora",
    )


def lora_config(lora: Mapping[str, Any]) -> Any:
    """A `peft.LoraConfig` for a causal language model.

    Raises:
        InputError: A field is unknown or unusable.
    """
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **lora})
    except (TypeError, ValueError) as error:
        raise InputError(str(error), where="training.lora", hint="See PEFT's LoraConfig for the fields") from error


@contextmanager
def refusing_settings(hint: str) -> Iterator[None]:
    """While a trainer is made: what it cannot be made with is the user's settings.

    Raises:
        InputError: With this hint: a package that a setting needs, a module that is not there …
        TrainingError: The device ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory() from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the trainer does not take these settings ({str(error).strip()})", where="training", hint=hint
        ) from error


def quiet(trainer: Trainer) -> None:
    """Without the trainer's own lines and bars on the terminal."""
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)


def land_saved(
    model_folder: Path,
    reference: Reference,
    prompts: Sequence[Prompt],
    kl_budget: float,
    *,
    max_new_tokens: int,
    seed: int,
) -> Landing:
    """Bring a saved policy down on the KL budget, by the main process; arguments as for `land`."""
    trained, _ = load_policy(model_folder, trust_remote_code=reference.trust_remote_code)
    start, tokenizer = reference.load()
    landing = land(trained, start, tokenizer, prompts, kl_budget, max_new_tokens=max_new_tokens, seed=seed)
    trained.save_pretrained(model_folder)
    return landing


def write_result(out: Path, result: AlignmentResult[Any], keep_checkpoints: bool) -> None:
    """Write `result.json`, the last file of a training: a folder without it is unfinished. Tidy up the checkpoints.

    Args:
        out: Folder of the training.
        result: What to write.
        keep_checkpoints: Keep the model of every checkpoint.
    """
    content = {
        "beta": result.beta,
        "landing": None if result.landing is None else asdict(result.landing),
        "steps": [asdict(step) for step in result.steps],
    }
    write_text(out / "result.json", json.dumps(content))
    _tidy(out, keep_checkpoints)


def _tidy(out: Path, keep_checkpoints: bool) -> None:
    """Remove what only going on would need."""
    if not keep_checkpoints:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
    for path in (out / FOLDER).glob("checkpoint-*/*"):
        if path.suffix in (".pt", ".pth", ".bin"):  # what only going on would need, a pickle, and no part of a model
            path.unlink()
    shutil.rmtree(out / FRESH, ignore_errors=True)


def read_result(out: Path, step: Callable[..., Step], keep_checkpoints: bool) -> AlignmentResult[Step] | None:
    """What `write_result` wrote, with steps of this class; None if the training is unfinished, or this is damaged."""
    try:
        content = json.loads((out / "result.json").read_text())
        landing = None if content["landing"] is None else Landing(**content["landing"])
        steps = [step(**one) for one in content["steps"]]
        result = AlignmentResult(out / "model", float(content["beta"]), steps, landing)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if is_main():
        _tidy(out, keep_checkpoints)  # whoever wrote it may have been killed before
    return result


def common_settings(*, steps: int, learning_rate: float, seed: int, save_steps: int) -> dict[str, Any]:
    """`TrainingArguments` that every solver has: schedule, seeds, device, checkpoints, and no bars of its own."""
    on_gpu = torch.cuda.is_available()
    return {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": max(1, steps // 4), "decay_type": "linear"},
        "warmup_steps": min(5, steps // 10),
        "seed": seed,
        "data_seed": seed,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": True if on_gpu else None,  # False would warn of a rename in transformers
        "use_cpu": not on_gpu,
        "save_steps": save_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
