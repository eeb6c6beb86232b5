"""The baseline of the policy gradient: what is known of the optimum, instead of other responses to the same prompt.

At the optimum Φ/β − log(π/p) is log Z for every response (M12), and Z is known from the calibration alone. Before that
the two differ by a residual whose mean, −KL(π‖π*), is much the same for all prompts: it is estimated from all other
responses of the step. Nothing depends on how many responses a prompt has, down to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from infalign.training.mixture import softened_log_ratio
from infalign.training.reward import TransformedReward
from infalign.training.trainer import SequenceTrainer

Baseline = Literal["known", "leave-one-out"]


def effective_number(advantages_B: Sequence[float]) -> float:
    """How many of B rollouts carry the gradient, (Σ|A|)²/ΣA²: B if all weigh the same, 1 if one outweighs the rest."""
    size_B = np.abs(np.asarray(advantages_B, dtype=np.float64))
    return float(size_B.sum() ** 2 / np.square(size_B).sum()) if size_B.any() else 0.0


class BaselineTrainer(SequenceTrainer):
    """TRL's trainer with a choice of baseline.

    Both baselines leave the expected gradient as it is: neither depends on the response it is subtracted from. Inside a
    mixture with the reference (M19) the softened log-ratio stands in the place of the log-ratio.

    Logs the spread of the residual (M12; 0 at the optimum) and the mean square of the advantage with each baseline.

    Args:
        baseline: "known" (M12), or "leave-one-out" over the other responses to the prompt, as TRL does.
        **arguments: As for `RLOOTrainer`.
    """

    def __init__(self, *, baseline: Baseline = "known", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.baseline = baseline

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        source = self.reward_funcs[0]
        assert self.model is not None, "held by the trainer"
        if not self.model.training or not isinstance(source, TransformedReward):
            return super()._generate_and_score_completions(inputs)
        output = super()._generate_and_score_completions(inputs)
        assert source.paid is not None, "these rollouts have just been paid"
        log_z_B = torch.tensor(source.paid.log_partition_B)
        first = self.accelerator.process_index * len(inputs)
        reward_B = self._rewards[first : first + len(inputs), 0]
        softened = softened_log_ratio(self.log_ratio_B.double().cpu().numpy(), source.mixture_weight)
        gain_B = reward_B - torch.from_numpy(softened).to(reward_B)
        residual_B = gain_B - log_z_B.to(reward_B)
        residual_N: Any = self.accelerator.gather(residual_B)
        known_B = residual_B - (residual_N.sum() - residual_B) / (len(residual_N) - 1)
        if source.mixture_weight < 1.0:  # TRL has subtracted the whole log-ratio
            gain_N: Any = self.accelerator.gather(gain_B)
            assert self.num_generations is not None, "always set"
            left_out_N = _leave_one_out(gain_N, self.num_generations)
            output["advantages"] = left_out_N[first : first + len(inputs)].to(output["advantages"])
        squares = torch.stack([output["advantages"].square().mean(), known_B.square().mean()])
        reduced: Any = self.accelerator.reduce(squares, reduction="mean")
        leave_one_out, known = reduced.tolist()
        metrics = self._metrics["train"]
        metrics["residual_std"].append(residual_N.std().item())
        metrics["advantage_square/leave_one_out"].append(leave_one_out)
        metrics["advantage_square/known"].append(known)
        if self.baseline == "known":
            output["advantages"] = known_B.to(output["advantages"])
        advantage_N: Any = self.accelerator.gather(output["advantages"])
        metrics["effective_rollouts"].append(effective_number(advantage_N.tolist()))
        return output

    def _calculate_rewards(self, *arguments: Any, **more: Any) -> torch.Tensor:
        self._rewards = super()._calculate_rewards(*arguments, **more)
        return self._rewards


def _leave_one_out(gain_N: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Each rollout's gain less the mean of the others of its prompt; 0 where there are no others."""
    if num_generations == 1:
        return torch.zeros_like(gain_N)
    gain_PG = gain_N.reshape(-1, num_generations)
    return ((gain_PG - gain_PG.mean(1, keepdim=True)) * num_generations / (num_generations - 1)).reshape(-1)
