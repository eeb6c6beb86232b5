"""Policies small enough to enumerate: every response of up to two tokens, with its exact probability."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infalign.calibration.calibrator import RewardCalibrator
from infalign.rewards.source import FunctionReward
from infalign.rollouts.models import load_policy
from infalign.rollouts.prompts import Prompt
from infalign.run.testbed.toy import random_llama
from infalign.theory.finite_k import rank_conditional_tilt, tilt_at_ranks
from infalign.training.reward import TransformedReward
from infalign.transforms import RewardTransform
from tests.responses import said

TOKENS = 2
PROMPTS = [Prompt("a b"), Prompt("c d a")]


def hashed_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """An arbitrary fixed score of each text, whatever blanks are around it, without ties between different texts."""
    rows = zip(prompts, completions, strict=True)
    return [(zlib.crc32(f"{p}|{c.strip()}".encode()) % 100_003) / 100_003 for p, c in rows]


def enumerate_responses(model: Any, tokenizer: Any, prompt: str) -> dict[tuple[int, ...], float]:
    """Every response with its exact log-probability."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    growing: dict[tuple[int, ...], float] = {(): 0.0}
    finished: dict[tuple[int, ...], float] = {}
    for position in range(TOKENS):
        batch = torch.cat([torch.cat([ids, torch.tensor([s], dtype=torch.long)], 1) for s in growing])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(batch).logits[:, -1].double(), -1)
        grown: dict[tuple[int, ...], float] = {}
        for (start, logprob), row in zip(growing.items(), logprobs.tolist(), strict=True):
            for token, value in enumerate(row):
                ended = token == tokenizer.eos_token_id or position == TOKENS - 1
                (finished if ended else grown)[(*start, token)] = logprob + value
        growing = grown
    return finished


@dataclass
class Testbed:
    """A tiny reference, its exact response distribution, and a reward calibrated on draws from it."""

    __test__ = False

    reference: Path
    vocabulary: int
    num_ref: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        random_llama(self.reference, self.vocabulary, hidden_size=32, seed=self.seed)
        model, self.tokenizer = load_policy(self.reference)
        rng = np.random.default_rng(self.seed)
        self.responses = [enumerate_responses(model, self.tokenizer, p.prompt) for p in PROMPTS]
        drawn = []
        for prompt, responses in zip(PROMPTS, self.responses, strict=True):
            probabilities = np.exp(list(responses.values()))
            assert abs(probabilities.sum() - 1) < 1e-9
            rewards = self.rewards(prompt, responses)
            drawn.append(rewards[rng.choice(len(rewards), self.num_ref, p=probabilities / probabilities.sum())])
        self.calibrator = RewardCalibrator().fit(np.array(drawn))

    def rewards(self, prompt: Prompt, responses: dict[tuple[int, ...], float]) -> np.ndarray:
        texts = [said(self.tokenizer, prompt.prompt, s) for s in responses]
        return np.array(hashed_reward([prompt.prompt] * len(texts), texts))

    def reward(self, transform: RewardTransform, beta: float, **more: Any) -> TransformedReward:
        return TransformedReward(
            FunctionReward(hashed_reward), self.calibrator, [p.id for p in PROMPTS], transform, beta, **more
        )

    def optimum(self, reward: TransformedReward, index: int) -> tuple[np.ndarray, float]:
        """p·exp(Φ_K/β)/Z by enumeration (M6, M7), without the floor that training gives the tilt, and its KL."""
        responses, prompt = self.responses[index], PROMPTS[index]
        assert isinstance(reward.transform, RewardTransform)
        ranks, ties = self.calibrator.ranks_and_ties(
            self.rewards(prompt, responses), prompt_index=np.full(len(responses), index)
        )
        num_ref = int(self.calibrator.num_ref_P[index])
        tilt = tilt_at_ranks(
            rank_conditional_tilt(reward.transform, reward.beta, num_ref) / reward.beta, 1.0, ranks, ties
        )
        log_ref = np.array(list(responses.values()))
        log_target = log_ref + tilt - np.logaddexp.reduce(log_ref + tilt)
        target = np.exp(log_target)
        return target, float((target * (log_target - log_ref)).sum())

    def distance(self, model_folder: Path, reward: TransformedReward) -> list[float]:
        """Total variation between a trained policy and the optimum, for each prompt."""
        return self.distances(model_folder, [self.optimum(reward, index)[0] for index in range(len(PROMPTS))])

    def distances(self, model_folder: Path, targets: list[np.ndarray]) -> list[float]:
        """Total variation between a trained policy and a distribution over the responses, for each prompt."""
        model, tokenizer = load_policy(model_folder)
        out = []
        for index, prompt in enumerate(PROMPTS):
            reached = enumerate_responses(model, tokenizer, prompt.prompt)
            probabilities = np.exp([reached[s] for s in self.responses[index]])
            out.append(0.5 * float(np.abs(probabilities - targets[index]).sum()))
        return out

    def kl(self, model_folder: Path) -> float:
        """Exact KL of a policy from the reference, mean over the prompts."""
        model, tokenizer = load_policy(model_folder)
        total = 0.0
        for responses, prompt in zip(self.responses, PROMPTS, strict=True):
            reached = enumerate_responses(model, tokenizer, prompt.prompt)
            total += sum(np.exp(reached[s]) * (reached[s] - responses[s]) for s in responses)
        return total / len(PROMPTS)
