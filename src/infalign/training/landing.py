"""End a training at its KL budget: scale the whole update θ − θ_ref until the measured KL is the budget.

A controller on β brings the policy near the budget, but it sees noisy KLs of prompts that are being trained on, and its
hold on the policy ends with the learning rate. What is left is a few percent to tens of percent, enough to spoil a
comparison at matched KL. Interpolating between the reference's weights and the trained ones moves along a smooth path
whose KL grows about as the square of the scale (weight interpolation towards the initial policy: Ramé et al. 2024,
arXiv 2406.16768). The KL is measured on prompts that were kept out of the updates.

Those are few, and scaling until *their* mean KL is the budget overshoots: where they show 1 + ε times the true KL, the
landed KL is the budget over 1 + ε, on average (1 + c²/P) times the budget for a coefficient of variation c between
prompts. So `aim` takes 1/(1 + c²/P) of the budget for its target, and all rounds settle the scale instead of the one
whose noise brings it nearest.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.logprobs import log_ratios
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore

SMALLEST, LARGEST = 0.5, 1.5  # how far a landing may scale; beyond that the training itself has to change
ROUND_NOISE = 0.03  # relative, of one round against another: both draw with the same seed on the same prompts
SLOPE_SPREAD = 0.5  # how far d log KL / d log scale may lie from 2
LARGEST_CORRECTION = 0.25  # of c²/P: a KL measured worse than to half its size says little about its own error


@dataclass(frozen=True)
class Landing:
    """Where a training came down.

    Attributes:
        scale: Factor on the update θ − θ_ref; 1 leaves the trained policy as it is.
        kl_before: Sequence KL of the trained policy on the steering prompts, in nats.
        kl: After scaling, as expected on other prompts, in nats.
        standard_error: Of `kl`, clustered by prompt: how far the choice of steering prompts may have led astray.
        kl_budget: What it should have been, in nats; None in results of earlier versions.
        note: What steering β came to, where it did not do what it should; None otherwise.
    """

    scale: float
    kl_before: float
    kl: float
    standard_error: float
    kl_budget: float | None = None
    note: str | None = None

    @property
    def missed(self) -> bool:
        """Whether the budget was out of reach: scaling stopped at its limit, or no scale came within a tenth of it."""
        far = self.kl_budget is not None and abs(self.kl / self.kl_budget - 1) > 0.1
        return far or self.scale in (SMALLEST, LARGEST)

    def __str__(self) -> str:
        told = f"landed at {self.kl:.3f} ± {self.standard_error:.3f} nats by scaling the update by {self.scale:.2f}"
        told += f" (it came in at {self.kl_before:.3f})"
        if self.missed:
            too_little = self.scale == LARGEST or (self.kl_budget is not None and self.kl < self.kl_budget)
            advice = "train longer, or at a higher learning rate" if too_little else "lower the learning rate"
            told += f"; no scale within {SMALLEST} to {LARGEST} meets the KL budget: {advice}"
        return f"{told}; {self.note}" if self.note else told


@dataclass(frozen=True)
class Round:
    """One measurement: the KL in nats, with its error clustered by prompt, at one scale of the update."""

    scale: float
    kl: float
    standard_error: float


def aim(rounds: Sequence[Round], kl_budget: float) -> Round:
    """The scale at which the KL is expected to be the budget, with the KL and the error to be expected there.

    A line log KL = a + b log scale through all rounds, those near the target counting most; b is 2 unless the rounds
    clearly say otherwise. The scale stays within `SMALLEST` and `LARGEST`.

    Args:
        rounds: Measurements on the same prompts, each with a KL above 0.
        kl_budget: In nats.
    """
    nearest = min(rounds, key=lambda one: abs(math.log(one.kl / kl_budget)))
    relative = nearest.standard_error / nearest.kl
    overshoot = 1 + min(relative**2, LARGEST_CORRECTION) if math.isfinite(relative) else 1.0
    x = np.log([one.scale for one in rounds])
    y = np.log([one.kl for one in rounds])
    target = math.log(kl_budget / overshoot)
    weights = 1 / (ROUND_NOISE**2 + (y - target) ** 2)
    weights /= weights.sum()
    mean_x, mean_y = float(weights @ x), float(weights @ y)
    # Ridge: rounds close together say little about the slope.
    lever = len(rounds) * float(weights @ (x - mean_x) ** 2)
    rise = len(rounds) * float(weights @ ((x - mean_x) * (y - mean_y - 2 * (x - mean_x))))
    slope = 2 + rise / (lever + (ROUND_NOISE / SLOPE_SPREAD) ** 2)
    slope = max(slope, 0.1)  # a KL that does not rise with the scale leaves the scale at a limit
    scale = math.exp(min(math.log(LARGEST), max(math.log(SMALLEST), mean_x + (target - mean_y) / slope)))
    scale = min(LARGEST, max(SMALLEST, scale))
    kl = overshoot * math.exp(mean_y + slope * (math.log(scale) - mean_x))
    return Round(scale, kl, relative * kl)


def land(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    kl_budget: float,
    *,
    max_new_tokens: int,
    seed: int,
    rollouts: int = 1024,
    tolerance: float = 0.02,
    max_rounds: int = 5,
) -> Landing:
    """Scale the model's update, in place, until its sequence KL is the budget.

    Args:
        model: The trained policy: full weights, or a PEFT model whose adapter is the update.
        reference: Where training started; its weights are not changed.
        tokenizer: The tokenizer of both.
        prompts: Prompts to measure the KL on.
        kl_budget: Target in nats.
        max_new_tokens: Cap on a response.
        seed: The same random numbers serve every round, so that rounds differ by the scale alone.
        rollouts: Rollouts of each measurement, over all prompts; at least 4 of each.
        tolerance: Relative deviation at which to stop.
        max_rounds: Most measurements.
    """
    samples = max(4, -(-rollouts // len(prompts)))
    update = _Update(model, reference)
    scale, rounds = 1.0, list[Round]()
    for _ in range(max_rounds):
        update.set(scale)
        kl_P = _kl_per_prompt(model, reference, tokenizer, prompts, samples, max_new_tokens, seed)
        error = float(kl_P.std(ddof=1) / math.sqrt(len(kl_P))) if len(kl_P) > 1 else math.nan
        rounds.append(Round(scale, float(kl_P.mean()), error))
        if rounds[-1].kl <= 0:  # nothing to scale
            return Landing(scale, rounds[0].kl, rounds[-1].kl, error, kl_budget)
        proposed = aim(rounds, kl_budget)
        if abs(math.log(proposed.scale / scale)) <= tolerance / 2:  # the KL goes with the square
            break
        scale = proposed.scale
    landed = aim(rounds, kl_budget)
    update.set(landed.scale)
    return Landing(landed.scale, rounds[0].kl, landed.kl, landed.standard_error, kl_budget)


class _Update:
    """θ − θ_ref of a model, whose weights can be put at any scale of it."""

    def __init__(self, model: PreTrainedModel, reference: PreTrainedModel) -> None:
        trained = dict(model.named_parameters())
        # Scaling B scales the product B·A, which is what an adapter adds; the reference is where B is zero.
        if any("lora_B" in name for name in trained):
            trained = {name: p for name, p in trained.items() if "lora_B" in name}
            start = {name: torch.zeros_like(p) for name, p in trained.items()}
        else:
            start = {name: p.detach() for name, p in reference.named_parameters() if name in trained}
        self._parameters = trained
        self._start = start
        self._update = {name: p.detach() - start[name] for name, p in trained.items()}

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Put the weights at θ_ref + scale · update."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._start[name] + scale * self._update[name])


def _kl_per_prompt(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> np.ndarray:
    """Mean over fresh rollouts of the exact KL at each visited prefix, shape (P,)."""
    key = RolloutKey("landing", tokenizer_fingerprint(tokenizer), max_new_tokens=max_new_tokens, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        store = RolloutStore.open(folder, key)
        sample(model, tokenizer, prompts, samples, store=store)
        token_ids_PG = store.lists_PK("token_ids", [prompt.id for prompt in prompts], samples)
    return log_ratios(model, reference, tokenizer, prompts, token_ids_PG).exact_kl_PG.mean(axis=1)
