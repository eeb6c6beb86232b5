"""A policy that can be enumerated, its exact distribution of rewards, and a decoder's outcome on that scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from infalign.rewards.source import FunctionReward
from infalign.rollouts.models import load_policy
from infalign.rollouts.prompts import Prompt
from infalign.run.testbed.toy import random_llama
from infalign.select.local import LocalSampler
from tests.responses import said
from tests.training.enumerable import TOKENS, enumerate_responses, hashed_reward

torch.set_num_threads(1)


@dataclass(frozen=True)
class Enumerated:
    """A model, and for one prompt the rewards that its responses can have with their exact probabilities."""

    model: Any
    tokenizer: Any
    prompt: Prompt
    rewards: np.ndarray
    chances: np.ndarray

    def sampler(self, **settings) -> LocalSampler:
        return LocalSampler(self.model, self.tokenizer, **{"max_new_tokens": TOKENS, **settings})

    def reward(self) -> FunctionReward:
        return FunctionReward(hashed_reward, key="hashed")

    def below(self, rewards) -> np.ndarray:
        """P(R < r)."""
        return np.array([self.chances[self.rewards < r - 1e-12].sum() for r in np.atleast_1d(rewards)])

    def at(self, rewards) -> np.ndarray:
        """P(R = r)."""
        return np.array([self.chances[np.abs(self.rewards - r) < 1e-12].sum() for r in np.atleast_1d(rewards)])

    def uniform_under(self, distortion, rewards, rng) -> np.ndarray:
        """Uniform on [0, 1] if the rewards have the CDF H(F): H of their quantile, spread over the mass of an atom."""
        low = np.clip(self.below(rewards), 0, 1)
        high = np.clip(low + self.at(rewards), 0, 1)
        low, high = distortion(low), distortion(high)
        return low + rng.random(len(low)) * (high - low)


@pytest.fixture(scope="session")
def enumerated(tmp_path_factory) -> Enumerated:
    model, tokenizer = load_policy(random_llama(tmp_path_factory.mktemp("words"), 14, hidden_size=32, seed=4))
    prompt = Prompt("a b")
    responses = enumerate_responses(model, tokenizer, prompt.prompt)
    texts = [said(tokenizer, prompt.prompt, ids) for ids in responses]
    rewards = np.array(hashed_reward([prompt.prompt] * len(texts), texts))
    return Enumerated(model, tokenizer, prompt, rewards, np.exp(list(responses.values())))
