"""A reference that can be written down, a store that holds each of its responses exactly as often as it is drawn, and
a policy that is nothing but a table: what a loss converges to is then seen without sampling noise and in milliseconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infalign.calibration.calibrator import RewardCalibrator
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.training.losses import Examples, OfflineLoss
from infalign.training.pool import RolloutPool, stored_rollouts

VOCABULARY, END = 6, 1
PROMPTS = [Prompt("a b"), Prompt("c d a")]
# Uniform over tokens, two of them at most: the end at once has probability 6/36, everything else 1/36.
RESPONSES = [[END], *([first, second] for first in range(VOCABULARY) if first != END for second in range(VOCABULARY))]
COUNTS = np.array([VOCABULARY if response == [END] else 1 for response in RESPONSES])
P = COUNTS / COUNTS.sum()
K = int(COUNTS.sum())


def uniform_store(folder: Path, rewards_PY: np.ndarray) -> RolloutStore:
    """K = 36 rollouts per prompt, every response as often as the uniform policy draws it, in some order."""
    store = RolloutStore.open(folder, RolloutKey("uniform", "tokenizer", max_new_tokens=2, seed=0))
    order = np.random.default_rng(0).permutation(K)
    kind_K = np.repeat(np.arange(len(RESPONSES)), COUNTS)[order]
    for p, prompt in enumerate(PROMPTS):
        store.append(
            {
                "prompt_id": [prompt.id] * K,
                "index": range(K),
                "text": [str(RESPONSES[y]) for y in kind_K],
                "token_ids": [RESPONSES[y] for y in kind_K],
                "logprob": np.log(P[kind_K]),
                "num_tokens": [len(RESPONSES[y]) for y in kind_K],
                "finish_reason": ["stop" if RESPONSES[y][-1] == END else "length" for y in kind_K],
            }
        )
        store.append_rewards("reward", [prompt.id] * K, np.arange(K), rewards_PY[p, kind_K])
    return store


def fitted(store: RolloutStore) -> tuple[RewardCalibrator, RolloutPool]:
    """The calibrator of that store, and its rollouts."""
    ids = [prompt.id for prompt in PROMPTS]
    calibrator = RewardCalibrator().fit(store.rewards_PK("reward", ids, K))
    return calibrator, stored_rollouts(store, PROMPTS, calibrator, ids)


def per_response(pool: RolloutPool, values_R: np.ndarray) -> np.ndarray:
    """One value per prompt and response, shape (P, Y), of values that are equal for equal responses."""
    out_PY = np.full((len(PROMPTS), len(RESPONSES)), np.nan)
    for prompt, tokens, value in zip(pool.prompt_R, pool.token_ids, values_R, strict=True):
        y = RESPONSES.index(list(tokens))
        assert np.isnan(out_PY[prompt, y]) or abs(out_PY[prompt, y] - value) < 1e-9
        out_PY[prompt, y] = value
    return out_PY


def minimise(loss: OfflineLoss, pool: RolloutPool, examples: Examples | None = None) -> np.ndarray:
    """The distribution over responses, shape (P, Y), at which a table of logits minimises the loss over the pool."""
    made = loss.examples(pool) if examples is None else examples
    kind_R = torch.tensor([RESPONSES.index(list(tokens)) for tokens in pool.token_ids])
    prompt_R = torch.tensor(pool.prompt_R)
    rollouts_NM = torch.tensor(made.rollouts_NM)
    ref_R, targets_N, weights_N = (
        torch.tensor(array, dtype=torch.float64) for array in (pool.ref_logprobs_R, made.targets_N, made.weights_N)
    )

    def value(logits: torch.Tensor) -> torch.Tensor:
        log_ratio_R = torch.log_softmax(logits.view(len(PROMPTS), -1), dim=1)[prompt_R, kind_R] - ref_R
        return (weights_N * loss(log_ratio_R[rollouts_NM], targets_N)).mean()

    # Newton's method, damped until a step helps: the table has 62 entries.
    logits = torch.log(torch.tensor(P)).repeat(len(PROMPTS))
    damping, best = 1e-3, value(logits)
    for _ in range(100):
        gradient = torch.func.grad(value)(logits)
        if gradient.abs().max() < 1e-9:
            break
        hessian = torch.func.hessian(value)(logits)
        while damping < 1e12:
            step = torch.linalg.solve(hessian + damping * torch.eye(len(logits)), gradient)
            if (reached := value(logits - step)) < best:
                logits, best, damping = logits - step, reached, max(damping / 10, 1e-9)
                break
            damping *= 10
        else:
            break
    return torch.softmax(logits.view(len(PROMPTS), -1), dim=1).numpy()


def total_variation(first_PY: np.ndarray, second_PY: np.ndarray) -> float:
    """The larger of the two prompts' distances."""
    return float((0.5 * np.abs(first_PY - second_PY).sum(axis=1)).max())
