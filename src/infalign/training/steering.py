"""Steering a training: what every step saw, β moved by the measured KL, and the state that goes with a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from infalign._io.files import write_text
from infalign._io.progress import Progress
from infalign.errors import TrainingError
from infalign.training.checkpoints import keep_state, read_state
from infalign.training.kl_control import KLController
from infalign.training.reward import TransformedReward
from infalign.training.running import ADVICE


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
    kl_error: float | None = None  # standard error of `kl`, clustered by prompt; None with one prompt
    win_rate: float | None = None  # of the target procedure (M10); None where a group is smaller than its n
    tie_mass: float | None = None  # chance that a rollout equals a reference
    frontier_share: float | None = None  # (W − ½)/(limit(KL) − ½)
    aligned_kl: float | None = None  # sequence KL of the trained model alone, where `kl` is that of a mixture (M19)
    effective_rollouts: float | None = None  # (Σ|A|)²/ΣA²: how many of the step's rollouts carry the gradient


class Steering(TrainerCallback):
    """Anneals, reads the step's sequence KL, steers β, records the step, keeps its state with the checkpoints.

    Annealing: over the first `anneal_steps` the tilt comes in evenly, so that the policy moves along p^(1 − s)·π*^s. At
    full strength from the start, the responses that the reference draws most often win first, and what is hardly ever
    drawn after that never comes back (`docs/solvers.md`, "How exact").
    """

    def __init__(
        self,
        reward: TransformedReward,
        controller: KLController | None,
        record: Path,
        total_steps: int,
        progress: Progress | None,
        anneal_steps: int = 0,
    ) -> None:
        self.anneal_steps = anneal_steps
        self.reward = reward
        self.controller = controller
        self.record = record
        self.total_steps = total_steps
        self.progress = progress
        self.steps: list[TrainingStep] = []
        self._of_last_step: dict[str, Any] = {}  # a step that Ctrl-C cuts short may have moved the reward's state

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint (or start afresh)."""
        if checkpoint is not None:
            state = read_state(checkpoint)
            self.reward.load_state(state["reward"])
            self.steps = [TrainingStep(**step) for step in state["steps"]]
            if self.controller is not None:
                self.controller = KLController(**state["controller"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before a step's rollouts are drawn."""
        self.reward.strength = min(1.0, (state.global_step + 1) / (self.anneal_steps + 1))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """After each optimiser step."""
        if logs is None or "sequence_kl" not in logs:
            return
        kl = math.nan if logs["sequence_kl"] is None else logs["sequence_kl"]  # TRL logs None for NaN
        if not math.isfinite(kl) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise TrainingError(
                f"the KL ({kl}) or the gradient ({logs.get('grad_norm')}) is not finite at step {state.global_step}",
                where="training",
                hint=ADVICE,
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
                kl_error=logs.get("sequence_kl_error"),
                win_rate=logs.get("win_rate"),
                tie_mass=logs.get("tie_mass"),
                frontier_share=logs.get("frontier_share"),
                aligned_kl=logs.get("aligned_kl"),
                effective_rollouts=logs.get("effective_rollouts"),
            )
        )
        if self.controller is not None and self.reward.strength == 1.0:  # before that a smaller KL is as it should be
            self.reward.beta = self.controller.update(kl)
        self._of_last_step = self._state()
        if state.is_world_process_zero:
            self._write_steps()
        if self.progress is not None:
            last = self.steps[-1]
            won = "" if last.win_rate is None else f"  win rate {last.win_rate:.3f}"
            alone = "" if last.aligned_kl is None else f" ({last.aligned_kl:.2f} alone)"
            text = f"KL {last.kl:.2f}{alone}  calibrated reward {last.calibrated_reward:.3f}{won}  beta {last.beta:.3g}"
            self.progress(state.global_step, self.total_steps, text)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the trainer's own checkpoint."""
        keep_state(args, state, self._of_last_step)

    def _state(self) -> dict[str, Any]:
        return {
            "reward": self.reward.state(),
            "steps": [asdict(step) for step in self.steps],
            "controller": None if self.controller is None else self.controller.state(),
        }

    def _write_steps(self) -> None:
        write_text(self.record, "".join(json.dumps(asdict(step)) + "\n" for step in self.steps))
