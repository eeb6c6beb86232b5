"""Steering a training: what every step saw, β moved by the measured KL, and the state that goes with a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from infalign.errors import TrainingError
from infalign.rollouts.progress import Progress
from infalign.training.kl_control import KLController
from infalign.training.reward import TransformedReward
from infalign.training.running import ADVICE, STATE


@dataclass(frozen=True)
class TrainingStep:
    """What one optimiser step saw, averaged over its rollouts."""

    step: int
    kl: float  # sequence KL, nats
    beta: float
    calibrated_reward: float
    raw_reward: float
    mean_length: float
    truncated: float


class Steering(TrainerCallback):
    """Reads the step's sequence KL, steers β, records the step, and keeps its state with the checkpoints."""

    def __init__(
        self,
        reward: TransformedReward,
        controller: KLController | None,
        record: Path,
        total_steps: int,
        progress: Progress | None,
    ) -> None:
        self.reward = reward
        self.controller = controller
        self.record = record
        self.total_steps = total_steps
        self.progress = progress
        self.steps: list[TrainingStep] = []

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint (or start afresh)."""
        if checkpoint is not None:
            state = json.loads((checkpoint / STATE).read_text())
            self.reward.load_state(state["reward"])
            self.steps = [TrainingStep(**step) for step in state["steps"]]
            if self.controller is not None:
                self.controller = KLController(**state["controller"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """After each optimiser step."""
        if logs is None or "kl" not in logs:
            return
        # TRL logs Σ log-ratios / Σ tokens and the mean length: their product is the mean over sequences.
        kl = logs["kl"] * logs["completions/mean_length"]
        if not math.isfinite(kl) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise TrainingError(
                f"the KL ({kl}) or the gradient ({logs.get('grad_norm')}) is not finite at step {state.global_step}",
                where="training",
                mend=ADVICE,
            )
        self.steps.append(
            TrainingStep(
                step=state.global_step,
                kl=kl,
                beta=self.reward.beta,
                calibrated_reward=logs["calibrated_reward"],
                raw_reward=logs["raw_reward"],
                mean_length=logs["completions/mean_length"],
                truncated=logs["completions/clipped_ratio"],
            )
        )
        if self.controller is not None:
            self.reward.beta = self.controller.update(kl)
        if state.is_world_process_zero:
            self._write_steps()
        if self.progress is not None:
            last = self.steps[-1]
            text = f"KL {last.kl:.2f}  calibrated reward {last.calibrated_reward:.3f}  beta {last.beta:.3g}"
            self.progress(state.global_step, self.total_steps, text)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the trainer's own checkpoint."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            content = {
                "reward": self.reward.state(),
                "steps": [asdict(step) for step in self.steps],
                "controller": None if self.controller is None else self.controller.state(),
            }
            temporary = checkpoint / (STATE + ".tmp")
            temporary.write_text(json.dumps(content))
            temporary.replace(checkpoint / STATE)

    def _write_steps(self) -> None:
        self.record.write_text("".join(json.dumps(asdict(step)) + "\n" for step in self.steps))
