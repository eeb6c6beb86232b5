"""The Hugging Face `Trainer` with a loss on log-ratios of stored rollouts, and the record of its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl.trainer.utils import selective_log_softmax

from infalign._io.files import write_text
from infalign._io.progress import Progress
from infalign.errors import TrainingError
from infalign.training.checkpoints import keep_state, read_state
from infalign.training.fresh import FreshRollouts
from infalign.training.losses import OfflineLoss
from infalign.training.running import ADVICE, quiet, refusing_settings
from infalign.training.stream import ExampleStream, collate


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


class OfflineTrainer(Trainer):
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
        with refusing_settings("See transformers' TrainingArguments for the fields of training.offline"):
            super().__init__(
                model=model,
                args=arguments,
                processing_class=tokenizer,  # saved with every checkpoint, which can then be evaluated
                train_dataset=data,
                data_collator=lambda items: {"pieces": collate(items, data.pad, padding_side)},
                callbacks=callbacks,
            )
        quiet(self)
        self.model_accepts_loss_kwargs = False  # by this older versions decide what `loss_is_scaled_for_ga` says
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


class Recorder(TrainerCallback):
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
            state = read_state(checkpoint)
            self.steps = [OfflineStep(**step) for step in state["steps"]]
            if self.fresh is not None:
                self.fresh.restore(self.steps[-1].step, self.total_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """After each optimiser step."""
        if logs is None or "log_ratio" not in logs:
            return
        numbers = {name: logs.get(name, 0.0) for name in ("loss", "log_ratio", "grad_norm")}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{bad[0]} ({numbers[bad[0]]}) is not finite at step {state.global_step}", where="training", hint=ADVICE
            )
        kl = self.fresh.kl if self.fresh is not None else logs["importance_kl"] if self.shows_kl else None
        self.steps.append(OfflineStep(state.global_step, logs["loss"], self.loss.beta, kl, logs["log_ratio"]))
        if state.is_world_process_zero:
            write_text(self.record, "".join(json.dumps(asdict(step)) + "\n" for step in self.steps))
        if self.progress is not None:
            shown = "" if kl is None else f"KL about {kl:.2f}  "
            self.progress(state.global_step, self.total_steps, f"{shown}loss {logs['loss']:.3g}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the trainer's own checkpoint."""
        keep_state(args, state, {"steps": [asdict(step) for step in self.steps]})
