"""Two policies whose every response can be enumerated, one an adapter on the other, and a reshaping to try."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from infalign.reshape.reshaping import log_mixture
from infalign.rollouts.prompts import Prompt
from infalign.run.testbed.toy import random_llama
from tests.training.enumerable import TOKENS, enumerate_responses

PROMPTS = [Prompt("a b"), Prompt("c d a")]


@dataclass(frozen=True)
class Bounded:
    """Log g(l) rises by `slope` from `low` to `high` and is flat outside: a stand-in for a fitted reshaping."""

    low: float = -1.0
    high: float = 0.5
    slope: float = 1.5
    mixture_weight: float = 0.0

    @property
    def weights(self) -> tuple[float, ...]:
        return (self.mixture_weight,)

    def log_density(self, log_ratios: Any) -> np.ndarray:
        return self.slope * np.clip(log_ratios, self.low, self.high)

    @cached_property
    def log_bound(self) -> float:
        # Between its corners log g − log(1 − ε + ε e^l) has no inner maximum that this grid could miss by 1e-6.
        grid = np.linspace(-60, 60, 120_001)
        return float((self.log_density(grid) - log_mixture((self.mixture_weight,), grid)).max()) + 1e-6

    def to_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "slope": self.slope, "mixture_weight": self.mixture_weight}


@dataclass(frozen=True)
class Pair:
    """A base, an adapter on it, and the same adapter merged into a model of its own."""

    base: Path
    adapter: Path
    merged: Path
    tokenizer: Any
    responses: list[list[tuple[int, ...]]]  # for each prompt, every response
    log_p: list[np.ndarray]
    log_q: list[np.ndarray]

    def log_ratios(self, p: int) -> np.ndarray:
        return self.log_q[p] - self.log_p[p]


def make_pair(folder: Path, seed: int = 0) -> Pair:
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    random_llama(base, 6, hidden_size=32, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own use of what transformers renamed
        model: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    responses, log_p, log_q = [], [], []
    for prompt in PROMPTS:
        found = [
            enumerate_responses(AutoModelForCausalLM.from_pretrained(one).eval(), tokenizer, prompt.prompt)
            for one in (base, merged)
        ]
        responses.append(list(found[0]))
        log_p.append(np.array(list(found[0].values())))
        log_q.append(np.array([found[1][one] for one in found[0]]))
    return Pair(base, adapter, merged, tokenizer, responses, log_p, log_q)


__all__ = ["PROMPTS", "TOKENS", "Bounded", "Pair", "make_pair"]
