"""What every solver shares around a Hugging Face `Trainer`: adapters, checkpoints, failures that a setting mends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from infalign.errors import InputError, TrainingError
from infalign.training.landing import Landing

STATE = "infalign_state.json"  # what a solver keeps beside the trainer's own checkpoint, written last
ADVICE = "Lower training.learning_rate; the last checkpoint is kept"


def refuse_adapter(policy: str | Path) -> None:
    """An adapter cannot be where training starts.

    Raises:
        InputError: Always, with the mend.
    """
    raise InputError(
        "this is an adapter; alignment starts from full weights",
        where=f"policy.model {policy}",
        mend="Merge it into its base first: AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload()"
        ".save_pretrained(…), and save the tokenizer beside it",
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; ones cut short while being written are skipped."""
    while folder.is_dir():
        newest = get_last_checkpoint(str(folder))
        if newest is None:
            return None
        # Our own state is the last file written for a checkpoint.
        if (Path(newest) / STATE).exists() and (Path(newest) / "trainer_state.json").exists():
            return Path(newest)
        shutil.rmtree(newest)
    return None


def run_trainer(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, telling apart the failures that a setting can mend; checkpoints made so far stay.

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
        raise TrainingError("the policy's probabilities are no longer finite", where="training", mend=ADVICE) from error
    assert trainer.model is not None, "it has just been trained"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters()):
        raise TrainingError("the policy's weights are no longer finite", where="training", mend=ADVICE)


def out_of_memory() -> TrainingError:
    """What to do when the device has no more memory."""
    return TrainingError(
        "the device ran out of memory",
        where="training",
        mend="Use fewer rollouts per step, training.rloo.gradient_accumulation_steps, or training.lora",
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
        raise InputError(str(error), where="training.lora", mend="See PEFT's LoraConfig for the fields") from error


def write_result(out: Path, beta: float, steps: Sequence[Any], landing: Landing | None, keep_checkpoints: bool) -> None:
    """Write `result.json`, the last file of a training: a folder without it is unfinished. Tidy up the checkpoints.

    Args:
        out: Folder of the training.
        beta: Final KL coefficient.
        steps: What every step saw, dataclasses.
        landing: How the KL budget was met.
        keep_checkpoints: Keep the model of every checkpoint.
    """
    content = {
        "beta": beta,
        "landing": None if landing is None else asdict(landing),
        "steps": [asdict(step) for step in steps],
    }
    temporary = out / "result.json.tmp"
    temporary.write_text(json.dumps(content))
    temporary.replace(out / "result.json")
    if not keep_checkpoints:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    for path in (out / "checkpoints").glob("checkpoint-*/*"):
        if path.suffix in (".pt", ".pth", ".bin"):  # what only going on would need, in pickles: not part of a model
            path.unlink()


def read_result(out: Path) -> dict[str, Any]:
    """What `write_result` wrote: beta, steps (as dictionaries) and landing."""
    content = json.loads((out / "result.json").read_text())
    content["landing"] = None if content["landing"] is None else Landing(**content["landing"])
    return content


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
