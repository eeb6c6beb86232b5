"""Reward sources behind one small interface, and filling a store with what they say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.errors import InputError, RewardError
from infalign.rewards.source import FunctionReward, HTTPReward, RewardSource, Scores, SequenceClassificationReward
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore

__all__ = [
    "FunctionReward",
    "HTTPReward",
    "RewardSource",
    "Scores",
    "SequenceClassificationReward",
    "column_names",
    "columns_of",
    "score_store",
]


def score_store(
    store: RolloutStore,
    source: RewardSource,
    prompts: Sequence[Prompt],
    progress: Progress | None = None,
    *,
    chunk_size: int = 1024,
    max_unscored: float = 0.05,
    retry_unscored: bool = False,
) -> int:
    """Score every rollout of these prompts that this source has not scored yet.

    Args:
        store: Rollouts; the rewards are written beside them, under the source's key.
        source: What scores.
        prompts: Prompts of the rollouts; the columns of their rows go to the source.
        progress: Called after each chunk with rollouts scored, rollouts in all, and the speed.
        chunk_size: Rollouts scored between two writes.
        max_unscored: Stop when a larger share of rollouts than this could not be scored.
        retry_unscored: Try those again that could not be scored before.

    Returns:
        How many rollouts were scored by this call.

    Raises:
        RewardError: The source failed on too many rollouts; what was scored is kept.
        InputError: The store has no rollouts of these prompts.
        MismatchError: The store has rewards of another source under the same key.
    """
    report = progress or no_progress
    prompt_of = {prompt.id: prompt for prompt in prompts}
    names = column_names(prompts)
    rollouts = store.table(["prompt_id", "index", "text"])
    ids, indices = rollouts["prompt_id"].to_pylist(), rollouts["index"].to_numpy()
    mine = [row for row, prompt_id in enumerate(ids) if prompt_id in prompt_of]
    if not mine:
        raise InputError("there are no rollouts of these prompts", where=str(store.path), hint="Draw them first")
    scored_now, started = 0, time.monotonic()
    with store.writing_rewards(source.key, source.description):
        before = store.rewards(source.key)
        value_of = dict(
            zip(
                zip(before["prompt_id"].to_pylist(), before["index"].to_pylist(), strict=True),
                before["reward"].to_pylist(),
                strict=True,
            )
        )
        known = {pair for pair, value in value_of.items() if value is not None or not retry_unscored}
        todo = [row for row in mine if (ids[row], int(indices[row])) not in known]
        done = len(mine) - len(todo)
        unscored = sum(1 for row in mine if value_of.get((ids[row], int(indices[row])), 0.0) is None)
        unscored = 0 if retry_unscored else unscored
        report(done, len(mine), "")
        for start in range(0, len(todo), chunk_size):
            rows = todo[start : start + chunk_size]
            owners = [prompt_of[ids[row]] for row in rows]
            texts = rollouts["text"].take(rows).to_pylist()
            scores = source.score_rows([owner.prompt for owner in owners], texts, **columns_of(owners, names))
            store.append_rewards(source.key, [ids[row] for row in rows], indices[rows], scores.rewards, scores.errors)
            done, scored_now = done + len(rows), scored_now + len(rows)
            failed = np.flatnonzero(np.isnan(scores.rewards))
            unscored += len(failed)
            if unscored > max_unscored * len(mine):
                first = int(failed[0]) if len(failed) else 0
                raise RewardError(
                    f"{unscored} of {counted(done, 'rollout')} could not be scored "
                    f"({scores.errors[first] or 'no reason given'}; "
                    f"first here: rollout {indices[rows[first]]} of prompt {owners[first].id})",
                    where=str(source),
                    hint="Fix the reward, or leave out the prompts it cannot judge; what is scored is kept",
                )
            speed = f"{scored_now / max(time.monotonic() - started, 1e-9):,.0f} rollouts/s"
            report(done, len(mine), f"{speed}, {unscored} unscored" if unscored else speed)
    return scored_now


def column_names(prompts: Sequence[Prompt]) -> list[str]:
    """The columns that all of these prompts' rows have, without those that a reward is given anyway."""
    if not prompts:
        return []
    shared = set(prompts[0].row).intersection(*(prompt.row for prompt in prompts))
    return sorted(shared - {"prompt", "prompts", "completions", "prompt_id", "self"})


def columns_of(prompts: Sequence[Prompt], names: Sequence[str]) -> dict[str, list[Any]]:
    """These columns of the prompts' rows as lists, and the prompts' ids."""
    columns: dict[str, list[Any]] = {name: [prompt.row[name] for prompt in prompts] for name in names}
    columns["prompt_id"] = [prompt.id for prompt in prompts]
    return columns
